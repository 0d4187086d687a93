"""Sampling positions and attention weights of the deformable attentions of a network, for figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.attention.deformable import DeformableAttention, Deformation

Place = tuple[float, float]
# The name of a block of a DAT, which may be the backbone of a detector or segmenter.
_BLOCK = re.compile(r"(?:^|\.)stages\.(\d+)\.attns\.(\d+)$")


@dataclass(frozen=True)
class BlockAttention:
    """Sampling positions and attention weights of one deformable attention for one image.

    Places are (y, x) as shares of the image's height and width: (0, 0) is its top left corner, (1, 1) the bottom right.

    Attributes:
        name: dotted name of the module.
        map_size: height and width of the map of queries.
        key_size: height and width of the grid of keys, ``Hk * Wk = Ns``.
        reference: undeformed places of the keys, ``[Ns, 2]``.
        places: where each group samples its keys, ``[groups, Ns, 2]``; some may be outside the image.
        weights: attention weights ``[heads, H*W, Ns]``, which add up to 1 over the keys.
    """

    name: str
    map_size: tuple[int, int]
    key_size: tuple[int, int]
    reference: NDArray[np.float32]
    places: NDArray[np.float32]
    weights: NDArray[np.float32]

    @property
    def title(self) -> str:
        """The name of the block, counted from 1: ``stage 3, block 2``."""
        found = _BLOCK.search(self.name)
        return f"stage {int(found[1]) + 1}, block {int(found[2]) + 1}" if found else self.name

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return len(self.weights)

    @property
    def groups(self) -> int:
        """Number of offset groups, each used by ``heads / groups`` consecutive heads."""
        return len(self.places)

    def group_of(self, head: int) -> int:
        """Return the offset group of a head."""
        return head * self.groups // self.heads

    def query_at(self, place: Place) -> int:
        """Return the index of the query whose cell contains a point."""
        (y, x), (height, width) = place, self.map_size
        return min(int(y * height), height - 1) * width + min(int(x * width), width - 1)

    def importance(self) -> NDArray[np.float32]:
        """Return the share of the attention that each key of each group receives, averaged over queries and heads.

        Returns:
            ``[groups, Ns]``; the keys of a group add up to 1 (drawn as in the figures of DAT, arXiv 2201.00520).
        """
        return self.weights.mean(1).reshape(self.groups, -1, self.weights.shape[-1]).mean(1)


@torch.no_grad()
def inspect_blocks(
    network: nn.Module, image: Tensor, *, stages: Sequence[int] = (), every_block: bool = False
) -> list[BlockAttention]:
    """Return sampling positions and attention weights of the deformable attentions of a network.

    Args:
        network: in evaluation mode.
        image: normalised, ``[3, H, W]``.
        stages: counted from 1; if empty, all that have deformable attention.
        every_block: every deformable block of a stage instead of its last one.

    Raises:
        ValueError: a stage has no deformable attention, or the whole network has none.
    """
    modules = _choose(network, stages, every_block=every_block)
    found: dict[str, BlockAttention] = {}

    def keep(module: DeformableAttention, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        found[names[module]] = _to_block_attention(names[module], tuple(x.shape[-2:]), module.inspect(x))

    names = {module: name for name, module in modules.items()}
    hooks = [module.register_forward_pre_hook(keep) for module in names]
    try:
        network(image.unsqueeze(0))
    finally:
        for hook in hooks:
            hook.remove()
    return [found[name] for name in modules]


def _choose(network: nn.Module, stages: Sequence[int], *, every_block: bool) -> dict[str, DeformableAttention]:
    """Return the deformable attentions by name, those of the last blocks of each stage unless `every_block`."""
    by_stage: dict[str, dict[str, DeformableAttention]] = {}
    for name, module in network.named_modules():
        if isinstance(module, DeformableAttention):
            block = _BLOCK.search(name)
            by_stage.setdefault(str(int(block[1]) + 1) if block else name, {})[name] = module
    if not by_stage:
        raise ValueError("this network has no deformable attention, the letter D; there is nothing to draw")
    wanted = [str(stage) for stage in stages] or list(by_stage)
    missing = [stage for stage in wanted if stage not in by_stage]
    if missing:
        raise ValueError(f"stage {missing[0]} has no deformable attention; choose from {', '.join(by_stage)}")
    chosen = {}
    for stage in wanted:
        blocks = list(by_stage[stage].items())
        chosen.update(blocks if every_block else blocks[-1:])
    return chosen


def _to_block_attention(name: str, map_size: tuple[int, int], seen: Deformation) -> BlockAttention:
    size = torch.tensor(map_size)

    def share(points: Tensor) -> NDArray[np.float32]:
        # -1 and +1 are the centres of the corner pixels of the map.
        return (((points.float().cpu() + 1) / 2 * (size - 1) + 0.5) / size).numpy()

    weights = seen.weights[0].float().cpu().numpy()
    reference, places = share(seen.reference), share(seen.positions[0])
    return BlockAttention(name, map_size, tuple(seen.key_size), reference, places, weights)
