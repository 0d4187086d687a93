"""Checkpoints: which files are read and rejected, and that interrupted writes leave complete files."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import resource
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from yacs.config import CfgNode

from config import default_config
from tests.runs import Killed
from training.checkpoint import CheckpointFolder, load_checkpoint, load_strictly
from training.resume import config_changes
from training.weight_sets import pick_weights

OLD = {"_use_new_zipfile_serialization": False}  # the pickle is then the file, whose content can be edited


def published() -> dict[str, Any]:
    """Return a small checkpoint in the layout of the published ones."""
    dat = {"dims": [64, 128, 256, 512], "stage_spec": [["N", "D"]], "coordinates": ("a", "tuple")}
    config = CfgNode({"BASE": [""], "MODEL": {"TYPE": "dat", "DAT": dat}})
    config.freeze()
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [1e-3], "metric": None, "noise_range_t": None, "noise_pct": 0.67},
        "max_accuracy": 83.864,
        "epoch": 299,
        "config": config,
    }


def refusal(path: Path) -> str:
    """Return the one-line error message for a file, which begins with its path."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    return str(error.value)


class Hostile:
    """Calls a function with a shell command when unpickled."""

    def __init__(self, function: Any, command: str) -> None:
        self.call = function, (command,)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_the_published_layout_is_read_as_plain_containers(tmp_path: Path, zipped: bool) -> None:
    path, written = tmp_path / "dat_pp_tiny_in1k_224.pth", published()
    torch.save(written, path, _use_new_zipfile_serialization=zipped)
    read = load_checkpoint(path)
    assert read["config"] == written["config"]
    assert not isinstance(read["config"]["MODEL"], CfgNode)
    assert (read["epoch"], read["max_accuracy"], read["lr_scheduler"]) == (299, 83.864, written["lr_scheduler"])
    assert torch.equal(read["optimizer"]["state"][0]["exp_avg"], written["optimizer"]["state"][0]["exp_avg"])
    weights = pick_weights(read, path, nn.Linear(4, 3)).weights
    assert all(torch.equal(weights[name], value) for name, value in written["model"].items())
    load_strictly(nn.Linear(4, 3), weights, path)


def test_published_files_still_load_with_timm_after_the_trainer_has_read_one(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "published.pth")
    load_checkpoint(tmp_path / "published.pth")
    assert torch.load(tmp_path / "published.pth", weights_only=True)["epoch"] == 299  # as timm reads it


@pytest.mark.parametrize(
    ("function", "command", "name"),
    [
        (os.system, "rm {}", "posix.system"),
        (os.remove, "{}", "posix.remove"),
        (eval, "__import__('os').remove('{}')", "eval"),
        (exec, "import os; os.remove('{}')", "exec"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_before_it_runs(
    tmp_path: Path, function: Any, command: str, name: str, zipped: bool
) -> None:
    path, victim = tmp_path / "weights.pth", tmp_path / "victim"
    victim.touch()
    config = Hostile(function, command.format(victim))
    torch.save(published() | {"config": config}, path, _use_new_zipfile_serialization=zipped)
    assert f"contains a pickled {name}, which could execute code when loaded; it is rejected" in refusal(path)
    assert victim.exists()
    torch.load(path, weights_only=False)  # for comparison: it would execute code
    assert not victim.exists()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.ones(3), "multiarray._reconstruct"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (timedelta(days=1), "datetime.timedelta"),
        (Path("x"), "Path"),
    ],
)
def test_other_pickled_class_is_rejected_by_name(tmp_path: Path, value: Any, name: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": {"weight": torch.ones(2)}, "extra": value}, path)
    message = refusal(path)
    assert "contains a pickled" in message
    assert name in message


@pytest.mark.parametrize("module", [b"numpy._core", b"numpy.core"])
def test_plain_values_of_other_trainers_are_read(tmp_path: Path, module: bytes) -> None:
    path = tmp_path / "checkpoint.pth"
    arguments = Namespace(lr=0.1, model="dat_tiny", betas=(0.9, 0.999))
    numbers = {"best": np.float64(83.5), "epoch": np.int64(3), "low": np.float32(0.5), "done": np.bool_(True)}
    torch.save({"model": {"weight": torch.ones(2)}, "args": arguments, **numbers}, path, **OLD)
    path.write_bytes(path.read_bytes().replace(b"numpy._core", module))
    loaded = load_checkpoint(path)
    assert loaded["args"] == arguments
    assert {name: loaded[name] for name in numbers} == numbers


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_called_damaged(tmp_path: Path, share: float, zipped: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save(published() | {"filler": torch.randn(20_000)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "damaged" in refusal(path)


def test_a_damaged_list_of_files_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(published(), path)
    content = path.read_bytes()
    entry = content.index(b"PK\1\2")  # the first of the list at the end of an archive
    for place, is_read in ((46, False), (6, True)):  # a name, and a version that PyTorch ignores
        path.write_bytes(content[: entry + place] + b"\xff" + content[entry + place + 1 :])
        if is_read:
            assert load_checkpoint(path)["epoch"] == 299
        else:
            assert "damaged" in refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; the download failed, download the file again"),
        (b"<!DOCTYPE html><html><title>Quota exceeded</title></html>", "a text page"),
        (b"\n  <html>", "a text page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a text page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 97\n", "a text page"),
        (b"Not found", "damaged or not a PyTorch checkpoint"),
        (b"PK\x03\x04" + bytes(100), "damaged"),
        (bytes(1000), "damaged"),
    ],
)
def test_files_that_are_not_checkpoints_are_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert message in refusal(path)


@pytest.mark.parametrize("value", [[torch.ones(2)], torch.ones(2), "text", 3])
def test_checkpoint_that_is_not_a_dict_is_rejected(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "weights.pth"
    torch.save(value, path)
    assert f"contains a {type(value).__name__}, not a dict" in refusal(path)


def test_missing_file_suggests_a_similar_name(tmp_path: Path) -> None:
    near = tmp_path / "dat_pp_tiny_in1k_224.pth"
    near.touch()
    assert refusal(tmp_path / "dat_tiny_in1k_224.pth").endswith(f"does not exist; did you mean {near}?")
    assert refusal(tmp_path / "nowhere" / "x.pth").endswith("does not exist")


def test_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    assert "is a folder; name a file in it" in refusal(tmp_path)


def test_file_without_read_permission_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "weights.pth"
    path.touch()
    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(path) == f"{path} cannot be read: Permission denied"


def test_a_read_error_of_the_machine_is_not_an_error_of_the_file() -> None:
    path = Path("/proc/self/mem")  # the beginning of the memory cannot be read
    with pytest.raises(OSError, match=re.escape(f"[Errno {errno.EIO}] Input/output error: '{path}'")):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ESTALE, "Stale file handle"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"),
    ],
)
def test_a_failure_of_the_machine_does_not_fall_back_to_an_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    folder = CheckpointFolder(tmp_path, keep=0)
    for value in (1, 2):
        folder.save(state(value), best=True)
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error), match=f"'{tmp_path / 'last.pth'}'$" if isinstance(error, OSError) else None):
        folder.newest(pytest.fail)
    assert folder.best_epoch() == 0


class Classifier(nn.Module):
    """The smallest network with a head of the published name."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(4, dim)
        self.cls_head = nn.Linear(dim, classes)

    def get_classifier(self) -> nn.Module:
        return self.cls_head


def test_strict_loading_loads_everything() -> None:
    source, target = Classifier(8, 5), Classifier(8, 5)
    load_strictly(target, source.state_dict(), "x.pth")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


def test_strict_loading_says_that_the_classes_differ() -> None:
    with pytest.raises(ValueError, match=r"x\.pth was trained for 1000 classes, the data set has 5; .*in TASK class"):
        load_strictly(Classifier(8, 5), Classifier(8, 1000).state_dict(), "x.pth")


def test_strict_loading_lists_the_differences_of_architecture() -> None:
    model = Classifier(8, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = Classifier(8, 5).state_dict()
    weights["body.bias"] = torch.ones(16)
    weights["extra"] = weights.pop("cls_head.bias")
    with pytest.raises(ValueError, match=r"x\.pth has a different architecture than --cfg") as error:
        load_strictly(model, weights, "x.pth")
    problems = ["body.bias is (16,) instead of (8,)", "cls_head.bias is missing", "extra is not in this model"]
    assert str(error.value).endswith(": " + "; ".join(problems))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_strict_loading_of_very_different_weights_stays_short() -> None:
    weights = {f"layer{i}.weight": torch.ones(1) for i in range(100)}
    with pytest.raises(ValueError, match=r"; and 100 more$"):
        load_strictly(Classifier(8, 5), weights, "x.pth")


def test_only_options_that_change_the_result_are_changes() -> None:
    written = default_config()
    checkpoint = {"config": written.dump(), "images_per_update": 512, "training_images": 9000}
    now = default_config()
    now.OUTPUT, now.DATA.NUM_WORKERS, now.DATA.BATCH_SIZE = "elsewhere", 2, 32
    now.DATA.DOWNLOAD = now.DATA.ALLOW_LARGER_VAL = True
    assert config_changes(checkpoint, now, images_per_update=512, training_images=9000) == []
    now.TRAIN.BASE_LR = 1e-3
    changes = config_changes(checkpoint, now, images_per_update=256, training_images=9001)
    assert [change.split(":")[0] for change in changes] == ["TRAIN.BASE_LR", "images per update", "training images"]
    assert changes[-1] == "training images: 9000 in the checkpoint, 9001 now"


@pytest.mark.parametrize(
    ("before", "now", "same"), [("fp16", "auto", True), ("bf16", "auto", True), ("off", "auto", False)]
)
def test_a_precision_that_is_still_open_may_become_that_of_the_checkpoint(before: str, now: str, same: bool) -> None:
    written, config = default_config(), default_config()
    written.AMP, config.AMP = before, now
    changes = config_changes(
        {"config": written.dump(), "images_per_update": 512}, config, images_per_update=512, training_images=9000
    )
    assert changes == ([] if same else [f"AMP: {before!r} in the checkpoint, {now!r} now"])


def state(value: float, size: int = 10) -> dict[str, Any]:
    return {"model": {"weight": torch.full((size,), value)}, "epoch": int(value)}


def value_in(path: Path) -> float:
    return load_checkpoint(path)["model"]["weight"][0].item()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def newest(folder: Path) -> tuple[str, float, list[str]]:
    """Return name, value and warnings of the checkpoint that a run would resume from."""
    warnings: list[str] = []
    found = CheckpointFolder(folder, keep=0).newest(warnings.append)
    assert found is not None
    path, read = found
    return path.name, read["model"]["weight"][0].item(), warnings


@contextmanager
def full_disk(limit: int = 4096) -> Iterator[None]:
    """Limit the size of files, so that a write fails in the middle as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_files_of_a_run(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=0)
    assert folder.newest(pytest.fail) is None
    folder.save(state(1))
    assert names(tmp_path) == {"last.pth"}
    folder.save(state(2), best=True)
    folder.save(state(3), epoch=3)
    assert names(tmp_path) == {"last.pth", "previous.pth", "best.pth", "epoch_3.pth"}
    values = {name: value_in(tmp_path / name) for name in names(tmp_path)}
    assert values == {"last.pth": 3, "previous.pth": 2, "best.pth": 2, "epoch_3.pth": 3}
    assert newest(tmp_path) == ("last.pth", 3, [])


def test_checkpoints_before_a_given_time_are_left_out(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=0)
    for epoch in (1, 2, 3):
        folder.save(state(epoch), epoch=epoch)
    (tmp_path / "epoch_2.pth").unlink()
    for name, seconds in (("last.pth", 3000), ("previous.pth", 2000), ("epoch_1.pth", 1000)):
        os.utime(tmp_path / name, (seconds, seconds))  # epoch_3.pth is the same file as last.pth
    for since, found in ((1000, "last.pth"), (3000, "last.pth"), (3000.5, None)):
        newest = folder.newest(pytest.fail, since=since)
        assert (newest and newest[0].name) == found
    (tmp_path / "last.pth").write_bytes(b"PK half a checkpoint")
    (tmp_path / "epoch_3.pth").unlink()
    os.utime(tmp_path / "last.pth", (3000, 3000))
    assert folder.newest(lambda _: None, since=2000)[0].name == "previous.pth"
    with pytest.raises(ValueError, match="can be read"):
        folder.newest(pytest.fail, since=2500)


def test_pruning_only_removes_the_oldest_epochs(tmp_path: Path) -> None:
    (tmp_path / "epoch_best_of_all.pth").write_text("mine")
    folder = CheckpointFolder(tmp_path, keep=2)
    for epoch in (8, 9, 10, 11):
        folder.save(state(epoch), best=epoch == 8, epoch=epoch)
    expected = {"last.pth", "previous.pth", "best.pth", "epoch_10.pth", "epoch_11.pth", "epoch_best_of_all.pth"}
    assert names(tmp_path) == expected
    assert value_in(tmp_path / "best.pth") == 8


@pytest.mark.parametrize(
    ("name", "epoch", "others"),
    [
        ("epoch_2.pth", 2, {"last.pth", "previous.pth", "epoch_3.pth"}),  # best.pth is of that epoch
        ("epoch_1.pth", 1, {"last.pth", "previous.pth", "best.pth", "epoch_2.pth", "epoch_3.pth"}),
        ("previous.pth", 2, {"last.pth", "epoch_3.pth"}),
    ],
)
def test_a_run_that_goes_back_does_not_build_on_later_checkpoints(
    tmp_path: Path, name: str, epoch: int, others: set[str]
) -> None:
    folder = CheckpointFolder(tmp_path, keep=0)
    for number in (1, 2, 3):
        folder.save(state(number) | {"best_epoch": number}, best=number == 2, epoch=number)
    assert {path.name for path in folder.abandoned(tmp_path / name, epoch)} == others


def test_a_full_disk_leaves_every_file_as_it_was(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(state(1), best=True, epoch=1)
    folder.save(state(2))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk(), pytest.raises(OSError, match="File too large"):
        folder.save(state(3, size=10_000), best=True, epoch=3)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    folder.save(state(4))
    assert newest(tmp_path) == ("last.pth", 4, [])


@contextmanager
def killed_before_step(step: int) -> Iterator[None]:
    """Interrupt before the given file system operation, counted from 0."""
    left = step

    def counted(call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return call(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "fsync"), (os, "link"), (Path, "replace"), (Path, "unlink"), (Path, "open")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield


def test_killed_write_leaves_complete_checkpoints_and_harmless_files(tmp_path: Path) -> None:
    deaths = 0
    for step in range(30):
        path = tmp_path / str(step)
        path.mkdir()
        folder = CheckpointFolder(path, keep=1)
        for value in (1, 2):
            folder.save(state(value), best=True, epoch=value)
        try:
            with killed_before_step(step):
                folder.save(state(3), best=True, epoch=3)
        except Killed:
            deaths += 1
        name, value, warnings = newest(path)
        assert (name, warnings) == ("last.pth", [])
        assert value in (2, 3)
        assert all(value_in(file) in (1, 2, 3) for file in path.glob("*.pth"))
        if value == 3:  # nothing is left to do, as no save may follow
            assert names(path) == {"last.pth", "previous.pth", "best.pth", "epoch_3.pth"}
        others = {file.name: value_in(file) for file in [path / "best.pth", *path.glob("epoch_*.pth")]}
        folder.save(state(5))  # neither the best nor the end of an epoch
        assert {name: value_in(path / name) for name in others if (path / name).exists()}.items() <= others.items()
        assert "best.pth" in names(path)
        folder.save(state(4), best=True, epoch=4)
        assert names(path) == {"last.pth", "previous.pth", "best.pth", "epoch_4.pth"}
        assert newest(path) == ("last.pth", 4, [])
    assert 8 < deaths < 30  # every operation was interrupted


def test_hard_links_leave_no_temporary_file(tmp_path: Path) -> None:
    """After a kill `last.pth` and `previous.pth` may be links to one file, which a rename does not change."""
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(state(1))
    os.link(tmp_path / "last.pth", tmp_path / "previous.pth")
    folder.save(state(2))
    assert {name: value_in(tmp_path / name) for name in names(tmp_path)} == {"last.pth": 2, "previous.pth": 1}


def test_half_a_file_left_by_a_killed_write_is_overwritten(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(state(1))
    for leftover in ("last.tmp", "beside.tmp"):
        (tmp_path / leftover).write_bytes(b"PK half a checkpoint")
    assert newest(tmp_path) == ("last.pth", 1, [])
    folder.save(state(2), best=True, epoch=2)
    assert names(tmp_path) == {"last.pth", "previous.pth", "best.pth", "epoch_2.pth"}


def test_a_file_system_without_hard_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    folder = CheckpointFolder(tmp_path, keep=1)
    for value in (1, 2):
        folder.save(state(value), best=True, epoch=value)
    values = {name: value_in(tmp_path / name) for name in names(tmp_path)}
    assert values == {"last.pth": 2, "previous.pth": 1, "best.pth": 2, "epoch_2.pth": 2}


def test_a_truncated_last_checkpoint_falls_back_to_the_previous_one_with_a_warning(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=0)
    folder.save(state(1))
    folder.save(state(2))
    last, previous = tmp_path / "last.pth", tmp_path / "previous.pth"
    last.write_bytes(last.read_bytes()[:500])
    name, value, warnings = newest(tmp_path)
    assert (name, value) == ("previous.pth", 1)
    assert len(warnings) == 1
    assert str(last) in warnings[0]
    assert str(previous) in warnings[0]


def test_newest_epoch_is_the_last_fallback(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=0)
    for epoch in (9, 10, 11):
        folder.save(state(epoch), epoch=epoch)
    for broken in ("last.pth", "previous.pth"):
        (tmp_path / broken).unlink()
        (tmp_path / broken).write_bytes(b"")
    assert newest(tmp_path)[:2] == ("epoch_11.pth", 11)
    for path in tmp_path.glob("*.pth"):
        path.unlink()
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"no checkpoint in {re.escape(str(tmp_path))} can be read"):
        newest(tmp_path)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://example.org/a.pth#sha256=" + 64 * "0", "only downloaded by https"),
        ("ftp://example.org/a.pth#sha256=" + 64 * "0", "only downloaded by https"),
        ("file:///etc/a.pth#sha256=" + 64 * "0", "only downloaded by https"),
        ("https://example.org/a.pth", "needs the file's hash"),
        ("https://example.org/a.pth#sha256=abc", "needs the file's hash"),
        ("https://example.org/a.pth#sha256=" + 64 * "x", "needs the file's hash"),
    ],
)
def test_url_needs_https_and_a_hash(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_checkpoint(address)


class Internet:
    """Replaces `urllib`'s: answers every request with a file, and counts."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.requests = 0

    def __call__(self, *_: Any, **__: Any) -> io.BytesIO:
        self.requests += 1
        answer = io.BytesIO(self.content)
        answer.info = lambda: EmailMessage()  # type: ignore[attr-defined]
        return answer


def test_a_fetched_file_is_checked_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(published(), tmp_path / "file.pth")
    content = (tmp_path / "file.pth").read_bytes()
    address = f"https://example.org/a.pth#sha256={hashlib.sha256(content).hexdigest()}"
    internet = Internet(content)
    monkeypatch.setattr("torch.hub.urlopen", internet)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for _ in range(2):
        assert load_checkpoint(address)["epoch"] == 299
    assert internet.requests == 1
    copies = list(tmp_path.rglob("checkpoints/*"))
    assert len(copies) == 1
    copies[0].write_bytes(content + b"x")
    assert load_checkpoint(address)["epoch"] == 299
    assert internet.requests == 2
    copies[0].unlink()
    internet.content = content + b"x"
    with pytest.raises(ValueError, match=r"https://example\.org/a\.pth could not be downloaded: invalid hash"):
        load_checkpoint(address)
    assert list(tmp_path.rglob("checkpoints/*")) == []
