"""Numbers of objects averaged over ranks, by which losses are divided."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_ranks_factor(objects: int, device: torch.device) -> Tensor:
    """Return the factor that turns a loss divided by the objects of a rank into one divided by their mean over ranks.

    The gradient, which is averaged over ranks, is then that of one process with all images. Every rank must call it.

    Args:
        objects: number of objects of this rank.
        device: device of the factor.
    """
    own = torch.tensor(objects, device=device)
    return own.clamp(min=1) / mean_over_ranks(own).clamp(min=1)


def mean_over_ranks(count: Tensor) -> Tensor:
    """Return the mean over all ranks of numbers of any shape, in float32; every rank must call it."""
    count = count.to(torch.float32, copy=True)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(count)
        count /= dist.get_world_size()
    return count
