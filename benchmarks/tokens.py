"""Time of the attentions of the Vision Transformer against the number of tokens.

    python -m benchmarks.tokens --plot benchmarks/tokens.png

One layer, one image, inference. The last row of the table has the exponent with which time grows with the number of
tokens, from the last two rows.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin("matplotlib")

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.timing import environment, spread, take_turns
from data.wording import counted
from models.attention.patch_deformable import PatchDeformableAttention
from models.attention.performer import PerformerAttention
from models.attention.tokens import SoftmaxAttention
from models.ops.locality import Window

SIDES = [14, 28, 56, 112]  # 196 to 12,544 patches
FEATURES = 64


def main() -> None:
    """Measure, print the table and draw the figure."""
    args = _parse_arguments()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    layer = f"{args.dim} channels, {counted(args.heads, 'head')}"
    print(f"{environment(device, args.threads)}; {layer}, best of {args.runs}\n")
    print(f"| tokens | {' | '.join(f'{name}, ms' for name in KINDS)} |")
    print(f"|---:|{'---:|' * len(KINDS)}")
    times = {name: [] for name in KINDS}
    for side in args.sides:
        candidates = {name: _run(name, side, args, device) for name in KINDS}
        seconds = take_turns(candidates, runs=args.runs, device=device)
        for name in KINDS:
            times[name].append(min(seconds[name]) * 1e3)
        cells = [f"{times[name][-1]:.1f} (+{spread(seconds[name])})" for name in KINDS]
        print(f"| {side**2:,} | {' | '.join(cells)} |", flush=True)
    powers = [f"{slope(args.sides, times[name]):.2f}" for name in KINDS]
    print(f"| power | {' | '.join(powers)} |")
    if args.plot:
        _plot(args.plot, args.sides, times)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", type=int, default=SIDES, help="sides of the square of patches")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each attention")
    parser.add_argument("--plot", type=Path, help="path of the figure")
    return parser.parse_args()


def _performer(*args: object, window: Window | None = None, **options: object) -> nn.Module:
    layer = PerformerAttention(*args, num_features=FEATURES, form="sums", **options)
    layer.window = window
    return layer


KINDS = {
    "softmax": SoftmaxAttention,
    "performer": _performer,
    "performer, band": partial(_performer, window=Window("sequence", 8)),
    "performer, box": partial(_performer, window=Window("box", 2)),
    "deformable": PatchDeformableAttention,
}


def _run(name: str, side: int, args: argparse.Namespace, device: torch.device) -> partial:
    torch.manual_seed(0)
    layer = KINDS[name](args.dim, heads=args.heads, grid=(side, side), prefix=0).to(device).eval()
    x = torch.randn(1, side * side, args.dim, device=device)
    return partial(_infer, layer, x)


@torch.inference_mode()
def _infer(layer: nn.Module, x: torch.Tensor) -> None:
    layer(x)


def slope(sides: list[int], times: list[float]) -> float:
    """Return the exponent with which time grows with the number of tokens, from the last two points."""
    if len(sides) < 2:
        return math.nan
    return math.log(times[-1] / times[-2]) / (2 * math.log(sides[-1] / sides[-2]))


def _plot(path: Path, sides: list[int], times: dict[str, list[float]]) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in times.items():
        axes.loglog([side**2 for side in sides], values, marker="o", label=name)
    axes.set(xlabel="tokens", ylabel="ms, one layer, one image")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
