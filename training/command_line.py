"""The command line of `main.py`: which flags set which options, and what is said of wrong ones."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from yacs.config import CfgNode

from config import load_config

# Flags that set an option of the config, and how their text is read.
_OPTION_FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "--batch-size": ("DATA.BATCH_SIZE", {"metavar": "N", "help": "images per process and micro-batch"}),
    "--data-path": (
        "DATA.DATA_PATH",
        {"metavar": "FOLDER", "help": "holds train/ and val/; or the variable DATA_PATH"},
    ),
    "--pretrained": ("MODEL.PRETRAINED", {"metavar": "FILE", "help": "weights to start from (fine-tuning)"}),
    "--resume": ("MODEL.RESUME", {"metavar": "FILE", "help": "checkpoint to continue or to evaluate"}),
    "--amp": (
        "AMP",
        {"nargs": "?", "const": "auto", "metavar": "off|fp16|bf16", "help": "mixed precision of training"},
    ),
    "--accumulation-steps": ("TRAIN.ACCUMULATION_STEPS", {"metavar": "N", "help": "micro-batches per update"}),
    "--use-checkpoint": (
        "TRAIN.USE_CHECKPOINT",
        {"action": "store_true", "help": "recompute activations, saving memory"},
    ),
    "--compile": ("COMPILE", {"action": "store_true", "help": "torch.compile, block by block"}),
    "--ema": (
        "TRAIN.EMA.ENABLED",
        {"action": "store_true", "help": "average the weights; with --eval, evaluate those"},
    ),
    "--output": ("OUTPUT", {"metavar": "FOLDER", "help": "results lie in FOLDER/<config name>/<tag>"}),
    "--tag": ("TAG", {"help": "name of this run"}),
    "--print-freq": ("PRINT_FREQ", {"metavar": "N", "help": "updates between lines of the log"}),
    "--seed": ("SEED", {"metavar": "N", "help": "random seed"}),
    "--device": ("DEVICE", {"metavar": "cuda|mps|cpu", "help": "default: the best there is"}),
    "--deterministic": ("DETERMINISTIC", {"action": "store_true", "help": "deterministic kernels only"}),
    "--allow-config-change": (
        "TRAIN.ALLOW_CONFIG_CHANGE",
        {"action": "store_true", "help": "resume although options differ from those of the checkpoint"},
    ),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest flag that exists."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see python main.py --help")

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            hint = f"did you mean {near[0]}?" if near else "options of config.py are set by --opts KEY VALUE"
            self.error(f"unknown argument {unknown[0]}; {hint}")
        return parsed


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, CfgNode]:
    """Return the command line, and the config with the command line merged into it."""
    parser = _Parser(prog="main.py", description="Train, evaluate or time a model.", allow_abbrev=False)
    parser.add_argument("--cfg", metavar="FILE", help="config, such as configs/digits.yaml")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--eval", action="store_true", help="evaluate --resume instead of training")
    mode.add_argument("--throughput", action="store_true", help="measure images per second instead of training")
    parser.add_argument("--check", action="store_true", help="check config, data layout and files, and stop")
    for flag, (key, settings) in _OPTION_FLAGS.items():
        parser.add_argument(flag, dest=key, default=None, **settings)
    parser.add_argument(
        "--opts", nargs="*", action="extend", default=[], metavar="KEY VALUE", help="any option of config.py"
    )
    args = parser.parse_args(argv)
    if not args.cfg:
        parser.error("no config given; pass one as --cfg FILE, such as configs/digits.yaml")
    empty = next((flag for flag, (key, _) in _OPTION_FLAGS.items() if getattr(args, key) == ""), None)
    if empty:
        parser.error(f"{empty} is empty; give it a value or leave it out")
    if len(args.opts) % 2:
        hint = f": write {args.opts[-1].replace('=', ' ', 1)}" if "=" in args.opts[-1] else ""
        raise ValueError(f"--opts takes pairs of KEY VALUE; {args.opts[-1]!r} has no value{hint}")
    given = {key: getattr(args, key) for key, _ in _OPTION_FLAGS.values() if getattr(args, key) is not None}
    config = load_config(args.cfg, [*args.opts, *(word for option in given.items() for word in option)])
    if args.eval and not (config.MODEL.RESUME or config.MODEL.PRETRAINED):
        raise ValueError("--eval needs a checkpoint: pass it as --resume FILE")
    return args, config
