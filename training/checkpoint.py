"""Checkpoints that are whole or not there: safe loading, atomic saving, and the files of a run.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts, so that reading one runs no code: `format`,
`model`, `ema` (or None), `chosen` (which of these two decides which epoch is the best, `raw` or `ema`), `optimizer`,
`scaler`, `images_per_update`, `training_images`, `classes` (the names by label), `config` (YAML text) and the fields of
`training.run.Position`, such as `epoch` and `update` (what comes next). The oldest files lack `chosen`,
`training_images` and `classes`. The published files, with a pickled `CfgNode` under `config`, load too, and so do files
of other trainers, in which `training.weight_sets` finds the weights.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import os
import pickle
import re
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from models.contract import classifier
from utils import STAGED

FORMAT = 1

# PyTorch's safe unpickler fills exact dicts and OrderedDicts only, so that is what a pickled CfgNode is read as.
_CFG_NODE = (OrderedDict, "yacs.config.CfgNode")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, unpickling nothing but tensors and plain containers.

    The yacs `CfgNode` of a published file becomes an `OrderedDict`.

    Args:
        path: a file, or an address as `fetch` takes it.

    Raises:
        ValueError: for a file that is missing, damaged, no checkpoint, or that holds any other pickled class.
    """
    path = fetch(str(path)) if "://" in str(path) else Path(path)
    if path.is_dir():
        raise ValueError(f"checkpoint {path} is a folder; name a file in it")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.pth")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ValueError(f"checkpoint {path} does not exist{hint}")
    try:
        with path.open("rb") as file:
            begin = file.read(512).lstrip().lower()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not begin or begin.startswith((b"<", b"version https://git-lfs")):
        kind = "a text page, not a checkpoint" if begin else "empty"
        raise ValueError(f"{path} is {kind}; the download went wrong, fetch the file again")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        with torch.serialization.safe_globals([_CFG_NODE]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is said below, in one line
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "Unsupported global" in reason or "GLOBAL" in reason:
            name = reason.split("GLOBAL ", 1)[-1].split()[0].rstrip(".")
            raise ValueError(
                f"{path} holds a pickled {name}, which could run code when loaded; it is refused"
            ) from None
        raise ValueError(f"{path} is damaged or no checkpoint of PyTorch") from None
    except Exception as error:  # torch.load lets whatever a broken file provokes through
        raise ValueError(f"{path} is damaged, cut off or no checkpoint of PyTorch ({type(error).__name__})") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a dict with `model`")
    return loaded


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, cut off or no file of safetensors ({error})") from None


def fetch(address: str) -> Path:
    """Return the local copy of `https://...#sha256=<hash of the file>`, which is downloaded once and checked each time.

    Raises:
        ValueError: for another protocol, without the hash, and where the file cannot be fetched or is another one.
    """
    url, _, digest = address.partition("#sha256=")
    if not url.startswith("https://"):
        raise ValueError(f"{address}: checkpoints are fetched by https alone; download the file and name it instead")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"{url} needs the file's hash: write {url}#sha256=<64 digits that sha256sum prints>")
    copy = Path(torch.hub.get_dir()) / "checkpoints" / f"{digest}.pth"
    if copy.is_file() and hashlib.sha256(copy.read_bytes()).hexdigest() == digest:
        return copy
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(copy), hash_prefix=digest, progress=False)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{url} could not be fetched: {error}") from None
    return copy


def load_strictly(model: nn.Module, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load `weights` into `model`, name for name and shape for shape.

    Raises:
        ValueError: listing what does not fit.
    """
    expected = model.state_dict()
    head = f"{classifier(model)}.weight"
    if head in weights and head in expected and weights[head].shape[1:] == expected[head].shape[1:]:
        classes, wanted = weights[head].shape[0], expected[head].shape[0]
        if classes != wanted:
            raise ValueError(
                f"{path} was trained for {classes} classes, the data set has {wanted}; "
                "evaluate it on the data it was trained on, or fine-tune it with --pretrained"
            )
    problems = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    problems += [f"{name} is not of this model" for name in weights.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected.keys() & weights.keys()
        if weights[name].shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ValueError(f"{path} is of another architecture than --cfg: {shown}")
    model.load_state_dict(weights)


class CheckpointFolder:
    """The checkpoints of a run: `last.pth`, the one before it as `previous.pth`, `best.pth` and `epoch_N.pth`."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Args:
        folder: an existing folder.
        keep: how many `epoch_N.pth` stay; 0 keeps all.
        """
        self.folder = folder
        self._keep = keep

    def save(self, state: dict[str, Any], *, best: bool = False, epoch: int | None = None) -> None:
        """Write `state` as `last.pth`, also as `best.pth` where it is the `best`, and as `epoch_N.pth` for `epoch` N.

        Raises:
            OSError: where the disk is full, say; `last.pth` is then what it was before, and every file whole.
        """
        last = self.folder / "last.pth"
        staged = _stage(state, last)
        try:
            # `last.pth` comes at the end: a run killed before that repeats its steps and writes the others again.
            if best:
                _put_beside(staged, self.folder / "best.pth")
            if epoch is not None:
                _put_beside(staged, self.folder / f"epoch_{epoch}.pth")
            if last.exists():
                _put_beside(last, self.folder / "previous.pth")
            self._prune()
            staged.replace(last)
        finally:
            staged.unlink(missing_ok=True)
        _sync(self.folder)

    def newest(self, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest checkpoint that can be read, with its path; None where there is no checkpoint.

        Raises:
            ValueError: where there are checkpoints, but none can be read.
        """
        candidates = [self.folder / "last.pth", self.folder / "previous.pth", *reversed(self._epochs())]
        broken = []
        for path in candidates:
            if not path.exists():
                continue
            try:
                state = load_checkpoint(path)
            except ValueError as error:
                broken.append(str(error))
                continue
            for reason in broken:
                warn(f"{reason}; continuing from {path} instead")
            return path, state
        if broken:
            raise ValueError(f"no checkpoint in {self.folder} can be read: {'; '.join(broken)}")
        return None

    def best_epoch(self) -> int:
        """Return which epoch `best.pth` is of; 0 where there is none that can be read."""
        try:
            return load_checkpoint(self.folder / "best.pth").get("best_epoch", 0)
        except ValueError:
            return 0

    def _epochs(self) -> list[Path]:
        numbers = {path: path.stem.removeprefix("epoch_") for path in self.folder.glob("epoch_*.pth")}
        return sorted((path for path in numbers if numbers[path].isdigit()), key=lambda path: int(numbers[path]))

    def _prune(self) -> None:
        if self._keep:
            for path in self._epochs()[: -self._keep]:
                path.unlink()


def _stage(state: dict[str, Any], target: Path) -> Path:
    """Write `state` beside `target`, flushed to the disk, and return where."""
    buffer = io.BytesIO()  # a full disk then fails in one plain write
    torch.save(state, buffer)
    staged = target.with_suffix(STAGED)
    staged.unlink(missing_ok=True)  # a killed write may have left it as another name of `best.pth`
    try:
        with staged.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        staged.unlink(missing_ok=True)
        raise
    return staged


def _put_beside(source: Path, target: Path) -> None:
    """Let `target` be the file that `source` is now: a second name for it, or a copy where there are no such names."""
    # One name for all targets, so that a killed write leaves one file at most.
    staged = target.with_name(f"beside{STAGED}")
    staged.unlink(missing_ok=True)
    try:
        try:
            os.link(source, staged)
        except OSError:
            shutil.copyfile(source, staged)
            _sync(staged)
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)  # still there where the disk is full, or both were names of the same file


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders; it keeps their names without being asked
        return
    try:
        with suppress(OSError):  # some network file systems cannot, and need not
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
