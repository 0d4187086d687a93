"""Mean intersection over union against a count by hand, over processes, scales and mirror images."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

import main
import models.segmentation
from config import load_config
from data.segmentation.sources import IGNORED
from data.transforms import as_pixels
from logger import RunLog
from models.segmentation.parts import resize
from tasks import build_task
from tasks.pictures import palette
from tasks.segmentation import LabelledPixels, MeanIoU, predict
from tests.data.segmentation.samples import write_masks
from tests.launched import run_in_processes
from tests.runs import write_config
from utils import EvaluationFailed, World


class Colours(nn.Module):
    """Returns logits that are functions of the colours."""

    gives_probabilities = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images)


def evaluate(rank: int, port: int, size: int, folder: Path) -> None:
    if size > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=size)
    torch.set_num_threads(1)
    config = load_config(folder / "tiny.yaml")
    task = build_task(config, World(rank, size, rank, torch.device("cpu")), training=False)
    found = task.evaluate(Colours(), task.eval_loader(), RunLog(None, config, is_main=False))
    torch.save(found.metrics, folder / f"{size}-{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


@pytest.mark.xdist_group("serial")
def test_one_and_three_processes_and_a_count_by_hand_agree_to_the_last_digit(tmp_path: Path) -> None:
    write_masks(tmp_path / "data", val=7)
    data = {"DATASET": "masks", "DATA_PATH": str(tmp_path / "data"), "BATCH_SIZE": 2, "NUM_WORKERS": 0}
    write_config(tmp_path, TASK="segmentation", DATA=data)
    evaluate(0, 0, 1, tmp_path)
    run_in_processes(evaluate, 3, 3, tmp_path)
    one = torch.load(tmp_path / "1-0.pt")
    assert [torch.load(tmp_path / f"3-{rank}.pt") for rank in range(3)] == [one] * 3
    assert one == by_hand(tmp_path)


def by_hand(folder: Path) -> dict[str, float]:
    """Return the metrics from pixels counted one by one."""
    task = build_task(load_config(folder / "tiny.yaml"), World(0, 1, 0, torch.device("cpu")), training=False)
    pixels, network = [], Colours().eval()
    for batch in task.eval_loader():
        moved = task.to_device(batch, torch.device("cpu"))
        for (image,), labels in zip(moved.images, moved.labels, strict=True):
            found = resize(network(image[None]), labels.shape)[0].argmax(0)
            pixels += zip(labels.flatten().tolist(), found.flatten().tolist(), strict=True)
    pixels = [(label, found) for label, found in pixels if label != IGNORED]
    assert len({label for label, _ in pixels}) == 3
    iou, recall = [], []
    for c in range(3):
        both = sum(label == found == c for label, found in pixels)
        recall.append(both / sum(label == c for label, _ in pixels))
        iou.append(both / sum(c in pair for pair in pixels))
    right = sum(label == found for label, found in pixels) / len(pixels)
    means = (torch.tensor(values, dtype=torch.float64).mean().item() for values in (iou, recall))
    return dict(zip(("miou", "class_accuracy"), means, strict=True)) | {"accuracy": right}


def meter(samples: int, classes: int = 3) -> MeanIoU:
    return MeanIoU([f"class {i}" for i in range(classes)], samples, torch.device("cpu"), flip=False)


def test_data_and_models_agree_on_the_label_of_ignored_pixels() -> None:
    assert models.segmentation.IGNORED == IGNORED


def test_absent_classes_are_not_averaged_and_skipped_images_give_a_warning() -> None:
    counted = meter(2, classes=4)
    image = torch.eye(3)[:, :, None].expand(3, 3, 8).contiguous()  # a class a row
    labels = torch.arange(3)[:, None].expand(3, 8).clone()
    labels[2] = IGNORED
    labels[1, :4] = 0

    class Same(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.cat([images, torch.zeros_like(images[:, :1])], dim=1)

    counted.add(Same(), LabelledPixels([[image], [image[:, :1, :1]]], [labels, torch.empty(0, 0)]))
    found = counted.result()
    assert found.metrics["miou"] == pytest.approx((8 / 12 + 4 / 8) / 2)  # classes 2 and 3 are nowhere that counts
    assert found.metrics["accuracy"] == pytest.approx(12 / 16)
    assert found.lines[-1] == " * mIoU 0.583 accuracy 0.750 class accuracy 0.833"
    assert found.warnings == ["1 image could not be read and is not counted"]
    with pytest.raises(EvaluationFailed, match="evaluated 0 images of a data set of 2"):
        meter(2).result()


def test_the_picture_shows_image_truth_and_what_was_found() -> None:
    counted, image = meter(1), torch.zeros(3, 8, 8)
    labels = torch.ones(8, 8, dtype=torch.int64)
    labels[:4] = IGNORED

    class Second(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.eye(3)[2, :, None, None].expand(1, 3, *images.shape[-2:])

    counted.add(Second(), LabelledPixels([[image]], [labels]))
    picture = counted.result().pictures["samples"]
    height = picture.shape[1] // 3
    titles, picture = np.split(picture, [-height])
    assert picture.shape == (height, 3 * height, 3)
    assert all(part.min() < 128 < part.max() for part in np.split(titles, 3, axis=1))
    centres = [picture[3 * height // 4, height // 2 + column * height] for column in range(3)]
    grey = np.array([124, 116, 104])
    assert np.array_equal(centres[0], grey)
    for centre, label in zip(centres[1:], (1, 2), strict=True):
        assert np.abs(centre - (0.65 * palette()[label] + 0.35 * grey)).max() <= 1
    assert np.abs(picture[height // 4, height + height // 2] - 0.35 * grey).max() <= 1


def test_several_views_are_averaged() -> None:
    network, image = Colours().eval(), torch.rand(3, 16, 20)
    views = [image, torch.rand(3, 8, 10)]
    logits = [resize(network(view[None]), (16, 20)) for view in views]
    logits += [resize(network(view[None].flip(-1)).flip(-1), (16, 20)) for view in views]
    expected = [sum(x.softmax(1) for x in some)[0].argmax(0) for some in (logits[:2], logits)]
    with torch.inference_mode():
        assert np.array_equal(predict(network, views, (16, 20)), expected[0])
        assert np.array_equal(predict(network, views, (16, 20), flip=True), expected[1])


def test_held_out_images_are_evaluated_at_every_scale_of_the_stored_pixels(tmp_path: Path) -> None:
    root = write_masks(tmp_path / "data", val=1)
    data = {"DATASET": "masks", "DATA_PATH": str(root), "IMG_SIZE": 20, "BATCH_SIZE": 2, "NUM_WORKERS": 0}
    path = write_config(tmp_path, TASK="segmentation", DATA=data, SEGMENTATION={"TEST_SCALES": [0.01, 2.0]})
    config = load_config(path)
    task = build_task(config, World(0, 1, 0, torch.device("cpu")), training=False)
    (batch,) = task.eval_loader()
    ((small, large),) = task.to_device(batch, torch.device("cpu")).images
    assert small.shape == (3, 1, 1)
    stored = np.asarray(Image.open(root / "images" / "val" / "0.png"))  # 48 x 40 pixels
    assert np.array_equal(as_pixels(large), stored)
    seen: list[Tensor] = []

    class Recorder(Colours):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return super().forward(images)

    task.evaluate(Recorder(), task.eval_loader(), RunLog(None, config, is_main=False))
    assert [images.shape for images in seen] == [(1, *small.shape), (1, *large.shape)]


def test_probabilities_of_several_views_are_averaged_as_they_are() -> None:
    """The mean of [.6, .5] and [.05, .16] is largest for the second class, that of their softmax for the first."""

    class Fixed(nn.Module):
        gives_probabilities = True
        outputs = iter(([0.60, 0.50, 0.0], [0.05, 0.16, 0.0]))

        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor(next(self.outputs))[:, None, None].expand(1, 3, *images.shape[-2:])

    assert (predict(Fixed(), torch.zeros(3, 4, 4), (4, 4), flip=True) == 1).all()


def remove_a_mask(root: Path) -> None:
    (root / "masks" / "train" / "3.png").unlink()


def make_a_mask_too_small(root: Path) -> None:
    Image.new("L", (4, 4)).save(root / "masks" / "val" / "0.png")


def name_fewer_classes(root: Path) -> None:
    (root / "classes.txt").write_text("sky\nsea\n")


@pytest.mark.parametrize(
    ("spoil", "options", "says"),
    [
        (remove_a_mask, [], r"1 of 8 images in .*images/train without a mask in .*masks/train: 3; add masks named as"),
        (make_a_mask_too_small, [], r"val/0\.png' is 48 x 40 pixels, its mask 4 x 4; they must have the same size"),
        (
            name_fewer_classes,
            [],
            r"has the value 2, which is none of the 2 classes; add classes, or define",
        ),
        (lambda root: (root / "classes.txt").unlink(), [], r"classes\.txt has 0 classes; write 1 to 255, one per line"),
        (
            lambda root: (root / "masks").rename(root / "mask"),
            [],
            r"has no folder masks/train; the layout is DATA_PATH",
        ),
        (
            None,
            ["DATA.DATASET", "mask"],
            r"must be one of ade20k, masks, coco, digit_scenes for TASK segmentation, not 'mask'; ",
        ),
        (None, ["DATA.DATASET", "digit_scenes"], r"no file instances_\w+\.json in data path"),
        (None, ["DATA.LABEL_MAP.sky", "0"], r"DATA\.LABEL_MAP \{sky: 0\}: both must be numbers from 0 to 255"),
        (None, ["DATA.IGNORE_LABEL", "256"], "DATA.IGNORE_LABEL must be 0 to 255, not 256"),
        (None, ["MODEL.SEGMENTER.NAME", "upnet"], r"MODEL\.SEGMENTER\.NAME must be .*; did you mean upernet\?"),
        (None, ["MODEL.SEGMENTER.ARGS.chanels", "8"], r"MODEL\.SEGMENTER\.ARGS: .*chanels"),
        (
            None,
            ["MODEL.SEGMENTER.NAME", "upernet", "DATA.BATCH_SIZE", "1"],
            r"DATA\.BATCH_SIZE 1 on 1 process is too small for upernet, whose batch norms need 2 images",
        ),
        (None, ["MODEL.TYPE", "vit"], r"MODEL\.TYPE = 'vit' cannot be a backbone; choose dat or timm"),
        (None, ["DATA.CACHE", "True"], r"DATA\.CACHE is not supported by TASK segmentation; leave it at False"),
        (None, ["SEGMENTATION.TEST_SCALES", "[]"], "SEGMENTATION.TEST_SCALES must be a list of numbers above 0"),
    ],
)
def test_wrong_input_gets_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object] | None,
    options: list[str],
    says: str,
) -> None:
    root = write_masks(tmp_path / "data")
    if spoil:
        spoil(root)
    data = {"DATASET": "masks", "DATA_PATH": str(root), "BATCH_SIZE": 2, "NUM_WORKERS": 0}
    config = write_config(tmp_path, TASK="segmentation", DATA=data)
    assert main.main(["--cfg", str(config), "--check", "--opts", *options]) == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(r"main\.py: [^\n]+\n", printed), printed
    assert re.search(says, printed), printed
