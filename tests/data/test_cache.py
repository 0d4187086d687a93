"""Cached images equal those of their source, are shared by processes, and leave no files behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data import build, cache
from data.build import build_train_loader, open_dataset
from data.cache import CachedSource
from data.formats.tar import open_tar
from data.images import UnreadableImage
from data.listing import Listing
from data.sources import ImageSource, Request
from tests.data.formats.writers import add_bytes
from tests.data.samples import small_config, write_folder


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    root = write_folder(tmp_path / "photos", {"train/cat": 4, "train/dog": 3, "val/cat": 1})
    return open_dataset(small_config(root)).train


def test_processes_share_what_is_read_once(
    tmp_path: Path, source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [(image.data, image.name, image.exif) for image in map(source.get, range(7))]
    folder = tmp_path / "memory"
    folder.mkdir()
    first = CachedSource(source, folder, "run", processes=2, is_main=True)
    monkeypatch.setattr(type(source), "get", lambda *_: pytest.fail("the source is asked again"))
    second = CachedSource(source, folder, "run", processes=2, is_main=False)
    assert list(folder.iterdir()) == []
    for one in (first, second):
        assert [(image.data, image.name, image.exif) for image in map(one.get, range(7))] == expected
        np.testing.assert_array_equal(one.labels, source.labels)
        assert (one.cached(), one.warnings) == (7, ())


@pytest.mark.xdist_group("serial")
@pytest.mark.parametrize("key", ["run", "another run"])
def test_what_a_killed_process_left_is_removed_and_not_used(tmp_path: Path, source: ImageSource, key: str) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()

    def die_after_filling() -> None:
        CachedSource(source, folder, "run", processes=2, is_main=True)
        os.kill(os.getpid(), signal.SIGKILL)

    killed = multiprocessing.get_context("fork").Process(target=die_after_filling)
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert (folder / f"dat-{os.getuid()}-run.data").exists()
    other = open_dataset(small_config(write_folder(tmp_path / "others", {"train/fox": 2, "val/fox": 1}))).train
    cached = CachedSource(other, folder, key, processes=1, is_main=True)
    assert list(folder.iterdir()) == []
    assert [cached.get(index).data for index in range(2)] == [other.get(index).data for index in range(2)]


def test_the_cache_of_a_living_process_is_not_removed(tmp_path: Path, source: ImageSource) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    first = CachedSource(source, folder, "run", processes=2, is_main=True)
    files = set(folder.iterdir())
    assert CachedSource(source, folder, "another run", processes=1, is_main=True).cached() == 7
    assert set(folder.iterdir()) == files
    assert CachedSource(source, folder, "run", processes=2, is_main=False).get(6).data == first.get(6).data
    assert list(folder.iterdir()) == []


def test_images_that_do_not_fit_or_are_unreadable_come_from_the_source(
    tmp_path: Path, source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [len(source.get(index).data) for index in range(7)]
    missing = Path(source.get(1).name)
    missing.unlink()
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("", (), {"free": sum(sizes[:4]), "total": 0}))
    cached = CachedSource(source, tmp_path, "run", processes=1, is_main=True)
    assert 3 <= cached.cached() < 6
    assert cached.get(6).data == source.get(6).data
    (warning,) = cached.warnings
    assert warning.startswith(
        f"DATA.CACHE: {7 - len(cached._table)} of 7 images read from the disk, as {tmp_path} is full"
    )
    with pytest.raises(UnreadableImage):
        cached.get(1)


def test_memory_of_prefetched_batches_stays_free(
    tmp_path: Path, source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(build, "SHARED_MEMORY", folder)
    monkeypatch.setattr(build.os, "sched_getaffinity", lambda _: {0}, raising=False)
    config = small_config(tmp_path / "photos", CACHE=True, NUM_WORKERS=1)
    batches = 4 * 4 * 32 * 32 * 4  # four batches of four images
    for free, cached in ((batches - 1, 7), (batches, 0), (batches + len(source.get(0).data), 1)):
        disk = type("", (), {"free": free, "total": 0})
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda _, disk=disk: disk)
        assert build._source(config, source, "train", 0).cached() == cached


def test_batches_are_the_same(source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SHARED_MEMORY", tmp_path)
    root, batches = tmp_path / "photos", []
    for on in (False, True):
        config = small_config(root, CACHE=on)
        (batch,) = build_train_loader(config, open_dataset(config), rank=0, world_size=1)
        batches.append(batch)
    np.testing.assert_array_equal(*(batch.images.numpy() for batch in batches))


def test_tasks_of_a_slurm_step_share_the_cache(
    source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(build, "SHARED_MEMORY", folder)
    monkeypatch.delenv("RANK", raising=False)
    for name, value in {"LOCAL_WORLD_SIZE": "2", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    config = small_config(tmp_path / "photos", CACHE=True, BATCH_SIZE=2)
    loaders = []
    for parent in (10, 11):  # each task has a shell of its own as its parent
        monkeypatch.setattr(build.os, "getppid", lambda parent=parent: parent)
        assert len(list(folder.iterdir())) == (0 if parent == 10 else 4)
        loaders.append(build_train_loader(config, open_dataset(config), rank=parent - 10, world_size=2))
    assert list(folder.iterdir()) == []


def test_system_without_shared_memory(source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SHARED_MEMORY", tmp_path / "none")
    config = small_config(tmp_path / "photos", CACHE=True)
    with pytest.raises(ValueError, match="leave it off"):
        build_train_loader(config, open_dataset(config), rank=0, world_size=1)


def test_full_shared_memory_is_reported_in_one_line(
    tmp_path: Path, source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(Listing, "save", full)
    with pytest.raises(
        ValueError, match=r"^DATA\.CACHE: .*/memory cannot be written \(No space left on device\); free"
    ):
        CachedSource(source, folder, "run", processes=1, is_main=True)
    assert list(folder.iterdir()) == []


def test_a_disk_that_fails_is_not_reported_as_full_memory(
    tmp_path: Path, source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: ImageSource, index: int) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", f"{index}.jpg")

    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(type(source), "get", fail)
    with pytest.raises(OSError, match=r"Stale file handle: '0\.jpg'") as failure:
        CachedSource(source, folder, "run", processes=1, is_main=True)
    assert failure.value.errno == errno.ESTALE
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("system", ["Linux", "Windows"])
def test_images_of_an_archive_that_is_read_by_several_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    if system == "Windows":
        monkeypatch.delattr(os, "pread", raising=False)
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for number in range(2000):
            add_bytes(archive, f"cat/{number:04}.jpg", f"image {number:04}".encode())
    source = open_tar(Request(path=str(tmp_path), needs=("train",))).train
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        cached = CachedSource(source, tmp_path, "run", processes=1, is_main=True)
    finally:
        sys.setswitchinterval(interval)
    assert [cached.get(index).data for index in range(2000)] == [f"image {n:04}".encode() for n in range(2000)]
