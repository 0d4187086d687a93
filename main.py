"""Train, evaluate or time a model: read the command line, build everything from one config, run.

python main.py --cfg configs/digits.yaml
python main.py --cfg configs/dat_tiny.yaml --data-path imagenet --eval --resume dat_pp_tiny_in1k_224.pth
"""

from __future__ import annotations

import startup

if __name__ == "__main__":
    startup.end_quietly()

import argparse
import difflib
import logging
import math
import os
import sys
import warnings as python_warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from checkpoint import (
    FORMAT,
    CheckpointFolder,
    check_training_state,
    class_changes,
    config_changes,
    load_checkpoint,
    load_strictly,
    model_weights,
    written_config,
)
from config import flatten, load_config
from data.build import build_eval_loader, build_mixup, build_train_loader, open_dataset
from data.images import UnreadableImage
from engine import Evaluation, TrainingStopped, evaluate, measure_throughput, train_one_epoch
from logger import RunLog, check_writers
from lr_scheduler import build_scheduler
from models import build_model
from models.weights import adapt
from optimizer import build_optimizer
from output_folder import hold_folder, open_folder, set_aside, try_folder, write_whole
from run import BadImages, Run
from tools.plot import plot_curves
from utils import (
    LOST_PEER,
    StopSignal,
    World,
    close_world,
    collective_timeout,
    fail_together,
    init_world,
    is_lost_peer,
    is_lost_worker,
    is_out_of_memory,
    launched_as,
    pick_device,
    seed_everything,
    wait_for_all,
    was_restarted,
)

# Flags that set an option of the config, and how their text is read.
_OPTION_FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "--batch-size": ("DATA.BATCH_SIZE", {"metavar": "N", "help": "images per process and micro-batch"}),
    "--data-path": (
        "DATA.DATA_PATH",
        {"metavar": "FOLDER", "help": "holds train/ and val/; or the variable DATA_PATH"},
    ),
    "--pretrained": ("MODEL.PRETRAINED", {"metavar": "FILE", "help": "weights to start from (fine-tuning)"}),
    "--resume": ("MODEL.RESUME", {"metavar": "FILE", "help": "checkpoint to continue or to evaluate"}),
    "--amp": (
        "AMP",
        {"nargs": "?", "const": "auto", "metavar": "off|fp16|bf16", "help": "mixed precision of training"},
    ),
    "--accumulation-steps": ("TRAIN.ACCUMULATION_STEPS", {"metavar": "N", "help": "micro-batches per update"}),
    "--use-checkpoint": (
        "TRAIN.USE_CHECKPOINT",
        {"action": "store_true", "help": "recompute activations, saving memory"},
    ),
    "--compile": ("COMPILE", {"action": "store_true", "help": "torch.compile, block by block"}),
    "--ema": (
        "TRAIN.EMA.ENABLED",
        {"action": "store_true", "help": "average the weights; with --eval, evaluate those"},
    ),
    "--output": ("OUTPUT", {"metavar": "FOLDER", "help": "results lie in FOLDER/<config name>/<tag>"}),
    "--tag": ("TAG", {"help": "name of this run"}),
    "--print-freq": ("PRINT_FREQ", {"metavar": "N", "help": "updates between lines of the log"}),
    "--seed": ("SEED", {"metavar": "N", "help": "random seed"}),
    "--device": ("DEVICE", {"metavar": "cuda|mps|cpu", "help": "default: the best there is"}),
    "--deterministic": ("DETERMINISTIC", {"action": "store_true", "help": "deterministic kernels only"}),
    "--allow-config-change": (
        "TRAIN.ALLOW_CONFIG_CHANGE",
        {"action": "store_true", "help": "resume although options differ from those of the checkpoint"},
    ),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest flag that exists."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see python main.py --help")

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            hint = f"did you mean {near[0]}?" if near else "options of config.py are set by --opts KEY VALUE"
            self.error(f"unknown argument {unknown[0]}; {hint}")
        return parsed


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, CfgNode]:
    """Return the command line, and the config with the command line merged into it."""
    parser = _Parser(prog="main.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--cfg", metavar="FILE", help="config, such as configs/digits.yaml")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--eval", action="store_true", help="evaluate --resume instead of training")
    mode.add_argument("--throughput", action="store_true", help="measure images per second instead of training")
    parser.add_argument("--check", action="store_true", help="check config, data layout and files, and stop")
    for flag, (key, settings) in _OPTION_FLAGS.items():
        parser.add_argument(flag, dest=key, default=None, **settings)
    parser.add_argument(
        "--opts", nargs="*", action="extend", default=[], metavar="KEY VALUE", help="any option of config.py"
    )
    args = parser.parse_args(argv)
    if not args.cfg:
        parser.error("no config given; pass one as --cfg FILE, such as configs/digits.yaml")
    empty = next((flag for flag, (key, _) in _OPTION_FLAGS.items() if getattr(args, key) == ""), None)
    if empty:
        parser.error(f"{empty} is empty; give it a value or leave it out")
    if len(args.opts) % 2:
        hint = f": write {args.opts[-1].replace('=', ' ', 1)}" if "=" in args.opts[-1] else ""
        raise ValueError(f"--opts takes pairs of KEY VALUE; {args.opts[-1]!r} has no value{hint}")
    given = {key: getattr(args, key) for key, _ in _OPTION_FLAGS.values() if getattr(args, key) is not None}
    config = load_config(args.cfg, [*args.opts, *(word for option in given.items() for word in option)])
    if args.eval and not (config.MODEL.RESUME or config.MODEL.PRETRAINED):
        raise ValueError("--eval needs a checkpoint: pass it as --resume FILE")
    return args, config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 1 for a run that broke off and would do so again; 2 for wrong input; 75 where another
        process died or hangs; 128 + the number of the signal that stopped the run.
    """
    try:
        args, config = parse(argv)
        if args.check:
            return check(args, config)
        world = init_world(config.DEVICE)
        settle(config, world.device)
        job = build_job(args, config, world)
    except (ValueError, OSError) as error:
        return refuse(error)
    except RuntimeError as error:
        return break_off(error)
    try:
        status = job()
        close_world()
        return status
    except UnreadableImage as error:
        refuse(f"{error}; mend or remove it, or leave such images out by --opts DATA.BAD_IMAGES skip", alone=True)
        return 2 if args.eval else 1
    except TrainingStopped as error:
        if world.is_main or config.TRAIN.ANOMALY_REPORT:  # all stop for one reason, but each reports its own modules
            logging.getLogger("dat").error(str(error))
        return 1
    except (RuntimeError, OSError, MemoryError) as error:
        return break_off(error)


def refuse(error: Exception | str, *, alone: bool = False) -> int:
    """Say in one line what was wrong with the input and return the exit status.

    Once for all processes if they have met, who fail together then; before, once on each machine. What one process
    knows `alone`, it says itself.
    """
    try:
        rank, _, local_rank, _ = launched_as()
    except ValueError:  # is what is wrong
        rank = local_rank = 0
    if alone or (rank if torch.distributed.is_initialized() else local_rank) == 0:
        print(f"main.py: {on_one_line(str(error))}", file=sys.stderr, flush=True)
    return 2


def build_job(args: argparse.Namespace, config: CfgNode, world: World) -> Callable[[], int]:
    """Return what the command line asks for, built and ready to run; it returns the exit status.

    Raises:
        ValueError: for wrong input.
    """
    if args.throughput:
        return partial(run_throughput, prepare(config, world), config, world)
    if args.eval:
        with fail_together():
            built = build_evaluation(config, world)
        return partial(run_evaluation, *built, config, world)
    return partial(train, build_run(config, world))


def settle(config: CfgNode, device: torch.device) -> None:
    """Settle the options that depend on the device: for AMP "auto" bf16 where there is such, else fp16.

    Raises:
        ValueError: where the device cannot do what is asked for.
    """
    if config.AMP == "auto":
        emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        config.AMP = "fp16" if emulated else "bf16"
    if config.DETERMINISTIC and device.type == "cuda" and (config.COMPILE or config.MODEL.DAT.attn_drop_rate):
        raise ValueError(
            "--deterministic goes neither with --compile nor with attn_drop_rate on CUDA: both sample position tables "
            "by an operation whose backward has no deterministic kernel there"
        )


def break_off(error: RuntimeError | OSError | MemoryError) -> int:
    """Say that memory, a file system or another process is gone, if that is what `error` means; return the exit status.

    Raises:
        RuntimeError: any other `error`.
    """
    log = logging.getLogger("dat")
    if isinstance(error, OSError) or is_lost_worker(error):
        reason = on_one_line(str(error).strip().splitlines()[-1])
        hint = "" if isinstance(error, OSError) else " (fewer DATA.NUM_WORKERS take less memory)"
        log.error(f"rank {launched_as()[0]}: {reason}{hint}; the same command continues from the last checkpoint")
        return LOST_PEER
    if is_out_of_memory(error):
        log.error(
            "out of memory; reduce --batch-size and raise --accumulation-steps instead, pass --use-checkpoint, or "
            "choose a smaller network"
        )
        return 1
    if not is_lost_peer(error):
        raise error
    minutes = collective_timeout().total_seconds() / 60
    reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]  # without gloo's source line and advice
    log.error(
        f"rank {launched_as()[0]}: another process died, or did not answer for {minutes:g} minutes "
        f"(DAT_TIMEOUT_MINUTES): {reason}; the same command continues from the last checkpoint"
    )
    return LOST_PEER


def on_one_line(message: str) -> str:
    """Return `message` with line breaks and control characters, which names of files may hold, as escapes."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)


def check(args: argparse.Namespace, config: CfgNode) -> int:
    """Check all that can be checked before processes are started, without writing anything."""
    size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    settle(config, pick_device(config.DEVICE, 0, size))
    world = World(0, size, 0, torch.device("cpu"))
    if args.throughput:
        prepare(config, world)
    elif args.eval:
        build_evaluation(config, world)
    else:
        run, _, _ = assemble(config, world)
        try_folder(run.folder)
    print(f"checked: {config.MODEL.NAME}, {config.MODEL.DAT.num_classes} classes")
    return 0


def prepare(config: CfgNode, world: World) -> nn.Module:
    """Set seeds and precision, and return the model on its device."""
    seed_everything(config.SEED)
    torch.backends.cudnn.benchmark = not config.DETERMINISTIC
    torch.use_deterministic_algorithms(config.DETERMINISTIC)
    if config.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS refuses
    return build_model(config).to(world.device, memory_format=torch.channels_last)


def run_throughput(model: nn.Module, config: CfgNode, world: World) -> int:
    """Print images per second of inference on random images."""
    if config.COMPILE:
        model.compile_blocks()
    rate = measure_throughput(model, config, world.device)
    size = config.DATA.IMG_SIZE
    print(
        f"{config.MODEL.NAME}: {rate:.1f} images/s at {size}x{size}, batch {config.DATA.BATCH_SIZE}, on "
        f"{world.device.type}"
    )
    return 0


def run_evaluation(model: nn.Module, loader: DataLoader, warnings: list[str], config: CfgNode, world: World) -> int:
    """Evaluate a checkpoint and print the published lines."""
    log = RunLog(None, config, is_main=world.is_main)
    for warning in warnings if world.is_main else ():
        log.warning(warning)
    if config.COMPILE:
        model.compile_blocks()
    path, images = config.MODEL.RESUME or config.MODEL.PRETRAINED, len(loader.dataset)
    log.info(f"evaluating {path} on {images} images, {world.size} process{'es' * (world.size > 1)}")
    evaluate(model, loader, world, log).log(log)
    return 0


def build_evaluation(config: CfgNode, world: World) -> tuple[nn.Module, DataLoader, list[str]]:
    """Return the model with the weights of the checkpoint, the loader of the images, and what to warn of.

    Raises:
        ValueError: for wrong input.
    """
    path = config.MODEL.RESUME or config.MODEL.PRETRAINED
    dataset = open_dataset(config, ("val",))
    config.MODEL.DAT.num_classes = len(dataset.classes)
    loader = build_eval_loader(config, dataset, rank=world.rank, world_size=world.size)
    checkpoint = load_checkpoint(path)
    weights = model_weights(checkpoint, path, ema=config.TRAIN.EMA.ENABLED)
    model = prepare(config, world)
    load_strictly(model, weights, path)
    return (
        model,
        loader,
        [f"{path} was trained on other classes: {change}" for change in class_changes(checkpoint, dataset.classes)],
    )


def build_run(config: CfgNode, world: World) -> Run:
    """Build a training run and open its output folder.

    Raises:
        ValueError: for wrong input; nothing has been written then but the lock of a folder that there was.
    """
    folder, hold = run_folder(config), None
    with fail_together():
        if world.is_main and folder.is_dir():  # before reading checkpoints that another run may be about to replace
            hold = hold_folder(open_folder(folder), patience=min(120, collective_timeout().total_seconds() / 2))
    with fail_together():
        run, notes, warnings = assemble(config, world)
    run.check_agreement()
    begins = run.continued_from is None or run.continued_from.parent.resolve() != folder.resolve()
    with fail_together():
        if world.is_main:
            run.hold = hold or hold_new_folder(folder)
            if begins and (earlier := set_aside(folder)):
                notes.append(f"the files of an earlier run in this folder lie in {earlier} now")
    run.log = RunLog(run.folder, config, is_main=world.is_main, updates_done=run.updates_done)
    run.stop.listen()
    if begins:
        run.save()  # before the first line of the log, so that what is killed before has left nothing to set aside
    run.model = distribute(run.model, world)
    introduce(run, notes, warnings)
    return run


def hold_new_folder(folder: Path) -> TextIO:
    """Make a folder that there was not yet, and hold it.

    Raises:
        ValueError: where another run has made it in between.
    """
    hold = hold_folder(open_folder(folder), patience=0)
    if (folder / "last.pth").exists():
        hold.close()
        raise ValueError(
            f"another run has begun in {folder} meanwhile; start again to continue it, or give another --tag"
        )
    return hold


def run_folder(config: CfgNode) -> Path:
    """Return where the results of a run go."""
    return Path(config.OUTPUT) / config.MODEL.NAME / config.TAG


def assemble(config: CfgNode, world: World) -> tuple[Run, list[str], list[str]]:
    """Build a run, continued from its newest checkpoint or started from pretrained weights, if there are any.

    Nothing is written, and nothing asked of other processes.

    Returns:
        The run, whose model is not distributed and whose log writes no files yet; what to note and to warn of.

    Raises:
        ValueError: for wrong input.
    """
    dataset = open_dataset(config)
    classes = dataset.classes
    meant_for, config.MODEL.DAT.num_classes = config.MODEL.DAT.num_classes, len(classes)
    train_loader = build_train_loader(config, dataset, rank=world.rank, world_size=world.size)
    eval_loader = build_eval_loader(config, dataset, rank=world.rank, world_size=world.size)
    mixup = build_mixup(config, len(classes))
    check_writers(config)
    network = prepare(config, world)
    notes: list[str] = []
    warnings: list[str] = []
    if len(classes) != meant_for:
        notes.append(f"{len(classes)} classes as in the data set, instead of the {meant_for} of the config")
    folder = run_folder(config)
    data = {"training_images": len(train_loader.dataset), "classes": classes}
    resumed = find_resumed(config, folder, world, data, warnings)
    if resumed is not None:
        load_strictly(network, model_weights(resumed[1], resumed[0]), resumed[0])
    elif config.MODEL.PRETRAINED:
        notes += start_from_pretrained(config, network)
    elif config.MODEL.CLASS_MAP:
        raise ValueError("MODEL.CLASS_MAP belongs to the weights of --pretrained; give those too, or remove the map")
    ema = ModelEmaV3(network, decay=config.TRAIN.EMA.DECAY, use_warmup=True) if config.TRAIN.EMA.ENABLED else None
    if config.COMPILE:
        network.compile_blocks()
    optimizer = build_optimizer(config, network, world.size)
    updates = train_loader.sampler.updates_per_epoch
    run = Run(
        config=config,
        world=world,
        log=RunLog(None, config, is_main=world.is_main),
        folder=folder,
        classes=classes,
        model=network,
        train_loader=train_loader,
        eval_loader=eval_loader,
        mixup=mixup,
        criterion=nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else config.MODEL.LABEL_SMOOTHING),
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, updates_per_epoch=updates, world_size=world.size),
        scaler=torch.amp.GradScaler(world.device.type, enabled=config.AMP == "fp16"),
        ema=ema,
        stop=StopSignal(),
        bad_images=BadImages(folder / "bad_images.txt"),
        checkpoints=CheckpointFolder(folder, keep=config.KEEP_CHECKPOINTS),
    )
    if resumed is not None:
        run.restore(resumed[1], resumed[0])
        if run.position.epoch >= config.TRAIN.EPOCHS and resumed[0].parent.resolve() != folder.resolve():
            raise ValueError(
                f"{resumed[0]} is the end of a run of {run.position.epoch} epochs, which leaves nothing to train; "
                "evaluate it with --eval, or start from its weights by --pretrained"
            )
        notes.append(f"continuing from {resumed[0]}: epoch {run.position.epoch + 1}, update {run.position.update}")
        if config.MODEL.PRETRAINED:
            notes.append(f"the weights are those of {resumed[0]}, not of --pretrained {config.MODEL.PRETRAINED}")
    return run, notes, warnings + doubts(run) + dataset.doubts()


def doubts(run: Run) -> list[str]:
    """Return what about a run may not be meant so."""
    config, found = run.config, []
    if config.TRAIN.WARMUP_EPOCHS >= config.TRAIN.EPOCHS:
        found.append(
            f"TRAIN.WARMUP_EPOCHS {config.TRAIN.WARMUP_EPOCHS} is not below TRAIN.EPOCHS {config.TRAIN.EPOCHS}: the "
            "learning rate never reaches TRAIN.BASE_LR"
        )
    images = len(run.train_loader.dataset)
    left_out = images - run.updates_per_epoch * run.images_per_update
    if left_out > images / 10:
        found.append(
            f"an epoch is whole updates of {run.images_per_update} images: {left_out} of {images}, others each time, "
            "are left out; smaller batches leave out less"
        )
    return found


def find_resumed(
    config: CfgNode, folder: Path, world: World, data: dict[str, Any], warnings: list[str]
) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint to continue from, with its path: --resume, or the newest of the output folder.

    Args:
        config: the options of this run.
        folder: its output folder.
        world: its processes.
        data: what `config_changes` compares of the data set.
        warnings: takes what to warn of.

    Raises:
        ValueError: where it cannot be continued under this config.
    """
    found = None
    if config.TRAIN.AUTO_RESUME or was_restarted():
        try:
            found = CheckpointFolder(folder, keep=config.KEEP_CHECKPOINTS).newest(warnings.append)
        except ValueError as error:
            if not config.MODEL.RESUME:
                raise
            warnings.append(f"{error}; continuing from {config.MODEL.RESUME} instead")
    if config.MODEL.RESUME and not (found and began_from(found[1]) == config.MODEL.RESUME):
        found = Path(config.MODEL.RESUME), load_checkpoint(config.MODEL.RESUME)
    if found is None:
        return None
    path, state = found
    check_training_state(state, path)
    changes = config_changes(
        state,
        config,
        images_per_update=config.DATA.BATCH_SIZE * world.size * config.TRAIN.ACCUMULATION_STEPS,
        **data,
    )
    if changes and not config.TRAIN.ALLOW_CONFIG_CHANGE:
        raise ValueError(
            f"{path} was written under other options: {'; '.join(changes)}. Give another --tag to train "
            "another run (from its weights by --pretrained), or --allow-config-change to continue this one all the same"
        )
    warnings += [f"continuing under other options: {change}" for change in changes]
    return found


def began_from(state: dict[str, Any]) -> str:
    """Return the --resume of the run that wrote `state`; the same command as this one went on from there already."""
    written = written_config(state) if state.get("format") == FORMAT else None
    return dict(flatten(written)).get("MODEL.RESUME", "") if written else ""


def start_from_pretrained(config: CfgNode, network: nn.Module) -> list[str]:
    """Load the weights to fine-tune into `network` and return what was done with them, for the log."""
    path = config.MODEL.PRETRAINED
    class_map = Path(config.MODEL.CLASS_MAP) if config.MODEL.CLASS_MAP else None
    given = model_weights(load_checkpoint(path), path)
    try:
        weights, report = adapt(given, network, class_map=class_map)
    except ValueError as error:
        raise ValueError(f"--pretrained {path}: {error}") from None
    network.load_state_dict(weights)
    return [f"starting from {path}", *report.lines()]


def distribute(network: nn.Module, world: World) -> nn.Module:
    """Return `network`, averaging its gradients over the processes if there are several."""
    if world.size == 1:
        return network
    devices = [world.device] if world.device.type == "cuda" else None
    # Of weights of 1x1, whose strides say nothing.
    python_warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(
        network, device_ids=devices, gradient_as_bucket_view=True, forward_sync_buffers=False
    )


def introduce(run: Run, notes: list[str], warnings: list[str]) -> None:
    """Write config.yaml and say what is about to run."""
    config, log = run.config, run.log
    if run.world.is_main:
        write_whole(run.folder / "config.yaml", config.dump())
    log.rewind(epoch=run.position.epoch, update=run.updates_done)
    parameters = sum(p.numel() for p in run.network().parameters())
    log.info(
        f"{config.MODEL.NAME}: {parameters / 1e6:.2f} M parameters, {len(run.train_loader.dataset)} training and "
        f"{len(run.eval_loader.dataset)} held-out images, {config.TRAIN.EPOCHS} epochs of {run.updates_per_epoch} "
        f"updates of {run.images_per_update} images on {run.world.size} x {run.world.device.type}; "
        f"results in {run.folder}"
    )
    for warning in warnings:
        log.warning(warning)
    for note in notes:
        log.info(note)


def train(run: Run) -> int:
    """Train to the end or to a request to stop, finish the log, and return the exit status."""
    try:
        return train_epochs(run)
    finally:
        run.log.close()


def train_epochs(run: Run) -> int:
    """Train and evaluate epoch by epoch; return the exit status."""
    config, position, log = run.config, run.position, run.log
    saved = not position.nonfinite_in_row
    while position.epoch < config.TRAIN.EPOCHS:
        finished = train_one_epoch(run)
        run.save()  # the evaluation may be interrupted, too
        results = evaluate_weights(run) if finished else None
        if results is None:
            how = "the same command" if config.TRAIN.AUTO_RESUME else f"--resume {run.folder / 'last.pth'}"
            log.info(f"stopped as asked in epoch {position.epoch + 1}, update {position.update}; {how} continues")
            return run.stop.exit_status()
        sound = all(math.isfinite(result.loss) for result in results)
        if sound:  # so are the weights, whatever the last updates were
            position.nonfinite_in_row = 0
        position.finish_epoch(results[-1].top1 if sound else -math.inf)
        log.info(f"Max accuracy: {position.best_accuracy:.2f}%")
        keep = config.SAVE_FREQ > 0 and position.epoch % config.SAVE_FREQ == 0
        saved = run.save(best=position.best_epoch == position.epoch, epoch=position.epoch if keep else None)
    return conclude(run, saved)


def evaluate_weights(run: Run) -> list[Evaluation] | None:
    """Evaluate the weights and, where there are any, the averaged weights; None where the run was asked to stop."""
    kinds = {"eval": ("", run.network())} | ({"eval_ema": ("averaged weights", run.ema.module)} if run.ema else {})
    results = []
    for kind, (name, network) in kinds.items():
        result = evaluate(network, run.eval_loader, run.world, run.log, run.stop)
        if result is None:
            return None
        result.log(run.log, name)
        values = {"top1": result.top1, "top5": result.top5, "loss": result.loss}
        run.log.metrics(kind, epoch=run.position.epoch + 1, update=run.updates_done, **values)
        results.append(result)
    return results


def conclude(run: Run, saved: bool) -> int:
    """Draw the curves and say how the run ended; return the exit status."""
    position = run.position
    wait_for_all()
    if run.world.is_main:
        try:
            plot_curves(run.folder / "metrics.jsonl", run.folder / "curves.png")
        except OSError as error:
            run.log.warning(f"{run.folder / 'curves.png'} could not be written ({error.strerror})")
    run.log.info(
        f"finished: best accuracy {position.best_accuracy:.2f} % in epoch {position.best_epoch} of {position.epoch}; "
        f"best.pth, last.pth, curves.png, metrics.jsonl, log.txt and config.yaml lie in {run.folder}"
    )
    if not saved:
        run.log.error("last.pth is not of the end of the run; the lines above say why")
    return 0 if saved else 1


if __name__ == "__main__":
    sys.exit(main())
