"""Peak memory of detectors and segmenters: two updates and an evaluation of one image, in a separate process.

    python -m benchmarks.dense coco --cfg configs/detection/*_dat_tiny_1x.yaml configs/segmentation/*_dat_tiny_40k.yaml

The first images of a data set in the layout of COCO are resized to the given sizes; for segmenters, its objects and the
background are pixel classes. The peak is that of the whole process (ru_maxrss), in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin()

import numpy as np
from faster_coco_eval.core import mask as rle
from PIL import Image

from data.detection.coco import open_coco
from data.detection.sources import DetectionDataset
from data.sources import Request
from logger import read_rows

ROOT = Path(__file__).resolve().parents[1]
UPDATES = 2
SIZES = ["480x640", "800x1333"]


@dataclass(frozen=True)
class Measured:
    """Results of a run.

    Attributes:
        losses: the losses of the updates.
        score: AP of a detector, mIoU of a segmenter.
        peak: GiB.
        seconds: CPU seconds.
    """

    losses: list[float]
    score: float
    peak: float
    seconds: float


def main() -> None:
    """Run the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data set in the layout of COCO")
    parser.add_argument("--cfg", nargs="+", type=Path, required=True, help="configs of detectors and segmenters")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="HxW", help=f"default: {' '.join(SIZES)}")
    batch = "images of an update (1; UperNet needs 2)"
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help=batch)
    args = parser.parse_args()
    try:
        dataset = open_coco(Request(path=str(args.data), needs=("train",)))
    except ValueError as error:
        startup.refuse(error)
    print("| config | size | losses | AP or mIoU | peak, GiB | CPU seconds |\n|---|---|---|---:|---:|---:|")
    for text in args.sizes:
        height, width = map(int, text.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            write_samples(dataset, Path(folder), (height, width), train=UPDATES * args.batch_size)
            for config in args.cfg:
                found = measure(config, Path(folder), (height, width), batch_size=args.batch_size)
                losses = ", ".join(f"{loss:.3f}" for loss in found.losses)
                cells = [config.stem, text, losses, f"{found.score:.3f}", f"{found.peak:.2f}", f"{found.seconds:.0f}"]
                print(f"| {' | '.join(cells)} |", flush=True)


def write_samples(dataset: DetectionDataset, root: Path, size: tuple[int, int], *, train: int) -> None:
    """Write the first images at this height and width in the layout of COCO: some for training, and one held out."""
    numbers = iter(range(len(dataset.train)))
    for part, count in (("train", train), ("val", 1)):
        images, annotations = [], []
        (root / part).mkdir()
        for _, index in zip(range(count), numbers, strict=False):
            name, objects = f"{index}.png", _objects(dataset, index, size)
            dataset.train.get(index).decode().resize(size[::-1]).save(root / part / name)
            images.append({"id": index, "file_name": name, "height": size[0], "width": size[1]})
            annotations += [{**_annotation(*one), "image_id": index} for one in objects]
        content = {
            "images": images,
            "annotations": [{**one, "id": number} for number, one in enumerate(annotations)],
            "categories": [{"id": label, "name": name} for label, name in enumerate(dataset.classes)],
        }
        (root / f"instances_{part}.json").write_text(json.dumps(content), encoding="utf-8")


def _objects(dataset: DetectionDataset, index: int, size: tuple[int, int]) -> list[tuple[np.ndarray, int]]:
    """Return mask and label of the objects of an image at another size, the largest first."""
    objects = dataset.train.objects(index)
    masks = objects.decoded(dataset.train.size(index))
    resized = [np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST)) for mask in masks]
    found = [(mask, label) for mask, label in zip(resized, objects.labels.tolist(), strict=True) if mask.any()]
    return sorted(found, key=lambda one: -int(one[0].sum()))


def _annotation(mask: np.ndarray, label: int) -> dict[str, Any]:
    runs = rle.encode(np.asfortranarray(mask))
    box, area = rle.toBbox(runs).tolist(), float(mask.sum())
    outline = {"size": mask.shape, "counts": runs["counts"].decode()}
    return {"category_id": label, "bbox": box, "area": area, "iscrowd": 0, "segmentation": outline}


def measure(config: Path, data: Path, size: tuple[int, int], *, batch_size: int) -> Measured:
    """Train for an epoch and evaluate, as in the trainer.

    Raises:
        RuntimeError: the run failed.
    """
    short, long = min(size), max(size)
    options = {
        "DATA.DATASET": "coco",
        "DATA.BATCH_SIZE": batch_size,
        "DATA.NUM_WORKERS": 0,
        "DATA.IMG_SIZE": list(size),
        "DETECTION.SHORT_SIDES": [short],
        "DETECTION.LONG_SIDE": long,
        "DETECTION.CROP_SIDES": [],
        "DETECTION.TEST_SHORT_SIDE": short,
        "SEGMENTATION.SCALE": [1.0, 1.0],
        "TRAIN.EPOCHS": 1,
        "AMP": "off",
        "PRINT_FREQ": 1,
        "SAVE_FREQ": 0,
        "REPORT": False,
        "DEVICE": "cpu",
        "TAG": "measured",
    }
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, str(ROOT / "main.py"), "--cfg", str(config), "--data-path", str(data)]
        command += ["--output", output, "--opts", *(str(word) for option in options.items() for word in option)]
        run = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=startup.stop_with_parent
        )
        said = run.stdout.read()
        _, status, usage = os.wait4(run.pid, 0)
        if status:
            raise RuntimeError(f"{' '.join(command)}:\n{said}")
        rows = read_rows(next(Path(output).glob("*/measured/metrics.jsonl")))
    evaluated = next(row for row in rows if row["kind"] == "eval")
    return Measured(
        losses=[row["loss"] for row in rows if row["kind"] == "train"],
        score=evaluated.get("AP", evaluated.get("miou")),
        peak=usage.ru_maxrss / 2**20,
        seconds=usage.ru_utime + usage.ru_stime,
    )


if __name__ == "__main__":
    main()
