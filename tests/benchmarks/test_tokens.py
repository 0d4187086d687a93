"""Cost of the attentions of the Vision Transformer, in counted operations, independent of other processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import tokens
from tests.runs import printed_by


class Numbers(TorchDispatchMode):
    """Counts the numbers that operations write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not function.is_view:
            self.count += out.numel()
        return out


@pytest.mark.parametrize("name", [name for name in tokens.KINDS if name != "softmax"])
def test_numbers_written_grow_with_the_number_of_tokens(name: str) -> None:
    counts = []
    for side in (16, 32):
        layer = tokens.KINDS[name](24, heads=2, grid=(side, side), prefix=0)
        with Numbers() as numbers, torch.no_grad():
            layer(torch.randn(1, side * side, 24))
        counts.append(numbers.count)
    assert counts[1] / counts[0] == pytest.approx(4, rel=0.1)


def test_the_table_and_the_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = tmp_path / "tokens.png"
    options = ["--sides", "4", "8", "--dim", "12", "--heads", "2", "--runs", "1", "--plot", str(figure)]
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    lines = printed_by(tokens.main, *options).splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["16", "64", "power"]
    assert figure.stat().st_size > 1000
