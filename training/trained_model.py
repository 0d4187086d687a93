"""Load a trained network with its config and class names from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from yacs.config import CfgNode

from config import complete, load_config
from data.detection import transforms as detection
from data.images import read_image
from data.segmentation import transforms as segmentation
from data.transforms import eval_transform, normalize
from data.wording import counted
from models.build import build_model, num_classes, set_num_classes
from models.class_names import IMAGENET_1K
from tasks.classes import describe_labels
from training.checkpoint import load_checkpoint, load_strictly, set_trained_epoch
from training.resume import written_config
from training.weight_sets import EMA, RAW, count_classes, pick_weights
from utils import seed_everything


@dataclass(frozen=True)
class TrainedModel:
    """A network ready for use.

    Attributes:
        network: in evaluation mode, on the CPU.
        config: the config of the run that trained it.
        classes: names by label.
        weights: ``raw`` or ``ema``; empty for an untrained network.
        path: the checkpoint.
        notes: how its weights were recognised, if it was not written by this trainer.
    """

    network: nn.Module
    config: CfgNode
    classes: list[str]
    weights: str
    path: str
    notes: Sequence[str] = ()

    def transform(self, size: tuple[int, int] | None = None) -> Callable[[Image.Image], Tensor]:
        """Return the transform from an RGB image to the network's normalised input ``[3, H, W]``.

        Args:
            size: height and width in pixels; None for the transform of the task's evaluation, of a segmenter at a scale
                of 1.
        """
        config = self.config
        if size is None and config.TASK in _DENSE_INPUTS:
            return partial(_DENSE_INPUTS[config.TASK], config)
        return eval_transform(
            size or config.image_size,
            interpolation=config.DATA.INTERPOLATION,
            crop=config.TEST.CROP and size is None,
            crop_ratio=config.TEST.CROP_RATIO,
            resize=config.TEST.RESIZE if size is None else "squash",
        )

    def read(self, path: str | Path) -> Image.Image:
        """Read an image file as RGB, rotated according to DATA.EXIF; see `data.images.read_image`."""
        return read_image(path, exif=self.config.DATA.EXIF == "apply")

    def words(self) -> str:
        """Return a description of what was loaded."""
        kind = {RAW: "raw weights", EMA: "averaged weights", "": "random weights"}[self.weights]
        name = self.config.MODEL.NAME
        classes = counted(len(self.classes), "class", "classes")
        loaded = f"{self.path or name}: {name}, {classes} ({describe_labels(self.classes)}), {kind}"
        return "\n".join([*self.notes, loaded])


def load_trained(path: str | Path, *, cfg: str | Path | None = None, weights: str = "") -> TrainedModel:
    """Load a network from a checkpoint.

    Args:
        path: a checkpoint of this trainer, or another file of weights together with `cfg`.
        cfg: config file; None for the config in the checkpoint.
        weights: ``raw`` or ``ema``; empty for those that the checkpoint was selected by.

    Raises:
        ValueError: the file has no such weights, or no config and `cfg` is None.
    """
    checkpoint = load_checkpoint(path)
    config = load_config(cfg) if cfg else _own_config(checkpoint, path)
    network = build_model(config)
    given = pick_weights(checkpoint, path, network, kind=weights)
    network = _fit_classes(network, config, given.weights)
    load_strictly(network, given.weights, path)
    set_trained_epoch(network, checkpoint)
    classes = _class_names(checkpoint.get("classes"), num_classes(config))
    return TrainedModel(network.eval(), config, classes, given.kind, str(path), given.notes)


def untrained(config: CfgNode, classes: list[str] | None = None) -> TrainedModel:
    """Return the network of a config with the random weights that a run with its seed starts from."""
    seed_everything(config.SEED)
    network = build_model(config).eval()
    return TrainedModel(network, config, _class_names(classes, num_classes(config)), "", "")


def _detection_input(config: CfgNode, image: Image.Image) -> Tensor:
    options = config.DETECTION
    transform = detection.EvalTransform(short_side=options.TEST_SHORT_SIDE, long_side=options.LONG_SIDE)
    return normalize(transform(tv_tensors.Image(F.pil_to_tensor(image))).as_subclass(Tensor))


def _segmentation_input(config: CfgNode, image: Image.Image) -> Tensor:
    return normalize(segmentation.EvalTransform(config.image_size).apply(image))


_DENSE_INPUTS = {"detection": _detection_input, "segmentation": _segmentation_input}


def _fit_classes(network: nn.Module, config: CfgNode, weights: dict[str, Tensor]) -> nn.Module:
    """Return the network with the number of classes of the weights, which is also set in the config."""
    classes = count_classes(weights, network)
    if not classes or classes == num_classes(config):
        return network
    set_num_classes(config, classes)
    return build_model(config)


def _own_config(checkpoint: dict[str, Any], path: str | Path) -> CfgNode:
    written = written_config(checkpoint)
    if written is None:
        raise ValueError(f"{path} has no config; give the one of its architecture, such as --cfg configs/dat_tiny.yaml")
    return complete(written)


def _class_names(known: Any, number: int) -> list[str]:
    if isinstance(known, list) and len(known) == number:
        return known
    if number == IMAGENET_1K:
        info = ImageNetInfo("imagenet-1k")
        return [info.index_to_description(label) for label in range(number)]
    return [f"class {label}" for label in range(number)]
