"""Predictions from a checkpoint alone: formats, batches, folders, lists, and files that cannot be read."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from yacs.config import CfgNode

from data.detection.transforms import EvalTransform
from data.images import read_image
from data.transforms import normalize
from models.build import build_model
from tasks.pictures import palette, with_legend
from tests.browser import Browser, needs_browser
from tests.models.detection.test_detectors import REGIONS
from tests.runs import ROOT, call
from tests.tools.samples import CLASSES, tiny_config, write_checkpoint, write_photograph
from tools.predict import main
from training.trained_model import load_trained, untrained


@pytest.fixture
def photographs(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    names = ("a.png", "b <i>.jpg", "more/c.webp")
    return [write_photograph(folder / name, seed=seed) for seed, name in enumerate(names)]


def expected(checkpoint: Path, path: Path) -> torch.Tensor:
    model = load_trained(checkpoint)
    with torch.inference_mode():
        return model.network(model.transform()(read_image(path))[None]).softmax(1)[0]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_json_lines_have_the_predictions(tmp_path: Path, photographs: list[Path], batch_size: int) -> None:
    checkpoint = write_checkpoint(tmp_path, ema=True)
    words = ("--checkpoint", checkpoint, "--format", "jsonl", "--top", 3, "--batch-size", batch_size)
    status, out, err = call(main, *words, tmp_path / "photos")
    assert status == 0
    assert "tiny, 10 classes (0 = ant, 1 = bee, 2 = cat, ..., 9 = jay), averaged weights" in err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["file"] for row in rows] == list(map(str, photographs))
    for row, path in zip(rows, photographs, strict=True):
        values, labels = expected(checkpoint, path).topk(3)
        assert [one["class"] for one in row["top"]] == [CLASSES[label] for label in labels]
        assert [one["probability"] for one in row["top"]] == pytest.approx(values.tolist(), abs=1e-5)


def test_text_csv_and_lists(tmp_path: Path, photographs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{path}\n" for path in photographs)))
    words = ("--checkpoint", checkpoint, "--top", 20)
    _, text, _ = call(main, *words, "-")
    best = expected(checkpoint, photographs[0]).max(0)
    assert text.splitlines()[0].startswith(f"{photographs[0]}: {CLASSES[best.indices]} {100 * best.values:.1f} %, ")
    _, out, _ = call(main, *words, "--format", "csv", *photographs)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["file"] for row in rows] == list(map(str, photographs))
    assert sorted(rows[0][f"class{place}"] for place in range(1, 11)) == CLASSES
    assert sum(float(rows[0][f"probability{place}"]) for place in range(1, 11)) == pytest.approx(1, abs=1e-5)


def test_a_list_may_have_names_that_are_not_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsencode(tmp_path) + b"/\xe4.png"
    Path(os.fsdecode(name)).write_bytes(write_photograph(tmp_path / "a.png").read_bytes())
    listed = io.TextIOWrapper(io.BytesIO(name + b"\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", listed)
    status, out, _ = call(main, "--checkpoint", write_checkpoint(tmp_path), "-")
    assert status == 0
    assert "\\udce4.png: " in out


def test_files_that_cannot_be_read_are_named_and_skipped(tmp_path: Path, photographs: list[Path]) -> None:
    photographs[1].write_bytes(b"no image")
    words = ("--checkpoint", write_checkpoint(tmp_path), "--format", "jsonl", "--batch-size", 2)
    status, out, err = call(main, *words, tmp_path / "photos")
    assert status == 1
    assert [json.loads(line)["file"] for line in out.splitlines()] == [str(photographs[0]), str(photographs[2])]
    assert f"skipped: cannot read image '{photographs[1]}'" in err


def test_files_of_folders_that_are_skipped_are_counted(tmp_path: Path, photographs: list[Path]) -> None:
    folder = tmp_path / "photos"
    photographs[0].rename(folder / "a.jfif")
    for name in ("d.heic", "more/e.HEIC", "f.pdf", "._a.jpg"):
        (folder / name).write_bytes(b"no image")
    status, out, err = call(main, "--checkpoint", write_checkpoint(tmp_path), "--top", 1, folder)
    assert status == 0
    assert len(out.splitlines()) == 3
    assert f"3 files skipped in {folder}, with extensions that Pillow does not read: 2 .heic, 1 .pdf\n" in err


def test_names_that_the_console_cannot_show_are_escaped(tmp_path: Path) -> None:
    names = ["K\u00e4se", "\u732b", *CLASSES[2:]]
    checkpoint, photo = write_checkpoint(tmp_path, classes=names), write_photograph(tmp_path / "a.png")
    words = (sys.executable, ROOT / "tools/predict.py", "--checkpoint", checkpoint, "--top", 10, photo)
    done = subprocess.run(list(map(str, words)), capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr
    assert "K\u00e4se" in done.stdout.decode("cp1252")
    assert r"\u732b" in done.stdout.decode("cp1252")


def test_half_precision_is_close(tmp_path: Path, photographs: list[Path]) -> None:
    checkpoint = write_checkpoint(tmp_path)
    words = ("--checkpoint", checkpoint, "--format", "jsonl", "--top", 1, "--amp", "bf16", "--device", "cpu")
    _, out, _ = call(main, *words, photographs[0])
    values = expected(checkpoint, photographs[0])
    assert json.loads(out)["top"][0]["probability"] == pytest.approx(values.max().item(), abs=0.02)
    assert json.loads(out)["top"][0]["probability"] != values.max().item()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.jpg"], "nowhere.jpg does not exist; give images, folders, or -"),
        (["photos", "--top", "0"], "--top must be at least 1, not 0"),
        (["photos", "--threshold", "1.5"], "--threshold must be from 0 to 1, not 1.5"),
        (["photos", "--threshold", "nan"], "--threshold must be from 0 to 1, not nan"),
        (["empty"], "folder empty contains no images"),
        (["phone"], "folder phone contains no images, but 1 .heic"),
        (["-"], "no images were listed on standard input"),
    ],
)
def test_wrong_input_is_reported(
    tmp_path: Path, photographs: list[Path], monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "a.heic").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    status, _, err = call(main, "--checkpoint", write_checkpoint(tmp_path), *words)
    assert status == 2
    assert err.startswith(f"predict.py: {said}")
    assert err.count("\n") == 1


def write_page(folder: Path, photographs: list[Path]) -> Path:
    """Write a page of two pictures, and of a file that is none."""
    photographs[0].write_bytes(b"no image")
    page = folder / "pages" / "page.html"
    call(main, "--checkpoint", write_checkpoint(folder), "--html", page, folder / "photos")
    return page


def test_the_page_has_each_picture_with_its_classes(tmp_path: Path, photographs: list[Path]) -> None:
    page = write_page(tmp_path, photographs).read_text(encoding="utf-8")
    assert page.count("<figure") == page.count('src="data:image/') == 2
    assert page.count('class="bar') == 10
    captions = re.findall(r"<figcaption[^>]*>(.*?)</figcaption>", page, re.DOTALL)
    assert ["b &lt;i&gt;.jpg" in captions[0], "c.webp" in captions[1]] == [True, True]
    assert "a.png" in re.search(r"<li>(.*?)</li>", page)[1]


@needs_browser
def test_the_page_shows_each_picture(tmp_path: Path, photographs: list[Path]) -> None:
    page = write_page(tmp_path, photographs)
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        browser.wait_for("[...document.images].every(image => image.complete && image.naturalWidth)")
        assert browser.evaluate("document.images.length") == 2
        assert browser.evaluate("document.querySelectorAll('.bar').length") == 10
        assert "b <i>.jpg" in browser.evaluate("document.querySelector('figcaption').textContent")
        assert "a.png" in browser.evaluate("document.querySelector('li').textContent")
        assert browser.problems == []


def test_several_labels_have_their_own_probabilities(tmp_path: Path, photographs: list[Path]) -> None:
    config = tiny_config(tmp_path)
    config.DATA.MULTI_LABEL = True
    network, checkpoint = build_model(config), tmp_path / "several.pth"
    torch.nn.init.constant_(network.cls_head.bias, 100)
    torch.save({"format": 1, "model": network.state_dict(), "classes": CLASSES, "config": config.dump()}, checkpoint)
    words = ("--checkpoint", checkpoint, photographs[0], "--format", "jsonl")
    _, out, _ = call(main, *words)
    assert [one["probability"] for one in json.loads(out)["top"]] == [1.0] * 5


def test_tasks_without_predictions_are_refused(tmp_path: Path, photographs: list[Path]) -> None:
    config = tiny_config(tmp_path)
    config.TASK = "regression"
    checkpoint = write_checkpoint(tmp_path, config=config.dump())
    status, _, err = call(main, "--checkpoint", checkpoint, photographs[0])
    assert status == 2
    assert "predictions of TASK regression cannot be shown, only those of classification" in err


def test_segmenter_prints_shares_of_pixels_and_draws_them(tmp_path: Path, photographs: list[Path]) -> None:
    config = tiny_config(tmp_path)
    config.TASK, config.MODEL.SEGMENTER.ARGS = "segmentation", CfgNode({"channels": 8, "pyramid_channels": 8})
    network = build_model(config)
    with torch.no_grad():
        network.decode_head.conv_seg.bias[3] = 100
    checkpoint = tmp_path / "segmenter.pth"
    torch.save({"format": 1, "model": network.state_dict(), "classes": CLASSES, "config": config.dump()}, checkpoint)
    same_name = write_photograph(photographs[0].parent / "more" / "a.png", seed=3)
    words = ("--checkpoint", checkpoint, photographs[0].parent, "--format", "jsonl", "--draw", tmp_path / "maps")
    status, out, _ = call(main, *words)
    assert status == 0
    for line in out.splitlines():
        assert json.loads(line)["top"][0] == {"class": "dog", "share": 1.0}
    names = {f"{path.name}.png" for path in photographs} | {f"{same_name.name}-2.png"}
    assert {path.name for path in (tmp_path / "maps").iterdir()} == names
    drawn, photograph = (np.asarray(read_image(file)) for file in (tmp_path / "maps" / "a.png.png", photographs[0]))
    height, width = photograph.shape[:2]
    assert np.abs(drawn[:height, :width] - (0.65 * palette()[3] + 0.35 * photograph)).max() <= 1
    legend = drawn[:, width:].reshape(-1, 3)
    shown = [label for label in range(len(CLASSES)) if (legend == palette()[label]).all(-1).sum() > 100]
    assert shown == [3]


def test_a_legend_names_the_largest_classes_first_and_counts_the_rest() -> None:
    labels = np.repeat(np.arange(30), np.arange(1, 31)).reshape(15, -1).astype(np.uint8)
    pixels = np.full((*labels.shape, 3), 7, np.uint8)
    drawn = with_legend(pixels, labels, [f"class {i}" for i in range(30)])
    assert (drawn[: labels.shape[0], : labels.shape[1]] == 7).all()
    assert drawn.shape[0] == 21 * 20  # twenty classes, and the number of others
    squares = drawn[10::20, labels.shape[1] + 10]
    assert squares[:20].tolist() == palette()[np.arange(29, 9, -1)].tolist()


def test_detector_prints_and_draws_objects(tmp_path: Path, photographs: list[Path]) -> None:
    config = tiny_config(tmp_path)
    config.TASK, config.MODEL.DETECTOR.NAME, config.DETECTION.TEST_SHORT_SIDE = "detection", "mask_rcnn", 64
    config.MODEL.DETECTOR.ARGS = CfgNode({**REGIONS, "detection": CfgNode({"score_thresh": 0.0})})
    torch.manual_seed(0)
    network, checkpoint = build_model(config).eval(), tmp_path / "detector.pth"
    torch.save({"format": 1, "model": network.state_dict(), "classes": CLASSES, "config": config.dump()}, checkpoint)
    image = read_image(photographs[0])  # 60 x 40 pixels
    with torch.inference_mode():
        resized = EvalTransform(short_side=64, long_side=1333)(tv_tensors.Image(np.array(image).transpose(2, 0, 1)))
        (found,) = network([normalize(resized.as_subclass(torch.Tensor))])
    threshold = found["scores"].median().item()
    words = ("--checkpoint", checkpoint, "--threshold", threshold, "--draw", tmp_path / "boxes", photographs[0])
    status, out, _ = call(main, *words, "--format", "jsonl")
    objects, chosen = json.loads(out)["objects"], found["scores"] >= threshold
    assert (status, len(objects)) == (0, int(chosen.sum()))
    assert [one["class"] for one in objects] == [CLASSES[label] for label in found["labels"][chosen]]
    boxes = torch.tensor([one["box"] for one in objects])
    assert torch.allclose(boxes, found["boxes"][chosen] * torch.tensor([60 / 96, 40 / 64] * 2), atol=1e-3)
    assert all(one["mask"]["size"] == [40, 60] for one in objects)
    drawn = np.asarray(read_image(tmp_path / "boxes" / "a.png.png"))
    assert drawn.shape == (240, 360, 3)  # enlarged six times
    x, y = (6 * boxes[0, :2]).int().tolist()
    assert (drawn[y : y + 2, x + 12 : x + 14] == palette()[found["labels"][0]]).all(-1).any()
    _, out, _ = call(main, *words, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [float(row["x1"]) for row in rows] == pytest.approx(boxes[:, 0].tolist())
    _, out, _ = call(main, *words)
    assert out.count(" at ") == len(objects)
    _, out, _ = call(main, *words, "--threshold", 1)
    assert out == f"{photographs[0]}: no objects\n"


@pytest.mark.parametrize(
    ("task", "words", "said"),
    [
        ("classification", ("--draw", "maps"), "--draw is for TASK detection or segmentation"),
        ("classification", ("--threshold", 0.5), "--threshold is for TASK detection"),
        ("segmentation", ("--threshold", 0.5), "--threshold is for TASK detection"),
        ("detection", ("--top", 1), "--top is for TASK classification or segmentation"),
    ],
)
def test_flags_without_an_effect_are_refused(
    task: str, words: tuple, said: str, tmp_path: Path, photographs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = untrained(tiny_config(tmp_path))
    loaded.config.TASK = task
    monkeypatch.setattr("tools.predict.load_trained", lambda *_, **__: loaded)
    status, out, err = call(main, "--checkpoint", "best.pth", photographs[0], *words)
    assert (status, out) == (2, "")
    assert err.endswith(f"predict.py: {said}; the TASK of best.pth is {task}\n")


def test_files_that_cannot_be_written_are_found_before_the_predictions(tmp_path: Path, photographs: list[Path]) -> None:
    words = ("--checkpoint", write_checkpoint(tmp_path), photographs[0])
    (tmp_path / "file").touch()
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "file" / "page.html", "File exists")):
        status, out, err = call(main, *words, "--html", path)
        assert (status, out) == (2, "")
        assert err.endswith(f"predict.py: --html {path} cannot be written: {why}\n")
