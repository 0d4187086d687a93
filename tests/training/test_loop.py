"""The loops: accumulation, precision, norms, and counting over ranks."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from yacs.config import CfgNode

from config import load_config
from data.build import build_eval_loader, open_dataset
from logger import RunLog
from main import main
from models.dat import DAT
from tasks import Evaluation
from tests.data.samples import write_folder
from tests.runs import Killed, read_metrics, write_config
from training import build as build_module
from training import loop
from training.build import Assembly, assemble, build_run
from training.command_line import parse
from training.device import prepare_device
from training.finish import describe_result
from training.loop import take_update, train, train_one_epoch
from training.progress import Progress
from training.run import Run
from utils import LateReader, World, seed_everything

CPU = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def build(folder: Path, *flags: str) -> Run:
    """Return the tiny run with `flags`, built but not trained."""
    _, config = parse(["--cfg", str(write_config(folder)), "--output", str(folder / "output"), *flags])
    return build_run(config, CPU)


def train_epoch(folder: Path, *flags: str) -> tuple[Run, dict[str, torch.Tensor]]:
    """Return a run and its weights after one epoch."""
    folder.mkdir()
    run = build(folder, *flags)
    assert train_one_epoch(run)
    return run, run.model.state_dict()


def test_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    still = ["MODEL.DAT.drop_path_rate", "0"]
    _, whole = train_epoch(tmp_path / "whole", "--batch-size", "64", "--opts", *still)
    run, parts = train_epoch(tmp_path / "parts", "--batch-size", "16", "--accumulation-steps", "4", "--opts", *still)
    assert run.state.updates_per_epoch == 1437 // 64
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("amp", ["fp16", "bf16"])
def test_half_precision_trains_close_to_float32(tmp_path: Path, amp: str) -> None:
    train_epoch(tmp_path / "full")
    train_epoch(tmp_path / "half", "--amp", amp)
    full, half = (read_metrics(tmp_path / name / "output/tiny/default", "train") for name in ("full", "half"))
    for key, tolerance in (("loss", 0.05), ("grad_norm", 0.2)):
        assert [row[key] for row in half] == pytest.approx([row[key] for row in full], rel=tolerance)
        assert [row[key] for row in half] != [row[key] for row in full]


def test_the_logged_norm_is_the_norm_before_clipping(tmp_path: Path) -> None:
    norms = []
    for clip in ("0", "1000000", "0.001"):
        folder = tmp_path / clip
        train_epoch(
            folder, "--print-freq", "1", "--opts", "TRAIN.CLIP_GRAD", clip, "TRAIN.BASE_LR", "0", "TRAIN.WARMUP_LR", "0"
        )
        norms.append([row["grad_norm"] for row in read_metrics(folder / "output/tiny/default", "train")])
    assert norms[0] == norms[1] == norms[2]
    assert min(norms[0]) > 0.01


@pytest.mark.parametrize(
    "flags", [["--use-checkpoint"], ["--opts", "DATA.NUM_WORKERS", "2"]], ids=["recompute", "workers"]
)
def test_memory_and_speed_options_do_not_change_results(tmp_path: Path, flags: list[str]) -> None:
    _, plain = train_epoch(tmp_path / "plain")
    _, other = train_epoch(tmp_path / "other", *flags)
    torch.testing.assert_close(other, plain, rtol=0, atol=0)


def test_recomputed_batch_norms_count_a_batch_once(tmp_path: Path) -> None:
    left = []
    for flags in ((), ("--use-checkpoint",)):
        run = build(tmp_path, "--model", "test_resnet", "--opts", "TRAIN.AUTO_RESUME", "False", *flags)
        take_update(run, iter(run.train_loader))
        left.append(run.state.network.state_dict())
    assert any(name.endswith("num_batches_tracked") for name in left[0])
    torch.testing.assert_close(left[1], left[0], rtol=0, atol=0)


def test_random_numbers_of_a_step_are_the_same_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, states = build(tmp_path), []
    monkeypatch.setattr(loop, "step_unless", lambda *_: states.append(torch.get_rng_state().tolist()))
    for rank, update in ((0, 0), (1, 0), (0, 1)):
        run.state.position.update = update
        take_update(replace(run, world=replace(CPU, rank=rank)), iter(run.train_loader))
    assert states[1] == states[0] != states[2]


def test_mixup_and_every_schedule_train(tmp_path: Path) -> None:
    for schedule in ("linear", "step"):
        flags = ("--opts", "TRAIN.LR_SCHEDULER.NAME", schedule, "AUG.MIXUP", "0.8", "AUG.CUTMIX", "1.0")
        run, weights = train_epoch(tmp_path / schedule, *flags)
        assert run.task._mixup is not None
        assert all(value.isfinite().all() for value in weights.values())


def test_compiled_blocks_train_and_evaluate_batches_of_every_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def note(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        """Run graphs without compiling them: what is tested is what gets compiled when."""
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(DAT, "compile_blocks", partialmethod(DAT.compile_blocks, backend=note))
    torch._dynamo.reset()
    flags = ("--opts", "TRAIN.EPOCHS", "1", "DATA.NUM_WORKERS", "1")  # 360 images: the last batch is a partial one
    assert main(["--cfg", str(write_config(tmp_path)), "--output", str(tmp_path / "c"), "--compile", *flags]) == 0
    compiled = len(graphs)
    assert main(["--cfg", str(write_config(tmp_path)), "--output", str(tmp_path / "e"), *flags]) == 0
    assert len(graphs) == compiled > 0
    losses = [read_metrics(tmp_path / name / "tiny/default", "eval")[0]["loss"] for name in "ce"]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_only_finite_weights_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights become non-finite near the end of the second epoch; the checkpoint from before is kept."""
    run = build(tmp_path, "--opts", "SAVE_EVERY_UPDATES", "7")
    take_update = loop.take_update

    def break_weights(run: Run, batches: Iterator) -> loop.Update:
        update = take_update(run, batches)
        if run.state.updates_done == 2 * run.state.updates_per_epoch - 2:
            run.model.cls_head.weight.data.fill_(torch.nan)
        return update

    monkeypatch.setattr(loop, "take_update", break_weights)
    assert train(run) == 1
    for name in ("last.pth", "previous.pth", "best.pth"):
        weights = torch.load(run.folder / name, weights_only=True)["model"]
        assert all(value.isfinite().all() for value in weights.values()), name


def test_new_run_moves_the_files_of_an_earlier_one(tmp_path: Path) -> None:
    build(tmp_path)
    output = tmp_path / "output/tiny/default"
    (output / "epoch_300.pth").write_bytes(b"precious")
    build(tmp_path)
    assert (output / "epoch_300.pth").exists()  # the same command continues
    build(tmp_path, "--opts", "TRAIN.AUTO_RESUME", "False")
    assert (output / "earlier_1" / "epoch_300.pth").read_bytes() == b"precious"
    assert not (output / "epoch_300.pth").exists()
    assert (output / "last.pth").exists()


def test_base_rate_below_the_final_rate_gives_a_warning(tmp_path: Path) -> None:
    run = build(tmp_path, "--lr", "0")
    logged = (run.folder / "log.txt").read_text()
    assert logged.count("the learning rate rises to TRAIN.MIN_LR 0.0001, which is above TRAIN.BASE_LR 0; lower") == 1


def test_suspicious_settings_give_warnings(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", {"train/blue": 5, "train/red": 4, "val/blue": 1})
    flags = ["--data-path", str(images), "--batch-size", "6", "--opts", "DATA.DATASET", "imagenet"]
    run = build(tmp_path, *flags, "TRAIN.WARMUP_EPOCHS", "2")
    logged = (run.folder / "log.txt").read_text()
    assert "TRAIN.WARMUP_EPOCHS 2 is not below TRAIN.EPOCHS 2" in logged
    assert "dropped: 3 of 9 images, different ones in each epoch" in logged
    assert "1 of 2 classes without validation images: red" in logged
    run = build(tmp_path, "--tag", "updates", *flags, "TRAIN.WARMUP_EPOCHS", "2", "TRAIN.WARMUP_UPDATES", "1")
    assert "is not below TRAIN.EPOCHS" not in (run.folder / "log.txt").read_text()
    _, config = parse(["--cfg", str(write_config(tmp_path / "images")), "--warmup-epochs", "0"])
    assert assemble(config, CPU).warnings == []


def test_unused_weights_are_named(tmp_path: Path) -> None:
    first = build(tmp_path)
    again = build(tmp_path, "--pretrained", "elsewhere.pth")
    words = f"the weights are those of {first.folder / 'last.pth'}, not of --pretrained elsewhere.pth"
    assert words in (again.folder / "log.txt").read_text()


def test_run_killed_before_its_first_checkpoint_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(_: int) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", kill)
        with pytest.raises(Killed):
            build(tmp_path)
    folder = tmp_path / "output/tiny/default"
    assert {path.name for path in folder.iterdir()} == {".lock", "last.tmp"}
    build(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "last.pth",
        "log.txt",
        "config.yaml",
        "environment.json",
    }


def begin_optimizer(run: Run) -> None:
    """Give the optimizer of a run the state that a checkpoint of a started run has."""
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.state.optimizer.step()


@pytest.mark.parametrize(("batch_size", "update"), [("32", 20), ("128", 5)])
def test_resuming_with_other_update_sizes_continues_at_the_same_image(
    tmp_path: Path, batch_size: str, update: int
) -> None:
    run = build(tmp_path)
    begin_optimizer(run)
    run.state.position.epoch, run.state.position.update = 1, 10
    run.save()
    for done in (5, 10, 15):  # the last one was not saved
        run.log.metrics("train", epoch=2, update=run.state.updates_per_epoch + done, loss=1.0)
    resized = build(tmp_path, "--batch-size", batch_size, "--allow-config-change")
    assert resized.state.position.update == update
    assert [row["update"] - run.state.updates_per_epoch for row in read_metrics(run.folder, "train")] == [5, 10]


def test_changed_options_are_allowed_once_and_a_rate_jump_gives_a_warning(tmp_path: Path) -> None:
    run = build(tmp_path)
    run.lock.close()
    for update in range(run.state.updates_per_epoch * 2):
        run.state.scheduler.step_update(update)
    begin_optimizer(run)
    run.state.position.epoch = 2
    run.save()
    longer = build(tmp_path, "--epochs", "4", "--allow-config-change")
    longer.lock.close()
    logged = (run.folder / "log.txt").read_text()
    assert "the learning rate goes from " in logged
    assert "set TRAIN.LR_SCHEDULER.PLANNED_EPOCHS to its number of epochs\n" in logged
    again = build(tmp_path, "--epochs", "4")
    again.lock.close()
    own = load_config(run.folder / "config.yaml")  # with the changed options
    assert (own.TRAIN.EPOCHS, own.TRAIN.ALLOW_CONFIG_CHANGE) == (4, False)
    with pytest.raises(
        ValueError, match=r"TRAIN.EPOCHS: 4 in the checkpoint, 2 now.*config.yaml next to the checkpoint"
    ):
        build(tmp_path)
    held = ("--epochs", "4", "--allow-config-change", "--opts", "TRAIN.LR_SCHEDULER.PLANNED_EPOCHS", "2")
    (run.folder / "log.txt").unlink()
    run.save()
    continued = build(tmp_path, *held)
    continued.lock.close()
    assert continued.state.position.epoch == 2
    assert "the learning rate goes" not in (run.folder / "log.txt").read_text()
    build(tmp_path, *held, "TRAIN.LR_SCHEDULER.AFTER", "rewarm").lock.close()
    assert "drop at first. TRAIN.LR_SCHEDULER.AFTER hold keeps the rate\n" in (run.folder / "log.txt").read_text()
    build(tmp_path, *held, "TRAIN.BASE_LR", "0.5")
    assert "drop at first\n" in (run.folder / "log.txt").read_text()


def test_weights_of_a_run_on_the_same_classes_give_a_warning(tmp_path: Path) -> None:
    first = build(tmp_path)
    again = build(tmp_path, "--pretrained", str(first.folder / "last.pth"), "--tag", "another")
    logged = (again.folder / "log.txt").read_text()
    assert "has been trained on these classes for 0 epochs: optimizer and schedule start from scratch" in logged
    torch.save({"model": first.state.network.state_dict()}, tmp_path / "weights.pth")
    other = build(tmp_path, "--pretrained", str(tmp_path / "weights.pth"), "--tag", "third")
    assert "start from scratch, so" not in (other.folder / "log.txt").read_text()


def test_full_disk_at_the_start_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(build_module, "write_atomically", refuse)
    run = build(tmp_path)
    assert "config.yaml could not be written (No space left on device)" in (run.folder / "log.txt").read_text()
    for path in run.folder.iterdir():
        path.unlink()
    assert describe_result(run).endswith(f"; no files are in {run.folder}")


def test_run_resumed_from_another_folder_moves_earlier_files(tmp_path: Path) -> None:
    first = build(tmp_path)
    first.lock.close()
    elsewhere = tmp_path / "elsewhere.pth"
    shutil.copy(first.folder / "last.pth", elsewhere)
    (first.folder / "bad_images.txt").write_text("broken.jpg\n")
    run = build(tmp_path, "--resume", str(elsewhere))
    assert f"continuing from {elsewhere}: epoch 1" in (run.folder / "log.txt").read_text()
    assert (run.folder / "last.pth").exists()  # already, so that a restart finds it
    assert {"last.pth", "bad_images.txt"} <= {path.name for path in (run.folder / "earlier_1").iterdir()}
    warnings = []
    run.bad_images.add(["broken.jpg", "broken.jpg"], warnings.append)
    assert len(warnings) == 1
    assert (run.folder / "bad_images.txt").read_text() == "broken.jpg\n"


def test_the_command_that_began_a_run_continues_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after it was continued without --resume, and with other spellings of the same file."""
    monkeypatch.chdir(tmp_path)
    start = build(tmp_path, "--tag", "another")
    shutil.copy(start.folder / "last.pth", "start.pth")
    build(tmp_path, "--resume", "start.pth")
    for flags in (
        (),
        ("--resume", "start.pth"),
        ("--resume", "./start.pth"),
        ("--resume", str(tmp_path / "start.pth")),
    ):
        run = build(tmp_path, *flags)
        run.save()
        assert f"continuing from {run.folder / 'last.pth'}: epoch 1" in (run.folder / "log.txt").read_text()
        (run.folder / "log.txt").unlink()
        assert not (run.folder / "earlier_1").exists()


def test_a_run_that_goes_back_moves_its_later_checkpoints(tmp_path: Path) -> None:
    flags = ("--epochs", "9")
    run = build(tmp_path, *flags)
    begin_optimizer(run)
    for score in (10.0, 20.0, 30.0):
        run.state.position.finish_epoch(score)
        run.save(best=True, epoch=run.state.position.epoch)
    back = (*flags, "--resume", str(run.folder / "epoch_1.pth"))
    again = build(tmp_path, *back)
    assert again.state.position.epoch == 1
    moved = {path.name for path in (run.folder / "earlier_1").iterdir()}
    assert moved == {"last.pth", "previous.pth", "best.pth", "epoch_2.pth", "epoch_3.pth"}
    assert {path.name for path in run.folder.glob("*.pth")} == {"epoch_1.pth", "last.pth"}
    assert f"the other checkpoints in this folder were moved to {run.folder / 'earlier_1'}" in (
        run.folder / "log.txt"
    ).read_text(encoding="utf-8")
    again.state.position.finish_epoch(5.0)
    again.save(epoch=2)
    assert build(tmp_path, *back).state.position.epoch == 2  # the same command continues
    assert not (run.folder / "earlier_2").exists()


def test_the_end_of_an_epoch_is_not_the_beginning_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process fell back to `previous.pth`, after as many updates, but before the evaluation."""

    def gather(everywhere: list[Any], facts: dict[str, Any]) -> None:
        everywhere[:] = [facts, facts | {"checkpoints": (0, 29)}]

    assembly, config = assembled(tmp_path)
    assembly.state.position.epoch = 1
    pretend_two_ranks(monkeypatch, gather)
    with pytest.raises(ValueError, match="the processes do not see the same checkpoints in"):
        build_module._check_agreement(assembly, config)


@pytest.mark.parametrize(
    ("fact", "other", "says"),
    [
        ("training images", 1436, "do not see the same training images; all machines need the same data"),
        ("validation images", 359, "do not see the same validation images"),
        ("classes", {"classes": ["1", "0"]}, "do not see the same classes"),
        ("AMP", "fp16", "--amp chooses bf16 or fp16 by the GPU, and the GPUs differ; give --amp fp16"),
    ],
)
def test_processes_with_other_data_or_precision_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fact: str, other: Any, says: str
) -> None:
    def gather(everywhere: list[Any], facts: dict[str, Any]) -> None:
        assert fact in facts
        everywhere[:] = [facts, facts | {fact: other}]

    assembly, config = assembled(tmp_path)
    build_module._check_agreement(assembly, config)
    pretend_two_ranks(monkeypatch, gather)
    with pytest.raises(ValueError, match=re.escape(says)):
        build_module._check_agreement(assembly, config)


def assembled(folder: Path) -> tuple[Assembly, CfgNode]:
    _, config = parse(["--cfg", str(write_config(folder)), "--output", str(folder / "output")])
    return assemble(config, CPU), config


def pretend_two_ranks(monkeypatch: pytest.MonkeyPatch, gather: Callable[[list[Any], Any], None]) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)


class _Constant(nn.Module):
    """Always predicts class 0 with certainty."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([20.0] + 9 * [0.0]).expand(len(images), -1)


def test_evaluation_counts_every_image_once(tmp_path: Path) -> None:
    run = build(tmp_path)
    labels = torch.tensor([run.eval_loader.dataset[draw].target for draw in run.eval_loader.sampler])
    result = run.task.evaluate(_Constant(), run.eval_loader, run.log)
    assert result.lines[-1].startswith("Accuracy of the network on the 360 test images: ")
    assert result.metrics["top1"] == pytest.approx(100 * (labels == 0).float().mean().item())


def test_missing_image_is_an_error(tmp_path: Path) -> None:
    run = build(tmp_path)
    share = build_eval_loader(run.config, open_dataset(run.config), rank=0, world_size=2)
    with pytest.raises(RuntimeError, match="180 images of a data set of 360"):
        run.task.evaluate(run.state.network, share, run.log)


def test_numbers_are_read_one_step_late() -> None:
    reader = LateReader()
    assert reader.exchange("a", torch.tensor([1.0])) is None
    assert reader.exchange("b", torch.tensor([2.0])) == ("a", [1.0])
    assert reader.flush() == ("b", [2.0])
    assert reader.flush() is None


def test_seeds_are_a_function_of_the_whole_key() -> None:
    def draw(*key: int) -> float:
        seed_everything(*key)
        return torch.rand(()).item()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({draw(0, 1, 2), draw(0, 2, 1), draw(1, 1, 2), draw(0, 1)}) == 4


def test_metrics_past_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    run = build(tmp_path)
    log, path = run.log, tmp_path / "output/tiny/default/metrics.jsonl"
    for kind, epoch, update in (("train", 1, 10), ("eval", 1, 22), ("train", 2, 30), ("train", 2, 40), ("eval", 2, 44)):
        log.metrics(kind, epoch=epoch, update=update, loss=1.0)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "tra')
    log.rewind(epoch=1, update=30)
    assert [(row["kind"], row["update"]) for kind in ("train", "eval") for row in read_metrics(path.parent, kind)] == [
        ("train", 10),
        ("train", 30),
        ("eval", 22),
    ]


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    run = build(tmp_path)
    run.log.metrics("train", epoch=1, update=1, loss=float("nan"))
    assert read_metrics(tmp_path / "output/tiny/default", "train")[0]["loss"] is None


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, build(tmp_path).config, is_main=False)
    capsys.readouterr()
    log.info("not said")
    log.metrics("train", epoch=1, update=1, loss=1.0)
    log.warning("known to all")
    log.result(["known to all"], ["known to all"])
    log.warning("said", alone=True)
    assert capsys.readouterr().out == "said\n"


def test_rates_are_those_of_the_updates_on_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, take = [0.0], loop.take_update

    def take_two_seconds(*arguments: object) -> loop.Update:
        clock[0] += 2
        return take(*arguments)

    run = build(tmp_path, "--batch-size", "128", "--print-freq", "5")
    monkeypatch.setattr(loop, "take_update", take_two_seconds)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert train_one_epoch(run)
    rows = [json.loads(line) for line in (run.folder / "speed.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [(row["update"], row["images_per_second"], row["seconds"]) for row in rows]
    assert found == [(5, 64.0, 10.0), (10, 64.0, 10.0), (11, 64.0, 2.0)]


def test_closing_line_names_the_files_on_disk(tmp_path: Path) -> None:
    run = build(tmp_path)
    run.state.position.finish_epoch(50.0)
    folder = tmp_path / "output/tiny/default"
    lost = "best accuracy 50.00 % in epoch 1 of 1, without a best.pth in this folder"
    assert describe_result(run) == f"{lost}; last.pth, log.txt and config.yaml are in {folder}"
    run.save(best=True)
    assert describe_result(run).startswith("best accuracy 50.00 % in epoch 1 of 1; best.pth, last.pth, log.txt and")
    run.state.position.finish_epoch(60.0)
    assert "60.00 % in epoch 2 of 2, while best.pth is of epoch 1; best.pth" in describe_result(run)


@pytest.mark.parametrize(
    ("flags", "task", "expected"),
    [([], "classification", True), (["--deterministic"], "classification", False), ([], "detection", False)],
)
def test_cudnn_tries_its_algorithms_only_in_training_on_images_of_one_size(
    flags: list[str], task: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, found, update = build(tmp_path, *flags), [], loop.take_update
    run.config.TASK = task

    def note(*given: Any) -> loop.Update:
        found.append(torch.backends.cudnn.benchmark)
        return update(*given)

    monkeypatch.setattr(loop, "take_update", note)
    try:
        assert train_one_epoch(run)
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(found) == {expected}
    assert not torch.backends.cudnn.benchmark  # in evaluations


@pytest.fixture
def tf32() -> Iterator[tuple[Any, Any]]:
    """Return PyTorch's settings of convolutions and matrix products; they are restored afterwards."""
    settings = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [setting.allow_tf32 for setting in settings]
    yield settings
    for setting, value in zip(settings, before, strict=True):
        setting.allow_tf32 = value


@pytest.mark.parametrize(("flags", "precision"), [([], "ieee"), (["--tf32"], "tf32")])
@pytest.mark.filterwarnings("error")
def test_float32_is_tf32_only_on_request(
    flags: list[str], precision: str, tf32: tuple[Any, Any], tmp_path: Path
) -> None:
    for setting in tf32:
        setting.allow_tf32 = not flags
    _, config = parse(["--cfg", str(write_config(tmp_path)), *flags])
    prepare_device(config)
    assert [setting.allow_tf32 for setting in tf32] == [bool(flags)] * 2
    convolutions, products = tf32
    assert products.fp32_precision == precision  # which kernels of Triton follow
    assert (convolutions.conv.fp32_precision == "tf32") == bool(flags)


def test_run_without_finite_results_has_no_best_epoch(tmp_path: Path) -> None:
    run = build(tmp_path)
    run.state.position.finish_epoch(-math.inf)
    assert describe_result(run).startswith("no evaluation gave finite numbers; last.pth, log.txt and")


def test_losses_of_other_options_are_not_averaged(tmp_path: Path) -> None:
    """A run is resumed between two log lines, with a teacher, whose loss has a name of its own."""
    run = build(tmp_path)
    run.state.position.unlogged = [[9.0, 9.0], [1.0, 2.0, 3.0], [2.0, 2.0, 4.0]]
    with Progress(run) as progress:
        progress.advance(run.state.updates_per_epoch, 1.0, 0.1, ["teacher_loss"], time.perf_counter())
    (row,) = read_metrics(run.folder, "train")
    assert (row["loss"], row["grad_norm"], row["teacher_loss"]) == (1.5, 2.0, 3.5)


def test_best_score_is_logged_only_if_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(tmp_path)
    monkeypatch.setattr(loop, "train_one_epoch", lambda _: True)
    monkeypatch.setattr(loop, "finish_run", lambda *_: 0)
    for score, lines in ((math.nan, 0), (50.0, 1)):
        run.state.position.epoch = run.config.TRAIN.EPOCHS - 1
        monkeypatch.setattr(loop, "evaluate_weights", lambda _, score=score: [Evaluation({"top1": score}, [])])
        assert train(run) == 0
        assert (run.folder / "log.txt").read_text().count("Max accuracy: ") == lines
