"""Time of complete networks compared with timm models: inference, and forward and backward of a training step.

    python -m benchmarks.model --cfg configs/dat_tiny.yaml --timm swin_tiny_patch4_window7_224 convnext_tiny \\
        --threads 1 2 --batch-size 1 8 32 --amp none bf16 --compile

measures every combination of the arguments. All networks of a row take turns in this process on the same random images.
A row shows the best run of each, how much slower the median run is, and the best run divided by that of the first timm
model. The floor is the time that the matrix products of the first network would take at the throughput of one large
product; a training step has three times as many.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin()

import timm
import torch
from torch import Tensor, nn

from benchmarks.timing import AMP_DTYPES, environment, precision, spread, take_turns
from config import load_config
from models.build import build_model
from tools.arguments import add_opts
from tools.complexity import count_macs

SIDE = 1024  # side of the matrices for measuring the floor


def main() -> None:
    """Measure and print the table."""
    args = _parse_arguments()
    try:
        _print_table(args)
    except ValueError as error:
        startup.refuse(error)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", nargs="+", default=[], help="config files")
    parser.add_argument("--timm", nargs="+", default=[], help="names of timm models")
    parser.add_argument("--img-size", type=int, help="side of the images (default: size of the first config)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="CPU threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", choices=AMP_DTYPES, nargs="+", default=["none"], help="autocast")
    parser.add_argument(
        "--compile", action="store_true", help="also compiled networks; ours block by block, those of timm as a whole"
    )
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each network")
    parser.add_argument("--only", choices=TASKS, help="measure only one task")
    add_opts(parser, of="the configs")
    return parser.parse_args()


def _print_table(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device = torch.device(args.device)
    networks, size = _build_networks(args, device)
    first, *others = networks
    macs = count_macs(networks[first], size)
    print(f"{environment(device, max(args.threads))}; {size[0]}x{size[1]}, best of {args.runs}\n")
    columns = ["threads", "batch", "autocast", "task", "mode", "floor, ms", f"{first}, ms"]
    columns += [column for name in others for column in (f"{name}, ms", "ratio")]
    print(f"| {' | '.join(columns)} |\n|---:|---:|---|---|---|{'---:|' * (len(columns) - 5)}")
    for threads, compiled in product(args.threads, (False, True) if args.compile else (False,)):
        torch.set_num_threads(threads)
        running = _compiled(networks) if compiled else networks
        rates = {amp: _mac_rate(amp, device) for amp in args.amp}
        for batch, amp, task in product(args.batch_size, args.amp, [args.only] if args.only else TASKS):
            images = torch.randn(batch, 3, *size, device=device)
            candidates = {name: partial(TASKS[task], network, images, amp) for name, network in running.items()}
            seconds = take_turns(candidates, runs=args.runs, device=device)
            floor = batch * macs * (1 if task == "inference" else 3) / rates[amp]
            cells = [threads, batch, amp, task, "compiled" if compiled else "eager", f"{floor * 1e3:.0f}"]
            for name, runs in seconds.items():
                cells.append(f"{min(runs) * 1e3:.0f} +{spread(runs)}")
                if name != first:
                    cells.append(f"{min(runs) / min(seconds[first]):.2f}")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _build_networks(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, nn.Module], tuple[int, int]]:
    """Return the networks by name, those of timm first, and height and width of the images."""
    configs = [load_config(path, args.opts) for path in args.cfg]
    if not configs and not args.img_size:
        raise ValueError("without --cfg, give the side of the images with --img-size")
    size = (args.img_size, args.img_size) if args.img_size else configs[0].image_size
    ours = {Path(path).stem: build_model(config) for path, config in zip(args.cfg, configs, strict=True)}
    try:
        theirs = {name: timm.create_model(name) for name in args.timm}
    except RuntimeError as error:
        raise ValueError(f"--timm: {error}") from None
    networks = {**theirs, **ours}
    if not networks:
        raise ValueError("nothing to measure; give networks with --cfg and --timm")
    for network in networks.values():
        network.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)
    return networks, size


def _compiled(networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return copies compiled for the current number of threads, which is part of the generated code."""
    torch.compiler.reset()
    copies = copy.deepcopy(networks)
    for network in copies.values():
        if hasattr(network, "compile_blocks"):
            network.compile_blocks()
        else:
            network.compile(dynamic=False)
    return copies


def _mac_rate(amp: str, device: torch.device) -> float:
    """Return the multiply-accumulates per second of one large product."""
    a, b = torch.randn(2, SIDE, SIDE, device=device, dtype=AMP_DTYPES[amp] or torch.float32)
    return SIDE**3 / min(take_turns({"product": lambda: a @ b}, runs=3, device=device)["product"])


def infer(network: nn.Module, images: Tensor, amp: str) -> None:
    """Run inference on a batch."""
    network.eval()
    with torch.inference_mode(), precision(amp, images.device):
        network(images)


def train(network: nn.Module, images: Tensor, amp: str) -> None:
    """Run forward and backward on a batch, as in training but without the update."""
    network.train().zero_grad()
    with precision(amp, images.device):
        loss = network(images).float().logsumexp(-1).mean()
    loss.backward()


TASKS = {"inference": infer, "training": train}


if __name__ == "__main__":
    main()
