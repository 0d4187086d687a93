"""Write CIFAR-10, or the first images of each class, as JPEG files in class folders, downloading it if necessary.

.venv/bin/python -m examples.cifar10_folders cifar10
.venv/bin/python -m examples.cifar10_folders cifar10-12k --train 1000 --val 200
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from torchvision.datasets import CIFAR10
from tqdm import tqdm


def write_folders(original: str, folder: Path, *, train: int, val: int) -> None:
    """Write `folder/train/<class>/0000.jpg` and so on, and likewise `val` with the test images.

    Args:
        original: folder of the published files.
        folder: folder for the images.
        train: number of training images of each class.
        val: number of test images of each class.
    """
    for split, wanted in (("train", train), ("val", val)):
        data = CIFAR10(original, train=split == "train", download=True)
        written: Counter[str] = Counter()
        for image, label in tqdm(data, desc=split):
            name = data.classes[label]
            if written[name] < wanted:
                path = folder / split / name / f"{written[name]:04}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)  # JPEG of quality 75, with half the resolution in colour
                written[name] += 1


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the images")
    parser.add_argument("--original", default=".", metavar="FOLDER", help="of the published files (default: here)")
    parser.add_argument("--train", type=int, default=5000, help="training images per class (default: %(default)s)")
    parser.add_argument("--val", type=int, default=1000, help="test images per class (default: %(default)s)")
    args = parser.parse_args()
    write_folders(args.original, args.folder, train=args.train, val=args.val)


if __name__ == "__main__":
    main()
