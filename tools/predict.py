"""Predict images: classes; for a segmenter, their shares of the pixels; for a detector, objects.

    python tools/predict.py --checkpoint output/digits/default/best.pth photo.jpg folder
    find photos -name '*.jpg' | python tools/predict.py --checkpoint best.pth --format csv - > predictions.csv
    python tools/predict.py --checkpoint dat_pp_tiny_in1k_224.pth --cfg configs/dat_tiny.yaml folder --html page.html
    python tools/predict.py --checkpoint output/digits_fpn/default/best.pth photo.jpg --draw maps
    python tools/predict.py --checkpoint output/digits_mask_rcnn/default/best.pth photo.jpg --draw boxes --format jsonl

Results go to the standard output; what was loaded, progress and files that cannot be read to the standard error. Such
files are skipped, and the status is then 1.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin()

import torch
from PIL import Image
from tqdm import tqdm

from data.formats.folders import count_by_extension, select_images, skipped_files
from data.wording import counted
from models.contract import compile_parts
from tasks.pictures import SHOWN
from tools.arguments import add_device, add_network, check_least, device_of, free_name
from tools.predictions import Prediction, Predictor
from training.report import markup
from training.run import AUTOCAST
from training.trained_model import TrainedModel, load_trained

CLASSES = 5  # shown by default
# Flags that have an effect on some tasks only, and these tasks.
FLAGS = {
    "--top": ("classification", "segmentation"),
    "--threshold": ("detection",),
    "--draw": ("detection", "segmentation"),
}
TEMPLATE = Path(__file__).parent / "templates" / "predict.html"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="files and folders; - reads names from standard input, one per line"
    )
    add_network(parser, required=True)
    parser.add_argument("--top", type=int, metavar="K", help=f"classes per image (default: {CLASSES})")
    parser.add_argument(
        "--threshold", type=float, metavar="S", help=f"minimum score of objects, 0 to 1 (default: {SHOWN})"
    )
    parser.add_argument("--format", choices=WRITERS, default="text", help="default: text")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the pictures")
    parser.add_argument(
        "--draw", type=Path, metavar="FOLDER", help="also draw objects, or classes of pixels, over images"
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="batch size (default: 32)")
    add_device(parser)
    parser.add_argument("--amp", choices=AUTOCAST, default="off", help="mixed precision (default: off)")
    parser.add_argument("--compile", action="store_true", help="torch.compile, block by block")
    args = parser.parse_args()
    try:
        sys.exit(run(args))
    except (ValueError, OSError) as error:
        startup.refuse(error)


def run(args: argparse.Namespace) -> int:
    """Predict, write the results, and return the exit status.

    Raises:
        ValueError: wrong input.
    """
    check_least(args, 1, "--top", "--batch-size")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold must be from 0 to 1, not {args.threshold:g}")
    device = device_of(args)
    if "-" in args.images and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # file names are bytes, as on the command line
    files, warnings = find_images(args.images, sys.stdin)
    for warning in warnings:
        print(warning, file=sys.stderr)
    model = load_trained(args.checkpoint, cfg=args.cfg, weights=args.weights)
    print(model.words(), file=sys.stderr)
    check_task(args, model.config.TASK)
    network = model.network.to(device, memory_format=torch.channels_last)
    if args.compile:
        compile_parts(network)
    unreadable: list[str] = []
    predictor = Predictor(
        model,
        top=args.top or CLASSES,
        threshold=SHOWN if args.threshold is None else args.threshold,
        batch_size=args.batch_size,
        amp=args.amp,
        on_unreadable=unreadable.append,
    )
    with open_page(args.html) as file:
        done = write_predictions(predictor, files, args)
        for message in unreadable:
            print(f"skipped: {message}", file=sys.stderr)
        if file:
            file.write(page(model, done, unreadable))
            print(args.html, file=sys.stderr)
    return 1 if unreadable else 0


def check_task(args: argparse.Namespace, task: str) -> None:
    """Check that the flags have an effect on a network of a task.

    Raises:
        ValueError: one has none.
    """
    for flag, tasks in FLAGS.items():
        if getattr(args, flag.strip("-")) is not None and task not in tasks:
            raise ValueError(f"{flag} is for TASK {' or '.join(tasks)}; the TASK of {args.checkpoint} is {task}")


@contextmanager
def naming(flag: str, path: Path) -> Iterator[None]:
    """Let errors of the file system name the flag whose file or folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {error.strerror}") from None


def open_page(path: Path | None) -> AbstractContextManager[TextIO | None]:
    """Open the file of --html, if any, before the predictions, which may take long.

    Raises:
        ValueError: it cannot be written.
    """
    if path is None:
        return nullcontext()
    with naming("--html", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8", newline="\n")


def write_predictions(predictor: Predictor, files: Sequence[str], args: argparse.Namespace) -> list[Prediction]:
    """Predict, write the results and draw them, and return the predictions if they are wanted for a page."""
    model = predictor.model
    predictions = predictor.predict(files)
    if args.draw:
        with naming("--draw", args.draw):
            args.draw.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(files), unit="image", disable=None, leave=False)
    done, taken = [], set()
    write = WRITERS[args.format](sys.stdout, NUMBERS[model.config.TASK], min(predictor.top, len(model.classes)))
    for prediction in predictions:
        write(prediction)
        if args.draw:
            name = free_name(Path(prediction.path).name, taken)
            prediction.drawn(model.read(prediction.path)).save(args.draw / f"{name}.png")
        if args.html:
            done.append(prediction)
        bar.update()
    bar.close()
    return done


def find_images(names: Sequence[str], listed: TextIO) -> tuple[list[str], list[str]]:
    """Return the files of the command line, those in folders and in a list included, and warnings of skipped files.

    In folders, hidden files and those that Pillow cannot read are skipped.

    Raises:
        ValueError: a name does not exist, or a folder or the list holds no images.
    """
    files, warnings = [], []
    for name in names:
        if name == "-":
            found = [line for line in (line.rstrip("\r\n") for line in listed) if line]
            if not found:
                raise ValueError("no images were listed on standard input")
            files += found
        elif Path(name).is_dir():
            found, skipped = select_images(Path(name), below=True)
            if not found:
                held = f", but {count_by_extension(skipped)}" if skipped else ""
                raise ValueError(f"folder {name} contains no images{held}")
            files += map(str, found)
            warnings += filter(None, [skipped_files(Path(name), skipped)])
        elif Path(name).exists():
            files.append(name)
        else:
            raise ValueError(f"{name} does not exist; give images, folders, or - for a list on standard input")
    return files, warnings


# The number that comes with a class: for an image, for the pixels of a segmenter, for the object of a detector.
NUMBERS = {"classification": "probability", "segmentation": "share", "detection": "score"}


def _write_text(file: TextIO, number: str, top: int) -> Callable[[Prediction], None]:  # noqa: ARG001
    def write(prediction: Prediction) -> None:
        shown = [f"{name} {100 * value:.1f} %" for name, value in prediction.top]
        if prediction.objects:
            places = [" ".join(f"{side:.0f}" for side in box) for box in prediction.objects.boxes]
            shown = [f"{words} at {place}" for words, place in zip(shown, places, strict=True)]
        print(f"{_printable(prediction.path)}: {', '.join(shown) or 'no objects'}", file=file)

    return write


def _write_jsonl(file: TextIO, number: str, top: int) -> Callable[[Prediction], None]:  # noqa: ARG001
    def write(prediction: Prediction) -> None:
        row: dict[str, Any] = {"file": prediction.path}
        if prediction.objects:
            row["objects"] = [
                dict(zip(("class", number, "box", "mask"), values, strict=False)) for values in _objects(prediction)
            ]
        else:
            row["top"] = [{"class": name, number: value} for name, value in prediction.top]
        print(json.dumps(row), file=file)

    return write


def _objects(prediction: Prediction) -> Iterator[list[Any]]:
    """Yield class, score and box of each object, and its mask, if any, run-length encoded as in COCO."""
    for i, (name, score) in enumerate(prediction.top):
        values = [name, score, prediction.objects.boxes[i].tolist()]
        if (masks := prediction.objects.masks) is not None:
            values.append({"size": masks[i]["size"], "counts": masks[i]["counts"].decode()})
        yield values


def _write_csv(file: TextIO, number: str, top: int) -> Callable[[Prediction], None]:
    rows = csv.writer(file, lineterminator="\n")
    if number == NUMBERS["detection"]:
        rows.writerow(["file", "class", number, "x1", "y1", "x2", "y2"])
    else:
        rows.writerow(["file", *(f"{column}{place}" for place in range(1, top + 1) for column in ("class", number))])

    def write(prediction: Prediction) -> None:
        path = _printable(prediction.path)
        if prediction.objects:
            rows.writerows([path, name, score, *box] for name, score, box, *_ in _objects(prediction))
        else:
            rows.writerow([path, *(value for pair in prediction.top for value in pair)])

    return write


# Each takes the file, what the numbers are called, and the classes of an image, and returns a function that writes one
# prediction.
WRITERS = {"text": _write_text, "jsonl": _write_jsonl, "csv": _write_csv}


def _printable(path: str) -> str:
    """Return a path with non-UTF-8 bytes escaped."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def page(model: TrainedModel, predictions: Sequence[Prediction], unreadable: Sequence[str]) -> str:
    """Return the page of predictions with the pictures inside."""
    skipped = ""
    if unreadable:
        items = "".join(f"<li>{markup.text(message)}</li>" for message in unreadable)
        skipped = f"<h2>Skipped: {len(unreadable)}</h2>\n<ul>{items}</ul>"
    return markup.fill(
        TEMPLATE,
        title=markup.text(f"Predictions of {model.config.MODEL.NAME}"),
        summary=markup.text(f"{counted(len(predictions), 'image')}; {model.words()}"),
        images="\n".join(_figure(model.read(one.path), one) for one in predictions),
        unreadable=skipped,
    )


def _figure(image: Image.Image, prediction: Prediction) -> str:
    bars = "".join(markup.bar(name, share) for name, share in prediction.top)
    return markup.figure(prediction.drawn(image), prediction.path, bars)


if __name__ == "__main__":
    main()
