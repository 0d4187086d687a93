"""Rank 0 computes the average precision of all ranks, and all ranks have its result or its error."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data.detection.coco import open_coco
from data.sources import Request
from tasks import detection
from tasks.coco import Detections
from tasks.detection import AveragePrecision
from tests.data.detection.samples import write_coco
from tests.launched import run_in_processes
from utils import EvaluationFailed, World

IMAGES = 4


def evaluate(rank: int, port: int, folder: Path) -> None:
    """Save the metrics of all images, the calls that this rank computed, and the error if an image is missing."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    source = open_coco(Request(path=str(folder), needs=("val",))).held_out
    calls, compute = [], detection.average_precision
    detection.average_precision = lambda *args: calls.append(rank) or compute(*args)
    meter = AveragePrecision(source, ["dog", "cat"], World(rank, 2, rank, torch.device("cpu")))
    for index in range(rank, IMAGES, 2):
        objects = source.objects(index)
        meter._found[index] = Detections(
            boxes=objects.boxes, labels=objects.labels, scores=np.ones(len(objects.labels))
        )
    metrics = meter.result().metrics
    meter._found.pop(rank)
    try:
        error = str(meter.result())
    except EvaluationFailed as failed:
        error = str(failed)
    torch.save({"metrics": metrics, "calls": calls, "error": error}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.xdist_group("serial")
def test_one_rank_computes_and_all_have_the_result_or_the_error(tmp_path: Path) -> None:
    write_coco(tmp_path, val=IMAGES)
    run_in_processes(evaluate, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert (first["calls"], second["calls"]) == ([0], [])
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["AP"] > 0.9
    assert first["error"] == second["error"]
    assert first["error"].startswith("evaluated 2 images of a data set of 4")
