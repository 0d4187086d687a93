"""Images per second and peak memory of networks on a GPU, in one run, written to `benchmarks/gpu.md`.

    make bench-gpu

first compares the kernels with the plain operations on the device, then runs this. Every network runs in bfloat16
autocast and channels-last, eager and compiled, inference and a training step without the update; ours also with
PyTorch's own operations only, to show the effect of the kernels. The networks of one size take turns in one process.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin()

import timm
import torch
from torch import Tensor, nn

from benchmarks.memory import peak_memory
from benchmarks.model import infer, train
from benchmarks.timing import environment, spread, take_turns
from config import load_config
from models.build import build_model
from models.ops import forms

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
    if args.check:
        return
    torch.backends.cudnn.benchmark = True  # as in training
    torch.manual_seed(0)
    device = torch.device("cuda")
    setting = f"{environment(device, 1)}; bfloat16 autocast, channels-last, best of {args.runs}."
    text = f"# On a GPU\n\n`make bench-gpu`: {setting}\n"
    print(text)
    for size in args.sizes:
        made = networks(size, device)
        for batch in args.batch_sizes:
            lines = "\n".join(table(made, size, batch, device, args.runs)) + "\n"
            print(lines, flush=True)
            text += f"\n{lines}"
            args.output.write_text(text, encoding="utf-8")
        del made
        torch.compiler.reset()
        _free_memory()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=SETS, default=list(SETS), help="sides of the images")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--runs", type=int, default=20, help="timed runs of each network")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "gpu.md", help="file to write")
    parser.add_argument("--check", action="store_true", help="only check that there is a GPU")
    return parser.parse_args()


def networks(size: int, device: torch.device) -> dict[str, nn.Module]:
    """Return the networks of a size by name: each eager and compiled, ours without kernels, too."""
    configs, names = SETS[size]
    makers = {name: partial(timm.create_model, name) for name in names}
    makers |= {Path(path).stem: partial(build_model, load_config(str(ROOT / path))) for path in configs}
    ours = {Path(path).stem for path in configs}
    made = {}
    for name, make in makers.items():
        made[name], made[f"{name}, compiled"] = make(), make()
        if name in ours:
            made[f"{name}, compiled"].compile_blocks()
            made[f"{name}, plain operations"] = WithoutKernels(make())
        else:
            made[f"{name}, compiled"].compile(dynamic=False)
    return {name: network.to(device, memory_format=torch.channels_last) for name, network in made.items()}


class WithoutKernels(nn.Module):
    """A network that runs PyTorch's own operations, as all networks do with `DAT_PLAIN=1`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        with mock.patch.object(forms, "PLAIN", True):
            return self.network(images)


def table(made: dict[str, nn.Module], size: int, batch: int, device: torch.device, runs: int) -> list[str]:
    """Return the lines of the table of one size and batch; networks that fail are at the end, with the reason."""
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    lines = [
        f"| {size}x{size}, batch {batch} | task | images/s | median over best | peak memory, MiB |",
        "|---|---|---:|---:|---:|",
    ]
    for task, step in (("inference", infer), ("training", _train)):
        candidates = {name: partial(step, network, images, "bf16") for name, network in made.items()}
        problems = {name: _problem(candidate, device) for name, candidate in candidates.items()}
        running = {name: candidate for name, candidate in candidates.items() if not problems[name]}
        for name, seconds in take_turns(running, runs=runs, device=device).items():
            _free_memory()
            memory = peak_memory(running[name], made[name], device)
            lines.append(f"| {name} | {task} | {batch / min(seconds):.0f} | +{spread(seconds)} | {memory:.0f} |")
        lines += [f"| {name} | {task} | {problem} | | |" for name, problem in problems.items() if problem]
    return lines


def _train(network: nn.Module, images: Tensor, amp: str) -> None:
    """Run a training step and free the gradients, which would leave less memory to the other networks."""
    try:
        train(network, images, amp)
    finally:
        network.zero_grad()


def _problem(action: Callable[[], object], device: torch.device) -> str:
    """Run an action once, and return in one line why it failed; nothing if it did not."""
    problem = ""
    try:
        take_turns({"": action}, runs=0, device=device)  # waits for the GPU, which reports errors late
    except torch.OutOfMemoryError:
        problem = "out of memory"
    except Exception as error:  # those of PyTorch, its compiler and Triton have no common class
        problem = f"{type(error).__name__}: {error}".splitlines()[0].replace("|", r"\|")
    _free_memory()
    return problem


def _free_memory() -> None:
    """Return memory that nothing uses to the GPU, also that of compiled networks and failed runs: reference cycles."""
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
