"""A Vision Transformer with interchangeable attention and locality-aware initialisation."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

from timm.layers import to_2tuple
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from .attention.disentangled import DisentangledAttention, DisentangledPerformer
from .attention.patch_deformable import PatchDeformableAttention
from .attention.performer import PerformerAttention
from .attention.tokens import SoftmaxAttention
from .contract import ConvertedWeights
from .ops.locality import KINDS, Window
from .ops.random_features import KINDS as FEATURES
from .options import (
    DeclaredSignature,
    Option,
    at_least,
    check_divisible,
    complete,
    not_negative,
    one_of,
    positive,
    rate,
)

ATTENTIONS = ("softmax", "performer", "disentangled", "disentangled_performer", "deformable")
LOCALITIES = ("none", *KINDS)
INITS = {"timm": "", "jax": "jax"}  # timm's names of the initialisations
OPTIONS = {
    "patch_size": Option(4, "Side of a patch in pixels.", at_least(1)),
    "num_classes": Option(10, "Number of classes; 0: no classifier, the output is the features.", at_least(0)),
    "embed_dim": Option(384, "Channels.", at_least(1)),
    "depth": Option(4, "Number of blocks.", at_least(1)),
    "num_heads": Option(6, "Attention heads.", at_least(1)),
    "mlp_ratio": Option(4.0, "Hidden channels of the MLPs, as a multiple of `embed_dim`.", positive()),
    "global_pool": Option(
        "token",
        "`token`: classify from a class token. `avg`: no class token; classify from the mean of the patch tokens.",
        one_of("token", "avg"),
    ),
    "drop_rate": Option(0.1, "Dropout rate of tokens, projections and MLPs.", rate()),
    "attn_drop_rate": Option(
        0.0, "Probability of dropping an attention weight; `softmax` and `disentangled` only.", rate()
    ),
    "drop_path_rate": Option(
        0.0, "Stochastic-depth rate of the last block; increases linearly from 0 in the first.", rate()
    ),
    "weight_init": Option(
        "timm",
        "Initialisation of linear layers. `timm`: normal distribution with standard deviation 0.02. `jax`: Xavier, as "
        "in the original code; narrow networks learn much faster with it.",
        one_of(*INITS),
    ),
    "attention": Option("softmax", "Attention of the blocks.", one_of(*ATTENTIONS)),
    "num_features": Option(
        0,
        "Random features per head of the Performers; 0 for d ln d, with d channels per head.",
        not_negative(),
    ),
    "feature_kind": Option(
        "positive", "Random features: `positive` ones approximate softmax, `relu` ones do not.", one_of(*FEATURES)
    ),
    "redraw_epochs": Option(
        1, "Interval in epochs at which the Performers redraw their features; 0 for never.", not_negative()
    ),
    "span": Option(
        4,
        "Largest displacement in patches with its own position embedding, for disentangled attention.",
        at_least(1),
    ),
    "points": Option(4, "Sampling points per head and grid of `deformable`.", at_least(1)),
    "scales": Option(1, "Number of grids of `deformable`, each half as large as the previous one.", at_least(1)),
    "locality": Option(
        "none",
        "Window around each patch in the first epochs: `sequence` in the order of the tokens, `box` in the plane.",
        one_of(*LOCALITIES),
    ),
    "locality_reach": Option((8, 12, 18, 20), "Reach of each successive window to each side, in patches."),
    "locality_epochs": Option(
        (5, 10, 15, 20), "First epoch, from 0, without each window; there is no window after the last."
    ),
}
# Options that timm's Vision Transformer has under the same names.
TIMM_OPTIONS = (
    "patch_size",
    "num_classes",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "global_pool",
    "drop_path_rate",
)
# Entries that timm's attention does not have.
NEW_ENTRIES = re.compile(r"\.attn\.(random|relative|sampling_offsets|attention_weights)\.")


class VisionTransformer(timm_vit.VisionTransformer):
    """timm's Vision Transformer (arXiv 2010.11929) with configurable attention in its blocks.

    Args:
        img_size: height and width of the images in pixels, or one number for both.
        use_checkpoint: recompute the activations of each block in the backward pass instead of saving them.
        **options: `options` declares them, and ``docs/attention-modules.md`` lists them.

    Raises:
        TypeError: an option is unknown.
        ValueError: an option is not allowed or contradicts another.
    """

    __signature__ = DeclaredSignature()

    def __init__(self, *, img_size: int | tuple[int, int] = 32, use_checkpoint: bool = False, **options: Any) -> None:
        values = complete(options, OPTIONS)
        _check(values)
        _check_size(img_size, values["patch_size"])
        embed_dim, num_heads, drop_rate = values["embed_dim"], values["num_heads"], values["drop_rate"]
        weight_init, attention = INITS[values["weight_init"]], values["attention"]
        super().__init__(
            weight_init=weight_init,
            img_size=img_size,
            class_token=values["global_pool"] == "token",
            pos_drop_rate=drop_rate,
            proj_drop_rate=drop_rate,
            **{name: values[name] for name in TIMM_OPTIONS},
        )
        self.locality = values["locality"]
        self.schedule = list(zip(values["locality_epochs"], values["locality_reach"], strict=True))
        self.set_grad_checkpointing(use_checkpoint)
        grid, prefix = self.patch_embed.grid_size, self.num_prefix_tokens
        random = {name: values[name] for name in ("num_features", "feature_kind", "redraw_epochs")}
        span, attn_drop = values["span"], values["attn_drop_rate"]
        build: dict[str, Callable[..., nn.Module]] = {
            "softmax": partial(SoftmaxAttention, attn_drop=attn_drop),
            "performer": partial(PerformerAttention, **random),
            "disentangled": partial(DisentangledAttention, span=span, attn_drop=attn_drop),
            "disentangled_performer": partial(DisentangledPerformer, span=span, **random),
            "deformable": partial(PatchDeformableAttention, points=values["points"], scales=values["scales"]),
        }
        for block in self.blocks:
            block.attn = build[attention](embed_dim, heads=num_heads, grid=grid, prefix=prefix, proj_drop=drop_rate)
            if attention != "deformable":  # it has its own initialisation
                block.attn.apply(timm_vit.get_init_weights_vit(weight_init, needs_reset=False))

    @staticmethod
    def options() -> dict[str, Option]:
        """Return the declarations of all options by name, except image size and checkpointing."""
        return OPTIONS

    def window_at(self, epoch: int) -> Window | None:
        """Return the window around a patch in an epoch, counted from 0, or None if there is none."""
        if self.locality == "none":
            return None
        return next((Window(self.locality, reach) for end, reach in self.schedule if epoch < end), None)

    def set_epoch(self, epoch: int) -> None:
        """Set the window and the random features for an epoch, counted from 0.

        They depend only on the epoch, so a resumed run is the same as an uninterrupted one.
        """
        for block in self.blocks:
            block.attn.window = self.window_at(epoch)
            block.attn.set_epoch(epoch)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the embeddings exempt from weight decay."""
        tables = {name for name, _ in self.named_parameters() if name.endswith(".relative.table")}
        return super().no_weight_decay() | tables

    def convert_weights(self, weights: dict[str, Tensor]) -> ConvertedWeights:
        """Convert weights of timm's Vision Transformer, or of another `VisionTransformer`, to the names of this one.

        Patch and position embeddings are resized. ``deformable`` takes the value and output projections of softmax
        attention. Embeddings of relative positions, random features, and the sampling offsets and attention weights of
        ``deformable`` are newly initialised, or left out if this network has none.
        """
        weights = timm_vit.checkpoint_filter_fn(dict(weights), self)
        if isinstance(self.blocks[0].attn, PatchDeformableAttention):
            for name in [name for name in weights if ".attn.qkv." in name]:
                weights[name.replace("qkv", "value_proj")] = weights.pop(name).chunk(3)[2]
            weights = {name.replace(".attn.proj.", ".attn.output_proj."): x for name, x in weights.items()}
        own = self.state_dict().keys()
        unused = {name for name in weights.keys() - own if NEW_ENTRIES.search(name)}
        kept = {name: x for name, x in weights.items() if name not in unused}
        return ConvertedWeights(kept, {name for name in own - kept.keys() if NEW_ENTRIES.search(name)}, unused)

    def set_input_size(self, *_: Any, **__: Any) -> None:
        """Raise a ValueError: the attentions are built for a fixed grid."""
        raise ValueError("the grid of patches is fixed; build a network with the new img_size and load the weights")


def _check_size(img_size: int | tuple[int, int], patch_size: int) -> None:
    sides = to_2tuple(img_size)
    if len(sides) != 2 or min(sides) < patch_size:
        raise ValueError(f"img_size = {img_size} must be one or two numbers of at least patch_size = {patch_size}")
    if any(side % patch_size for side in sides):
        warnings.warn(
            f"img_size = {img_size} is not a multiple of patch_size = {patch_size}: pixels at the right and bottom "
            "edge are not seen",
            stacklevel=3,
        )


def _check(values: dict[str, Any]) -> None:
    """Check options that depend on each other, and lists."""
    embed_dim, num_heads, attention = (values[name] for name in ("embed_dim", "num_heads", "attention"))
    check_divisible("embed_dim", embed_dim, "num_heads", num_heads)
    rate = values["attn_drop_rate"]
    if rate and attention not in ("softmax", "disentangled"):
        raise ValueError(f"attn_drop_rate = {rate} cannot be used with attention = {attention!r}; set it to 0")
    reach, epochs = values["locality_reach"], values["locality_epochs"]
    if len(reach) != len(epochs):
        raise ValueError(
            f"locality_reach = {list(reach)} and locality_epochs = {list(epochs)} differ in length; give one of each "
            "per window"
        )
    for name, numbers, smallest in (("locality_reach", reach, 0), ("locality_epochs", epochs, 1)):
        if not all(isinstance(x, Integral) and not isinstance(x, bool) and x >= smallest for x in numbers):
            raise ValueError(f"{name} = {list(numbers)} must be whole numbers of at least {smallest}")
    if list(epochs) != sorted(set(epochs)):
        raise ValueError(f"locality_epochs = {list(epochs)} must increase from window to window")
