"""Time of one network against the side of the images, compared with the number of pixels.

    python -m benchmarks.sizes --cfg configs/dat_tiny.yaml --sizes 224 320 448 640 --plot benchmarks/sizes.png

The sizes take turns in this process; a point is the best run. The network is that of the config, with tables for the
size of the config.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin("matplotlib")

import torch
from matplotlib.figure import Figure

from benchmarks.model import infer, train
from benchmarks.timing import environment, take_turns
from config import load_config
from models.build import build_model


def main() -> None:
    """Measure, print the table and draw the plot."""
    args = _parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    try:
        network = build_model(load_config(args.cfg)).to(device)
    except ValueError as error:
        startup.refuse(error)
    images = {size: torch.randn(args.batch_size, 3, size, size, device=device) for size in args.sizes}
    title = f"{Path(args.cfg).stem}, {environment(device, args.threads)}; batch {args.batch_size}, best of {args.runs}"
    print(f"{title}\n\n| task | side | ms | time per pixel, relative to the first |\n|---|---:|---:|---:|")
    best = {}
    for task, step in (("inference", infer), ("forward and backward", train)):
        candidates = {size: partial(step, network, batch, "none") for size, batch in images.items()}
        seconds = take_turns(candidates, runs=args.runs, device=device)
        best[task] = {size: min(runs) for size, runs in seconds.items()}
        first = args.sizes[0]
        for size, value in best[task].items():
            per_pixel = value / best[task][first] / (size / first) ** 2
            print(f"| {task} | {size} | {value * 1e3:.0f} | {per_pixel:.3f} |", flush=True)
    if args.plot:
        _draw(best, title, args.plot)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, help="config file")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[224, 320, 448, 640], help="sides, the first is the base"
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each size")
    parser.add_argument("--plot", type=Path, help="image file to draw")
    return parser.parse_args()


def _draw(best: dict[str, dict[int, float]], title: str, path: Path) -> None:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for task, seconds in best.items():
        first = next(iter(seconds))
        (line,) = axes.plot(list(seconds), [value * 1e3 for value in seconds.values()], "o-", label=task)
        pixels = [seconds[first] * 1e3 * (size / first) ** 2 for size in seconds]
        axes.plot(list(seconds), pixels, ":", color=line.get_color(), label="in proportion to pixels")
    axes.set(xscale="log", yscale="log", xlabel="side of the images, pixels", ylabel="ms", xticks=list(seconds))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.set_title(title.replace("; ", "\n"), fontsize=7)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
