"""The log of a run, and the recorders in their current releases, offline."""

from __future__ import annotations

import importlib.util
import json
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from yacs.config import CfgNode

from config import default_config
from logger import RECORDERS, RunLog, check_recorders, read_rows, recorder_names
from training import loop


def options(*recorders: str) -> CfgNode:
    """Return the defaults with `recorders` in LOG.TO."""
    config = default_config()
    config.LOG.TO, config.LOG.PROJECT, config.LOG.NAME = list(recorders), "birds", "first try"
    return config


def write_twice(folder: Path, config: CfgNode) -> None:
    """Log two lines like a run that was resumed after the first one."""
    for update in (1, 2):
        log = RunLog(folder, config, is_main=True, updates_done=update - 1)
        log.metrics("train", epoch=1, update=update, loss=1.0 / update)
        log.speed(epoch=1, update=update, images_per_second=10.0)
        log.close(0)


def rows(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_times_and_rates_are_in_a_separate_file(tmp_path: Path) -> None:
    write_twice(tmp_path, options())
    assert rows(tmp_path / "metrics.jsonl") == [
        {"kind": "train", "epoch": 1, "update": 1, "loss": 1.0},
        {"kind": "train", "epoch": 1, "update": 2, "loss": 0.5},
    ]
    first, second = rows(tmp_path / "speed.jsonl")
    assert first["time"] <= second["time"]
    assert {name: second[name] for name in second if name != "time"} == {
        "epoch": 1,
        "update": 2,
        "images_per_second": 10.0,
    }


def test_rows_are_read_without_a_truncated_last_line(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "loss": 1.0}\n{"kind": "tr')
    assert read_rows(tmp_path / "metrics.jsonl") == [{"kind": "train", "loss": 1.0}]


def test_rewinding_keeps_finished_epochs_however_updates_are_counted(tmp_path: Path) -> None:
    log = RunLog(tmp_path, options(), is_main=True)
    for epoch, update in ((1, 50), (1, 100), (2, 200), (3, 210), (3, 230)):
        log.metrics("train", epoch=epoch, update=update, loss=1.0)
    log.metrics("eval", epoch=2, update=200, top1=1.0)
    log.metrics("eval", epoch=3, update=300, top1=2.0)
    log.rewind(epoch=2, update=210)
    kept = [(row["epoch"], row["update"]) for row in rows(tmp_path / "metrics.jsonl")]
    assert kept == [(1, 50), (1, 100), (2, 200), (3, 210), (2, 200)]
    log.rewind(epoch=2, update=105)  # earlier lines may count updates of half as many images
    assert [row["update"] for row in rows(tmp_path / "metrics.jsonl")] == [50, 100, 200, 200]


def test_a_run_can_be_resumed_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, options(), is_main=True)
    for update in (10, 20):
        log.metrics("train", epoch=1, update=update, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "tr\xc3')  # a truncated line
    monkeypatch.setattr("logger.write_atomically", lambda *_: pytest.fail("needs space on the disk"))
    log.rewind(epoch=0, update=10)
    assert [row["update"] for row in rows(tmp_path / "metrics.jsonl")] == [10]


def test_metrics_that_cannot_be_written_do_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").mkdir()  # like a file without write permission, also for root
    RunLog(tmp_path, options(), is_main=True).metrics("train", epoch=1, update=1, loss=1.0)
    assert "metrics.jsonl could not be written (Is a directory)" in capsys.readouterr().out


def test_older_options_and_the_section_name_the_same_recorders() -> None:
    config = options("mlflow", "tensorboard")
    config.TENSORBOARD = config.WANDB = True
    assert recorder_names(config) == ["mlflow", "tensorboard", "wandb"]
    assert recorder_names(default_config()) == []


@pytest.mark.parametrize("name", RECORDERS)
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_recorders(options())
    with pytest.raises(ValueError, match=f"recording with {name} needs its package: pip install {name}, or remove it"):
        check_recorders(options(name))


def test_tensorboard_records_every_number_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = default_config()
    config.TENSORBOARD = True
    write_twice(tmp_path, config)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert [event.value for event in events.Scalars("speed/images_per_second")] == [10.0, 10.0]


def test_weights_and_biases_records_one_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    begun, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: begun.append(init(**given)) or begun[-1])
    config = options("wandb")
    write_twice(tmp_path, config)
    identity = (tmp_path / "wandb_id.txt").read_text(encoding="utf-8")
    assert [(run.id, run.project, run.name) for run in begun] == [(identity, "birds", "first try")] * 2
    assert begun[0].config["TRAIN"]["EPOCHS"] == config.TRAIN.EPOCHS
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    assert any(b"train/loss" in file.read_bytes() for file in files)  # files of the same second share a folder


def test_mlflow_records_one_run_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'server'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = options("mlflow")
    write_twice(tmp_path, config)
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("birds").experiment_id])
    assert (run.info.run_name, run.info.status) == ("first try", "FINISHED")
    assert run.data.params["TRAIN.EPOCHS"] == str(config.TRAIN.EPOCHS)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]


@pytest.fixture
def mlflow_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunLog:
    """Return a log with a recorder of MLflow."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'server'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return RunLog(tmp_path, options("mlflow"), is_main=True)


def test_training_does_not_wait_for_mlflow(mlflow_log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    answered, sent = threading.Event(), []

    def send_slowly(_client: MlflowClient, _run: str, metrics: list) -> None:
        assert answered.wait(30)
        sent.append({metric.key: (metric.value, metric.step) for metric in metrics})

    def end(_client: MlflowClient, _run: str, status: str) -> None:
        sent.append(status)

    monkeypatch.setattr(MlflowClient, "log_batch", send_slowly)
    monkeypatch.setattr(MlflowClient, "set_terminated", end)
    for update in range(3):
        mlflow_log.metrics("train", epoch=1, update=update, loss=1.0, lr=0.1)
    assert sent == []
    answered.set()
    mlflow_log.close(0)
    steps = [{"train/loss": (1.0, update), "train/lr": (0.1, update)} for update in range(3)]
    assert sent == [*steps, "FINISHED"]


def test_an_mlflow_that_fails_is_left_out_with_what_is_still_to_send(
    mlflow_log: RunLog, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    closed, begun = threading.Event(), []

    def fail(*_: object) -> None:
        begun.append(1)
        if len(begun) > 1:
            assert closed.wait(30)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(MlflowClient, "log_batch", fail)
    for update in range(9):
        mlflow_log.metrics("train", epoch=1, update=update, loss=1.0)
    mlflow_log.close(0)
    closed.set()
    assert len(begun) <= 2
    assert capsys.readouterr().out.count("mlflow stopped recording this run: no route to host") == 1


@pytest.mark.parametrize(("status", "shown"), [(0, "FINISHED"), (1, "FAILED"), (143, "KILLED")])
def test_mlflow_shows_how_a_run_ended_and_continues_it(
    status: int, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'server'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client, shows = MlflowClient(), []
    for _ in range(2):
        log = RunLog(tmp_path, options("mlflow"), is_main=True)
        (run,) = client.search_runs([client.get_experiment_by_name("birds").experiment_id])
        shows.append(run.info.status)
        log.close(status)
        shows.append(client.get_run(run.info.run_id).info.status)
    assert shows == ["RUNNING", shown] * 2


def test_training_closes_the_log_once_with_its_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    recorder = SimpleNamespace(close=closed.append)
    monkeypatch.setitem(RECORDERS, "tensorboard", lambda *_: recorder)
    for train_epochs in (lambda _: 143, lambda _: 1 / 0):
        log = RunLog(tmp_path, options("tensorboard"), is_main=True)
        run = SimpleNamespace(log=log, world=SimpleNamespace(is_main=True))
        monkeypatch.setattr(loop, "train_epochs", train_epochs)
        with suppress(ZeroDivisionError):
            assert loop.train(run) == 143
    assert closed == [143, 1]


def test_mlflow_run_that_is_missing_on_the_server_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for server in ("one", "two"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / server}")
        RunLog(tmp_path, options("mlflow"), is_main=True).close(0)
    printed = capsys.readouterr().out
    assert printed.count("mlflow does not record this run: ") == 1
    assert "not found; set MLFLOW_TRACKING_URI to the place of the run in" in printed
    assert str(tmp_path / "mlflow_id.txt") in printed


class Broken:
    """A recorder whose service fails after some time."""

    def __init__(self, *_: object) -> None:
        pass

    def record(self, *_: object) -> None:
        raise ConnectionError("no route\nto host")

    def close(self, *_: object) -> None:
        raise ConnectionError("no route\nto host")


def test_a_service_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(RECORDERS, "wandb", Broken)
    log = RunLog(tmp_path, options("wandb"), is_main=True)
    log.metrics("train", epoch=1, update=1, loss=1.0)
    log.metrics("train", epoch=1, update=2, loss=1.0)
    log.close(0)
    assert capsys.readouterr().out.count("wandb stopped recording this run: no route to host") == 1
    assert len(rows(tmp_path / "metrics.jsonl")) == 2
    RunLog(tmp_path, options("wandb"), is_main=True).close(0)
    assert "wandb stopped recording this run: no route to host" in capsys.readouterr().out
    monkeypatch.setitem(RECORDERS, "wandb", lambda *_: Broken().record())
    RunLog(tmp_path, options("wandb"), is_main=True).close(0)
    assert "wandb does not record this run: no route to host" in capsys.readouterr().out
