"""Write a trained network as ONNX, a program of torch.export, a compiled package or safetensors, and check the files.

    python tools/export.py --checkpoint output/digits/default/best.pth --formats onnx onnx-int8 --validate
    python tools/export.py --checkpoint dat_pp_tiny_in1k_224.pth --cfg configs/dat_tiny.yaml --size 288
    python tools/export.py --cfg configs/dat_tiny.yaml --formats pt2      # random weights

Each file is run on one and on four random images, with --dynamic-size at three sizes, and its output is compared with
that of the network. --validate also compares its score on the validation images. The exit status is 1 if a file differs
too much.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin("onnx", "onnxruntime", "onnxscript", "transformers")

import torch
from torch import Tensor, nn

from config import load_config
from data.build import is_stream
from data.wording import counted
from logger import RunLog
from models.build import num_classes
from tasks import Score, Task, build_task
from tools.arguments import add_network, check_network, image_size
from tools.exported import FORMATS, ONNX_FORMATS, Run, Source
from training.report.held_out import check_classes
from training.trained_model import load_trained, untrained
from utils import World

BATCHES = (1, 4)


class Difference(NamedTuple):
    """Difference of logits from those of the network.

    Attributes:
        largest: the largest difference.
        reach: largest absolute value of the network's logits.
    """

    largest: float
    reach: float

    def within(self, tolerance: float) -> bool:
        """Return whether they agree; the tolerance grows with logits beyond 1. False for NaN."""
        return self.largest <= tolerance * max(1.0, self.reach)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network(parser)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["onnx"], help="default: onnx")
    parser.add_argument("--output", type=Path, default=Path("output/export"), help="folder (default: output/export)")
    parser.add_argument("--size", nargs="+", type=int, metavar="N", help="side, or height and width, in pixels")
    parser.add_argument("--dynamic-size", action="store_true", help="make the image size dynamic, too")
    parser.add_argument("--opset", type=int, help="ONNX opset (default: PyTorch's)")
    parser.add_argument("--validate", action="store_true", help="compare scores on the validation images of the config")
    parser.add_argument("--data-path", metavar="PATH", help="the location of these images")
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="X",
        help="largest allowed drop in the score (default: 0.5 for percentages, 0.005 for other scores)",
    )
    args = parser.parse_args()
    try:
        sys.exit(run(args))
    except (ValueError, OSError) as error:
        startup.refuse(error)


def run(args: argparse.Namespace) -> int:
    """Export, check, print the results, and return the exit status.

    Raises:
        ValueError: wrong input.
    """
    _check_flags(args)
    if args.checkpoint:
        model = load_trained(args.checkpoint, cfg=args.cfg, weights=args.weights)
    else:
        model = untrained(load_config(args.cfg))
    print(model.words())
    size = image_size(args.size) if args.size else model.config.image_size
    source = Source(model, size, dynamic=args.dynamic_size, opset=args.opset)
    task = _held_out(source, args.data_path) if args.validate else None
    score = _evaluate(task, source, model.network) if task else 0.0
    args.output.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in args.formats:
        kind = FORMATS[name]
        path = args.output / f"{model.config.MODEL.NAME}{kind.ending}"
        kind.write(source, path)
        exported = kind.load(path)
        difference = compare(source.network, exported, source.sizes())
        words = f"largest difference {difference.largest:.1e} of logits up to {difference.reach:.1f}"
        good = difference.within(kind.tolerance)
        if task:
            exported_score = _evaluate(task, source, exported)
            words += f", score {task.score.show(exported_score)} (the network: {task.score.show(score)})"
            good &= score - exported_score <= (_max_drop(task.score) if args.max_drop is None else args.max_drop)
        print(f"{path}  {_megabytes(path):.1f} MB  {words}{'' if good else '  MISMATCH'}")
        failed |= not good
    return int(failed)


def _check_flags(args: argparse.Namespace) -> None:
    """Check that every flag has an effect.

    Raises:
        ValueError: one has none.
    """
    check_network(args)
    if args.opset is not None and set(ONNX_FORMATS).isdisjoint(args.formats):
        raise ValueError(f"--opset is for ONNX files; leave it out, or add one of --formats {', '.join(ONNX_FORMATS)}")
    for flag, value in (("--data-path", args.data_path), ("--max-drop", args.max_drop)):
        if value is not None and not args.validate:
            raise ValueError(f"{flag} is for --validate; add it, or leave {flag} out")


@torch.inference_mode()
def compare(network: nn.Module, exported: Run, sizes: list[tuple[int, int]]) -> Difference:
    """Return the largest difference of logits on random images of several sizes and batch sizes."""
    generator = torch.Generator().manual_seed(0)
    differences, reach = [], 0.0
    for size in sizes:
        for batch in BATCHES:
            images = torch.randn(batch, 3, *size, generator=generator)
            expected = network(images)
            differences.append((exported(images) - expected).abs().max())
            reach = max(reach, expected.abs().max().item())
    return Difference(torch.stack(differences).max().item(), reach)  # torch's maximum keeps NaN


class Exported(nn.Module):
    """An exported file, or the network that it was exported from, for a task to evaluate.

    Args:
        run: the file or the network.
        source: what was exported.

    Attributes:
        gives_probabilities: that of a segmenter, see `models.segmentation.parts`.
    """

    def __init__(self, run: Run, source: Source) -> None:
        super().__init__()
        self._run = run.__call__  # a module would become a part, and a program of torch.export has no eval()
        self._size = None if source.dynamic else source.size
        self.gives_probabilities = getattr(source.network, "gives_probabilities", False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[B, 3, H, W]`` to logits, ``[B, classes]`` or of a segmenter ``[B, classes, H, W]``.

        Raises:
            ValueError: the file does not take images of this size.
        """
        size = tuple(images.shape[-2:])
        become = f"--validate: validation images become {size[0]} x {size[1]} pixels (height x width), but the file"
        if self._size not in (None, size):
            raise ValueError(
                f"{become} has a fixed size of {self._size[0]} x {self._size[1]}; add --dynamic-size, or leave "
                f"--validate out"
            )
        try:
            return self._run(images.contiguous())
        except AssertionError as error:  # a guard of torch.export
            raise ValueError(f"{become} does not take them; leave --validate out, or export onnx") from error


def _held_out(source: Source, data_path: str | None) -> Task:
    """Return the task of the config with its held-out images, for the size of the source.

    Raises:
        ValueError: they cannot be evaluated with the exported file.
    """
    model = source.model
    config = model.config.clone()
    if config.TASK == "detection":
        raise ValueError("--validate: detectors need images of any size, but the file has a fixed size; leave it out")
    if is_stream(config.DATA.DATASET):
        raise ValueError("--validate: the run read its images from commands, which are not executed from a checkpoint")
    config.DATA.IMG_SIZE = list(source.size)
    if data_path:
        config.DATA.DATA_PATH = data_path
    expected = num_classes(config)
    task = build_task(config, World(0, 1, 0, torch.device("cpu")), training=False)
    if num_classes(config) != expected:
        classes = counted(num_classes(config), "class", "classes")
        raise ValueError(f"--validate: the images have {classes}, the network {expected}")
    check_classes(task, model.path)
    return task


def _evaluate(task: Task, source: Source, run: Run) -> float:
    """Return the score of a file, or of the network, on the held-out images."""
    log = RunLog(None, task.config, is_main=True)
    return task.score.of(task.evaluate(Exported(run, source), task.eval_loader(), log).metrics)


def _max_drop(score: Score) -> float:
    """Return the default of ``--max-drop``: half a percent of the scale."""
    return 0.5 if score.unit == "%" else 0.005


def _megabytes(path: Path) -> float:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e6


if __name__ == "__main__":
    main()
