"""Checkpoints: safe loading, atomic saving, and the checkpoint files of a run.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts, so that loading it executes no code: `format`,
`model`, `ema` (or None), `chosen` (which of these two decides the best epoch, `raw` or `ema`), `optimizer`, `scaler`,
`images_per_update`, `training_images`, `classes` (names by label), `config` (YAML text) and the fields of
`training.run.Position`, such as `epoch` and `update` (the next ones). The oldest files lack `chosen`, `training_images`
and `classes`. The published files, with a pickled `CfgNode` under `config`, load too, and so do files of other
trainers, in which `training.weight_sets` finds the weights.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import shutil
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from data.wording import counted
from models.contract import classifier, set_epoch
from models.options import did_you_mean
from models.weights import mismatches
from training.exit_status import is_machine_failure, is_out_of_memory
from utils import STAGED

FORMAT = 1

# Plain values that other trainers save beside the weights: their parsed arguments, and numbers of NumPy, such as the
# best accuracy. None of them executes code when unpickled. Files of NumPy 1 name another module.
_SCALAR = np.float64(0).__reduce__()[0]
_PLAIN = [
    Namespace,
    np.dtype,
    *(type(np.dtype(code)) for code in f"?{np.typecodes['AllInteger']}{np.typecodes['Float']}"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU, unpickling only tensors, plain containers and plain values.

    The yacs `CfgNode` of a published file becomes an `OrderedDict`: `models.registry` allows it for all of PyTorch.

    Args:
        path: a file, or a URL as accepted by `fetch`.

    Raises:
        ValueError: the file is missing, damaged, not a checkpoint, or contains any other pickled class.
        OSError: the machine failed to read it, so it need not be damaged.
        MemoryError: out of memory; PyTorch raises a RuntimeError.
    """
    path = fetch(str(path)) if "://" in str(path) else Path(path)
    begin = _first_bytes(path)
    if path.suffix == ".safetensors" or _is_safetensors(begin):
        return _load_safetensors(path)
    if kind := _other_archive(path):
        raise ValueError(f"{path} is {kind}")
    with _naming_file(path):
        loaded = _unpickle(path)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} contains a {type(loaded).__name__}, not a dict with `model`")
    return loaded


def _unpickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN):
            warnings.simplefilter("ignore")  # problems are reported below, in one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "Unsupported global" in reason or "GLOBAL" in reason:
            name = reason.split("GLOBAL ", 1)[-1].split()[0].rstrip(".")
            raise ValueError(
                f"{path} contains a pickled {name}, which could execute code when loaded; it is rejected"
            ) from None
        raise ValueError(f"{path} is damaged or not a PyTorch checkpoint") from None
    except Exception as error:  # torch.load can raise any other exception on a damaged file, also an OSError
        if is_machine_failure(error) or is_out_of_memory(error):
            raise
        raise ValueError(f"{path} is damaged, truncated or not a PyTorch checkpoint ({type(error).__name__})") from None


@contextmanager
def _naming_file(path: Path) -> Iterator[None]:
    """Add the path to failures of the machine, and raise other errors of reading the file as `ValueError`."""
    try:
        yield
    except OSError as error:
        if is_machine_failure(error):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def _first_bytes(path: Path) -> bytes:
    """Return the beginning of a checkpoint file.

    Raises:
        ValueError: the file is missing, cannot be read, is empty or a text page.
        OSError: the machine failed to read it.
    """
    if path.is_dir():
        raise ValueError(f"checkpoint {path} is a folder; name a file in it")
    if not path.is_file():
        beside = {file.name: file for file in path.parent.glob("*.pth")}
        raise ValueError(f"checkpoint {path} does not exist{did_you_mean(path.name, beside, shown=beside)}")
    with _naming_file(path), path.open("rb") as file:
        begin = file.read(512)
    text = begin.lstrip().lower()
    if not text or text.startswith((b"<", b"version https://git-lfs")):
        kind = "a text page, not a checkpoint" if text else "empty"
        raise ValueError(f"{path} is {kind}; the download failed, download the file again")
    return begin


def _is_safetensors(begin: bytes) -> bool:
    """Return whether a file begins like safetensors: with the length of the header in 8 bytes, and JSON."""
    return begin[8:10] == b'{"' and int.from_bytes(begin[:8], "little") < 2**32


def _other_archive(path: Path) -> str:
    """Return what a zip archive is and how to convert it; empty for a checkpoint of PyTorch and for other files."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {PurePosixPath(name).name for name in archive.namelist()}
    except Exception:  # no zip archive, such as checkpoints of PyTorch before 1.6, or a damaged one
        return ""
    if "constants.pkl" in names:
        return (
            "a TorchScript program, which could execute code; if you trust it, save its weights: "
            "torch.save(torch.jit.load(file).state_dict(), new_file)"
        )
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive; save its arrays as tensors: torch.save({name: torch.from_numpy(array), ...}, file)"
    return ""


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, truncated or not a safetensors file ({error})") from None


def fetch(address: str) -> Path:
    """Return the local copy of `https://...#sha256=<hash of the file>`, which is downloaded once and checked each time.

    Raises:
        ValueError: the protocol is not https, the hash is missing or does not match, or the download fails.
    """
    url, _, digest = address.partition("#sha256=")
    if not url.startswith("https://"):
        raise ValueError(f"{address}: checkpoints are only downloaded by https; download the file and name it instead")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"{url} needs the file's hash: write {url}#sha256=<64 digits that sha256sum prints>")
    copy = Path(torch.hub.get_dir()) / "checkpoints" / f"{digest}.pth"
    if copy.is_file() and hashlib.sha256(copy.read_bytes()).hexdigest() == digest:
        return copy
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(copy), hash_prefix=digest, progress=False)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{url} could not be downloaded: {error}") from None
    return copy


def load_strictly(model: nn.Module, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load `weights` into `model`; all names and shapes must match.

    Raises:
        ValueError: lists the mismatches.
    """
    expected = model.state_dict()
    head = f"{classifier(model)}.weight"
    if head in weights and head in expected and weights[head].shape[1:] == expected[head].shape[1:]:
        classes, wanted = weights[head].shape[0], expected[head].shape[0]
        if classes != wanted:
            raise ValueError(
                f"{path} was trained for {counted(classes, 'class', 'classes')}, the data set has {wanted}; "
                "to evaluate it in TASK classification, name their labels in a MODEL.CLASS_MAP; to fine-tune it, use "
                "--pretrained"
            )
    if problems := mismatches(weights, expected):
        raise ValueError(f"{path} has a different architecture than --cfg: {problems}")
    model.load_state_dict(weights)


def set_trained_epoch(network: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Notify a network with the weights of `checkpoint` of the last epoch that they were trained in, if it is known."""
    if isinstance(epoch := checkpoint.get("epoch"), int):
        set_epoch(network, max(epoch if checkpoint.get("update") else epoch - 1, 0))


class CheckpointFolder:
    """The checkpoints of a run: `last.pth`, the one before it as `previous.pth`, `best.pth` and `epoch_N.pth`.

    Args:
        folder: an existing folder.
        keep: number of `epoch_N.pth` to keep; 0 keeps all.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def save(self, state: dict[str, Any], *, best: bool = False, epoch: int | None = None) -> None:
        """Write `state` as `last.pth`, also as `best.pth` if `best`, and as `epoch_N.pth` for `epoch` N.

        Raises:
            OSError: for example, the disk is full; `last.pth` is then unchanged and every file complete.
        """
        last = self.folder / "last.pth"
        staged = _stage(state, last)
        try:
            # `last.pth` is written last: a run killed before that resumes earlier and writes the others again.
            if best:
                _link_or_copy(staged, self.folder / "best.pth")
            if epoch is not None:
                _link_or_copy(staged, self.folder / f"epoch_{epoch}.pth")
            if last.exists():
                _link_or_copy(last, self.folder / "previous.pth")
            self._prune()
            staged.replace(last)
        finally:
            staged.unlink(missing_ok=True)
        _sync(self.folder)

    def newest(self, warn: Callable[[str], None], *, since: float = 0) -> tuple[Path, dict[str, Any]] | None:
        """Return path and content of the newest undamaged checkpoint, or None if there is no checkpoint.

        Args:
            warn: receives a line for each damaged one that is passed over.
            since: only consider files written at this time or later, in seconds since 1970.

        Raises:
            ValueError: there are checkpoints, but all are damaged.
            OSError: the machine failed to read one.
        """
        candidates = [self.folder / "last.pth", self.folder / "previous.pth", *reversed(self._epochs())]
        broken = []
        for path in candidates:
            if not path.exists() or path.stat().st_mtime < since:
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

    def abandoned(self, path: Path, epoch: int) -> list[Path]:
        """Return the checkpoints that a run does not build on if it goes back to an earlier one of the folder.

        Args:
            path: the earlier checkpoint.
            epoch: how many epochs it has finished.
        """
        states = [self.folder / name for name in ("last.pth", "previous.pth")]
        found = [file for file in states if file.exists() and file.name != path.name]
        found += [file for file, number in self._epochs().items() if number > epoch]
        return found + [self.folder / "best.pth"] * (self.best_epoch() > epoch)

    def best_epoch(self) -> int:
        """Return the epoch of `best.pth`; 0 if it does not exist or cannot be read."""
        try:
            return load_checkpoint(self.folder / "best.pth").get("best_epoch", 0)
        except (ValueError, OSError, MemoryError, RuntimeError):
            return 0

    def _epochs(self) -> dict[Path, int]:
        """Return the epochs of `epoch_N.pth` in ascending order."""
        numbers = {path: path.stem.removeprefix("epoch_") for path in self.folder.glob("epoch_*.pth")}
        epochs = {path: int(number) for path, number in numbers.items() if number.isdigit()}
        return dict(sorted(epochs.items(), key=lambda item: item[1]))

    def _prune(self) -> None:
        if self._keep:
            for path in list(self._epochs())[: -self._keep]:
                path.unlink()


def _stage(state: dict[str, Any], target: Path) -> Path:
    """Write `state` to a temporary file next to `target`, flush it to the disk, and return its path."""
    buffer = io.BytesIO()  # a full disk then fails in a single write
    torch.save(state, buffer)
    staged = target.with_suffix(STAGED)
    staged.unlink(missing_ok=True)  # after a killed write it may be a hard link to `best.pth`
    try:
        with staged.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        staged.unlink(missing_ok=True)
        raise
    return staged


def _link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if the file system does not support links."""
    # One temporary name for all targets, so that a killed write leaves at most one file.
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
        staged.unlink(missing_ok=True)  # still there if the disk is full, or both are links to the same file


def _sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows cannot open folders, and does not need to
        return
    try:
        with suppress(OSError):  # not supported by some network file systems
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
