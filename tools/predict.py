"""Say which classes a network sees in images. Of a segmenter, they come with their shares of the pixels.

    python tools/predict.py --checkpoint output/digits/default/best.pth photo.jpg folder
    find photos -name '*.jpg' | python tools/predict.py --checkpoint best.pth --format csv - > predictions.csv
    python tools/predict.py --checkpoint dat_pp_tiny_in1k_224.pth --cfg configs/dat_tiny.yaml folder --html page.html
    python tools/predict.py --checkpoint output/digits_fpn/default/best.pth photo.jpg --draw maps

Results go to the standard output; what was loaded, progress and files that cannot be read to the standard error. Such
files are skipped, and the status is then 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.images import UnreadableImage
from data.segmentation.transforms import EvalTransform
from data.transforms import normalize
from models.build import image_size
from models.contract import compile_parts
from tasks.pictures import paint
from tasks.segmentation import predict as predict_pixels
from tools import pages
from training.trained_model import TrainedModel, load_trained
from training.weight_sets import WEIGHTS

DTYPES = {"off": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEVICES = ("cpu", "cuda", "mps")
THUMBNAIL = 320  # pixels of the longer side on the page


@dataclass(frozen=True)
class Prediction:
    """The classes that an image probably shows.

    Attributes:
        path: the file.
        top: names and probabilities, the most probable first; of a segmenter, names and shares of the pixels.
    """

    path: str
    top: list[tuple[str, float]]


def main() -> None:
    """Predict what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files and folders; - reads names, one a line")
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument("--cfg", metavar="FILE", help="config, where the checkpoint holds none")
    parser.add_argument("--weights", choices=WEIGHTS, default="", help="default: what the checkpoint was chosen for")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes an image (default: 5)")
    parser.add_argument("--format", choices=WRITERS, default="text", help="default: text")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the pictures")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="of a segmenter: also draw its classes over images")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument("--device", choices=DEVICES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=DTYPES, default="off", help="mixed precision (default: off)")
    parser.add_argument("--compile", action="store_true", help="torch.compile, block by block")
    args = parser.parse_args()
    try:
        sys.exit(run(args))
    except (ValueError, OSError) as error:
        parser.error(str(error))


def run(args: argparse.Namespace) -> int:
    """Predict, write the results, and return the exit status.

    Raises:
        ValueError: wrong input.
    """
    for flag, value in (("--top", args.top), ("--batch-size", args.batch_size)):
        if value < 1:
            raise ValueError(f"{flag} must be at least 1, not {value}")
    files = list(find_images(args.images, sys.stdin))
    model = load_trained(args.checkpoint, cfg=args.cfg, weights=args.weights)
    print(model.words(), file=sys.stderr)
    network = model.network.to(args.device, memory_format=torch.channels_last)
    if args.compile:
        compile_parts(network)
    unreadable: list[str] = []
    predictions = _predictions(model, files, args, unreadable.append)
    bar = tqdm(total=len(files), unit="image", disable=None, leave=False)
    done = []
    write = WRITERS[args.format](sys.stdout, min(args.top, len(model.classes)))
    for prediction in predictions:
        write(prediction)
        if args.html:
            done.append(prediction)
        bar.update()
    bar.close()
    for message in unreadable:
        print(f"skipped: {message}", file=sys.stderr)
    if args.html:
        args.html.write_text(page(model, done, unreadable), encoding="utf-8", newline="\n")
        print(args.html, file=sys.stderr)
    return 1 if unreadable else 0


def _predictions(
    model: TrainedModel, files: Sequence[str], args: argparse.Namespace, on_unreadable: Callable[[str], object]
) -> Iterator[Prediction]:
    """Return the predictions of the kind of network that the checkpoint holds."""
    settings = {"top": args.top, "amp": args.amp, "on_unreadable": on_unreadable}
    if model.config.TASK == "segmentation":
        return segment(model, files, folder=args.draw, **settings)
    if args.draw:
        raise ValueError(f"--draw takes the checkpoint of a segmenter; {args.checkpoint} is of {model.config.TASK}")
    return predict(model, files, batch_size=args.batch_size, **settings)


def find_images(names: Sequence[str], listed: TextIO) -> Iterator[str]:
    """Yield the files of the command line: those in folders whose ending Pillow knows, and those that a list names.

    Raises:
        ValueError: a name does not exist, or a folder holds no images.
    """
    endings = Image.registered_extensions()
    for name in names:
        if name == "-":
            yield from filter(None, (line.rstrip("\r\n") for line in listed))
        elif Path(name).is_dir():
            found = sorted(str(file) for file in Path(name).rglob("*") if file.suffix.lower() in endings)
            if not found:
                raise ValueError(f"folder {name} holds no images")
            yield from found
        elif Path(name).exists():
            yield name
        else:
            raise ValueError(f"{name} does not exist; give images, folders, or - for a list on the standard input")


def predict(
    model: TrainedModel,
    files: Sequence[str],
    *,
    top: int,
    batch_size: int,
    amp: str = "off",
    on_unreadable: Callable[[str], object],
) -> Iterator[Prediction]:
    """Yield the most probable classes of each file that can be read, in order.

    Args:
        model: the network and its classes.
        files: paths of images.
        top: classes an image, at most as many as there are.
        batch_size: images at a time.
        amp: ``off``, ``fp16`` or ``bf16``.
        on_unreadable: told why a file cannot be read.
    """
    readable = _read(files, model, on_unreadable)
    while batch := list(islice(readable, batch_size)):
        probabilities = _probabilities(model.network, torch.stack([tensor for _, tensor in batch]), amp)
        values, labels = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
        for (path, _), row, names in zip(batch, values.tolist(), labels.tolist(), strict=True):
            yield Prediction(path, [(model.classes[label], value) for label, value in zip(names, row, strict=True)])


@torch.inference_mode()
def segment(
    model: TrainedModel,
    files: Sequence[str],
    *,
    top: int,
    folder: Path | None,
    amp: str = "off",
    on_unreadable: Callable[[str], object],
) -> Iterator[Prediction]:
    """Yield the classes with the largest shares of the pixels of each file that can be read, in order.

    Args:
        model: a segmenter and its classes.
        files: paths of images.
        top: classes an image, at most as many as there are.
        folder: where to draw the classes over each image, as PNG under its name; None for nowhere.
        amp: ``off``, ``fp16`` or ``bf16``.
        on_unreadable: told why a file cannot be read.
    """
    device = next(model.network.parameters()).device
    transform = EvalTransform(image_size(model.config))
    for path in files:
        try:
            image = model.read(path)
        except UnreadableImage as error:
            on_unreadable(str(error))
            continue
        with torch.autocast(device.type, dtype=DTYPES[amp], enabled=amp != "off"):
            pixels = normalize(transform.apply(image).to(device))
            labels = predict_pixels(model.network, pixels, (image.height, image.width)).cpu()
        shares = torch.bincount(labels.flatten(), minlength=len(model.classes)) / labels.numel()
        values, classes = shares.topk(min(top, len(model.classes)))
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(paint(np.asarray(image), labels.numpy())).save(folder / f"{Path(path).name}.png")
        names = [model.classes[label] for label in classes.tolist()]
        yield Prediction(path, list(zip(names, values.tolist(), strict=True)))


def _read(
    files: Sequence[str], model: TrainedModel, on_unreadable: Callable[[str], object]
) -> Iterator[tuple[str, Tensor]]:
    transform = model.transform()
    for path in files:
        try:
            yield path, transform(model.read(path))
        except UnreadableImage as error:
            on_unreadable(str(error))


@torch.inference_mode()
def _probabilities(network: nn.Module, images: Tensor, amp: str) -> Tensor:
    """Return the probabilities ``[B, classes]`` of normalised images ``[B, 3, H, W]``, on the CPU."""
    device = next(network.parameters()).device
    with torch.autocast(device.type, dtype=DTYPES[amp], enabled=amp != "off"):
        logits = network(images.to(device, memory_format=torch.channels_last))
    return logits.float().softmax(dim=1).cpu()


def _write_text(file: TextIO, top: int) -> Callable[[Prediction], None]:  # noqa: ARG001
    def write(prediction: Prediction) -> None:
        shown = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in prediction.top)
        print(f"{_printable(prediction.path)}: {shown}", file=file)

    return write


def _write_jsonl(file: TextIO, top: int) -> Callable[[Prediction], None]:  # noqa: ARG001
    def write(prediction: Prediction) -> None:
        classes = [{"class": name, "probability": probability} for name, probability in prediction.top]
        print(json.dumps({"file": prediction.path, "top": classes}), file=file)

    return write


def _write_csv(file: TextIO, top: int) -> Callable[[Prediction], None]:
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["file", *(f"{column}{place}" for place in range(1, top + 1) for column in ("class", "probability"))])

    def write(prediction: Prediction) -> None:
        rows.writerow([_printable(prediction.path), *(value for pair in prediction.top for value in pair)])

    return write


# Each takes the file and the number of classes an image, and returns what writes one prediction.
WRITERS = {"text": _write_text, "jsonl": _write_jsonl, "csv": _write_csv}


def _printable(path: str) -> str:
    """Return a path with bytes that are no UTF-8 written as escapes."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def page(model: TrainedModel, predictions: Sequence[Prediction], unreadable: Sequence[str]) -> str:
    """Return the page of predictions with the pictures inside."""
    skipped = ""
    if unreadable:
        items = "".join(f"<li>{pages.text(message)}</li>" for message in unreadable)
        skipped = f"<h2>Skipped: {len(unreadable)}</h2>\n<ul>{items}</ul>"
    return pages.fill(
        "predict.html",
        title=pages.text(f"Predictions of {model.config.MODEL.NAME}"),
        summary=pages.text(f"{len(predictions)} images; {model.words()}"),
        images="\n".join(_figure(model.read(one.path), one) for one in predictions),
        unreadable=skipped,
    )


def _figure(image: Image.Image, prediction: Prediction) -> str:
    source = pages.picture(image, side=THUMBNAIL)
    bars = "".join(pages.bar(name, share) for name, share in prediction.top)
    name = pages.text(prediction.path)
    return f'<figure class="card"><img src="{source}" alt="{name}"><figcaption>{name}</figcaption>{bars}</figure>'


if __name__ == "__main__":
    main()
