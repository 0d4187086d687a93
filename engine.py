"""The loops: training for one epoch, evaluation, and throughput. What they run on is built in main.py."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from anomaly import first_nonfinite
from data.datasets import Batch
from logger import RunLog
from optimizer import skip_next_step
from run import Run
from utils import LateReader, StopSignal, World, seed_everything, sum_over_ranks

AUTOCAST = {"off": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Ask(IntEnum):
    """What the ranks ask for after an update."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class TrainingStopped(RuntimeError):
    """The run cannot go on: too many updates in a row were not finite, or too many images unreadable."""


def train_one_epoch(run: Run) -> bool:
    """Train from `run.position`, which moves with every update, to the end of its epoch.

    Saves in between as SAVE_EVERY_UPDATES and SAVE_EVERY_MINUTES ask for.

    Returns:
        False where the run was asked to stop before the epoch was over.

    Raises:
        TrainingStopped: see there.
    """
    position = run.position
    run.model.train()
    run.train_loader.sampler.set_position(position.epoch, position.update * run.images_per_update)
    batches = iter(run.train_loader)
    reader = LateReader()
    pace = Pace(run)
    while position.update < run.updates_per_epoch:
        loss, unreadable, kept = accumulate_gradients(run, batches)
        norm = update_weights(run, loss)
        lr = run.optimizer.param_groups[0]["lr"]
        run.scheduler.step_update(run.updates_done)
        position.update += 1
        report = share(run, loss, norm, unreadable, save_due=pace.is_clock_due())
        ask = record(run, reader.exchange((position.update, lr, kept), report), pace)
        if ask or pace.is_count_due():
            ask = max(ask, record(run, reader.flush(), pace))
            if ask == Ask.STOP:
                break
            run.save()
            pace.saved()
    else:
        ask = record(run, reader.flush(), pace)
    pace.close()
    return ask != Ask.STOP


def accumulate_gradients(
    run: Run, batches: Iterator[Batch]
) -> tuple[torch.Tensor, int, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Run the micro-batches of one update forward and backward.

    Returns:
        Their mean loss on the device, the number of unreadable images among them, and the images and targets that the
        network saw where TRAIN.ANOMALY_REPORT needs them.
    """
    config, world, position, device = run.config, run.world, run.position, run.world.device
    steps = config.TRAIN.ACCUMULATION_STEPS
    loss_sum, unreadable, kept = torch.zeros((), device=device), 0, []
    for step in range(steps):
        batch = next(batches)
        run.bad_images.add(batch.unreadable, run.log.warning)
        unreadable += len(batch.unreadable)
        images, targets = to_device(batch.images, device), batch.targets.to(device, non_blocking=True)
        seed_everything(config.SEED, position.epoch, position.update, step, world.rank)
        if run.mixup is not None:
            images, targets = run.mixup(images, targets)
        if config.TRAIN.ANOMALY_REPORT:
            kept.append((images, targets))
        is_last = step == steps - 1
        with nullcontext() if is_last or world.size == 1 else run.model.no_sync():
            loss = compute_loss(run, run.model, images, targets) / steps
            run.scaler.scale(loss).backward()
        loss_sum += loss.detach()
    return loss_sum, unreadable, kept


def compute_loss(run: Run, model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of a micro-batch in the precision of the run."""
    with torch.autocast(run.world.device.type, dtype=AUTOCAST[run.config.AMP], enabled=run.config.AMP != "off"):
        return run.criterion(model(images), targets)


def share(run: Run, loss: torch.Tensor, norm: torch.Tensor, unreadable: int, *, save_due: bool) -> torch.Tensor:
    """Return `[mean loss, norm, unreadable images, requests to save, to stop]` over all ranks, on the device."""
    asked = (unreadable, save_due and run.world.is_main, run.stop.received is not None)
    flags = [torch.full((), float(value), device=loss.device) for value in asked]  # filled there: no copy to wait for
    return sum_over_ranks(torch.stack([loss / run.world.size, norm / run.world.size, *flags]))


def update_weights(run: Run, loss: torch.Tensor) -> torch.Tensor:
    """Take one step with the accumulated gradients and return their norm before clipping, unscaled, on the device.

    A loss or gradient that is not finite on any rank leaves weights and optimizer as they are, on every rank.
    """
    run.scaler.unscale_(run.optimizer)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, run.config.TRAIN.CLIP_GRAD or math.inf)
    broken = sum_over_ranks((~(norm.isfinite() & loss.isfinite())).float()).clamp(max=1)
    skip_next_step(run.optimizer, broken)
    run.optimizer.step()
    if run.scaler.is_enabled():
        run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema is not None:
        run.ema.update(run.network(), step=run.updates_done + 1)
    return torch.where(broken > 0, math.nan, norm)


def record(run: Run, report: tuple[Any, list[float]] | None, pace: Pace) -> Ask:
    """Take in what an update gave, log it when it is time, and return what the ranks ask for; all learn the same.

    Raises:
        TrainingStopped: see there.
    """
    if report is None:
        return Ask.NOTHING
    config, position = run.config, run.position
    (update, lr, kept), (loss, norm, unreadable, save, stop) = report
    position.unreadable += int(unreadable)
    limit = config.DATA.MAX_BAD_SHARE * len(run.train_loader.dataset)
    if position.unreadable > limit:
        images = len(run.train_loader.dataset)
        raise TrainingStopped(
            f"unreadable images in epoch {position.epoch + 1} so far: {position.unreadable} of {images}, more than "
            f"DATA.MAX_BAD_SHARE = {config.DATA.MAX_BAD_SHARE} of them; bad_images.txt lists them. Mend or remove "
            "them, or allow more by --opts DATA.MAX_BAD_SHARE"
        )
    if math.isfinite(norm) and math.isfinite(loss):
        position.nonfinite_in_row = 0
        position.unlogged.append([loss, norm])
    else:
        position.nonfinite_in_row += 1
        position.nonfinite += 1
        where = f"epoch {position.epoch + 1}, update {update}"
        run.log.warning(f"{where}: loss or gradient is not finite; update skipped ({position.nonfinite} so far)")
        if position.nonfinite_in_row >= config.TRAIN.MAX_NONFINITE:
            raise TrainingStopped(
                f"{where}: {position.nonfinite_in_row} updates in a row were not finite; the last good checkpoint is "
                "kept. Try a lower TRAIN.BASE_LR, a longer warm-up, or --amp bf16 in place of fp16"
                + (f". {anomaly_report(run, update, kept)}" if kept else "")
            )
    pace.advance(update, loss, lr)
    return Ask.STOP if stop else Ask.SAVE if save else Ask.NOTHING


def anomaly_report(run: Run, update: int, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> str:
    """Return where the numbers of this rank's micro-batches of `update`, run once more, stop being finite."""

    def forward() -> torch.Tensor:
        losses = []
        for step, batch in enumerate(batches):
            seed_everything(run.config.SEED, run.position.epoch, update - 1, step, run.world.rank)
            losses.append(compute_loss(run, run.network(), *batch))
        return torch.stack(losses).sum()

    return f"Rank {run.world.rank}: {first_nonfinite(run.network(), forward)}"


class Pace:
    """Progress within an epoch: the bar, the lines of the log, and when to save."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._begin = self._last_line = self._last_save = time.monotonic()
        self._first = self._last_update = run.position.update
        title = f"epoch {run.position.epoch + 1}/{run.config.TRAIN.EPOCHS}"
        self._bar = run.log.bar(run.updates_per_epoch, self._first, title)

    def advance(self, update: int, loss: float, lr: float) -> None:
        """Move on to `update`, whose loss is known now."""
        self._bar.update()
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        if update % self._run.config.PRINT_FREQ == 0 or update == self._run.updates_per_epoch:
            self._log(update, lr)

    def is_count_due(self) -> bool:
        """Return whether SAVE_EVERY_UPDATES asks for a checkpoint; the same on every rank."""
        every, update = self._run.config.SAVE_EVERY_UPDATES, self._run.position.update
        return every > 0 and update % every == 0 and update < self._run.updates_per_epoch

    def is_clock_due(self) -> bool:
        """Return whether SAVE_EVERY_MINUTES asks for a checkpoint, by this rank's clock."""
        every = self._run.config.SAVE_EVERY_MINUTES
        return every > 0 and time.monotonic() - self._last_save >= 60 * every

    def saved(self) -> None:
        """Note that a checkpoint was written now."""
        self._last_save = time.monotonic()

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def _log(self, update: int, lr: float) -> None:
        run, position, now = self._run, self._run.position, time.monotonic()
        losses, norms = zip(*position.unlogged, strict=True) if position.unlogged else ((math.nan,), (math.nan,))
        loss, norm = sum(losses) / len(losses), sum(norms) / len(norms)
        position.unlogged.clear()
        rate = (update - self._last_update) * run.images_per_update / max(now - self._last_line, 1e-9)
        left = (run.config.TRAIN.EPOCHS - position.epoch) * run.updates_per_epoch - update
        seconds_left = left * (now - self._begin) / max(update - self._first, 1)
        self._last_line, self._last_update = now, update
        run.log.step(
            f"epoch {position.epoch + 1}/{run.config.TRAIN.EPOCHS} update {update}/{run.updates_per_epoch}  "
            f"lr {lr:.3e}  loss {loss:.4f}  grad norm {norm:.3f}  {rate:.1f} images/s  {_memory(run.world.device)}"
            f"{_scale(run.scaler)}  {_clock(seconds_left)} left"
        )
        total = position.epoch * run.updates_per_epoch + update
        run.log.metrics("train", epoch=position.epoch + 1, update=total, lr=lr, loss=loss, grad_norm=norm)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, over all images of all ranks: accuracies in percent, mean cross-entropy, counts."""

    top1: float
    top5: float
    loss: float
    images: int
    skipped: int

    def log(self, log: RunLog, name: str = "") -> None:
        """Say the result in the published lines, after the `name` of the weights if they have one."""
        prefix = f"{name}: " if name else ""
        log.info(f"{prefix} * Acc@1 {self.top1:.3f} Acc@5 {self.top5:.3f}")
        log.info(f"{prefix} * Loss {self.loss:.4f}")
        log.info(f"{prefix}Accuracy of the network on the {self.images} test images: {self.top1:.1f}%")
        if self.skipped:
            log.warning(f"{self.skipped} images could not be read and are not counted")


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: DataLoader, world: World, log: RunLog, stop: StopSignal | None = None
) -> Evaluation | None:
    """Evaluate in float32.

    Sums over all images of all ranks are divided by their number, so that the result does not depend on how many
    processes share the work.

    Args:
        model: returns logits `[B, classes]`.
        loader: this rank's share of the images.
        world: the processes.
        log: names the images that cannot be read.
        stop: ends the evaluation early when any rank was asked to stop.

    Returns:
        What was found; None where it was stopped.

    Raises:
        RuntimeError: where not each image of the data set was counted once.
    """
    was_training = model.training
    model.eval()
    total = len(loader.dataset)
    rounds = math.ceil(
        math.ceil(total / world.size) / loader.batch_size
    )  # a rank may have one batch fewer than another
    batches, reader = iter(loader), LateReader()
    sums = torch.zeros(5, dtype=torch.float32 if world.device.type == "mps" else torch.float64, device=world.device)
    bar = log.bar(rounds, 0, "evaluating")
    stopped = False
    for _ in range(rounds):
        batch = next(batches, None)
        if batch is not None:
            for path in batch.unreadable:
                log.warning(f"{path} cannot be read; evaluated without it")
            sums += _count(
                model,
                to_device(batch.images, world.device),
                batch.targets.to(world.device, non_blocking=True),
                sums.dtype,
            )
        asked = torch.full((), float(stop is not None and stop.received is not None), device=world.device)
        earlier = reader.exchange(None, sum_over_ranks(asked))
        bar.update()
        if earlier is not None and earlier[1]:
            stopped = True
            break
    bar.close()
    model.train(was_training)
    if stopped:
        return None
    correct1, correct5, loss, images, skipped = sum_over_ranks(sums).tolist()
    if images + skipped != total or not images:
        raise RuntimeError(f"evaluated {images + skipped:.0f} images of a data set of {total}")
    return Evaluation(100 * correct1 / images, 100 * correct5 / images, loss / images, int(images), int(skipped))


def _count(model: nn.Module, images: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `[correct, correct among five, sum of losses, images, images left out]` of a batch."""
    logits = model(images).float()
    read = targets >= 0
    losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (ranked == targets[:, None]) & read[:, None]
    return torch.stack([x.to(dtype).sum() for x in (hits[:, 0], hits, losses, read, ~read)])


@torch.inference_mode()
def measure_throughput(model: nn.Module, config: CfgNode, device: torch.device, *, runs: int = 30) -> float:
    """Return how many random images a second the model classifies, in batches of DATA.BATCH_SIZE."""
    model.eval()
    size = config.DATA.IMG_SIZE
    images = to_device(torch.randn(config.DATA.BATCH_SIZE, 3, size, size), device)
    with torch.autocast(device.type, dtype=AUTOCAST[config.AMP], enabled=config.AMP != "off"):
        for _ in range(max(runs // 10, 1)):
            model(images)
        _finish(device)
        begin = time.perf_counter()
        for _ in range(runs):
            model(images)
        _finish(device)
    return runs * len(images) / (time.perf_counter() - begin)


def to_device(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return images `[B, 3, H, W]` on the device, channels last in memory, without waiting for the copy."""
    return images.to(device, non_blocking=True, memory_format=torch.channels_last)


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB GPU"
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GiB"


def _scale(scaler: torch.amp.GradScaler) -> str:
    return f"  loss scale {scaler.get_scale():.0f}" if scaler.is_enabled() else ""


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
