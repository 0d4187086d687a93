"""Images per second and peak memory of networks on a GPU, in one run, written to `benchmarks/gpu.md`.

    make bench-gpu

first compares the kernels with the plain operations on the device, then runs this. Every network runs in bfloat16
autocast and channels-last, eager and compiled, inference and a training step without the update; ours also with the
plain operations, to show the effect of the kernels. The networks of one size take turns in one process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin()

import timm
import torch
from torch import nn

from benchmarks.memory import peak_memory
from benchmarks.model import infer, train
from benchmarks.timing import environment, spread, take_turns
from config import load_config
from models.build import build_model
from tools.complexity import with_plain_operations

ROOT = Path(__file__).resolve().parents[1]
SETS = {
    224: (["configs/dat_tiny.yaml"], ["swin_tiny_patch4_window7_224", "convnext_tiny"]),
    384: (["configs/dat_base_384.yaml"], ["swin_base_patch4_window12_384"]),
}


def main() -> None:
    """Measure, print and write the tables."""
    args = _parse_arguments()
    if not torch.cuda.is_available():
        startup.refuse("PyTorch sees no GPU here; benchmarks.launches counts kernels and bytes without one")
    device = torch.device("cuda")
    torch.manual_seed(0)
    lines = [
        "# On a GPU",
        "",
        f"`make bench-gpu`: {environment(device, 1)}; bfloat16 autocast, channels-last, best of {args.runs}.",
    ]
    for size in args.sizes:
        for batch in args.batch_sizes:
            lines += ["", *table(networks(size, device), size, batch, device, args.runs)]
    text = "\n".join(lines) + "\n"
    print(text)
    args.output.write_text(text, encoding="utf-8")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=SETS, default=list(SETS), help="sides of the images")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--runs", type=int, default=20, help="timed runs of each network")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "gpu.md", help="file to write")
    return parser.parse_args()


def networks(size: int, device: torch.device) -> dict[str, nn.Module]:
    """Return the networks of a size by name: each eager and compiled, ours with the plain operations, too."""
    configs, names = SETS[size]
    makers = {name: partial(timm.create_model, name) for name in names}
    makers |= {Path(path).stem: partial(build_model, load_config(str(ROOT / path))) for path in configs}
    ours = {Path(path).stem for path in configs}
    made = {}
    for name, make in makers.items():
        made[name], made[f"{name}, compiled"] = make(), make()
        if name in ours:
            made[f"{name}, compiled"].compile_blocks()
            made[f"{name}, plain operations"] = with_plain_operations(make())
        else:
            made[f"{name}, compiled"].compile(dynamic=False)
    return {name: network.to(device, memory_format=torch.channels_last) for name, network in made.items()}


def table(made: dict[str, nn.Module], size: int, batch: int, device: torch.device, runs: int) -> list[str]:
    """Return the lines of the table of one size and batch."""
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    lines = [
        f"| {size}x{size}, batch {batch} | task | images/s | median over best | peak memory, MiB |",
        "|---|---|---:|---:|---:|",
    ]
    for task, step in (("inference", infer), ("training", train)):
        candidates = {name: partial(step, network, images, "bf16") for name, network in made.items()}
        candidates = {name: candidate for name, candidate in candidates.items() if _fits(candidate)}
        for name, seconds in take_turns(candidates, runs=runs, device=device).items():
            memory = peak_memory(candidates[name], made[name], device)
            lines.append(f"| {name} | {task} | {batch / min(seconds):.0f} | +{spread(seconds)} | {memory:.0f} |")
        lines += [f"| {name} | {task} | out of memory | | |" for name in made if name not in candidates]
    return lines


def _fits(action: Callable[[], object]) -> bool:
    """Run an action once, and return whether there was enough memory."""
    try:
        action()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


if __name__ == "__main__":
    main()
