"""Pack a data set into tar shards with an index, for `DATA.DATASET tar`.

    python tools/make_shards.py --data-path imagenet --output imagenet-shards --short-side 320

Each split becomes `<split>-000000.tar`, ... in WebDataset's layout: `<key>.jpg` and `<key>.cls`, the label, which is a
position in the list of classes, `classes.txt`. `shards.json` lists the shards with their checksums, and `<split>.index`
has the offset of each image. The order of the images is kept. After an interruption the same command continues and
writes the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin()

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm
from yacs.config import CfgNode

from config import apply_overrides, default_config
from data.build import is_stream, open_dataset
from data.formats.series import MANIFEST
from data.formats.tar_index import build_index, index_name
from data.images import StoredImage, UnreadableImage
from data.sources import SEPARATOR, Dataset, ImageSource
from data.wording import counted
from tools.arguments import add_opts, check_least
from tools.pool import map_in_processes
from utils import STAGED, write_atomically

PLAN = "plan.json"
# Extension by Pillow's name of a format whose files are kept; MPO is the JPEG of some cameras and phones.
_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}


@dataclass(frozen=True)
class Plan:
    """The parameters of the shards."""

    dataset: str
    data_path: str
    options: list[str]
    images: dict[str, int]
    classes: list[str]
    content: str
    per_shard: int
    short_side: int
    quality: int


@dataclass(frozen=True)
class Shard:
    """One archive: consecutive images of a split."""

    part: str
    number: int
    first: int
    stop: int

    @property
    def name(self) -> str:
        """Name of the file."""
        return f"{self.part}-{self.number:06}.tar"


def main() -> None:
    """Run the command line."""
    args = _parse_arguments()
    try:
        pack(args)
    except UnreadableImage as error:
        startup.refuse(f"{error}; repair or remove it; tools/check_data.py finds all such images")
    except (ValueError, OSError) as error:
        startup.refuse(error)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", default="", help="the data set")
    parser.add_argument("--dataset", default="imagenet", help="its format, a DATA.DATASET (default: class folders)")
    parser.add_argument("--output", required=True, type=Path, help="folder for the shards, new or empty")
    parser.add_argument(
        "--parts", nargs="+", choices=("train", "val"), default=["train", "val"], help="splits to pack (default: both)"
    )
    parser.add_argument("--per-shard", type=int, default=1000, help="images per shard (default: %(default)s)")
    parser.add_argument(
        "--short-side", type=int, default=0, help="shrink larger images to it and write JPEG (default: 0, unchanged)"
    )
    parser.add_argument(
        "--quality", type=int, default=90, help="quality of JPEG files that are shrunk or turned (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    add_opts(parser, of="the data set")
    return parser.parse_args()


def pack(args: argparse.Namespace) -> None:
    """Write all missing shards, then the manifest and the indices.

    Raises:
        ValueError: the data set cannot be opened, an image cannot be read, or the output folder holds other files.
    """
    dataset = open_dataset(dataset_config(args.dataset, args.data_path, args.opts), args.parts)
    sources = {"train": dataset.train, "val": dataset.held_out}
    sources = {part: sources[part] for part in args.parts}
    plan = _plan(args, dataset, sources)
    _begin(args.output, plan)
    shards = [
        Shard(part, number, first, min(first + args.per_shard, len(source)))
        for part, source in sources.items()
        for number, first in enumerate(range(0, len(source), args.per_shard))
    ]
    if kept := sum((args.output / shard.name).exists() for shard in shards):
        print(f"continuing: {kept} of {counted(len(shards), 'shard')} in {args.output} are complete", flush=True)
    write = partial(_write, sources=sources, folder=args.output, plan=plan)
    entries = {}
    with tqdm(total=sum(plan.images.values()), unit="image", disable=None) as bar:
        for shard, entry in zip(shards, map_in_processes(write, shards, workers=args.workers), strict=True):
            entries[shard.name] = entry
            bar.update(shard.stop - shard.first)
    for part in sources:
        paths = [args.output / shard.name for shard in shards if shard.part == part]
        several = sources[part].labels.ndim == 2
        build_index(paths, several=several).save(args.output / index_name(part, several=several))
    write_atomically(args.output / MANIFEST, json.dumps({"shards": entries}, indent=1))
    (args.output / PLAN).unlink()
    for left in args.output.glob("*.part"):
        left.unlink()
    size = sum(entry["bytes"] for entry in entries.values())
    images, archives = counted(sum(plan.images.values()), "image"), counted(len(shards), "shard")
    print(f"{args.output}: {images} in {archives}, {size / 2**20:.1f} MiB")


def dataset_config(dataset: str, path: str, options: Sequence[str]) -> CfgNode:
    """Return a config for a data set.

    Raises:
        ValueError: an option does not exist, a value is invalid, or the data set is a stream.
    """
    config = default_config()
    config.DATA.DATASET, config.DATA.DATA_PATH = dataset, path
    apply_overrides(config, options)
    if is_stream(config.DATA.DATASET):
        raise ValueError(f"--dataset {config.DATA.DATASET} has no random access; read its shards as tar")
    return config


def _plan(args: argparse.Namespace, dataset: Dataset, sources: dict[str, ImageSource]) -> Plan:
    check_least(args, 1, "--per-shard", "--workers")
    if not 1 <= args.quality <= 100 or args.short_side < 0:
        raise ValueError(f"--quality {args.quality} must be 1 to 100 and --short-side {args.short_side} 0 or more")
    content = hashlib.sha256()
    for source in sources.values():
        content.update(source.labels.astype("<i8").tobytes())
    images = {part: len(source) for part, source in sources.items()}
    return Plan(
        dataset=args.dataset,
        data_path=str(Path(args.data_path).absolute()) if args.data_path else os.environ.get("DATA_PATH", ""),
        options=args.opts,
        images=images,
        classes=dataset.classes,
        content=content.hexdigest(),
        per_shard=args.per_shard,
        short_side=args.short_side,
        quality=args.quality,
    )


def _begin(folder: Path, plan: Plan) -> None:
    """Create the output folder, or check that the same command started it.

    Raises:
        ValueError: it holds anything else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} contains a finished set of shards; give another --output")
    if (folder / PLAN).exists():
        if json.loads((folder / PLAN).read_text(encoding="utf-8")) != asdict(plan):
            raise ValueError(f"{folder} contains the beginning of other shards; give another --output, or remove them")
    elif any(file.name != f"{PLAN}{STAGED}" for file in folder.iterdir()):
        raise ValueError(f"{folder} is not empty; nothing is overwritten, give another --output")
    else:
        write_atomically(folder / PLAN, json.dumps(asdict(plan), indent=1))
    # After the plan: a folder with other files and no plan is not continued.
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in plan.classes), encoding="utf-8")


def _label(label: int | np.ndarray) -> bytes:
    """Return the content of a `.cls` file: a number, or several."""
    labels = np.flatnonzero(label) if isinstance(label, np.ndarray) else [label]
    return SEPARATOR.join(map(str, labels)).encode()


def _write(shard: Shard, sources: dict[str, ImageSource], folder: Path, plan: Plan) -> dict[str, Any]:
    """Write a shard atomically unless it exists, and return its entry of the manifest."""
    path = folder / shard.name
    if not path.exists():
        staged = path.with_suffix(f".{os.getpid()}.part")  # a worker may outlive a parent that was killed
        source = sources[shard.part]
        with staged.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for index in range(shard.first, shard.stop):
                    content, ending = _encode(source.get(index), plan)
                    _add(archive, f"{index:08}.{ending}", content)
                    _add(archive, f"{index:08}.cls", _label(source.label(index)))
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    with path.open("rb") as file:
        digest = _digest(file)
    return {"images": shard.stop - shard.first, "bytes": path.stat().st_size, "sha256": digest}


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _encode(stored: StoredImage, plan: Plan) -> tuple[bytes, str]:
    """Return the bytes of an image, possibly shrunk, and its file extension."""
    image = stored.decode()  # even if its bytes are kept, so that unreadable images are found here and not in training
    kind, orientation = stored.describe()
    ending, is_turned = _ENDINGS.get(kind), stored.exif and orientation != 1
    is_shrunk = 0 < plan.short_side < min(image.size)
    if ending and not is_turned and not is_shrunk:
        return stored.data, ending
    if is_shrunk:
        scale = plan.short_side / min(image.size)
        size = tuple(max(plan.short_side, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
    left = 1 if is_turned else orientation
    if is_shrunk or ending == "jpg":
        return _save(image, "JPEG", left, quality=plan.quality), "jpg"
    return _save(image, "PNG", left), "png"


def _save(image: Image.Image, kind: str, orientation: int, **settings: int) -> bytes:
    exif, content = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(content, kind, exif=exif if orientation != 1 else b"", **settings)
    return content.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()
