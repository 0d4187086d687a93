"""Train, evaluate or time a model: read the command line, build everything from one config, run.

python main.py --cfg configs/digits.yaml
python main.py --cfg configs/dat_tiny.yaml --data-path imagenet --eval --resume dat_pp_tiny_in1k_224.pth
"""

from __future__ import annotations

from training import startup

if __name__ == "__main__":
    startup.begin()  # before the imports below, which take seconds

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from yacs.config import CfgNode

from data.images import UnreadableImage, UnusableImage
from data.wording import counted
from logger import RunLog
from training.build import assemble, build_run
from training.command_line import parse
from training.device import resolve_options
from training.evaluation import build_evaluation, build_throughput, run_throughput, size_in_words
from training.exit_status import FAILED, is_machine_failure, on_one_line, report_failure, report_wrong_input
from training.loop import TrainingStopped, train
from training.output_folder import try_folder
from training.preview import preview
from utils import World, close_world, fail_together, init_world, launched_as, pick_device


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status, see `training.exit_status`."""
    try:
        args, config = parse(argv)
        if args.check:
            return check(args, config)
        world = init_world(config.DEVICE)
        resolve_options(config, world.device)
        job = build_job(args, config, world)
    except (ValueError, OSError) as error:
        return report_failure(error) if is_machine_failure(error) else report_wrong_input(error)
    except (RuntimeError, MemoryError) as error:
        return report_failure(error)
    try:
        status = job()
        close_world()
        return status
    except UnusableImage as error:
        hint = "; repair or delete it, or leave such images out by --opts DATA.BAD_IMAGES skip"
        message = f"{error}{hint if isinstance(error, UnreadableImage) else ''}"
        if args.eval:
            return report_wrong_input(message, alone=True)
        logging.getLogger("dat").error(on_one_line(message))  # in log.txt, too, if rank 0 met it
        return FAILED
    except TrainingStopped as error:
        # All ranks stop for the same reason, but each reports its own modules.
        if world.is_main or config.TRAIN.ANOMALY_REPORT:
            logging.getLogger("dat").error(str(error))
        return FAILED
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        return report_failure(error)


def build_job(args: argparse.Namespace, config: CfgNode, world: World) -> Callable[[], int]:
    """Return the job of the command line, ready to run; it returns the exit status.

    Raises:
        ValueError: wrong input.
    """
    if args.throughput:
        return partial(run_throughput, config, build_throughput(config, world), world)
    if args.eval:
        with fail_together():
            return build_evaluation(config, world, amp=config.AMP if args.AMP else "off").run
    return partial(train, build_run(config, world))


def check(args: argparse.Namespace, config: CfgNode) -> int:
    """Check everything that can be checked before processes are started, and report it without writing anything.

    Raises:
        ValueError: wrong input.
    """
    launch = launched_as()
    size = max(launch.size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # of a launcher that has started none yet
    device = pick_device(config.DEVICE, 0, size if launch.size == 1 else launch.local_size)
    precision = config.AMP
    resolve_options(config, device)
    if precision == "auto" and device.type == "cpu":  # perhaps in place of a job's GPU, which chooses bf16 or fp16
        config.AMP = precision
    world, lines, warnings = World(0, size, 0, torch.device("cpu")), [], []
    if args.throughput:
        build_throughput(config, world)
        summary = size_in_words(config)
    elif args.eval:
        evaluation = build_evaluation(config, world, cached=False)
        lines, warnings = evaluation.notes, evaluation.warnings
        images = counted(len(evaluation.loader.dataset), "validation image")
        summary = f"{evaluation.path}, {images}, {evaluation.task.summary()}"
    else:
        assembly = assemble(config, world, cached=False)
        try_folder(config.run_folder)
        lines, warnings = preview(assembly, config, replace(world, device=device))
        summary = assembly.task.summary()
    log = RunLog(None, config, is_main=launch.rank == 0)
    log.begin(lines, warnings)
    log.info(f"checked: {config.MODEL.NAME}, {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
