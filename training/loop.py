"""The training loop: epochs and updates, with logging, saving and stopping."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data.wording import counted
from models.contract import set_epoch
from optimizer import keep_frozen_in_eval, learning_rate, step_unless
from tasks import Evaluation
from training.anomaly import first_nonfinite
from training.exit_status import FAILED
from training.finish import finish_run
from training.progress import Progress
from training.run import Run
from utils import LateReader, seed_everything, sum_over_ranks

# Takes the place of micro-batch and rank in the seed of an optimizer step; no micro-batch has this seed.
_STEP = (0, 0, 1)


class Action(IntEnum):
    """What to do after an update, the same on all ranks."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class TrainingStopped(RuntimeError):
    """The run cannot continue: too many consecutive updates were not finite, or too many files are unreadable."""


class Update(NamedTuple):
    """Results of one update on this rank, on the device.

    Attributes:
        loss: mean over the micro-batches.
        norm: gradient norm before clipping, unscaled; NaN if the update was skipped.
        named_losses: those whose sum is `loss`; empty if the task returns a single loss.
        unreadable: number of files in these micro-batches that could not be read.
        batches: the micro-batches of the loader, if TRAIN.ANOMALY_REPORT is set.
    """

    loss: Tensor
    norm: Tensor
    named_losses: dict[str, Tensor]
    unreadable: int
    batches: list[Any]


def train(run: Run) -> int:
    """Train to the end or to a request to stop, finish the log, and return the exit status."""
    try:
        status = train_epochs(run)
        finish_run(run, status)
        return status
    finally:
        run.log.close(FAILED)  # without effect unless there was an error


def train_epochs(run: Run) -> int:
    """Train and evaluate epoch by epoch; return the exit status, which is above 128 if the run was asked to stop."""
    config, position, log = run.config, run.state.position, run.log
    saved = True
    while position.epoch < config.TRAIN.EPOCHS and not run.early_stop_reason():
        finished = train_one_epoch(run)
        run.save()  # the evaluation may be interrupted, too
        results = evaluate_weights(run) if finished else None
        if results is None:
            how = "" if config.TRAIN.AUTO_RESUME else f" with --resume {run.folder / 'last.pth'}"
            log.info(
                f"stopped on request in epoch {position.epoch + 1}, update {position.update}; run the same command "
                f"again{how} to continue"
            )
            return run.stop.exit_status()
        scores = [run.task.score.of(result.metrics) for result in results]
        position.finish_epoch(scores[-1] if all(map(math.isfinite, scores)) else -math.inf)
        if position.best_epoch:
            log.info(run.task.best_line(position.best_accuracy))
        keep = config.SAVE_FREQ > 0 and position.epoch % config.SAVE_FREQ == 0
        saved = run.save(best=position.best_epoch == position.epoch, epoch=position.epoch if keep else None)
    return 0 if saved else FAILED


def train_one_epoch(run: Run) -> bool:
    """Train from the current position to the end of the epoch.

    Saves checkpoints in between according to SAVE_EVERY_UPDATES and SAVE_EVERY_MINUTES.

    Returns:
        False if the run was asked to stop before the end of the epoch.

    Raises:
        TrainingStopped: see there.
    """
    state, position = run.state, run.state.position
    run.model.train()
    for network in filter(None, (state.network, state.ema and state.ema.module)):
        set_epoch(network, position.epoch)
    run.task.set_epoch(position.epoch)
    keep_frozen_in_eval(state.network)
    run.train_loader.sampler.set_position(position.epoch, position.update * state.images_per_update)
    batches, reader, action = iter(run.train_loader), LateReader(), Action.NOTHING
    with run.fastest_convolutions(), Progress(run) as progress:
        while position.update < state.updates_per_epoch:
            lr = learning_rate(state.optimizer)
            update = take_update(run, batches)
            numbers = reduce_update(run, update, save_due=progress.is_clock_due())
            tag = position.update, lr, time.perf_counter(), list(update.named_losses), update.batches
            action = record(run, reader.exchange(tag, numbers), progress)
            if action or progress.is_count_due():
                action = max(action, record(run, reader.flush(), progress))
                if action == Action.STOP:
                    return False
                run.save()
                progress.saved()
        return max(action, record(run, reader.flush(), progress)) != Action.STOP


def take_update(run: Run, batches: Iterator[Any]) -> Update:
    """Take one update: forward and backward over its micro-batches, then one step of the optimizer.

    If the loss or a gradient is not finite on any rank, weights, running statistics and optimizer stay unchanged on
    all ranks.
    """
    config, state, task, device = run.config, run.state, run.task, run.world.device
    position, optimizer, steps = state.position, state.optimizer, config.TRAIN.ACCUMULATION_STEPS
    total, named_losses, unreadable, kept = torch.zeros((), device=device), {}, 0, []
    for step in range(steps):
        batch = next(batches)
        run.bad_images.add(task.unreadable(batch), partial(run.log.warning, alone=True))
        unreadable += len(task.unreadable(batch))
        seed_everything(config.SEED, position.epoch, position.update, step, run.world.rank)
        if config.TRAIN.ANOMALY_REPORT:
            kept.append(batch)
        batch = task.prepare(batch, device)
        with run.gradient_sync(enabled=step == steps - 1):
            with run.autocast():
                losses = task.loss(run.model, batch)
            loss = total_loss(losses)
            with run.statistics.kept(enabled=config.TRAIN.USE_CHECKPOINT):
                state.scaler.scale(loss / steps).backward()
        total += loss.detach() / steps
        for name, value in losses.items() if isinstance(losses, dict) else ():
            named_losses[name] = named_losses.get(name, 0) + value.detach() / steps

    state.scaler.unscale_(optimizer)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = nn.utils.clip_grad_norm_(weights, config.TRAIN.CLIP_GRAD or math.inf)
    broken = sum_over_ranks((~(norm.isfinite() & total.isfinite())).float()).clamp(max=1)
    # Without the rank, so that optimizers that draw random numbers, such as kron, take the same step on all ranks.
    seed_everything(config.SEED, position.epoch, position.update, *_STEP)
    step_unless(broken, optimizer)
    run.statistics.agree(run.world.size, broken=broken)
    if state.scaler.is_enabled():
        state.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update(state.network, step=state.updates_done + 1)
    state.scheduler.step_update(state.updates_done)
    position.update += 1
    return Update(total, torch.where(broken > 0, math.nan, norm), named_losses, unreadable, kept)


def total_loss(losses: Tensor | dict[str, Tensor]) -> Tensor:
    """Return the loss to minimise: the sum of named losses."""
    return losses if isinstance(losses, Tensor) else sum(losses.values())


def reduce_update(run: Run, update: Update, *, save_due: bool) -> Tensor:
    """Return `[loss, norm, unreadable files, requests to save, to stop, named losses...]` over all ranks.

    Losses and norm are averaged, the others summed. The numbers stay on the device.
    """
    asked = (update.unreadable, save_due and run.world.is_main, run.stop.received is not None)
    flags = [torch.full((), float(value), device=update.loss.device) for value in asked]  # filled there, not copied
    means = [value / run.world.size for value in (update.loss, update.norm, *update.named_losses.values())]
    return sum_over_ranks(torch.stack([*means[:2], *flags, *means[2:]]))


def record(run: Run, report: tuple[Any, list[float]] | None, progress: Progress) -> Action:
    """Process the numbers of an update, log them if due, and return what to do next, which is the same on all ranks.

    Raises:
        TrainingStopped: see there.
    """
    if report is None:
        return Action.NOTHING
    config, position = run.config, run.state.position
    (update, lr, taken, names, batches), (loss, norm, unreadable, save, stop, *named_losses) = report
    position.unreadable += int(unreadable)
    samples = len(run.train_loader.dataset)
    if position.unreadable > config.DATA.MAX_BAD_SHARE * samples:
        raise TrainingStopped(
            f"unreadable images in epoch {position.epoch + 1} so far: {position.unreadable} of {samples}, more than "
            f"DATA.MAX_BAD_SHARE = {config.DATA.MAX_BAD_SHARE} of them; bad_images.txt lists them. Repair or delete "
            "them, or allow more by --opts DATA.MAX_BAD_SHARE"
        )
    if math.isfinite(norm) and math.isfinite(loss):
        position.nonfinite_in_row = 0
        position.unlogged.append([loss, norm, *named_losses])
    else:
        position.nonfinite_in_row += 1
        position.nonfinite += 1
        where = f"epoch {position.epoch + 1}, update {update}"
        run.log.warning(f"{where}: loss or gradient is not finite; update skipped ({position.nonfinite} so far)")
        if position.nonfinite_in_row >= config.TRAIN.MAX_NONFINITE:
            raise TrainingStopped(
                f"{where}: {counted(position.nonfinite_in_row, 'update was', 'updates in a row were')} not finite; the "
                "last good checkpoint is kept. Try a lower TRAIN.BASE_LR, a longer warm-up, or --amp bf16 in place of "
                "fp16" + (f". {anomaly_report(run, update, batches)}" if batches else "")
            )
    progress.advance(update, loss, lr, names, taken)
    return Action.STOP if stop else Action.SAVE if save else Action.NOTHING


def anomaly_report(run: Run, update: int, batches: list[Any]) -> str:
    """Run this rank's micro-batches of `update` once more and report the first module with a non-finite output."""
    network = run.state.network

    def forward() -> Tensor:
        total = torch.zeros((), device=run.world.device)
        for step, batch in enumerate(batches):
            seed_everything(run.config.SEED, run.state.position.epoch, update - 1, step, run.world.rank)
            prepared = run.task.prepare(batch, run.world.device)  # draws from the same generators
            with run.autocast():
                losses = run.task.loss(network, prepared)
            total = total + total_loss(losses)
        return total

    return f"Rank {run.world.rank}: {first_nonfinite(network, forward)}"


def evaluate_weights(run: Run) -> list[Evaluation] | None:
    """Evaluate the weights and the EMA weights, if any; return None if the run was asked to stop."""
    state = run.state
    kinds = {"eval": ("", state.network)} | (
        {"eval_ema": ("averaged weights: ", state.ema.module)} if state.ema else {}
    )
    results = []
    for kind, (prefix, network) in kinds.items():
        result = run.task.evaluate(network, run.eval_loader, run.log, run.stop)
        if result is None:
            return None
        run.log.result(result.lines, result.warnings, prefix)
        run.log.metrics(kind, epoch=state.position.epoch + 1, update=state.updates_done, **result.metrics)
        run.log.pictures(kind, result.pictures, update=state.updates_done)
        results.append(result)
    return results
