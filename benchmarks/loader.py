"""Images per second of the training loader, beside a plain torchvision `ImageFolder` with the same transform.

    python -m benchmarks.loader --cfg configs/dat_tiny.yaml --data-path FOLDER --workers 0 2 4

Both loaders of a row take turns in this process, over the same images in the same order. The table shows the best run
of each, and its slowest as a share of that.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import PIL
import timm
import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from yacs.config import CfgNode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import load_config
from data.build import build_train_loader, open_dataset


def main() -> None:
    """Measure and print the table."""
    args = _parse_arguments()
    try:
        config = load_config(args.cfg, [*args.opts, "DATA.DATASET", "imagenet", "DATA.DATA_PATH", args.data_path])
        _print_table(config, args)
    except ValueError as error:
        sys.exit(f"error: {error}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, help="config file: size, batch, transforms")
    parser.add_argument("--data-path", default=os.environ.get("DATA_PATH", ""), help="holds train/<class>/*")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="numbers of workers to measure")
    parser.add_argument("--images", type=int, default=1000, help="images of a run, after those that warm it up")
    parser.add_argument("--runs", type=int, default=3, help="runs of each loader")
    parser.add_argument("--opts", nargs="+", default=[], help="options of the config, KEY VALUE ...")
    return parser.parse_args()


def _print_table(config: CfgNode, args: argparse.Namespace) -> None:
    print(
        f"{args.cfg}, {args.images} images a run, {args.runs} runs; {os.cpu_count()} cores ({platform.machine()}); "
        f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"timm {timm.__version__}, Pillow {PIL.__version__}\n"
    )
    print("| workers | this loader, images/s | slowest run | ImageFolder, images/s | slowest run | ratio |")
    print("|---:|---:|---:|---:|---:|---:|")
    for workers in args.workers:
        config.DATA.NUM_WORKERS = workers
        ours, plain = _measure(config, images=args.images, runs=args.runs)
        cells = [f"{max(rates):.1f} | {min(rates) / max(rates):.0%}" for rates in (ours, plain)]
        print(f"| {workers} | {' | '.join(cells)} | {max(ours) / max(plain):.3f} |", flush=True)


def _measure(config: CfgNode, *, images: int, runs: int) -> tuple[list[float], list[float]]:
    """Return the images per second of every run of the loader and of the plain one."""
    loader = build_train_loader(config, open_dataset(config, ("train",)), rank=0, world_size=1)
    ours, plain = _batches(loader), _batches(_plain_loader(config, loader))
    # More than the workers have ready while the other loader runs.
    warm_up = 2 * config.DATA.NUM_WORKERS + 1
    batches = max(1, images // config.DATA.BATCH_SIZE)
    rates = [[_batches_per_second(s, batches, warm_up) for s in (ours, plain)] for _ in range(runs)]
    scaled = [[rate * config.DATA.BATCH_SIZE for rate in side] for side in zip(*rates, strict=True)]
    return scaled[0], scaled[1]


def _plain_loader(config: CfgNode, loader: DataLoader) -> DataLoader:
    """Return a loader as the documentation of torchvision writes it, in the order of `loader`."""
    folder = Path(config.DATA.DATA_PATH).expanduser() / "train"
    return DataLoader(
        ImageFolder(folder, transform=loader.dataset.transform),
        batch_size=loader.batch_size,
        sampler=[draw.index for draw in loader.sampler],
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        persistent_workers=loader.persistent_workers,
    )


def _batches(loader: DataLoader) -> Iterator[object]:
    while True:
        yield from loader


def _batches_per_second(batches: Iterator[object], count: int, warm_up: int) -> float:
    for _ in range(warm_up):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
