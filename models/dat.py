"""The Deformable Attention Transformer: DAT (arXiv 2201.00520), DAT+ and DAT++ (arXiv 2309.01430)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import MIXERS
from .layers import MLP, ConvMLP, DropPath, LayerNorm, LayerScale, LocalPerceptionUnit, PointwiseConv
from .options import NUM_STAGES, StageOptions, check_network, split_stages


class Stage(nn.Module):
    """Blocks of one width: each a mixer and an MLP with residual connections, or one ConvNeXt block.

    The parts of block ``d`` lie at index ``d`` of parallel lists, as the published weights are named.

    Args:
        options: what the blocks are made of.
        dim_in: channels of the incoming map.
        drop_paths: stochastic-depth rate of each block.
        use_checkpoint: recompute the activations of each block in the backward pass instead of keeping them.
    """

    def __init__(
        self, options: StageOptions, *, dim_in: int, drop_paths: Sequence[float], use_checkpoint: bool = False
    ) -> None:
        super().__init__()
        dim, depth, letters = options.dim, options.depth, options.letters
        self.letters = letters
        self.use_lpu = options.use_lpu
        self.use_checkpoint = use_checkpoint

        mlp = ConvMLP if options.use_dwc_mlp else MLP
        init = options.layer_scale_value
        self.proj = PointwiseConv(dim_in, dim) if dim_in != dim else nn.Identity()
        self.ln_cnvnxt = nn.ModuleDict({str(d): LayerNorm(dim) for d in range(depth) if letters[d] == "X"})
        self.layer_norms = nn.ModuleList(
            nn.Identity() if letter == "X" else LayerNorm(dim) for letter in letters for _ in range(2)
        )
        self.mlps = nn.ModuleList(mlp(dim, expansion=options.expansion, drop=options.drop_rate) for _ in range(depth))
        self.attns = nn.ModuleList(MIXERS[letter](options) for letter in letters)
        self.drop_paths = nn.ModuleList(DropPath(rate) for rate in drop_paths)
        # A ConvNeXt block has no layer scale; its entries exist, untrained, because published weights name them.
        self.layer_scales = nn.ModuleList(
            LayerScale(dim, init).requires_grad_(letter != "X") if init > 0 else nn.Identity()
            for letter in letters
            for _ in range(2)
        )
        self.local_perception_units = nn.ModuleList(
            LocalPerceptionUnit(dim) for _ in range(depth if options.use_lpu else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for d in range(len(self.letters)):
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(self.block, d, x, use_reentrant=False)
            else:
                x = self.block(d, x)
        return x

    def block(self, d: int, x: Tensor) -> Tensor:
        """Run block ``d`` on a map ``[B, C, H, W]``."""
        drop_path = self.drop_paths[d]
        if self.use_lpu:
            x = self.local_perception_units[d](x)
        if self.letters[d] == "X":
            return drop_path(x, self.mlps[d](self.ln_cnvnxt[str(d)](self.attns[d](x))))
        x = drop_path(x, self.layer_scales[2 * d](self.attns[d](self.layer_norms[2 * d](x))))
        return drop_path(x, self.layer_scales[2 * d + 1](self.mlps[d](self.layer_norms[2 * d + 1](x))))


class DAT(nn.Module):
    """A Vision Transformer with deformable attention, from images ``[B, 3, H, W]`` to logits ``[B, num_classes]``.

    Arguments that hold four values have one per stage. The network runs on any image whose last map has a pixel,
    whatever ``img_size`` it was built for.

    Args:
        img_size: side of the images that the position tables are made for, in pixels.
        patch_size: pixels per pixel of the first map on each axis.
        num_classes: size of the logits.
        expansion: width of the MLPs over that of the stage.
        dim_stem: channels of the stem.
        dims: channels.
        depths: number of blocks.
        stage_spec: the letter of each block, a string or a list of letters per stage; see `models.attention`.
        heads: attention heads.
        heads_q: heads of Q.
        window_sizes: side of the windows of L and S, kernel of X.
        groups: offset groups of D.
        strides: pixels per key of D.
        ksizes: kernel of the offset network of D.
        offset_range_factor: bound of the offsets of D in key cells; negative for unbounded ones.
        use_pes: whether D has a position bias.
        dwc_pes: D takes a depthwise convolution of the queries as its position bias.
        fixed_pes: D takes one bias per query and key.
        log_cpb: D takes the bias from a small network of log-spaced displacements.
        no_offs: D pools the map instead of sampling it at deformed positions.
        sr_ratios: reduction of the keys of P.
        nat_ksizes: window of N.
        nat_rpb: whether N has a table of relative position biases.
        nqs: learned queries of Q.
        ksize_qnas: window of Q.
        qna_activation: ``exp``, ``sigmoid`` or ``linear`` scores of Q.
        use_dwc_mlps: MLPs with a depthwise convolution.
        use_lpus: a local perception unit, a depthwise convolution with a residual, before each block.
        use_conv_patches: stem and downsampling of overlapping 3x3 convolutions.
        layer_scale_values: initial layer scale; none where not positive.
        drop_rate: dropout rate of projections and MLPs.
        attn_drop_rate: probability of dropping an attention weight.
        drop_path_rate: stochastic-depth rate of the last block; rises linearly from 0.
        coordinates: ``dat++``, or ``cvpr22`` for the coordinates of the first paper's weights.
        use_checkpoint: recompute the activations of each block in the backward pass instead of keeping them.

    Raises:
        ValueError: an option is not allowed or contradicts another.
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 4,
        num_classes: int = 1000,
        expansion: int = 4,
        dim_stem: int = 96,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        stage_spec: Sequence[str | Sequence[str]] = ("LD", "LD", "LDLDLD", "LD"),
        heads: Sequence[int] = (3, 6, 12, 24),
        heads_q: Sequence[int] = (6, 12, 24, 48),
        window_sizes: Sequence[int] = (7, 7, 7, 7),
        groups: Sequence[int] = (1, 1, 3, 6),
        strides: Sequence[int] = (1, 1, 1, 1),
        ksizes: Sequence[int] = (9, 7, 5, 3),
        offset_range_factor: Sequence[float] = (1, 2, 3, 4),
        use_pes: Sequence[bool] = (False, False, False, False),
        dwc_pes: Sequence[bool] = (False, False, False, False),
        fixed_pes: Sequence[bool] = (False, False, False, False),
        log_cpb: Sequence[bool] = (False, False, False, False),
        no_offs: Sequence[bool] = (False, False, False, False),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        nat_ksizes: Sequence[int] = (3, 3, 3, 3),
        nat_rpb: bool = True,
        nqs: Sequence[int] = (2, 2, 2, 2),
        ksize_qnas: Sequence[int] = (3, 3, 3, 3),
        qna_activation: str = "exp",
        use_dwc_mlps: Sequence[bool] = (False, False, False, False),
        use_lpus: Sequence[bool] = (False, False, False, False),
        use_conv_patches: bool = False,
        layer_scale_values: Sequence[float] = (-1, -1, -1, -1),
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        coordinates: str = "dat++",
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_network(
            img_size=img_size,
            patch_size=patch_size,
            dim_stem=dim_stem,
            num_classes=num_classes,
            expansion=expansion,
            use_conv_patches=use_conv_patches,
            qna_activation=qna_activation,
            coordinates=coordinates,
            rates={"drop_rate": drop_rate, "attn_drop_rate": attn_drop_rate, "drop_path_rate": drop_path_rate},
        )
        lists = {
            "dim": dims,
            "depth": depths,
            "letters": stage_spec,
            "heads": heads,
            "heads_q": heads_q,
            "window_size": window_sizes,
            "groups": groups,
            "stride": strides,
            "ksize": ksizes,
            "offset_range_factor": offset_range_factor,
            "use_pe": use_pes,
            "dwc_pe": dwc_pes,
            "fixed_pe": fixed_pes,
            "log_cpb": log_cpb,
            "no_off": no_offs,
            "sr_ratio": sr_ratios,
            "nat_ksize": nat_ksizes,
            "nq": nqs,
            "ksize_qna": ksize_qnas,
            "use_dwc_mlp": use_dwc_mlps,
            "use_lpu": use_lpus,
            "layer_scale_value": layer_scale_values,
        }
        stages = split_stages(
            lists,
            map_size=img_size // patch_size,
            expansion=expansion,
            nat_rpb=nat_rpb,
            qna_activation=qna_activation,
            coordinates=coordinates,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
        )
        self.num_classes = num_classes
        self.smallest_image = 1 if use_conv_patches else patch_size << (NUM_STAGES - 1)
        stem = _overlapping_stem if use_conv_patches else _plain_stem
        self.patch_proj = stem(patch_size, dim_stem)
        last = max(sum(depths) - 1, 1)
        rates = iter([drop_path_rate * block / last for block in range(sum(depths))])
        self.stages = nn.ModuleList(
            Stage(
                options,
                dim_in=dim_in,
                drop_paths=list(islice(rates, options.depth)),
                use_checkpoint=use_checkpoint,
            )
            for options, dim_in in zip(stages, (dim_stem, *dims[1:]), strict=True)
        )
        kernel, padding = (3, 1) if use_conv_patches else (2, 0)
        self.down_projs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim_out, kernel, stride=2, padding=padding, bias=False), LayerNorm(dim_out))
            for dim, dim_out in pairwise(dims)
        )
        self.cls_norm = LayerNorm(dims[-1])
        self.cls_head = nn.Linear(dims[-1], num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the layer that gives the logits."""
        return self.cls_head

    def compile_blocks(self, *, backend: str = "inductor") -> None:
        """Compile every mixer and MLP by itself, for inputs of fixed size; parameters keep their names.

        Blocks of one kind and width share their code, so that it takes a fraction of the time of the whole network.
        Raises the process's limit of recompilations, `torch._dynamo.config.recompile_limit`, to the number of shapes.
        Compiled blocks keep for the backward pass what the plain operations keep; ``use_checkpoint`` saves memory.

        Args:
            backend: compiler, as `torch.compile` takes it.
        """
        # Modules of one class share the limit: 4 stages, training and evaluation, whole and partial batches.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for stage in self.stages:
            for module in (*stage.attns, *stage.mlps):
                module.compile(backend=backend, fullgraph=True, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cls_norm(self.forward_features(x)[-1])
        return self.cls_head(x.mean(dim=(2, 3)))

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Return the output of every stage, ``[B, dims[i], H_i, W_i]``, for images ``[B, 3, H, W]``."""
        if min(x.shape[-2:]) < self.smallest_image:
            raise ValueError(
                f"an image of {x.shape[-2]} x {x.shape[-1]} pixels leaves nothing for the last stage; "
                f"give at least {self.smallest_image} x {self.smallest_image}"
            )
        x = self.patch_proj(x.contiguous(memory_format=torch.channels_last))
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(self.down_projs[i - 1](x) if i else x)
            maps.append(x)
        return maps


def _overlapping_stem(patch_size: int, dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, dim // 2, kernel_size=3, stride=patch_size // 2, padding=1),
        LayerNorm(dim // 2),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, kernel_size=3, stride=patch_size // 2, padding=1),
        LayerNorm(dim),
    )


def _plain_stem(patch_size: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size), LayerNorm(dim))
