"""The accuracy of a short run stays within the spread of seeds.

The bounds are the mean of twenty seeds, 0 to 19, and four standard deviations to each side. What they catch was planted
and measured, by the slow test below. Weight decay is high here, so that the position tables, which it must leave alone,
would show it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.launched import Job
from tests.runs import read_metrics, write_config

# 145 updates of 48 digits, 16 x 16 pixels: about ten seconds.
RECIPE = {
    "DATA": {"BATCH_SIZE": 48, "IMG_SIZE": 16},
    "MODEL": {
        "DAT": {
            "img_size": 16,
            "patch_size": 2,
            "dim_stem": 16,
            "dims": [16, 32, 32, 32],
            "heads": [2, 4, 4, 4],
            "groups": [1, 2, 2, 2],
            "use_conv_patches": False,
            "use_lpus": [False] * 4,
            "use_dwc_mlps": [False] * 4,
            "drop_path_rate": 0.1,
        }
    },
    "TRAIN": {"EPOCHS": 5, "WEIGHT_DECAY": 8.0, "LR_SCHEDULER": {"WARMUP_PREFIX": False}},
    "AUG": {"HFLIP": 0.5, "SCALE": [0.5, 1.0]},
}
BOUNDS = {
    "held-out accuracy": (71.9, 90.3),
    "held-out loss": (1.140, 1.310),
    "training loss": (1.596, 1.680),
    "position tables": (0.0128, 0.0190),
}


def learn(folder: Path, *words: str, prepare: Callable[[], None] | None = None) -> dict[str, float]:
    """Train with the recipe and return the values of `BOUNDS`; `prepare` is called first, in the process of the run."""
    config = write_config(folder, **RECIPE)
    job = Job(["--cfg", config, "--output", folder / "output", *words], folder / "console.txt", prepare=prepare)
    assert job.wait() == [0], job.console()
    run = folder / "output" / "tiny" / "default"
    evaluated = read_metrics(run, "eval")[-1]
    losses = [row["loss"] for row in read_metrics(run, "train")][-5:]
    weights = torch.load(run / "last.pth", weights_only=True)["model"]
    tables = torch.cat([table.flatten() for name, table in weights.items() if "rpe_table" in name or "rpb" in name])
    return {
        "held-out accuracy": evaluated["top1"],
        "held-out loss": evaluated["loss"],
        "training loss": sum(losses) / len(losses),
        "position tables": tables.square().mean().sqrt().item(),
    }


def outside(measured: dict[str, float]) -> dict[str, float]:
    """Return the values outside their bounds."""
    return {name: value for name, value in measured.items() if not BOUNDS[name][0] <= value <= BOUNDS[name][1]}


def test_a_short_run_learns_what_it_should(tmp_path: Path) -> None:
    assert outside(learn(tmp_path)) == {}


def decay_tables() -> None:
    import optimizer

    optimizer.no_weight_decay = lambda model: set()


def invert_drop_path() -> None:
    from models.layers import Residual

    def forward(self: Residual, x: Tensor, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x + branch
        return x + branch * torch.empty(x.shape[0], 1, 1, 1).bernoulli_(self.rate) / self.rate

    Residual.forward = forward


def flip_rows() -> None:
    flip = Tensor.flip
    Tensor.flip = lambda self, *dims: flip(self, 0) if dims == (1,) and self.ndim == 3 else flip(self, *dims)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [decay_tables, invert_drop_path, flip_rows], ids=lambda fault: fault.__name__)
def test_planted_fault_exceeds_the_bounds(tmp_path: Path, fault: Callable[[], None]) -> None:
    assert outside(learn(tmp_path, prepare=fault))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.1, 10])
def test_wrong_learning_rate_exceeds_the_bounds(tmp_path: Path, factor: float) -> None:
    measured = learn(tmp_path, "--opts", "TRAIN.BASE_LR", str(2e-2 * factor))
    assert outside(measured)
    assert all(math.isfinite(value) for value in measured.values())
