"""DINO: DETR with improved denoising anchor boxes (arXiv 2203.03605), based on transformers' Deformable DETR.

Projections, encoder and decoder layers are those of two-stage Deformable DETR with box refinement. DINO adds
contrastive denoising (section 3.3), mixed query selection (3.4), look forward twice (3.5), and positions from anchors
as in DAB-DETR. Each addition can be switched off; without any, the model is Deformable DETR.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from transformers import DeformableDetrConfig, DeformableDetrModel
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMLPPredictionHead as MLP
from transformers.models.deformable_detr.modeling_deformable_detr import inverse_sigmoid

from ..backbone import DATBackbone, TimmBackbone
from ..options import Check, at_least, check_divisible, not_negative
from ..transformers_config import build_config, check_names
from .backbone_adapter import AdapterConfig, adapt
from .denoising import noised_queries
from .float32_boxes import compute_boxes_in_float32
from .initial_weights import draw_weights, set_prior
from .queries import Assignment, Queries, Targets, match, set_losses
from .set_prediction import SetDetector, best_boxes, image_mask, relative_targets
from .transformers_kinds import KINDS

# Arguments of transformers' config with an effect on DINO; losses, matching and the number of queries are its own.
ARGUMENTS = (
    *("d_model", "num_feature_levels", "position_embedding_type", "activation_function"),
    *("encoder_layers", "encoder_ffn_dim", "encoder_attention_heads", "encoder_n_points"),
    *("decoder_layers", "decoder_ffn_dim", "decoder_attention_heads", "decoder_n_points"),
    *("dropout", "attention_dropout", "activation_dropout"),
)

_TWICE_A_SHARE = Check(lambda value: 0 <= value <= 2, "between 0 and 2")


class Memory(NamedTuple):
    """The output of the encoder, all levels concatenated.

    Attributes:
        features: ``[B, S, C]``.
        mask: ``[B, S]``, true within the image.
        shapes: height and width of every level.
        ratios: fractions of the width and height of every level that the image covers, ``[B, levels, 2]``.
    """

    features: Tensor
    mask: Tensor
    shapes: list[tuple[int, int]]
    ratios: Tensor

    def level_arguments(self) -> dict[str, Any]:
        """Return the levels as keyword arguments of transformers' layers."""
        shapes = torch.tensor(self.shapes, device=self.features.device)
        starts = F.pad(shapes.prod(1).cumsum(0)[:-1], (1, 0))
        return {"spatial_shapes": shapes, "spatial_shapes_list": self.shapes, "level_start_index": starts}

    def maps(self) -> list[Tensor]:
        """Return the features of every level as maps ``[B, C, h, w]``."""
        levels = self.features.transpose(1, 2).split([height * width for height, width in self.shapes], dim=-1)
        return [level.unflatten(-1, shape) for level, shape in zip(levels, self.shapes, strict=True)]


class DINO(SetDetector):
    """A DETR whose queries start from the encoder's best proposals, trained with denoising queries.

    Args:
        backbone: maps images to feature maps; has ``channels``.
        num_classes: number of classes, without "no object".
        num_queries: number of matched queries; fewer if the maps have fewer pixels.
        denoising: number of positive denoising queries per training image, and of negative ones; 0 for none.
        label_noise: twice the probability that a denoising query gets a random label.
        box_noise: scale of the noise of the corners of a box, in halves of its sides.
        mixed_query_selection: whether the contents of queries are learned; otherwise they are computed from the
            positions of the best proposals, which have a single class, and the encoder's loss covers all pixels.
        anchor_positions: whether the positions of queries follow their boxes from layer to layer, as in DAB-DETR.
        look_forward_twice: whether the loss of a layer's boxes also trains the previous layer.
        **arguments: arguments of transformers' `DeformableDetrConfig` that are in `ARGUMENTS`, such as ``d_model``.

    Raises:
        ValueError: an argument is unknown, or its value has the wrong type or is out of range.
    """

    maps = KINDS["deformable_detr"].maps
    sized_by_classes = ("transformer.decoder.class_embed.", "label_contents.")

    def __init__(
        self,
        backbone: DATBackbone | TimmBackbone,
        *,
        num_classes: int,
        num_queries: int = 900,
        denoising: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        mixed_query_selection: bool = True,
        anchor_positions: bool = True,
        look_forward_twice: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(backbone)
        check_names(type(self).__name__, arguments, {*ARGUMENTS, *DINO.__init__.__kwdefaults__})
        at_least(1).require("num_queries", num_queries)
        not_negative().require("denoising", denoising)
        not_negative().require("box_noise", box_noise)
        _TWICE_A_SHARE.require("label_noise", label_noise)
        self.num_classes, self.num_queries, self.denoising = num_classes, num_queries, denoising
        self.label_noise, self.box_noise, self.look_forward_twice = label_noise, box_noise, look_forward_twice
        config = build_config(
            type(self).__name__,
            DeformableDetrConfig,
            backbone_config=AdapterConfig(channels=list(backbone.channels)),
            num_labels=num_classes,
            two_stage=True,
            with_box_refine=True,
            **{"dropout": 0.0, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048, **arguments},
        )
        _check_sizes(config)
        self.transformer = DeformableDetrModel(config)
        adapt(self.transformer, backbone)
        width, heads = config.d_model, config.decoder_layers + 1  # the last one is for the encoder's proposals
        self.transformer.decoder.class_embed = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(heads))
        self.transformer.decoder.bbox_embed = nn.ModuleList(MLP(width, width, 4, 3) for _ in range(heads))
        compute_boxes_in_float32(self.transformer)
        draw_weights(self.transformer)
        set_prior(self.transformer, num_classes)
        self.contents = nn.Embedding(num_queries, width) if mixed_query_selection else None
        self.anchor_position = MLP(2 * width, width, width, 2) if anchor_positions else None
        self.label_contents = nn.Embedding(num_classes, width) if denoising else None
        if mixed_query_selection and anchor_positions:
            # These layers compute contents and positions from proposals.
            del self.transformer.pos_trans, self.transformer.pos_trans_norm

    def process(
        self, batch: ImageList, targets: Sequence[dict[str, Tensor]] | None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        inside = image_mask(batch)
        if not self.training:
            return best_boxes(*self.predict(batch.tensors, inside), batch)
        memory = self.encode(batch.tensors, inside)
        proposals, queries = self.select_queries(memory)
        truth = Targets(relative_targets(targets, batch.image_sizes))
        extra, assignments, losses = self.extra_queries(memory, truth, batch)
        layers = self.decode(memory, Queries.joined([*extra, queries]))
        return losses | self.losses(proposals, layers, truth, assignments)

    def predict(self, images: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.encode(images, inside)
        logits, boxes = self.decode(memory, self.select_queries(memory)[1])[-1]
        return logits.sigmoid(), boxes

    def extra_queries(
        self,
        memory: Memory,  # noqa: ARG002
        truth: Targets,
        batch: ImageList,  # noqa: ARG002
    ) -> tuple[list[Queries], dict[str, Assignment], dict[str, Tensor]]:
        """Return additional queries for training whose objects are known, these objects, and additional losses."""
        if not self.denoising:
            return [], {}, {}
        # Also without objects: all ranks must have the same losses, collectives and parameters with a gradient.
        noised, assignment = noised_queries(
            truth, self.label_contents, self.denoising, label_noise=self.label_noise, box_noise=self.box_noise
        )
        return [noised], {"denoising": assignment}, {}

    def encode(self, images: Tensor, inside: Tensor) -> Memory:
        """Return the output of the encoder for images ``[B, 3, H, W]``; ``inside`` is that of `predict`."""
        parts, maps, sources, masks, positions = self.transformer, self.backbone(images), [], [], []
        for level, project in enumerate(parts.input_proj):
            # Levels beyond the maps of the backbone are computed from the last map, each from the previous one.
            above = maps[min(level, len(maps) - 1)] if level <= len(maps) else sources[-1]
            source = project(above)
            mask = F.interpolate(inside[None].float(), size=source.shape[-2:])[0].bool()
            position = parts.position_embedding(source.shape, source.device, torch.float32, mask)
            sources.append(source)
            masks.append(mask)
            positions.append(position.flatten(2).transpose(1, 2) + parts.level_embed[level])
        memory = Memory(
            torch.cat([source.flatten(2).transpose(1, 2) for source in sources], 1),
            torch.cat([mask.flatten(1) for mask in masks], 1),
            [tuple(source.shape[-2:]) for source in sources],
            torch.stack([parts.get_valid_ratio(mask) for mask in masks], 1),
        )
        encoded = parts.encoder(
            inputs_embeds=memory.features,
            attention_mask=memory.mask,
            spatial_position_embeddings=torch.cat(positions, 1),
            valid_ratios=memory.ratios,
            **memory.level_arguments(),
        )
        return memory._replace(features=encoded.last_hidden_state)

    def select_queries(self, memory: Memory) -> tuple[tuple[Tensor, Tensor], Queries]:
        """Return logits and boxes of the encoder's proposals, and the queries initialised from the best proposals.

        The proposals are those that the loss covers: the best ones in DINO, all in Deformable DETR.
        """
        decoder = self.transformer.decoder
        features, priors = self.transformer.gen_encoder_output_proposals(memory.features, ~memory.mask, memory.shapes)
        logits, boxes = decoder.class_embed[-1](features), decoder.bbox_embed[-1](features) + priors
        # Proposals have the classes of the data set in DINO, but only one class, "object", in Deformable DETR.
        score = logits[..., 0] if self.contents is None else logits.amax(-1)
        best = score.topk(min(self.num_queries, score.shape[1]), dim=1).indices.unsqueeze(-1)
        selected = boxes.gather(1, best.expand(-1, -1, 4))
        anchors = selected.detach()
        if self.contents is None:
            contents = self._from_positions(anchors)[1]
        else:
            logits, boxes = logits.gather(1, best.expand(-1, -1, logits.shape[-1])), selected
            contents = self.contents.weight[: anchors.shape[1]].expand(anchors.shape[0], -1, -1)
        return (logits, boxes.sigmoid()), Queries.matched(contents, anchors.sigmoid())

    def decode(self, memory: Memory, queries: Queries) -> list[tuple[Tensor, Tensor]]:
        """Return logits ``[B, Q, classes]`` and boxes ``[B, Q, 4]`` (cx, cy, w, h) of the queries after each layer."""
        decoder, content, reference = self.transformer.decoder, queries.contents, queries.boxes
        levels, ratios = memory.level_arguments(), memory.ratios.repeat(1, 1, 2)[:, None]  # [B, 1, levels, 4]
        # In evaluation there are only matched queries, which attend to each other.
        mask, previous, found = queries.attention_mask() if self.training else None, reference, []
        static = None if self.anchor_position else self._from_positions(inverse_sigmoid(reference))[0]
        for layer, class_head, box_head in zip(decoder.layers, decoder.class_embed, decoder.bbox_embed, strict=False):
            position = static if static is not None else self.anchor_position(self._sine(inverse_sigmoid(reference)))
            content = layer(
                content,
                object_queries_position_embeddings=position,
                reference_points=reference[:, :, None] * ratios,
                encoder_hidden_states=memory.features,
                encoder_attention_mask=memory.mask,
                attention_mask=mask,
                **levels,
            )
            change = box_head(content)
            found.append((class_head(content), (change + inverse_sigmoid(previous)).sigmoid()))
            refined = (change + inverse_sigmoid(reference)).sigmoid()
            reference = refined.detach()
            previous = refined if self.look_forward_twice else reference
        return found

    def losses(
        self,
        proposals: tuple[Tensor, Tensor],
        layers: list[tuple[Tensor, Tensor]],
        truth: Targets,
        extra: dict[str, Assignment],
    ) -> dict[str, Tensor]:
        """Return the losses of proposals, matched queries and additional queries, summed over layers.

        Args:
            proposals: logits ``[B, Q, classes]`` and boxes ``[B, Q, 4]`` of the encoder, see `select_queries`.
            layers: logits and boxes of each layer of the decoder, the additional queries first.
            truth: the objects.
            extra: assigned objects of each set of additional queries, by name, in the order of the queries.
        """
        objects = truth if self.contents is not None else truth.without_classes()
        losses = {"encoder": sum(set_losses(*proposals, match(*proposals, objects), objects).values())}
        known = sum(assignment.shape[1] for assignment in extra.values())
        for logits, boxes in layers:
            start = 0
            for name, assignment in extra.items():
                part = slice(start, start := start + assignment.shape[1])
                loss = sum(set_losses(logits[:, part], boxes[:, part], assignment, truth).values())
                losses[name] = losses.get(name, 0.0) + loss
            matched = logits[:, known:], boxes[:, known:]
            for name, loss in set_losses(*matched, match(*matched, truth), truth).items():
                losses[name] = losses.get(name, 0.0) + loss
        return losses

    def _sine(self, logits: Tensor) -> Tensor:
        """Return the sine embedding ``[B, Q, 2 C]`` of boxes ``[B, Q, 4]``, which are given before the sigmoid."""
        return self.transformer.get_proposal_pos_embed(logits)

    def _from_positions(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions and contents of queries, computed from boxes before the sigmoid as in Deformable DETR."""
        parts = self.transformer
        return parts.pos_trans_norm(parts.pos_trans(self._sine(logits))).chunk(2, dim=-1)


def _check_sizes(config: DeformableDetrConfig) -> None:
    """Raise a ValueError if numbers of layers, levels, points or heads do not give a network."""
    at_least(DINO.maps).require("num_feature_levels", config.num_feature_levels)
    not_negative().require("encoder_layers", config.encoder_layers)
    for name in ("decoder_layers", "encoder_n_points", "decoder_n_points", "encoder_ffn_dim", "decoder_ffn_dim"):
        at_least(1).require(name, getattr(config, name))
    for name in ("encoder_attention_heads", "decoder_attention_heads"):
        check_divisible("d_model", config.d_model, name, getattr(config, name))
