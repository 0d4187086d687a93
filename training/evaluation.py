"""Evaluate a checkpoint (`--eval`) or measure throughput (`--throughput`)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from yacs.config import CfgNode

from data.streams import Loader
from data.wording import counted
from logger import RunLog
from models.build import build_model
from models.contract import compile_parts
from tasks import Task, build_task, check_task
from training.build import build_network
from training.checkpoint import load_checkpoint, load_strictly, set_trained_epoch
from training.device import prepare_device
from training.resume import written_config
from training.run import AUTOCAST
from training.weight_sets import count_classes, pick_weights
from utils import EvaluationFailed, World, different_on_ranks, sum_over_ranks


@dataclass(frozen=True)
class CheckpointEvaluation:
    """A checkpoint to evaluate.

    Attributes:
        path: the file.
        task: data and metrics.
        network: with the weights of the file.
        loader: the held-out images.
        choice: description of the selected set of weights, if the file has several.
        notes: lines for the log at the start.
        warnings: warnings for the log.
        amp: precision, as in `AMP`.
    """

    path: str
    task: Task
    network: nn.Module
    loader: Loader
    choice: str
    notes: list[str]
    warnings: list[str]
    amp: str

    def run(self) -> int:
        """Evaluate, log the results in the published format, and return the exit status."""
        config, world = self.task.config, self.task.world
        if different_on_ranks({"images": len(self.loader.dataset), "classes": self.task.describe()}):
            raise EvaluationFailed("the processes do not see the same data set; all machines need the same copy of it")
        log = RunLog(None, config, is_main=world.is_main)
        log.begin(self.notes, self.warnings)
        if config.COMPILE:
            compile_parts(self.network)
        images = counted(len(self.loader.dataset), "image")
        choice = self.choice and f", {self.choice},"
        processes = counted(world.size, "process", "processes")
        precision = "" if self.amp == "off" else f", in {self.amp}"
        log.info(f"evaluating {self.path}{choice} on {images}, {processes}{precision}")
        with torch.autocast(world.device.type, dtype=AUTOCAST[self.amp], enabled=self.amp != "off"):
            result = self.task.evaluate(self.network, self.loader, log)
        log.result(result.lines, result.warnings)
        return 0


def build_evaluation(config: CfgNode, world: World, *, amp: str = "off", cached: bool = True) -> CheckpointEvaluation:
    """Load the checkpoint of --resume, or of --pretrained, into the network of the config.

    Args:
        config: options of the run.
        world: its processes.
        amp: precision, as in `AMP`. The config's AMP only applies to training.
        cached: whether DATA.CACHE takes effect; it reads all images.

    Raises:
        ValueError: wrong input.
    """
    path = config.MODEL.RESUME or config.MODEL.PRETRAINED
    task = build_task(config, world, training=False)  # which may reject DATA.CACHE
    config.DATA.CACHE &= cached
    checkpoint = load_checkpoint(path)
    written = written_config(checkpoint)
    if written is not None and written.get("TASK", config.TASK) != config.TASK:
        raise ValueError(f"{path} is of TASK {written.TASK} and --cfg of {config.TASK}; give the config of that run")
    network = build_network(task, world)
    given = pick_weights(checkpoint, path, network, kind=config.MODEL.WEIGHTS)
    if found := task.take_classes(checkpoint, count_classes(given.weights, network)):
        network = build_network(task, world)
    loader = task.eval_loader()
    load_strictly(network, given.weights, path)
    set_trained_epoch(network, checkpoint)
    warnings = [f"{path} was trained on other classes: {change}" for change in task.changes(checkpoint)]
    warnings += task.warnings()
    return CheckpointEvaluation(path, task, network, loader, given.choice, [*found, *given.notes], warnings, amp)


def build_throughput(config: CfgNode, world: World) -> nn.Module:
    """Return the network of the config, with random weights, to be timed.

    Raises:
        ValueError: wrong input.
    """
    check_task(config)
    prepare_device(config)
    torch.backends.cudnn.benchmark = not config.DETERMINISTIC  # all images have one size
    return build_model(config).to(world.device, memory_format=torch.channels_last)


def run_throughput(config: CfgNode, network: nn.Module, world: World) -> int:
    """Print images per second of inference on random images, of all processes together; return the exit status."""
    if config.COMPILE:
        compile_parts(network)
    rate = measure_throughput(network, config, world.device)
    total = sum_over_ranks(torch.tensor(rate, device=world.device)).item()
    if world.is_main:
        processes = f", {world.size} processes" if world.size > 1 else ""
        print(
            f"{config.MODEL.NAME}: {total:.1f} images/s at {size_in_words(config)}, batch {config.DATA.BATCH_SIZE}, on "
            f"{world.device.type}{processes}"
        )
    return 0


def size_in_words(config: CfgNode) -> str:
    """Return height and width of the images, such as 224x224."""
    return "x".join(map(str, config.image_size))


@torch.inference_mode()
def measure_throughput(network: nn.Module, config: CfgNode, device: torch.device, *, runs: int = 30) -> float:
    """Return images per second of inference on random images in batches of DATA.BATCH_SIZE."""
    network.eval()
    images = torch.randn(config.DATA.BATCH_SIZE, 3, *config.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, dtype=AUTOCAST[config.AMP], enabled=config.AMP != "off"):
        for _ in range(max(runs // 10, 1)):
            network(images)
        _wait_for(device)
        if dist.is_initialized():
            dist.barrier()  # so that all processes are measured at the same time
        begin = time.perf_counter()
        for _ in range(runs):
            network(images)
        _wait_for(device)
    return runs * len(images) / (time.perf_counter() - begin)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
