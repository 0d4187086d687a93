"""Write report.html of a run: one page with its result, curves, mistakes, cost, environment and config.

    python tools/report.py output/digits/default
    python tools/report.py output/*/*
    python tools/report.py output/dat_tiny/default --data-path imagenet --device cuda

A run writes it at its end. For a classifier, the checkpoint best.pth is run over the validation images: accuracy by
class, the confusion matrix, and the worst mistakes as pictures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin()

import torch

from training.report.curves import plot_curves
from training.report.page import write_report


def main() -> None:
    """Write the reports of the runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run")
    parser.add_argument("--data-path", default="", metavar="FOLDER", help="the data set (default: that of the run)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if available, else cpu"
    )
    args = parser.parse_args()
    try:
        for run in args.runs:
            plot_curves({run.name: run / "metrics.jsonl"}, run / "curves.png")
            print(write_report(run, torch.device(args.device), data_path=args.data_path))
    except (ValueError, OSError) as error:
        startup.refuse(error)


if __name__ == "__main__":
    main()
