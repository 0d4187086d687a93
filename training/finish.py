"""The end of a run: curves, report and the last lines of its log."""

from __future__ import annotations

from datetime import timedelta

from training.run import Run
from utils import leave_together

# Result files of a run.
RESULTS = ("best.pth", "last.pth", "report.html", "curves.png", "metrics.jsonl", "log.txt", "config.yaml")
# How long the other ranks wait for the report and the recorders of one process: longer than any takes.
_REPORT_TIMEOUT = timedelta(days=1)


def finish_run(run: Run, status: int) -> None:
    """Close the log of a run; unless it was asked to stop, first draw the curves, write the report and log the result.

    Args:
        run: the run.
        status: its exit status.
    """
    with leave_together(_REPORT_TIMEOUT):  # srun ends the other tasks a minute after the first one has ended
        if run.world.is_main and status < 128:
            draw_curves(run)
            write_html_report(run)
            _log_end(run, saved=status == 0)
        run.log.close(status)


def _log_end(run: Run, *, saved: bool) -> None:
    position = run.state.position
    if position.epoch < run.config.TRAIN.EPOCHS:
        run.log.info(
            f"{run.early_stop_reason()}: the run ends after epoch {position.epoch} of {run.config.TRAIN.EPOCHS}"
        )
    run.log.info(f"finished: {describe_result(run)}")
    if not saved:
        run.log.error("last.pth is not from the end of the run; the lines above say why")


def draw_curves(run: Run) -> None:
    """Write curves.png; errors are logged as warnings."""
    from training.report.curves import plot_curves  # importing matplotlib takes a second and is only needed here

    curves = run.folder / "curves.png"
    try:
        plot_curves({run.config.TAG: run.folder / "metrics.jsonl"}, curves)
    except (OSError, ValueError) as error:  # a full disk, or somebody removed metrics.jsonl
        reason = error.strerror if isinstance(error, OSError) else error
        run.log.warning(f"{curves} could not be written ({reason})")
        curves.unlink(missing_ok=True)  # a partial file


def write_html_report(run: Run) -> None:
    """Write report.html from the files of the run; errors are logged as warnings."""
    if not run.config.REPORT:
        return
    from training.report.held_out import NotWanted
    from training.report.page import write_report

    hint = f"tools/report.py {run.folder} writes it"
    try:
        write_report(run.folder, run.world.device, wanted=lambda: run.stop.received is None)
    except NotWanted:
        run.log.info(f"no report.html, as the run was asked to stop; {hint}")
    except Exception as error:  # the run has finished and its results are saved
        run.log.warning(f"no report.html ({' '.join(str(error).split())}); {hint}")


def describe_result(run: Run) -> str:
    """Return the best score and the result files that exist; some are missing if the disk was full."""
    position, score = run.state.position, run.task.score
    best = "no evaluation gave finite numbers"
    if position.best_epoch:
        best = f"best {score.title} {score.show(position.best_accuracy)} in epoch {position.best_epoch} "
        best += f"of {position.epoch}"
    if (held := run.checkpoints.best_epoch()) != position.best_epoch:
        # It could not be written, or is in the folder of another run, from which this one was resumed.
        best += f", while best.pth is of epoch {held}" if held else ", without a best.pth in this folder"
    files = [run.folder / name for name in RESULTS]
    written = [file.name for file in files if file.is_file() and file.stat().st_size]
    *most, last = written or ["no files"]
    return f"{best}; {' and '.join(filter(None, (', '.join(most), last)))} are in {run.folder}"
