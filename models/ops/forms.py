"""What the choice between the forms of an operation depends on."""

from __future__ import annotations

import torch
from torch import Tensor


def runs_by_hand(x: Tensor) -> bool:
    """Return whether forms with a backward of their own, written for the caches of a CPU, suit where ``x`` is used.

    Under autocast and in a compiled graph the plain ones do better: the precision of each product and the fusion of
    elementwise steps are then decided elsewhere.
    """
    by_eager_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return by_eager_cpu and x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
