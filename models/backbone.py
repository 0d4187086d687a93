"""Backbones of detectors and segmenters: from images to one feature map per stride."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
from torch import Tensor, nn

from .contract import ConvertedWeights, no_weight_decay
from .dat import DAT
from .layers import LayerNorm
from .options import NUM_STAGES

_TIMM_PREFIX = "body.model."  # prefix added by timm's feature extractor


class DATBackbone(DAT):
    """A `DAT` with a layer norm on each stage output, as published for dense prediction.

    Parameter names follow the published detection weights: those of `DAT` without the classifier, plus
    ``norms.<stage>.norm``.

    Args:
        out_indices: stages whose outputs are returned, in ascending order; negative ones count from the end.
        use_checkpoint: recompute the activations of each block in the backward pass instead of saving them.
        **options: options of `DAT`.

    Attributes:
        channels: number of channels of each returned map.
        strides: stride of each returned map in image pixels.

    Raises:
        TypeError: an option is unknown.
        ValueError: an option or index is not allowed.
    """

    def __init__(
        self, *, out_indices: Sequence[int] = (0, 1, 2, 3), use_checkpoint: bool = False, **options: Any
    ) -> None:
        super().__init__(use_checkpoint=use_checkpoint, **{**options, "num_classes": 0})
        if not set(out_indices) <= set(range(-NUM_STAGES, NUM_STAGES)) or not out_indices:
            raise ValueError(f"out_indices = {list(out_indices)} must name some of the stages 0 to {NUM_STAGES - 1}")
        self.out_indices = tuple(sorted(i % NUM_STAGES for i in out_indices))
        self.prune_intermediate_layers(self.out_indices, prune_norm=True)
        self.channels = [self.feature_info[i]["num_chs"] for i in self.out_indices]
        self.strides = [self.feature_info[i]["reduction"] for i in self.out_indices]
        self.norms = nn.ModuleList(
            LayerNorm(info["num_chs"]) if i in self.out_indices else nn.Identity()
            for i, info in enumerate(self.feature_info)
        )

    def convert_weights(self, weights: dict[str, Tensor]) -> ConvertedWeights:
        """Convert the weights of a classifier, which has no output norms, or of a backbone."""
        pruned = range(len(self.stages), NUM_STAGES)
        absent = (
            "cls_norm.",
            "cls_head.",
            *(f"norms.{i}." for i in range(NUM_STAGES) if i not in self.out_indices),
            *(f"stages.{i}." for i in pruned),
            *(f"down_projs.{i - 1}." for i in pruned),
        )
        unused = {name for name in weights if name.startswith(absent)}
        new = {name for name in self.state_dict().keys() - weights.keys() if name.startswith("norms.")}
        return ConvertedWeights({name: value for name, value in weights.items() if name not in unused}, new, unused)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the normalised maps ``[B, channels[i], H / strides[i], W / strides[i]]`` of images ``[B, 3, H, W]``.

        Pixels at the right and bottom beyond a multiple of the last stride may be ignored; pad such images.
        """
        maps = self.forward_intermediates(x, self.out_indices, intermediates_only=True)
        return [self.norms[i](x) for i, x in zip(self.out_indices, maps, strict=True)]


class TimmBackbone(nn.Module):
    """A timm model as feature extractor, with the interface of `DATBackbone`.

    Args:
        name: name of a model for `timm.create_model`.
        out_indices: indices of the returned maps.
        **arguments: arguments of the model.

    Attributes:
        channels: number of channels of each returned map.
        strides: stride of each returned map in image pixels.
    """

    def __init__(self, name: str, *, out_indices: Sequence[int] = (0, 1, 2, 3), **arguments: Any) -> None:
        super().__init__()
        # This kind of feature extractor returns [B, C, H, W] for all models.
        getter = {"features_only": True, "feature_cls": "getter"}
        self.body = timm.create_model(name, out_indices=tuple(out_indices), **getter, **arguments)
        self.channels: list[int] = self.body.feature_info.channels()
        self.strides: list[int] = self.body.feature_info.reduction()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable recomputing activations in the backward pass."""
        self.body.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm exempts from weight decay."""
        return {f"{_TIMM_PREFIX}{name}" for name in no_weight_decay(self.body.model)}

    def convert_weights(self, weights: dict[str, Tensor]) -> ConvertedWeights:
        """Convert the weights of the full timm model, or of a backbone."""
        own = self.state_dict().keys()
        if own <= weights.keys():
            return ConvertedWeights(weights)
        unused = {name for name in weights if f"{_TIMM_PREFIX}{name}" not in own}
        kept = {f"{_TIMM_PREFIX}{name}": value for name, value in weights.items() if name not in unused}
        return ConvertedWeights(kept, unused=unused)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return maps ``[B, channels[i], H / strides[i], W / strides[i]]`` of images ``[B, 3, H, W]``."""
        return self.body(x)
