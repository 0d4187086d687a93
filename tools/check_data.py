"""Read every image of a data set once and report problems.

    python tools/check_data.py --data-path imagenet

Reports unreadable images, duplicates between and within the splits, tiny and unusually shaped images, the number of
images per class, and mean and standard deviation of the colours. Ends with a verdict; the exit status is 1 if there are
problems for training.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin()

import numpy as np
from tqdm import tqdm

from data.build import open_dataset
from data.images import UnreadableImage
from data.sources import Dataset, ImageSource
from data.wording import counted
from tools.arguments import add_opts, check_least
from tools.make_shards import dataset_config
from tools.pool import map_in_processes

# An image is tiny if a side has fewer pixels than TINY, and unusual if its aspect ratio is at least ODD.
TINY = 32
ODD = 4
CHUNK = 64  # images that a worker inspects at a time


@dataclass(frozen=True, slots=True)
class ImageStatistics:
    """Statistics of one image: name, size, hash and sums of its pixels; or why it cannot be read."""

    index: int
    name: str = ""
    size: tuple[int, int] = (0, 0)
    digest: bytes = b""
    mean: tuple[float, ...] = ()
    square: tuple[float, ...] = ()
    error: str = ""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", default="", help="the data set")
    parser.add_argument("--dataset", default="imagenet", help="its format, a DATA.DATASET (default: class folders)")
    parser.add_argument(
        "--parts", nargs="+", choices=("train", "val"), default=["train", "val"], help="splits to read (default: both)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--show", type=int, default=10, help="images listed per kind (default: %(default)s)")
    add_opts(parser, of="the data set")
    args = parser.parse_args()
    try:
        check_least(args, 1, "--workers")
        check_least(args, 0, "--show")
        dataset = open_dataset(dataset_config(args.dataset, args.data_path, args.opts), args.parts)
        faults = check(dataset, args.parts, workers=args.workers, show=args.show)
    except (ValueError, OSError) as error:
        startup.refuse(error)
    print("verdict: " + ("; ".join(faults) if faults else "no problems found"))
    sys.exit(1 if faults else 0)


def check(dataset: Dataset, parts: Sequence[str], *, workers: int, show: int) -> list[str]:
    """Print the statistics of the splits of a data set and return the problems for training."""
    faults = []
    places: dict[bytes, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for warning in dataset.warnings():
        print(f"note: {warning}")
    for part in parts:
        source = dataset.train if part == "train" else dataset.held_out
        seen = list(tqdm(_inspect_all(source, workers), total=len(source), unit="image", desc=part, disable=None))
        broken = [one for one in seen if one.error]
        whole = [one for one in seen if not one.error]
        print(f"\n{part}: {counted(len(source), 'image')}, {len(broken)} unreadable")
        _list([one.error for one in broken], show)
        if broken:
            faults.append(f"{counted(len(broken), 'unreadable image')} in {part}")
        _describe_classes(dataset, source)
        _describe_sizes(whole, show)
        if whole:
            _describe_colours(whole)
        for one in whole:
            places[one.digest][part].append(one.name)
    return faults + _duplicates(places, parts, show)


def _inspect_all(source: ImageSource, workers: int) -> Iterator[ImageStatistics]:
    chunks = (range(first, min(first + CHUNK, len(source))) for first in range(0, len(source), CHUNK))
    for seen in map_in_processes(partial(_inspect_chunk, source), chunks, workers=workers):
        yield from seen


def _inspect_chunk(source: ImageSource, chunk: Sequence[int]) -> list[ImageStatistics]:
    return [_inspect(source, index) for index in chunk]


def _inspect(source: ImageSource, index: int) -> ImageStatistics:
    try:
        stored = source.get(index)
        image = stored.decode()
    except UnreadableImage as error:
        return ImageStatistics(index, error=str(error))
    pixels = np.asarray(image)
    digest = hashlib.blake2b(pixels.tobytes() + str(image.size).encode(), digest_size=16).digest()
    values = pixels.reshape(-1, 3) / 255
    mean, square = (tuple(channels.mean(0).tolist()) for channels in (values, values**2))
    return ImageStatistics(index, stored.name, image.size, digest, mean, square)


def _describe_classes(dataset: Dataset, source: ImageSource) -> None:
    counts = dataset.counts(source)
    few, many = int(np.argmin(counts)), int(np.argmax(counts))
    if counts[few] == counts[many]:
        print(f"classes: {len(counts)}, of {counted(counts[few], 'image')} each")
        return
    print(
        f"classes: {len(counts)}, of {counts[few]} ({dataset.classes[few]}) to {counts[many]} "
        f"({dataset.classes[many]}) images, median {np.median(counts):g}"
    )


def _describe_sizes(seen: Sequence[ImageStatistics], show: int) -> None:
    if not seen:
        return
    sizes = np.array([one.size for one in seen])
    print(
        f"width x height: {' x '.join(map(str, sizes.min(0)))} at least, {' x '.join(map(str, sizes.max(0)))} at most, "
        f"{' x '.join(f'{side:.0f}' for side in sizes.mean(0))} on average"
    )
    for kind, chosen in (
        (f"tiny, a side below {TINY} pixels", sizes.min(1) < TINY),
        (f"oddly shaped, one side {ODD} times the other or more", sizes.max(1) >= ODD * sizes.min(1)),
    ):
        if chosen.any():
            print(f"{counted(chosen.sum(), 'image is', 'images are')} {kind}")
            found = np.flatnonzero(chosen)
            names = (f"{seen[i].name} ({sizes[i][0]} x {sizes[i][1]})" for i in found[:show])
            _list(list(names), show, len(found))


def _describe_colours(seen: Sequence[ImageStatistics]) -> None:
    mean = np.mean([one.mean for one in seen], 0)
    deviation = np.sqrt(np.maximum(np.mean([one.square for one in seen], 0) - mean**2, 0))
    print(f"mean {np.array2string(mean, precision=4)}, deviation {np.array2string(deviation, precision=4)} (of 1)")


def _duplicates(places: dict[bytes, dict[str, list[str]]], parts: Sequence[str], show: int) -> list[str]:
    faults = []
    both = [found for found in places.values() if len(found) > 1]
    if both:
        print(f"\n{counted(len(both), 'image is', 'images are')} in both train and val")
        _list([f"{found['train'][0]} = {found['val'][0]}" for found in both], show)
        faults.append(
            f"{counted(len(both), 'image is', 'images are')} in training and validation, so results are too good"
        )
    for part in parts:
        twice = [names for found in places.values() if len(names := found.get(part, [])) > 1]
        if twice:
            print(f"\n{counted(len(twice), 'image occurs', 'images occur')} more than once in {part}")
            _list([" = ".join(names[:3]) for names in twice], show)
    return faults


def _list(lines: Sequence[str], show: int, total: int = 0) -> None:
    for line in lines[:show]:
        print(f"  {line}")
    if max(total, len(lines)) > show:
        print(f"  ... and {max(total, len(lines)) - show} more")


if __name__ == "__main__":
    main()
