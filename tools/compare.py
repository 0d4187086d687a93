"""Train networks with the same recipe, one after another, and draw their accuracy in one figure.

    python tools/compare.py configs/compare/digits.yaml --seeds 0 1 2
    python tools/compare.py configs/compare/cifar10.yaml --variants softmax performer --opts DATA.DATA_PATH cifar10
    python tools/compare.py configs/cifar10/*.yaml --seeds 0 1 --opts DATA.DATA_PATH cifar10

For a single config with a Vision Transformer, the network is trained with each attention, and a DAT of the same cost.
Several configs are trained unchanged.

After an interruption the same command continues: finished runs are not repeated, and the interrupted one
resumes. `comparison.png` and `comparison.md` are rewritten after each run, next to the runs of one config or into the
output folder of several.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin("matplotlib")

import torch
from matplotlib.figure import Figure

from config import load_config
from logger import read_rows
from models.build import build_model
from models.vit import ATTENTIONS
from tools.arguments import add_opts
from tools.complexity import count_macs, count_parameters
from training.exit_status import FAILED, WRONG_INPUT

CONTINUE = "the same command continues"
# By exit status of a training.
ADVICE = {
    FAILED: "repeating the command does not help by itself, see the message above",
    WRONG_INPUT: "correct the options, or choose another OUTPUT",
}
MAIN = Path(__file__).resolve().parents[1] / "main.py"
ATTENTION_OPTIONS = {
    **{
        f"{attention}{suffix}": ["MODEL.VIT.attention", attention, "MODEL.VIT.locality", locality]
        for attention in ATTENTIONS
        for suffix, locality in (("", "none"), ("_local", "box"))
    },
    "dat": ["MODEL.TYPE", "dat"],
}


class Cost(NamedTuple):
    """Cost of a network: parameters, MACs and images per second of inference."""

    parameters: int
    macs: int
    rate: float


class Variant(NamedTuple):
    """One of the networks that are compared.

    Attributes:
        config: path of its YAML file.
        options: over that file.
        folder: of its runs.
    """

    config: str
    options: list[str]
    folder: Path


def main() -> int:
    """Train the remaining runs and return the exit status."""
    args, variants, folder = _parse_arguments()
    costs: dict[str, Cost] = {}
    for seed in args.seeds:
        for name, variant in variants.items():
            tag = f"{name}_seed{seed}"
            epochs = load_config(variant.config, variant.options).TRAIN.EPOCHS
            if len(accuracies(variant.folder / tag)) < epochs:
                command = [sys.executable, str(MAIN), "--cfg", variant.config, "--tag", tag]
                if status := _train([*command, "--opts", "SEED", str(seed), *variant.options]):
                    print(f"compare.py: {tag} ended with status {status}; {ADVICE.get(status, CONTINUE)}")
                    return status
            if name not in costs:
                costs[name] = measure(variant)
            write(
                folder, costs, {name: [variants[name].folder / f"{name}_seed{n}" for n in args.seeds] for name in costs}
            )
    print(f"{folder / 'comparison.md'}\n{folder / 'comparison.png'}")
    return 0


def _train(command: Sequence[str]) -> int:
    """Run a training and return its status; Ctrl-C is left to it, as it saves before it ends."""
    before = signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which the training would inherit
    try:
        return subprocess.run(command).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def _parse_arguments() -> tuple[argparse.Namespace, dict[str, Variant], Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML files; or one with MODEL.VIT and MODEL.DAT")
    parser.add_argument("--variants", nargs="+", metavar="VARIANT", help="only these: attentions, or names of files")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="seeds of the runs of each variant (default: 0)"
    )
    add_opts(parser, of="the configs")
    args = parser.parse_args()
    try:
        return args, *choose(args.configs, args.variants, args.opts)
    except ValueError as error:
        startup.refuse(error)


def choose(configs: Sequence[str], names: Sequence[str] | None, opts: Sequence[str]) -> tuple[dict[str, Variant], Path]:
    """Return the variants to compare by name, and the folder of the results.

    Raises:
        ValueError: a config is wrong or is not that of a classifier, two have one name, or a chosen name is unknown.
    """
    loaded = {path: load_config(path, opts) for path in configs}
    for path, config in loaded.items():
        if config.TASK != "classification" or config.DATA.MULTI_LABEL:
            raise ValueError(f"{path} is not compared: only classifiers of one label per image have a top-1 accuracy")
    first = loaded[configs[0]]
    if len(loaded) == 1 and first.MODEL.TYPE == "vit":
        folder = Path(first.OUTPUT) / first.MODEL.NAME
        options = ATTENTION_OPTIONS.items()
        variants = {name: Variant(configs[0], [*chosen, *opts], folder) for name, chosen in options}
    else:
        folder = Path(first.OUTPUT)
        variants = {
            Path(path).stem: Variant(path, [*opts], Path(config.OUTPUT) / config.MODEL.NAME)
            for path, config in loaded.items()
        }
        if len(variants) < len(loaded):
            raise ValueError("two configs have the same file name; networks are named after it")
    for name in names or ():
        if name not in variants:
            raise ValueError(f"variant {name!r} is unknown; choose from {', '.join(variants)}")
    return {name: variants[name] for name in names or variants}, folder


def accuracies(folder: Path) -> list[float]:
    """Return the validation accuracy of every finished epoch of a run."""
    rows = read_rows(folder / "metrics.jsonl")
    by_epoch = {row["epoch"]: row["top1"] for row in rows if row["kind"] == "eval"}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def measure(variant: Variant, *, batch: int = 64, runs: int = 5) -> Cost:
    """Return the cost of a variant; images per second on this machine are the best of several runs."""
    config = load_config(variant.config, variant.options)
    model, size = build_model(config).eval(), config.image_size
    images, seconds = torch.randn(batch, 3, *size), []
    for _ in range(runs + 1):
        start = time.perf_counter()
        with torch.inference_mode():
            model(images)
        seconds.append(time.perf_counter() - start)
    return Cost(count_parameters(model), count_macs(model, size), batch / min(seconds[1:]))


def write(folder: Path, costs: dict[str, Cost], runs: dict[str, list[Path]]) -> None:
    """Write the table and the figure of what has been trained so far, given the folders of the runs by variant."""
    curves = {name: [accuracy for path in paths if (accuracy := accuracies(path))] for name, paths in runs.items()}
    (folder / "comparison.md").write_text(table(costs, curves), encoding="utf-8")
    draw(folder / "comparison.png", curves)


def table(costs: dict[str, Cost], curves: dict[str, list[list[float]]]) -> str:
    """Return the table in Markdown; the accuracy is that of the last epoch, mean and range over the seeds."""
    lines = [
        "| variant | parameters | MACs | images/s | accuracy, % | range | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, cost in costs.items():
        last = [run[-1] for run in curves[name]]
        lines.append(
            f"| {name} | {cost.parameters / 1e6:.2f} M | {cost.macs / 1e6:.1f} M | {cost.rate:.0f} | "
            f"{statistics.mean(last):.2f} | {min(last):.2f} to {max(last):.2f} | {len(last)} |"
        )
    return "\n".join(lines) + "\n"


def draw(path: Path, curves: dict[str, list[list[float]]]) -> None:
    """Draw the mean accuracy of every variant over epochs, and the range of its seeds."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes: Any = figure.subplots()
    colours = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(n.removesuffix("_local") for n in curves))}
    for name, runs in curves.items():
        length = min(map(len, runs))
        points = list(zip(*(run[:length] for run in runs), strict=True))
        epochs = range(1, length + 1)
        style = {"color": colours[name.removesuffix("_local")], "linestyle": "--" if name.endswith("_local") else "-"}
        axes.plot(epochs, [statistics.mean(point) for point in points], label=name, linewidth=1.2, **style)
        axes.fill_between(epochs, [*map(min, points)], [*map(max, points)], color=style["color"], alpha=0.08)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
