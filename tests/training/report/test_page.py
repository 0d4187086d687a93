"""The page of a finished run: the mistakes of a classifier; a failed report does not fail the run."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Return a run with its report, and the best of its accuracies."""
    folder, out = tmp_path_factory.mktemp("report"), io.StringIO()
    with redirect_stdout(out):
        assert main(command(folder)) == 0
    assert "report.html" in out.getvalue().splitlines()[-1]
    run = folder / "tiny" / "default"
    (run / "report.html").unlink()
    page.write_report(run, torch.device("cpu"))
    return run, max(row["top1"] for row in read_metrics(run, "eval_ema"))


def test_the_page_of_a_run_has_its_results(trained: tuple[Path, float]) -> None:
    run, best = trained
    content, right = (run / "report.html").read_text(encoding="utf-8"), round(best * 8 / 100)
    said = re.sub(r"<[^>]*>", " ", content)
    for words in (
        f"{right} of 8 correct: {best:.2f} %",
        f"{best:.2f} % best accuracy, in epoch",
        *("&lt;cat&gt;", "2 of 2", "TRAIN.EMA.DECAY", torch.__version__.partition("+")[0]),
    ):
        assert words in said
    assert content.count('<figure class="card"><img') == 8 - right
    matrix = re.search(r'<table class="matrix">.*?</table>', content, re.DOTALL)[0]
    assert sum(map(int, re.findall(r'<td class="number"[^>]*>(\d+)</td>', matrix))) == 8


@needs_browser
def test_the_page_of_a_run_is_shown(trained: tuple[Path, float], tmp_path: Path) -> None:
    run, best = trained
    with Browser(tmp_path / "profile") as browser:
        browser.open(run / "report.html")
        browser.wait_for("[...document.images].every(image => image.complete && image.naturalWidth)")
        text = browser.evaluate("document.body.innerText")
        assert f"{best:.2f} %\nbest accuracy, in epoch" in text
        assert f"torch\t{torch.__version__.partition('+')[0]}" in text
        assert browser.evaluate("document.querySelectorAll('.images figure').length") == 8 - round(best * 8 / 100)
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
