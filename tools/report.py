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
    startup.begin("matplotlib")

from tools.arguments import add_device, device_of
from training.report.curves import plot_curves
from training.report.page import write_report


def main() -> int:
    """Write the reports of the runs on the command line, and return the exit status: 2 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run")
    parser.add_argument("--data-path", default="", metavar="FOLDER", help="the data set (default: that of the run)")
    add_device(parser)
    args = parser.parse_args()
    try:
        device = device_of(args)
    except ValueError as error:
        startup.refuse(error)
    failed = False
    for run in args.runs:
        try:
            plot_curves({run.name: run / "metrics.jsonl"}, run / "curves.png")
            print(write_report(run, device, data_path=args.data_path))
        except (ValueError, OSError) as error:
            startup.complain(error)
            failed = True
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
