"""Draw the curves of one run, or of several in one picture, from their metrics.jsonl.

python tools/plot.py output/digits/default
python tools/plot.py output/digits/default output/digits/lion --output both.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin("matplotlib")

from training.report.curves import planned_rates, plot_curves


def _names(folders: list[Path]) -> list[str]:
    """Return distinct names of the runs: the tag, or as much of the path as necessary."""
    folders = [folder.resolve() for folder in folders]
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]).replace("$", r"\$") for folder in folders]  # not a formula
        # Legends leave out labels that start with an underscore.
        if len(set(names)) == len(names) and not any(name.startswith("_") for name in names):
            return names
    raise ValueError("a run is named twice")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="plot.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: curves.png or comparison.png in the first RUN"
    )
    parser.add_argument("--planned", action="store_true", help="also draw the planned learning rate of the first RUN")
    args = parser.parse_args(argv)
    try:
        runs = dict(zip(_names(args.runs), (run / "metrics.jsonl" for run in args.runs), strict=True))
        target = args.output or args.runs[0] / ("curves.png" if len(runs) == 1 else "comparison.png")
        planned = planned_rates(args.runs[0]) if args.planned else ()
        plot_curves(runs, target, planned=planned)
    except (ValueError, OSError) as problem:
        startup.refuse(problem)
    print(target)


if __name__ == "__main__":
    main()
