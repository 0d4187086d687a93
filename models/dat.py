"""The Deformable Attention Transformer: DAT (arXiv 2201.00520), DAT+ and DAT++ (arXiv 2309.01430)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention.letters import MIXERS, check_letters, declared_options
from .layers import MLP, ConvMLP, LayerNorm, LayerScale, Residual, as_pair, pointwise, residual_depthwise
from .options import (
    NUM_STAGES,
    OFF,
    Check,
    DeclaredSignature,
    Option,
    StageOption,
    StageOptions,
    at_least,
    complete,
    one_of,
    rate,
    split_stages,
)
from .tables import Resize

# Options of the network; the mixers declare theirs in their own modules.
OPTIONS = {
    "img_size": Option(
        224,
        "Image size that determines the position tables: one number or [height, width]. Images may have any size.",
        Check(lambda size: len(as_pair(size)) == 2 and min(as_pair(size)) >= 1, "at least 1, or [height, width]"),
        also_list=True,
    ),
    "patch_size": Option(4, "Stride of the stem: pixels of the image per pixel of the first map.", at_least(1)),
    "in_chans": Option(3, "Channels of the images.", at_least(1)),
    "num_classes": Option(1000, "Number of classes; 0: no classifier, the output is the pooled map.", at_least(0)),
    "global_pool": Option(
        "avg",
        "Pooling of the last map; empty: no pooling, which requires `num_classes: 0`.",
        one_of("avg", "max", "avgmax", ""),
    ),
    "expansion": Option(4, "Hidden channels of the MLPs, as a multiple of `dims`.", at_least(1)),
    "dim_stem": Option(96, "Channels of the stem.", at_least(1)),
    "dims": StageOption((96, 192, 384, 768), "Channels.", each=at_least(1)),
    "depths": StageOption((2, 2, 6, 2), "Number of blocks.", each=at_least(1)),
    "stage_spec": StageOption(
        (("L", "D"), ("L", "D"), ("L", "D", "L", "D", "L", "D"), ("L", "D")),
        "Letters of the mixers, one per block; a stage is a string or a list of letters.",
    ),
    "heads": StageOption((3, 6, 12, 24), "Attention heads."),
    "use_dwc_mlps": StageOption(OFF, "The MLPs have a depthwise convolution."),
    "use_lpus": StageOption(OFF, "A local perception unit, a depthwise convolution with a skip, before each block."),
    "use_conv_patches": Option(False, "Stem and downsampling use overlapping 3x3 convolutions."),
    "layer_scale_values": StageOption((-1.0,) * NUM_STAGES, "Initial layer scale; 0 or less: no layer scale."),
    "drop_rate": Option(0.0, "Dropout rate of projections and MLPs.", rate()),
    "attn_drop_rate": Option(0.0, "Probability of dropping an attention weight.", rate()),
    "drop_path_rate": Option(
        0.0, "Stochastic-depth rate of the last block; increases linearly from 0 in the first.", rate()
    ),
}


class Stage(nn.Module):
    """A sequence of blocks of the same width, each a mixer and an MLP with residual connections, or a ConvNeXt block.

    Maps ``[B, dim_in, H, W]`` to ``[B, C, H, W]``. The modules of block ``d`` are at index ``d`` of parallel lists, as
    in the published weights.

    Args:
        options: options of the stage.
        dim_in: number of input channels.
        drop_paths: stochastic-depth rate of each block.
        use_checkpoint: recompute the activations of each block in the backward pass instead of saving them.
    """

    def __init__(
        self, options: StageOptions, *, dim_in: int, drop_paths: Sequence[float], use_checkpoint: bool = False
    ) -> None:
        super().__init__()
        dim, depth, letters = options["dims"], options["depths"], options.letters
        expansion, drop = options["expansion"], options["drop_rate"]
        mixers = [MIXERS[letter] for letter in letters]
        self.single_residual = [mixer.single_residual for mixer in mixers]
        self.use_checkpoint = use_checkpoint

        mlp = ConvMLP if options["use_dwc_mlps"] else MLP
        init = options["layer_scale_values"]
        self.proj = nn.Conv2d(dim_in, dim, kernel_size=1) if dim_in != dim else nn.Identity()
        self.ln_cnvnxt = nn.ModuleDict({str(d): LayerNorm(dim) for d in range(depth) if self.single_residual[d]})
        self.layer_norms = nn.ModuleList(
            nn.Identity() if single else LayerNorm(dim) for single in self.single_residual for _ in range(2)
        )
        self.mlps = nn.ModuleList(mlp(dim, expansion=expansion, drop=drop) for _ in range(depth))
        self.attns = nn.ModuleList(mixer.build(options) for mixer in mixers)
        self.residuals = nn.ModuleList(Residual(rate) for rate in drop_paths)
        # ConvNeXt blocks do not use layer scale; the published weights contain it, so it exists and is not trained.
        self.layer_scales = nn.ModuleList(
            LayerScale(dim, init).requires_grad_(not single) if init > 0 else nn.Identity()
            for single in self.single_residual
            for _ in range(2)
        )
        self.local_perception_units = nn.ModuleList(
            nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
            for _ in range(depth if options["use_lpus"] else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = pointwise(self.proj, x)
        for d in range(len(self.attns)):
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(self.block, d, x, use_reentrant=False)
            else:
                x = self.block(d, x)
        return x

    def block(self, d: int, x: Tensor) -> Tensor:
        """Run block ``d`` on a map ``[B, C, H, W]``."""
        add = self.residuals[d]
        if self.local_perception_units:
            x = residual_depthwise(self.local_perception_units[d], x)
        if self.single_residual[d]:
            return add(x, self.mlps[d](self.ln_cnvnxt[str(d)](self.attns[d](x))))
        x = add(x, self.layer_scales[2 * d](self.attns[d](self.layer_norms[2 * d](x))))
        return add(x, self.layer_scales[2 * d + 1](self.mlps[d](self.layer_norms[2 * d + 1](x))))


class DAT(nn.Module):
    """A Vision Transformer with deformable attention, from images ``[B, 3, H, W]`` to logits ``[B, num_classes]``.

    Images may have any size for which the last map has at least one pixel, whatever ``img_size`` is. The network has
    the methods of timm's models.

    Args:
        **options: the options under their published names; `options` declares them, and ``docs/model.md`` lists them.
            Options with four values have one per stage.
        use_checkpoint: recompute the activations of each block in the backward pass instead of saving them.

    Attributes:
        num_features: channels of the last map.
        head_hidden_size: channels of the classifier's input; equals ``num_features``.
        feature_info: channels, stride and name of each stage output, in timm's format.
        smallest_image: height and width of the smallest supported image in pixels.

    Raises:
        TypeError: an option is unknown.
        ValueError: an option is not allowed or contradicts another, or, when called, the images have a wrong shape or
            are too small.
    """

    __signature__ = DeclaredSignature()

    def __init__(self, *, use_checkpoint: bool = False, **options: Any) -> None:
        super().__init__()
        declared = self.options()
        values = complete(options, declared)
        size, patch_size, dim_stem = as_pair(values["img_size"]), values["patch_size"], values["dim_stem"]
        _check_stem(values)
        stages = split_stages(values, declared, map_size=(size[0] // patch_size, size[1] // patch_size))
        for stage in stages:
            check_letters(stage)

        overlapping = values["use_conv_patches"]
        self.in_chans = values["in_chans"]
        smallest = 1 if overlapping else patch_size << (NUM_STAGES - 1)
        self.smallest_image = (smallest, smallest)
        stem = _overlapping_stem if overlapping else _plain_stem
        self.patch_proj = stem(values["in_chans"], dim_stem, patch_size)
        dims, blocks = [stage["dims"] for stage in stages], sum(stage["depths"] for stage in stages)
        rates = iter([values["drop_path_rate"] * block / max(blocks - 1, 1) for block in range(blocks)])
        self.stages = nn.ModuleList(
            Stage(
                stage,
                dim_in=dim_in,
                drop_paths=list(islice(rates, stage["depths"])),
                use_checkpoint=use_checkpoint,
            )
            for stage, dim_in in zip(stages, (dim_stem, *dims[1:]), strict=True)
        )
        kernel, padding = (3, 1) if overlapping else (2, 0)
        self.down_projs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim_out, kernel, stride=2, padding=padding, bias=False), LayerNorm(dim_out))
            for dim, dim_out in pairwise(dims)
        )
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size << i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.cls_norm = LayerNorm(dims[-1])
        self.reset_classifier(values["num_classes"], values["global_pool"])

    @staticmethod
    def options() -> dict[str, Option]:
        """Return the declarations of all options by name: those of the network, then those of the mixers."""
        return OPTIONS | declared_options()

    def get_classifier(self) -> nn.Module:
        """Return the layer that computes the logits."""
        return self.cls_head

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters exempt from weight decay: the position biases of D, L, S and E.

        Those of N and Q decay, as in the published recipe.
        """
        return {f"{path}.{name}" for path, names in self._mixer_results("no_weight_decay") for name in names}

    def position_tables(self) -> dict[str, Resize]:
        """Return the resize function of each position table, by name."""
        tables = self._mixer_results("position_tables")
        return {f"{path}.{name}": resize for path, functions in tables for name, resize in functions.items()}

    def input_convs(self) -> set[str]:
        """Return the names of the convolutions applied to the image."""
        return {"patch_proj.0"}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one.

        Args:
            num_classes: number of logits; 0 removes the layer.
            global_pool: new pooling; None keeps the current one.

        Raises:
            ValueError: a value is not allowed, or logits are requested without pooling.
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        given = {"num_classes": num_classes, "global_pool": pool}
        num_classes, pool = complete(given, {name: OPTIONS[name] for name in given}).values()
        if num_classes and not pool:
            raise ValueError(
                f"global_pool = '' leaves a map, which num_classes = {num_classes} cannot classify; choose avg, or "
                "num_classes = 0"
            )
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=pool, flatten=bool(pool))
        like = self.patch_proj[0].weight
        self.cls_head = nn.Linear(self.num_features, num_classes).to(like) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable recomputing the activations of each block in the backward pass."""
        for stage in self.stages:
            stage.use_checkpoint = enable

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Resize the position tables bicubically to another image size, for fine-tuning at that size.

        Images of other sizes can be processed without this.

        Args:
            img_size: height and width in pixels, or both as one number.

        Raises:
            ValueError: it is not one or two whole numbers, or leaves no pixel for the last stage.
        """
        img_size = complete({"img_size": img_size}, {"img_size": OPTIONS["img_size"]})["img_size"]
        _check_image(img_size, smallest=self.feature_info[-1]["reduction"])
        size = as_pair(img_size)
        for stage, info in zip(self.stages, self.feature_info, strict=False):
            for mixer in stage.attns:
                if hasattr(mixer, "set_map_size"):
                    mixer.set_map_size(tuple(side // info["reduction"] for side in size))
        update_model_input_size(self, size)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that group the parameters into layers, in timm's format: the stem, then the blocks.

        A downsampling layer belongs to the block that follows it.

        Args:
            coarse: group by stage instead of by block.
        """
        stem = r"^patch_proj|^stages\.0\.proj"
        down = [(rf"^down_projs\.{i}\.", (i + 1, 0)) for i in range(len(self.down_projs))]
        if coarse:
            down = [(pattern, (i,)) for pattern, (i, _) in down]
            return {"stem": stem, "blocks": [*down, (r"^stages\.(\d+)", None)]}
        blocks = [
            (rf"^stages\.{i}\.(?:(?!layer_)\w+\.{d}|layer_\w+\.(?:{2 * d}|{2 * d + 1}))\.", (i, d))
            for i, stage in enumerate(self.stages)
            for d in range(len(stage.attns))
        ]
        return {"stem": stem, "blocks": [*down, *blocks]}

    def _mixer_results(self, method: str) -> Iterator[tuple[str, Any]]:
        """Yield the path of each mixer that has a method, and the result of the method."""
        for path, module in self.named_modules():
            if module is not self and hasattr(module, method):
                yield path, getattr(module, method)()

    def compile_blocks(self, *, backend: str = "inductor") -> None:
        """Compile every mixer and MLP separately, for each size of the input; parameters keep their names.

        Blocks of the same kind and width share code, so this is much faster than compiling the whole network. Compiled
        blocks save all activations for the backward pass; use ``use_checkpoint`` to save memory. Beyond the limit of
        `torch._dynamo.config.recompile_limit`, with images of dozens of sizes, blocks run without being compiled.

        Side effect: raises that limit to at least 64 for the process.

        Args:
            backend: backend of `torch.compile`.
        """
        # All modules of a class share the limit, and each shape counts: 4 stages, training and evaluation, full and
        # partial batches. With fullgraph=True, the limit would be an error.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for stage in self.stages:
            for module in (*stage.attns, *stage.mlps):
                module.compile(backend=backend, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised map of the last stage, ``[B, num_features, H, W]``, for images ``[B, 3, H, W]``."""
        return self.cls_norm(self._maps(x, len(self.stages))[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits ``[B, num_classes]`` for a map of `forward_features`, or with ``pre_logits`` the pooled map."""
        # torch.func.vmap does not support adaptive pooling.
        x = x.mean(dim=(2, 3)) if self.global_pool.pool_type == "avg" else self.global_pool(x)
        return x if pre_logits else self.cls_head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the outputs of stages, ``[B, dims[i], H_i, W_i]``, for images ``[B, 3, H, W]``.

        Args:
            x: images.
            indices: stage indices, negative ones from the end; an int n for the last n stages, None for all.
            norm: apply the classifier's norm to the output of the last stage.
            stop_early: skip the stages after the last requested one.
            output_fmt: NCHW, the only layout.
            intermediates_only: return only the list.

        Returns:
            The result of `forward_features` and the outputs in the order of ``indices``. With ``stop_early``, the
            former is the output of the last stage that was computed.

        Raises:
            ValueError: ``output_fmt`` is not NCHW, or the images have a wrong shape or are too small.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt = {output_fmt!r} must be NCHW; permute the maps for another layout")
        stages = len(self.stages)
        take, last = feature_take_indices(stages, indices)
        maps = self._maps(x, last + 1 if stop_early or intermediates_only else stages)
        final = self.cls_norm(maps[-1]) if len(maps) == stages else maps[-1]
        intermediates = [final if norm and i == stages - 1 else maps[i] for i in take]
        return intermediates if intermediates_only else (final, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the modules that the outputs of the given stages do not need.

        Args:
            indices: stage indices, as in `forward_intermediates`.
            prune_norm: also remove the classifier's norm; always removed if the last stage is.
            prune_head: also remove pooling and classifier; always removed if the last stage is.

        Returns:
            The indices as numbers from 0.
        """
        take, last = feature_take_indices(len(self.stages), indices)
        cut = last + 1 < len(self.stages)
        self.stages, self.down_projs = self.stages[: last + 1], self.down_projs[:last]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or cut:
            self.cls_norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take

    def _maps(self, x: Tensor, stages: int) -> list[Tensor]:
        """Return the outputs of the first ``stages`` stages."""
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"images must have the shape [B, {self.in_chans}, H, W], not {list(x.shape)}; x[None] makes a batch of "
                "one image, and the option in_chans sets the number of channels"
            )
        height, width = self.smallest_image
        if x.shape[-2] < height or x.shape[-1] < width:
            raise ValueError(
                f"an image of {x.shape[-2]} x {x.shape[-1]} pixels is too small for the last stage; "
                f"give at least {height} x {width}"
            )
        x = self.patch_proj(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))  # channels last in memory
        maps = []
        for i, stage in enumerate(islice(self.stages, stages)):
            x = stage(self.down_projs[i - 1](x) if i else x)
            maps.append(x)
        return maps


def _check_image(img_size: int | Sequence[int], *, smallest: int) -> None:
    if min(as_pair(img_size)) < smallest:
        raise ValueError(f"img_size = {img_size} leaves no pixel for the last stage; choose at least {smallest}")


def _check_stem(values: dict[str, Any]) -> None:
    """Check that the last map has at least one pixel and that the stem can be built."""
    patch_size, dim_stem = values["patch_size"], values["dim_stem"]
    _check_image(values["img_size"], smallest=patch_size << (NUM_STAGES - 1))
    if values["use_conv_patches"] and (patch_size % 2 or dim_stem % 2):
        raise ValueError(
            f"patch_size = {patch_size} and dim_stem = {dim_stem} must both be even with use_conv_patches, "
            "whose stem begins with a convolution of stride 2 to half its channels"
        )


def _overlapping_stem(in_chans: int, dim: int, patch_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, kernel_size=3, stride=2, padding=1),
        LayerNorm(dim // 2),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, kernel_size=3, stride=patch_size // 2, padding=1),
        LayerNorm(dim),
    )


def _plain_stem(in_chans: int, dim: int, patch_size: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size), LayerNorm(dim))
