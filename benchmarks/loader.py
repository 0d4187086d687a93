"""Images per second of one core that loads training images, compared with timm's loader with the same transforms.

    python -m benchmarks.loader --data-path FOLDER --also tar:SHARDS --also csv:TABLES
    python -m benchmarks.loader --listing 14000000

The loaders take turns in this process, without workers, over the same folder; the best run of each counts. "recipe" is
the published pipeline: decode, random resized crop, flip, RandAugment; "light" is without RandAugment. timm's loader
is measured with and without its prefetcher, which collates bytes; the faster one is the baseline of the ratios.
timm normalises and erases on this core, this loader leaves both to the device.

With --listing, a synthetic list of this many images is written and mapped, and its time and memory are printed.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin()

import numpy as np
import PIL
import simplejpeg
import timm
import torch
from timm.data import create_dataset, create_loader
from timm.data.auto_augment import NAME_TO_OP
from yacs.config import CfgNode

from config import default_config
from data.build import build_train_loader, open_dataset
from data.images import StoredImage
from data.listing import Listing
from data.operations import posterize
from data.samplers import TrainSampler
from data.wording import counted

# Images that eight GPUs consume per second, and seconds of a day.
GPUS, RATE = 8, 2500
# Dollars per core and hour: an assumption, about the on-demand price of clouds.
PRICE = 0.04


def main() -> None:
    """Run the command line and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", default="", help="contains train/<class>/*")
    parser.add_argument("--also", action="append", default=[], metavar="FORMAT:PATH", help="the same in another format")
    parser.add_argument("--batch-size", type=int, default=26)
    parser.add_argument("--size", type=int, default=224, help="height and width of the result")
    parser.add_argument("--images", type=int, default=100, help="minimum images of a run")
    parser.add_argument("--runs", type=int, default=7, help="runs of each loader")
    parser.add_argument("--listing", type=int, default=0, metavar="N", help="measure a synthetic list of N images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # timm passes 0 bits to Pillow, which rejects them from version 13 on.
    NAME_TO_OP.update({name: posterize for name in NAME_TO_OP if name.startswith("Posterize")})
    print(
        f"{platform.machine()}, {counted(os.cpu_count() or 1, 'core')}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, timm {timm.__version__}, Pillow {PIL.__version__}, "
        f"simplejpeg {simplejpeg.__version__}\n"
    )
    try:
        print_listing(args.listing) if args.listing else print_rates(args)
    except ValueError as error:
        startup.refuse(error)


def print_rates(args: argparse.Namespace) -> None:
    """Print images per second of every loader and decoder."""
    print(
        "| pipeline | loader | images/s | slowest run | relative to timm | first batch, s "
        "| cores for 8 GPUs | $ per GPU-day |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for light in (False, True):
        loaders: dict[str, Iterable] = {
            "timm, folder": _timm_loader(args, light=light, prefetch=False),
            "timm, folder, prefetcher": _timm_loader(args, light=light, prefetch=True),
            "imagenet": _our_loader(args, "imagenet", args.data_path, light=light),
        }
        for also in args.also:
            name, _, path = also.partition(":")
            loaders[name] = _our_loader(args, name, path, light=light)
        first = {name: _seconds(lambda loader=loader: next(iter(loader))) for name, loader in loaders.items()}
        rates = {name: [] for name in loaders}
        for _ in range(args.runs):
            for name, loader in loaders.items():
                rates[name].append(_rate(loader, args.images))
        base = max(max(rates[name]) for name in rates if name.startswith("timm"))
        for name, found in rates.items():
            best = max(found)
            cells = f"{best:.1f} | {min(found) / best:.0%} | {best / base:.2f} | {first[name]:.2f}"
            kind = "light" if light else "recipe"
            print(
                f"| {kind} | {name} | {cells} | {GPUS * RATE / best:.0f} | {24 * PRICE * RATE / best:.2f} |", flush=True
            )
    _print_decoders(args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    print(f"\npeak memory of this process: {peak:.2f} GiB")


def print_listing(count: int) -> None:
    """Print the cost of a list of `count` images: memory, and the start of an epoch."""
    names = (f"n{number // 640:08}/n{number // 640:08}_{number % 640:05}.JPEG".encode() for number in range(count))
    rows = ((name, number // 640) for number, name in enumerate(names))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "synthetic.index"
        Listing.of(rows, {"label": np.int32}, {}).save(path)
        size = path.stat().st_size
        begin = time.perf_counter()
        listing = Listing.load(path)
        sampler = TrainSampler(len(listing), batch_size=128, rank=0, world_size=8, seed=0)
        first = next(iter(sampler))
        seconds = time.perf_counter() - begin
        listing.name(first.index)
    print(
        f"{counted(count, 'image')}: {size / 2**30:.2f} GiB, mapped once by all processes of a machine, and "
        f"{8 * count / 2**30:.2f} GiB for the order of an epoch in each; an epoch starts in {seconds:.2f} s"
    )


def _config(args: argparse.Namespace, dataset: str, path: str, *, light: bool) -> CfgNode:
    config = default_config()
    config.DATA.DATASET, config.DATA.DATA_PATH, config.DATA.NUM_WORKERS = dataset, path, 0
    config.DATA.BATCH_SIZE, config.DATA.IMG_SIZE = args.batch_size, args.size
    if light:
        config.AUG.AUTO_AUGMENT, config.AUG.COLOR_JITTER = "", 0.0
    return config


def _our_loader(args: argparse.Namespace, dataset: str, path: str, *, light: bool) -> Iterable:
    config = _config(args, dataset, path, light=light)
    return build_train_loader(config, open_dataset(config, ("train",)), rank=0, world_size=1)


def _timm_loader(args: argparse.Namespace, *, light: bool, prefetch: bool) -> Iterable:
    aug = default_config().AUG
    if not (Path(args.data_path) / "train").is_dir():
        raise ValueError(f"no folder 'train' in data path {args.data_path!r}")
    return create_loader(
        create_dataset("", root=str(Path(args.data_path) / "train")),
        (3, args.size, args.size),
        args.batch_size,
        is_training=True,
        use_prefetcher=prefetch,
        num_workers=0,
        persistent_workers=False,
        scale=tuple(aug.SCALE),
        ratio=tuple(aug.RATIO),
        hflip=aug.HFLIP,
        interpolation="bicubic",
        color_jitter=None,
        auto_augment=None if light else aug.AUTO_AUGMENT,
        re_prob=0.0 if light else aug.REPROB,
        re_mode=aug.REMODE,
        device=torch.device("cpu"),
    )


def _print_decoders(args: argparse.Namespace) -> None:
    config = _config(args, "imagenet", args.data_path, light=True)
    source = open_dataset(config, ("train",)).train
    files = [source.get(index).data for index in range(min(len(source), args.images))]
    decoders: dict[str, Callable[[bytes], object]] = {
        "Pillow": lambda data: np.asarray(StoredImage(data, "").decode()),
        "simplejpeg": simplejpeg.decode_jpeg,
    }
    print("\n| decoder | images/s |\n|---|---:|")
    for name, decode in decoders.items():
        fastest = min(_seconds(lambda decode=decode: [decode(data) for data in files]) for _ in range(args.runs))
        print(f"| {name} | {len(files) / fastest:.1f} |")


def _rate(loader: Iterable, images: int) -> float:
    batches, seen = chain.from_iterable(repeat(loader)), 0
    begin = time.perf_counter()
    while seen < images:
        seen += len(next(batches)[0])
    return seen / (time.perf_counter() - begin)


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
