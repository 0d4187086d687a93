"""Time of whole networks beside models of timm: inference, and forward and backward of a training step.

    python -m benchmarks.model --cfg configs/dat_tiny.yaml --timm swin_tiny_patch4_window7_224 --threads 1

All networks take turns in this process on the same random images. A row shows the best run, by how much the median run
is slower, and the best run over that of the first model of timm.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.memory import peak_memory
from benchmarks.timing import AMP_DTYPES, environment, precision, spread, take_turns
from config import load_config
from models import build_model


def main() -> None:
    """Measure and print the tables."""
    args = _parse_arguments()
    try:
        _print_tables(args)
    except ValueError as error:
        sys.exit(f"error: {error}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", nargs="+", default=[], help="config files")
    parser.add_argument("--timm", nargs="+", default=[], help="names of timm models")
    parser.add_argument("--img-size", type=int, help="side of the images; that of the first config where left out")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", choices=AMP_DTYPES, default="none", help="autocast")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile; ours block by block, those of timm whole"
    )
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each network")
    parser.add_argument("--only", choices=("inference", "training"), help="measure one of the two")
    parser.add_argument("--opts", nargs="+", default=[], help="options of the configs, KEY VALUE ...")
    return parser.parse_args()


def _print_tables(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    networks, size = _build_networks(args, device)
    images = torch.randn(args.batch_size, 3, size, size, device=device)
    print(
        f"{environment(device, args.threads)}; batch {args.batch_size}, {size}x{size}, autocast {args.amp}, "
        f"{'compiled' if args.compile else 'eager'}, best of {args.runs}"
    )
    for task, step in (("inference", infer), ("training", train)):
        if args.only in (None, task):
            _print_table(task, step, networks, images, args)


def _build_networks(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, nn.Module], int]:
    """Return the networks by name, those of timm first, and the side of the images."""
    configs = [load_config(path, args.opts) for path in args.cfg]
    if not configs and not args.img_size:
        raise ValueError("without --cfg, give the side of the images with --img-size")
    size = args.img_size or configs[0].DATA.IMG_SIZE
    ours = {Path(path).stem: build_model(config) for path, config in zip(args.cfg, configs, strict=True)}
    try:
        theirs = {name: timm.create_model(name) for name in args.timm}
    except RuntimeError as error:
        raise ValueError(f"--timm: {error}") from None
    if args.compile:
        for network in ours.values():
            network.compile_blocks()
        for network in theirs.values():
            network.compile(dynamic=False)
    networks = {**theirs, **ours}
    if not networks:
        raise ValueError("nothing to measure; give networks with --cfg and --timm")
    for network in networks.values():
        network.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)
    return networks, size


def infer(network: nn.Module, images: Tensor, amp: str) -> None:
    """Run a network on a batch as for predictions."""
    network.eval()
    with torch.inference_mode(), precision(amp, images.device):
        network(images)


def train(network: nn.Module, images: Tensor, amp: str) -> None:
    """Run a network on a batch forward and backward, as in training but for the update of the weights."""
    network.train().zero_grad()
    with precision(amp, images.device):
        loss = network(images).float().logsumexp(-1).mean()
    loss.backward()


def _print_table(
    task: str,
    step: Callable[[nn.Module, Tensor, str], None],
    networks: dict[str, nn.Module],
    images: Tensor,
    args: argparse.Namespace,
) -> None:
    rivals = {name: lambda network=network: step(network, images, args.amp) for name, network in networks.items()}
    seconds = take_turns(rivals, runs=args.runs, device=images.device)
    on_gpu = images.is_cuda
    base = min(next(iter(seconds.values())))
    print(f"\n| {task} | best, ms | median over best | images/s | ratio |" + (" peak memory, MiB |" if on_gpu else ""))
    print("|---|---:|---:|---:|---:|" + ("---:|" if on_gpu else ""))
    for name, runs in seconds.items():
        best = min(runs)
        row = f"| {name} | {best * 1e3:.0f} | +{spread(runs)} | {len(images) / best:.1f} | {best / base:.3f} |"
        print(
            row + (f" {peak_memory(rivals[name], networks[name], images.device):.0f} |" if on_gpu else ""), flush=True
        )


if __name__ == "__main__":
    main()
