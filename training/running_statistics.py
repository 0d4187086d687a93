"""The running statistics of batch norms, which every process collects from its own images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from utils import sum_over_ranks


class RunningStatistics:
    """The running means and variances of a network, the same in all processes between updates.

    All processes then evaluate the network that is saved, and a resumed run continues exactly.

    Args:
        network: with its initial weights, the same in all processes; it need not have such statistics.
    """

    def __init__(self, network: nn.Module) -> None:
        names = ("running_mean", "running_var")
        self._buffers = [buffer for name, buffer in network.named_buffers() if name.endswith(names)]
        counts = [buffer for name, buffer in network.named_buffers() if name.endswith("num_batches_tracked")]
        self._collected = self._buffers + counts
        self._agreed = self._gather()

    @contextmanager
    def kept(self, *, enabled: bool) -> Iterator[None]:
        """Return the context of a backward pass that recomputes activations, and would count its batch a second time.

        Args:
            enabled: whether activations are recomputed.
        """
        before = [buffer.clone() for buffer in self._collected] if enabled else []
        yield
        for buffer, value in zip(self._collected, before, strict=False):
            buffer.copy_(value)

    def agree(self, world_size: int, *, broken: Tensor) -> None:
        """Average what the processes have collected in an update, or drop it.

        Args:
            world_size: number of processes.
            broken: above 0 if the update was not finite; the same in all processes.
        """
        if not self._buffers:
            return
        collected = self._gather()
        if world_size > 1:  # the differences, so that the statistics of frozen norms stay exactly the same
            collected = self._agreed + sum_over_ranks(collected - self._agreed) / world_size
        self._agreed = torch.where(broken > 0, self._agreed, collected)
        for buffer, values in zip(self._buffers, self._agreed.split([x.numel() for x in self._buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))

    def _gather(self) -> Tensor:
        return torch.cat([buffer.detach().flatten() for buffer in self._buffers]) if self._buffers else torch.empty(0)
