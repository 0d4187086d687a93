"""Progress within an epoch: progress bar, log lines, and when to save."""

from __future__ import annotations

import math
import sys
import time

import torch

from training.run import Run

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None


class Progress:
    """Tracks the updates of one epoch; a context manager that closes the progress bar."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._begin = self._last_line = time.perf_counter()
        self._last_save = time.monotonic()
        self._first = self._last_update = run.state.position.update
        title = f"epoch {run.state.position.epoch + 1}/{run.config.TRAIN.EPOCHS}"
        self._bar = run.log.bar(run.state.updates_per_epoch, self._first, title)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, update: int, loss: float, lr: float, names: list[str], taken: float) -> None:
        """Record an update whose loss is now known.

        Args:
            update: its number within the epoch, from 1.
            loss: averaged over all ranks.
            lr: its learning rate.
            names: the names of the losses whose sum is `loss`.
            taken: `time.perf_counter()` when it was taken; its loss is known one update later.
        """
        self._bar.update()
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        if update % self._run.config.PRINT_FREQ == 0 or update == self._run.state.updates_per_epoch:
            self._log(update, lr, names, taken)

    def is_count_due(self) -> bool:
        """Return whether a checkpoint is due by SAVE_EVERY_UPDATES; the same on every rank."""
        every, update = self._run.config.SAVE_EVERY_UPDATES, self._run.state.position.update
        return every > 0 and update % every == 0 and update < self._run.state.updates_per_epoch

    def is_clock_due(self) -> bool:
        """Return whether a checkpoint is due by SAVE_EVERY_MINUTES, by this rank's clock."""
        every = self._run.config.SAVE_EVERY_MINUTES
        return every > 0 and time.monotonic() - self._last_save >= 60 * every

    def saved(self) -> None:
        """Restart the timer of SAVE_EVERY_MINUTES."""
        self._last_save = time.monotonic()

    def _log(self, update: int, lr: float, names: list[str], taken: float) -> None:
        run, state, position = self._run, self._run.state, self._run.state.position
        # A run that is resumed with other options may have other named losses than before.
        rows = [row for row in position.unlogged if len(row) == 2 + len(names)]
        columns = list(zip(*rows, strict=True)) or [(math.nan,)] * (2 + len(names))
        loss, norm, *named_losses = (sum(values) / len(values) for values in columns)
        position.unlogged.clear()
        seconds = taken - self._last_line
        rate = (update - self._last_update) * state.images_per_update / seconds
        left = (run.config.TRAIN.EPOCHS - position.epoch) * state.updates_per_epoch - update
        seconds_left = left * (taken - self._begin) / max(update - self._first, 1)
        self._last_line, self._last_update = taken, update
        memory = _memory(run.world.device)
        shown = "".join(f"{name} {value:.4f}  " for name, value in zip(names, named_losses, strict=True))
        memory_in_words = f"{memory:.1f} GiB" if math.isfinite(memory) else "memory unknown"
        run.log.step(
            f"epoch {position.epoch + 1}/{run.config.TRAIN.EPOCHS} update {update}/{state.updates_per_epoch}  "
            f"lr {lr:.3e}  loss {loss:.4f}  {shown}grad norm {norm:.3f}  {rate:.1f} images/s  "
            f"{memory_in_words}{_scale(state.scaler)}  {_clock(seconds_left)} left"
        )
        at = {"epoch": position.epoch + 1, "update": position.epoch * state.updates_per_epoch + update}
        values = {"lr": lr, "loss": loss, "grad_norm": norm, **dict(zip(names, named_losses, strict=True))}
        run.log.metrics("train", **at, **values)
        speed = {"images_per_second": round(rate, 2), "seconds": round(seconds, 3), "memory_gib": round(memory, 3)}
        run.log.speed(**at, **speed)


def _memory(device: torch.device) -> float:
    """Return the peak memory of the GPU or of the process in GiB; NaN if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return math.nan
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _scale(scaler: torch.amp.GradScaler) -> str:
    return f"  loss scale {scaler.get_scale():.0f}" if scaler.is_enabled() else ""


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
