"""Shards have all images of the data set, are complete or absent, and equal after an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from data.build import open_dataset
from data.formats.folders import FileSource
from data.sources import Dataset
from tests.data.samples import photograph, small_config, write_folder
from tests.runs import ROOT
from tools import make_shards

LAYOUT = {"train/cat": 9, "train/dog": 8, "val/cat": 3, "val/dog": 2}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "photos", LAYOUT)


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["make_shards.py", "--workers", "1", *map(str, words)])
    make_shards.main()


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Return what the tool says on wrong input."""
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *words)
    return capsys.readouterr().err


def opened(root: Path) -> Dataset:
    return open_dataset(small_config(root, DATASET="tar"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_the_images_as_they_are(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "--data-path", photos, "--output", tmp_path / "shards", "--per-shard", 4)
    shards, folders = opened(tmp_path / "shards"), open_dataset(small_config(photos))
    assert shards.classes == folders.classes
    for one, other in ((shards.train, folders.train), (shards.held_out, folders.held_out)):
        assert [one.get(i).data for i in range(len(one))] == [other.get(i).data for i in range(len(other))]
        assert [one.label(i) for i in range(len(one))] == [other.label(i) for i in range(len(other))]
    listed = json.loads((tmp_path / "shards/shards.json").read_text())["shards"]
    assert len(listed) == 5 + 2
    for name, entry in listed.items():
        content = (tmp_path / "shards" / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert not (tmp_path / "shards/plan.json").exists()


def test_images_are_shrunk_but_not_enlarged(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for side, size in ((24, (32, 24)), (100, (48, 36))):
        run(monkeypatch, "--data-path", photos, "--output", tmp_path / str(side), "--short-side", side)
        assert opened(tmp_path / str(side)).train.read(0).size == size


def write_turned(path: Path, orientation: int | None, kind: str = "JPEG") -> None:
    """Write a photograph with an EXIF orientation; MPO is the JPEG of some cameras, with a preview behind it."""
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    more = {"save_all": True, "append_images": [photograph(9)]} if kind == "MPO" else {}
    photograph(5).save(path, kind, exif=exif, **more)


TURNED = {
    "a.jpg": (None, "JPEG"),
    "b.jpg": (1, "JPEG"),
    "c.jpg": (6, "JPEG"),
    "d.jpg": (6, "MPO"),
    "e.jpg": (None, "MPO"),
    "f.png": (8, "PNG"),
    "g.avif": (3, "AVIF"),
    "h.tif": (6, "TIFF"),
}


@pytest.mark.parametrize("side", [0, 24])
@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_orientation_is_that_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, exif: str
) -> None:
    """Images are upright in the shards if EXIF orientation is applied; otherwise it can be applied later."""
    (tmp_path / "photos/train/cat").mkdir(parents=True)
    for name, (orientation, kind) in TURNED.items():
        write_turned(tmp_path / "photos/train/cat" / name, orientation, kind)
    flags = ("--short-side", side, "--parts", "train", "--opts", "DATA.EXIF", exif)
    run(monkeypatch, "--data-path", tmp_path / "photos", "--output", tmp_path / "shards", *flags)
    for later in ("ignore", "apply"):
        of_shards = open_dataset(small_config(tmp_path / "shards", DATASET="tar", EXIF=later), ("train",)).train
        of_files = open_dataset(
            small_config(tmp_path / "photos", EXIF="apply" if exif == "apply" else later), ("train",)
        ).train
        for index, name in enumerate(TURNED):
            one, other = of_shards.read(index), of_files.read(index)
            assert (one.width > one.height) == (other.width > other.height), name
            error = np.abs(np.asarray(one.resize(other.size), dtype=int) - np.asarray(other)).mean()
            assert error < 12, name


def test_files_are_kept_unless_they_are_turned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "photos/train/cat"
    folder.mkdir(parents=True)
    for name, (orientation, kind) in TURNED.items():
        write_turned(folder / name, orientation, kind)
    flags = ("--parts", "train", "--quality", 40, "--opts", "DATA.EXIF", "apply")
    run(monkeypatch, "--data-path", tmp_path / "photos", "--output", tmp_path / "shards", *flags)
    with tarfile.open(tmp_path / "shards/train-000000.tar") as archive:
        packed = {member.name: archive.extractfile(member).read() for member in archive if ".cls" not in member.name}
    endings = [name.partition(".")[2] for name in packed]
    assert endings == ["jpg", "jpg", "jpg", "jpg", "jpg", "png", "png", "tif"]
    files = [(folder / name).read_bytes() for name in TURNED]
    kept = [content == file for content, file in zip(packed.values(), files, strict=True)]
    assert kept == [True, True, False, False, True, False, False, True]
    for name, content in packed.items():
        if name.endswith("jpg") and content not in files:
            assert len(content) < len(files[2])


def test_data_set_is_not_sent_with_every_shard(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: FileSource) -> None:
        raise TypeError("pickled")

    monkeypatch.setattr(FileSource, "__reduce__", refuse)
    run(monkeypatch, "--data-path", photos, "--output", tmp_path / "shards", "--per-shard", 4)


def test_classes_that_are_numbers(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The label of class 10 is its position, 2, which is the name of another class."""
    for name, number in (("cat", "10"), ("dog", "2")):
        for part in ("train", "val"):
            (photos / part / name).rename(photos / part / number)
    for number in ("0", "1"):
        write_folder(photos, {f"train/{number}": 1})
    run(monkeypatch, "--data-path", photos, "--output", tmp_path / "shards")
    shards, folders = opened(tmp_path / "shards"), open_dataset(small_config(photos))
    assert shards.classes == folders.classes == ["0", "1", "10", "2"]
    assert shards.train.labels.tolist() == folders.train.labels.tolist()
    assert shards.held_out.labels.tolist() == folders.held_out.labels.tolist()


def test_images_without_files_are_written_as_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "--dataset", "digits", "--output", tmp_path / "shards", "--parts", "val")
    shards, digits = (
        open_dataset(small_config(tmp_path / "shards", DATASET="tar"), ("val",)),
        open_dataset(small_config()),
    )
    for index in (0, 100, 359):
        assert shards.held_out.read(index).tobytes() == digits.held_out.read(index).tobytes()
        assert shards.held_out.label(index) == digits.held_out.label(index)


def test_images_of_several_labels(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("cat", "dog;emu", "", "emu")
    for part, number in (("train", 9), ("val", 3)):
        rows = [f"photos/{part}/cat/{index}.jpg,{names[index % 4]}\n" for index in range(number)]
        (tmp_path / f"{part}.csv").write_text("".join(rows))
    flags = ("--dataset", "csv", "--data-path", tmp_path, "--opts", "DATA.MULTI_LABEL", "True")
    run(monkeypatch, *flags, "--output", tmp_path / "shards", "--per-shard", 4)
    kinds = (("csv", tmp_path), ("tar", tmp_path / "shards"))
    table, shards = (open_dataset(small_config(root, DATASET=kind, MULTI_LABEL=True)) for kind, root in kinds)
    assert shards.classes == table.classes == ["cat", "dog", "emu"]
    for one, other in ((shards.train, table.train), (shards.held_out, table.held_out)):
        np.testing.assert_array_equal(one.labels, other.labels)
    assert shards.train.labels.sum(1).tolist() == [1, 2, 0, 1] * 2 + [1]
    with pytest.raises(ValueError, match=r"several labels for an image, .1;2.; set DATA\.MULTI_LABEL True"):
        opened(tmp_path / "shards")


def test_a_kill_leaves_whole_shards_and_the_same_command_continues(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--data-path", photos, "--output", tmp_path / "whole", "--per-shard", 2)
    assert "continuing" not in capsys.readouterr().out
    output = tmp_path / "killed"
    command = [sys.executable, ROOT / "tools/make_shards.py", "--data-path", photos, "--output", output]
    # A shard that takes a second: the machine is fast, the photographs are small.
    slow = "import runpy, sys, time; from data.formats import folders; read = folders.read_file\n"
    slow += "folders.read_file = lambda path: (time.sleep(0.2), read(path))[1]\n"
    slow += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [sys.executable, "-c", slow, *command[1:], "--per-shard", "2", "--workers", "1"]
    process = subprocess.Popen([str(word) for word in words], cwd=ROOT, start_new_session=True)
    while not list(output.glob("train-*3.tar")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = files(output)
    assert "shards.json" not in before
    assert "plan.json" in before
    run(monkeypatch, "--data-path", photos, "--output", output, "--per-shard", 2)
    kept = sum(name.endswith(".tar") for name in before)
    assert f"continuing: {kept} of 12 shards in {output} are complete\n" in capsys.readouterr().out
    assert files(output) == files(tmp_path / "whole")


@pytest.mark.parametrize("left", [[], ["plan.json.tmp"], ["plan.json"]])
def test_a_kill_at_the_beginning_does_not_block_the_same_command(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: list[str]
) -> None:
    def killed(path: Path, text: str) -> None:
        for name in left:
            path.with_name(name).write_text(text)
        raise KeyboardInterrupt

    words = ("--data-path", photos, "--per-shard", 4, "--output")
    with monkeypatch.context() as context:
        context.setattr(make_shards, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            run(context, *words, tmp_path / "killed")
    for name in ("killed", "whole"):
        run(monkeypatch, *words, tmp_path / name)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_nothing_is_overwritten(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data-path", photos, "--output", tmp_path / "shards")
    run(monkeypatch, *words)
    before = files(tmp_path / "shards")
    said = refused(monkeypatch, capsys, *words)
    assert said == f"make_shards.py: {tmp_path}/shards contains a finished set of shards; give another --output\n"
    assert files(tmp_path / "shards") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    said = refused(monkeypatch, capsys, *words[:2], "--output", tmp_path / "other")
    assert said.startswith(f"make_shards.py: {tmp_path}/other is not empty; nothing is overwritten")


def test_another_plan_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "train/dog/7.jpg").write_text("no image")
    words = ("--data-path", photos, "--output", tmp_path / "shards")
    said = refused(monkeypatch, capsys, *words)
    assert said.startswith(f"make_shards.py: cannot read image '{photos}/train/dog/7.jpg': ")
    assert "; repair or remove it; " in said
    said = refused(monkeypatch, capsys, *words, "--short-side", 20)
    assert said.startswith(f"make_shards.py: {tmp_path}/shards contains the beginning of other shards")
    said = refused(monkeypatch, capsys, *words, "--opts", "DATA.EXIF", "apply")
    assert "the beginning of other shards" in said
    photos.rename(tmp_path / "others")
    said = refused(monkeypatch, capsys, "--data-path", tmp_path / "others", *words[2:])
    assert "the beginning of other shards" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--per-shard", "0"), "--per-shard must be at least 1, not 0"),
        (("--quality", "101"), "--quality 101 must be 1 to 100"),
        (("--opts", "DATA.VAL"), "--opts takes pairs of KEY VALUE; 'DATA.VAL' has no value"),
        (("--opts", "DATA.EXIF", "applied"), "DATA.EXIF must be .*, not 'applied'; did you mean apply?"),
        (("--dataset", "tgz"), "DATA.DATASET must be one of"),
        (("--opts", "DATA.DATASET", "webdataset"), "--dataset webdataset has no random access"),
    ],
)
def test_wrong_arguments(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple,
    says: str,
) -> None:
    said = refused(monkeypatch, capsys, "--data-path", photos, "--output", tmp_path / "shards", *words)
    assert re.match(f"make_shards.py: {says}", said)


def test_shard_missing_from_the_list(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "--data-path", photos, "--output", tmp_path / "shards", "--per-shard", 4)
    (tmp_path / "shards/train-000004.tar").unlink()  # the last one, whose absence numbers do not show
    with pytest.raises(
        ValueError, match=r"lacks train-000004\.tar, which .*shards\.json lists; copy again what is missing"
    ):
        opened(tmp_path / "shards")
