"""The command line of `main.py`: the options set by each flag, and errors for wrong flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from yacs.config import CfgNode

from config import OPTIONS, RunOption, check_pairs, load_config
from models.options import did_you_mean
from training.weight_sets import EMA, RAW

# Flags of other trainers for flags that set no option, or that need a value.
_SYNONYMS = {
    **dict.fromkeys(("--config", "--config-file"), "--cfg"),
    **dict.fromkeys(("--evaluate", "--test", "--test-only", "--validate"), "--eval"),
    **dict.fromkeys(("--cfg-options", "--set"), "--opts KEY VALUE"),
    **dict.fromkeys(("--cpu", "--no-cuda"), "--device cpu"),
    "--dry-run": "--check",
    "--no-amp": "--amp off",
    "--no-resume": "--opts TRAIN.AUTO_RESUME False",
}
# Options that name the output folder.
_FOLDER = {"OUTPUT", "MODEL.NAME", "TAG"}


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, with the closest existing flag."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see python main.py --help")

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            meant = _suggestion(unknown[0].partition("=")[0].replace("_", "-"), flags)
            self.error(f"unknown argument {unknown[0]}{meant or '; options of config.py are set by --opts KEY VALUE'}")
        return parsed


def _suggestion(flag: str, flags: Sequence[str]) -> str:
    """Return a hint to the flag or option that an unknown flag probably means; empty if none is similar."""
    words = {name.rpartition(".")[2].lower().replace("_", "-"): name for name in reversed(OPTIONS)}
    known = {name: key for key in OPTIONS for name in getattr(OPTIONS[key], "synonyms", ())}
    known |= {f"--{word}": key for word, key in words.items() if f"--{word}" not in known}
    exact = {name: _as_flag(key) for name, key in known.items()} | {name: name for name in flags} | _SYNONYMS
    similar = {word: _as_flag(key) for word, key in words.items()} | {name.lstrip("-"): name for name in flags}
    return (
        did_you_mean(flag, exact, shown=exact, cutoff=1)
        or did_you_mean(flag.lstrip("-"), similar, shown=similar, cutoff=0.75)
        or did_you_mean(flag, flags, cutoff=0.78)
    )


def _as_flag(key: str) -> str:
    """Return how an option is set on the command line."""
    return getattr(OPTIONS[key], "flag", "") or f"--opts {key} VALUE"


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, CfgNode]:
    """Return the parsed arguments, and the config with the command line merged into it.

    Raises:
        ValueError: wrong arguments, or see `config.load_config`.
    """
    parser = _Parser(prog="main.py", description="Train, evaluate or time a model.", allow_abbrev=False)
    parser.add_argument("--cfg", metavar="FILE", help="config, such as configs/digits.yaml")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--eval", action="store_true", help="evaluate --resume instead of training")
    mode.add_argument("--throughput", action="store_true", help="measure images per second instead of training")
    parser.add_argument("--check", action="store_true", help="check config, data layout and files, and stop")
    flags = {option.flag: key for key, option in OPTIONS.items() if isinstance(option, RunOption) and option.flag}
    for flag, key in flags.items():
        parser.add_argument(flag, dest=key, default=None, **_argument_settings(OPTIONS[key]))
    parser.add_argument(
        "--opts", nargs="*", action="extend", default=[], metavar="KEY VALUE", help="any option of config.py"
    )
    args = parser.parse_args(argv)
    if not args.cfg:
        parser.error("no config given; pass one as --cfg FILE, such as configs/digits.yaml")
    given = {key: getattr(args, key) for key in flags.values() if getattr(args, key) is not None}
    empty = next((flag for flag, key in flags.items() if given.get(key) == ""), None)
    if empty:
        parser.error(f"{empty} is empty; give it a value or leave it out")
    check_pairs(args.opts)  # before the flags are appended
    implied = ["MODEL.TYPE", "timm"] if "MODEL.TIMM.NAME" in given else []
    config = load_config(args.cfg, [*implied, *args.opts, *(word for option in given.items() for word in option)])
    if args.eval:
        _choose_evaluated(config, {*args.opts[::2], *given}, Path(args.cfg))
    return args, config


def _argument_settings(option: RunOption) -> dict[str, Any]:
    """Return the argparse settings for the flag of an option."""
    meaning = {"help": option.meaning.replace("%", "%%")}
    if isinstance(option.default, bool):
        return {"action": "store_const", "const": option.bare, **meaning}
    optional = {} if option.bare is None else {"nargs": "?", "const": option.bare}
    return {"metavar": option.metavar, **meaning, **optional}


def _choose_evaluated(config: CfgNode, given: set[str], path: Path) -> None:
    """Set MODEL.RESUME to the checkpoint to evaluate: the one on the command line, or `best.pth` of the run.

    With the config.yaml of a run, that is the run in the folder of this file, which may have been moved. Training, in
    contrast, writes to the folder that the config names.

    Files named in a config are what its run started from, so they are not evaluated. Likewise, only --weights or --ema
    on the command line select the weights of the checkpoint.

    Raises:
        ValueError: there is neither.
    """
    folder = config.run_folder
    if path.name == "config.yaml" and (path.parent / "last.pth").is_file() and not given & _FOLDER:
        folder = path.parent
    best = folder / "best.pth"
    named = [config.MODEL[name] for name in ("RESUME", "PRETRAINED") if f"MODEL.{name}" in given]
    if not any(named) and not best.is_file():
        start = config.MODEL.RESUME or config.MODEL.PRETRAINED
        hint = f"; {start}, which the config names, is what the run starts from" if start else ""
        hint += f"; {folder} has no best.pth, but last.pth" if (folder / "last.pth").is_file() else ""
        raise ValueError(f"--eval needs a checkpoint: pass it as --resume FILE{hint}")
    config.MODEL.RESUME = next(filter(None, named), str(best))
    config.MODEL.PRETRAINED = ""
    if "MODEL.CLASS_MAP" not in given:  # that of a config is for the weights its run started from
        config.MODEL.CLASS_MAP = ""
    if "MODEL.WEIGHTS" not in given:
        asked = EMA if config.TRAIN.EMA.ENABLED else RAW
        config.MODEL.WEIGHTS = asked if "TRAIN.EMA.ENABLED" in given else ""
