"""A Vision Transformer with exchangeable attention and locality-aware initialisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from .attention.disentangled import DisentangledAttention, DisentangledPerformer
from .attention.patch_deformable import PatchDeformableAttention
from .attention.performer import PerformerAttention
from .attention.tokens import SoftmaxAttention
from .ops.locality import KINDS, Window

ATTENTIONS = ("softmax", "performer", "disentangled", "disentangled_performer", "deformable")
LOCALITIES = ("none", *KINDS)


class VisionTransformer(timm_vit.VisionTransformer):
    """timm's Vision Transformer (arXiv 2010.11929) with another attention in its blocks.

    Args:
        img_size: height and width of the images, or their side.
        patch_size: pixels per patch on each axis.
        num_classes: size of the logits.
        embed_dim: channels.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs over ``embed_dim``.
        global_pool: ``token`` classifies by a class token, ``avg`` by the mean of the patches, without such a token.
        drop_rate: dropout rate of tokens, projections and MLPs.
        attn_drop_rate: probability of dropping an attention weight; ``softmax`` and ``disentangled`` alone.
        drop_path_rate: stochastic-depth rate of the last block; rises linearly from 0.
        attention: one of `ATTENTIONS`.
        num_features: random features of a head of the Performers; 0 for ``d ln d`` of its d channels.
        feature_kind: ``positive``, which approximates softmax, or ``relu``.
        redraw_epochs: epochs after which the Performers draw other features; 0 for never.
        span: largest displacement in patches with a relative position of its own, of the disentangled ones.
        points: points of a head on every grid, of ``deformable``.
        scales: grids of ``deformable``, each half as large as the one before.
        locality: ``none``, or where the first epochs have a window around each patch (TransGAN, arXiv 2102.07074,
            section 3.4): ``sequence``, in the order of the tokens, or ``box``, in the plane.
        locality_reach: patches that the windows reach to each side, one after the other.
        locality_epochs: the epoch before which each window ends; after the last there is none.
        use_checkpoint: recompute the activations of each block in the backward pass instead of keeping them.

    Raises:
        ValueError: an option is not allowed or contradicts another.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        num_classes: int = 10,
        embed_dim: int = 384,
        depth: int = 4,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        global_pool: str = "token",
        drop_rate: float = 0.1,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attention: str = "softmax",
        num_features: int = 0,
        feature_kind: str = "positive",
        redraw_epochs: int = 1,
        span: int = 4,
        points: int = 4,
        scales: int = 1,
        locality: str = "none",
        locality_reach: Sequence[int] = (8, 12, 18, 20),
        locality_epochs: Sequence[int] = (5, 10, 15, 20),
        use_checkpoint: bool = False,
    ) -> None:
        _check(embed_dim, num_heads, attention, attn_drop_rate, locality, locality_reach, locality_epochs)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            global_pool=global_pool,
            class_token=global_pool == "token",
            pos_drop_rate=drop_rate,
            proj_drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        self.locality = locality
        self.schedule = list(zip(locality_epochs, locality_reach, strict=True))
        self.set_grad_checkpointing(use_checkpoint)
        common = {
            "heads": num_heads,
            "grid": self.patch_embed.grid_size,
            "prefix": self.num_prefix_tokens,
            "proj_drop": drop_rate,
        }
        random = {"num_features": num_features, "feature_kind": feature_kind, "redraw_epochs": redraw_epochs}
        makers: dict[str, Callable[..., nn.Module]] = {
            "softmax": partial(SoftmaxAttention, attn_drop=attn_drop_rate),
            "performer": partial(PerformerAttention, **random),
            "disentangled": partial(DisentangledAttention, span=span, attn_drop=attn_drop_rate),
            "disentangled_performer": partial(DisentangledPerformer, span=span, **random),
            "deformable": partial(PatchDeformableAttention, points=points, scales=scales),
        }
        for block in self.blocks:
            block.attn = makers[attention](embed_dim, **common)
            if attention != "deformable":  # which starts from values of its own
                block.attn.apply(self._init_weights)

    def window_at(self, epoch: int) -> Window | None:
        """Return what a patch sees in an epoch, counted from 0; all where None."""
        if self.locality == "none":
            return None
        return next((Window(self.locality, reach) for end, reach in self.schedule if epoch < end), None)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0: with its window and its random features.

        The same whenever it is called, so that a resumed run goes on as it would have.
        """
        for block in self.blocks:
            block.attn.window = self.window_at(epoch)
            block.attn.set_epoch(epoch)

    def set_input_size(self, *_: Any, **__: Any) -> None:
        """Refuse, as attentions are made for a grid; build another network and take over the weights."""
        raise ValueError("the grid of patches is fixed; build a network of the new img_size and take over the weights")


def take_over(state: dict[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """Return weights of a timm Vision Transformer as `model` names them.

    Patches and position embeddings are resized to its grid. What timm's has not, tables of relative positions or places
    to look at, is missing from the result. Values and output of ``deformable`` come from those of softmax attention.
    """
    state = timm_vit.checkpoint_filter_fn(dict(state), model)
    if not isinstance(model.blocks[0].attn, PatchDeformableAttention):
        return state
    moved = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            moved[name.replace("qkv", "value_proj")] = tensor.chunk(3)[2]
        else:
            moved[name.replace(".attn.proj.", ".attn.output_proj.")] = tensor
    return moved


def _check(
    embed_dim: int,
    num_heads: int,
    attention: str,
    attn_drop_rate: float,
    locality: str,
    reach: Sequence[int],
    epochs: Sequence[int],
) -> None:
    if attention not in ATTENTIONS:
        raise ValueError(f"attention = {attention!r} is unknown; choose one of {', '.join(ATTENTIONS)}")
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim = {embed_dim} is not divisible by num_heads = {num_heads}; change one of them")
    if attn_drop_rate and attention not in ("softmax", "disentangled"):
        raise ValueError(f"attn_drop_rate = {attn_drop_rate} has no meaning for attention = {attention!r}; set it to 0")
    if locality not in LOCALITIES:
        raise ValueError(f"locality = {locality!r} is unknown; choose one of {', '.join(LOCALITIES)}")
    if len(reach) != len(epochs):
        raise ValueError(
            f"locality_reach has {len(reach)} windows and locality_epochs {len(epochs)} ends; give one for each"
        )
    if list(epochs) != sorted(set(epochs)) or min(epochs, default=1) < 1 or min(reach, default=0) < 0:
        raise ValueError(
            f"locality_epochs = {list(epochs)} and locality_reach = {list(reach)}: give ends that rise from 1 on, and "
            "reaches from 0 on"
        )
