"""Time and peak memory of backbones at the image size of detectors: feature maps, and their forward and backward.

    python -m benchmarks.backbones --models swin_tiny_patch4_window7_224 dat_tiny --threads 2

Models are those of timm, DAT included, with `features_only`. They take turns in this process on one random image; the
best run counts. The default size is that of detectors, 800 x 1,333 pixels, padded to a multiple of 32. Peak memory is
measured in a new process per model and task, as the increase over that before the call: resident memory on a CPU (Linux
only), allocated memory on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin()

import timm
import torch
from torch import Tensor, nn

import models  # noqa: F401  registers DAT with timm
from benchmarks.memory import peak_in_new_process, peak_increase
from benchmarks.timing import AMP_DTYPES, environment, precision, spread, take_turns


def main() -> None:
    """Measure and print the table."""
    args = _parse_arguments()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.peak:
        name, task = args.peak
        print(peak_increase(partial(TASKS[task], *_sample(name, args, device), args.amp), device))
        return
    height, width = args.img_size
    print(
        f"{environment(device, args.threads)}; one image of {height}x{width}, autocast {args.amp}, "
        f"best of {args.runs}, spread of the median over the best\n"
    )
    print("| task | model | ms | relative to the first | peak, GiB |\n|---|---|---:|---:|---:|")
    samples = {name: _sample(name, args, device) for name in args.models}
    for task, action in TASKS.items():
        candidates = {name: partial(action, *sample, args.amp) for name, sample in samples.items()}
        seconds = take_turns(candidates, runs=args.runs, device=device)
        for name, runs in seconds.items():
            best, ratio = f"{min(runs) * 1e3:.0f} ({spread(runs)})", min(runs) / min(seconds[args.models[0]])
            peak = peak_in_new_process("benchmarks.backbones", name, task) / 2**10
            print(f"| {task} | {name} | {best} | {ratio:.2f} | {peak:.2f} |", flush=True)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["swin_tiny_patch4_window7_224", "dat_tiny"], metavar="NAME")
    parser.add_argument("--img-size", type=int, nargs=2, default=[800, 1344], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", choices=AMP_DTYPES, default="none", help="autocast")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each model")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "TASK"), help="only print one peak memory, MiB")
    return parser.parse_args()


def _sample(name: str, args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Return a backbone and a random image for it."""
    torch.manual_seed(0)
    any_size = {"strict_img_size": False} if name.startswith("swin") else {}
    backbone = timm.create_model(name, features_only=True, **any_size).to(device)
    return backbone, torch.randn(1, 3, *args.img_size, device=device)


def _inference(backbone: nn.Module, image: Tensor, amp: str) -> None:
    backbone.eval()
    with torch.inference_mode(), precision(amp, image.device):
        backbone(image)


def _training(backbone: nn.Module, image: Tensor, amp: str) -> None:
    backbone.train().zero_grad()
    with precision(amp, image.device):
        maps = backbone(image)
    sum(feature.float().square().mean() for feature in maps).backward()


TASKS = {"inference": _inference, "training": _training}


if __name__ == "__main__":
    main()
