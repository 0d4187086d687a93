"""The page of a finished run: the mistakes of a classifier; a failed report does not fail the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from main import main
from tests.browser import Browser, needs_browser
from tests.data.samples import write_folder
from tests.runs import read_metrics, write_config
from training.report import page
from training.report.held_out import NotWanted

pytestmark = pytest.mark.xdist_group("training")

PHOTOS = {"train/<cat>": 8, "train/dog": 8, "val/<cat>": 5, "val/dog": 3}


def test_the_time_of_a_run_is_that_of_its_updates() -> None:
    assert page._time_of_updates([{"seconds": 3600.0}, {"seconds": 61.6}, {}]) == "1:01:02"


def command(folder: Path) -> list[str]:
    write_folder(folder, PHOTOS)
    data = {"DATASET": "imagenet", "DATA_PATH": str(folder), "BATCH_SIZE": 4}
    train = {"EPOCHS": 2, "WARMUP_EPOCHS": 0, "EMA": {"ENABLED": True, "DECAY": 0.5}}
    config = write_config(folder, DATA=data, TRAIN=train, REPORT=True, PRINT_FREQ=1)
    return ["--cfg", str(config), "--output", str(folder)]


@needs_browser
def test_the_page_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(command(tmp_path)) == 0
    run = tmp_path / "tiny" / "default"
    assert "report.html" in capsys.readouterr().out.splitlines()[-1]
    best = max(row["top1"] for row in read_metrics(run, "eval_ema"))
    (run / "report.html").unlink()
    page.write_report(run, torch.device("cpu"))
    with Browser(tmp_path / "profile") as browser:
        browser.open(run / "report.html")
        browser.wait_for("[...document.images].every(image => image.complete && image.naturalWidth)")
        text = browser.evaluate("document.body.innerText")
        right = round(best * 8 / 100)
        assert f"{right} of 8 correct: {best:.2f} %" in text
        assert f"{best:.2f} %\nbest accuracy, in epoch" in text
        for words in ("<cat>", "2 of 2", "TRAIN.EMA.DECAY", f"torch\t{torch.__version__.partition('+')[0]}"):
            assert words in text
        assert browser.evaluate("document.querySelectorAll('.images figure').length") == 8 - right
        counts = "[...document.querySelectorAll('table.matrix td.number')].map(cell => Number(cell.textContent))"
        assert sum(browser.evaluate(counts)) == 8
        assert browser.problems == []


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("no memory\nleft"), "no report.html (no memory left); tools/report.py "),
        (NotWanted(), "to stop; tools/"),
    ],
)
def test_failed_report_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error: Exception, says: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(page, "_mistakes", fail)
    assert main(command(tmp_path)) == 0
    assert says in capsys.readouterr().out
