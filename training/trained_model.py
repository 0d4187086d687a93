"""A network as a checkpoint holds it: with its config, the names of its classes, and the weights it was chosen for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn
from yacs.config import CfgNode

from config import complete, load_config
from data.images import read_image
from data.transforms import eval_transform
from models.build import build_model, num_classes, set_num_classes
from models.contract import classifier
from models.weights import IMAGENET_1K
from tasks.classes import in_words
from training.checkpoint import load_checkpoint, load_strictly
from training.resume import written_config
from training.weight_sets import EMA, RAW, pick_weights


@dataclass(frozen=True)
class TrainedModel:
    """A network that is ready to be used.

    Attributes:
        network: in evaluation mode, on the CPU.
        config: of the run that trained it.
        classes: names by label.
        weights: ``raw`` or ``ema``; empty for a network that was not trained.
        path: the checkpoint.
        notes: how its weights were recognised, where they do not stand as in those of the trainer.
    """

    network: nn.Module
    config: CfgNode
    classes: list[str]
    weights: str
    path: str
    notes: Sequence[str] = ()

    def transform(self, size: tuple[int, int] | None = None) -> Callable[[Image.Image], Tensor]:
        """Return what makes an RGB image the network's input ``[3, H, W]``, as evaluation does.

        Args:
            size: height and width in pixels; that of the config, with its crop, where None.
        """
        config = self.config
        return eval_transform(
            size or config.image_size,
            interpolation=config.DATA.INTERPOLATION,
            crop=config.TEST.CROP and size is None,
            crop_ratio=config.TEST.CROP_RATIO,
            resize=config.TEST.RESIZE if size is None else "squash",
        )

    def read(self, path: str | Path) -> Image.Image:
        """Return an image file as RGB, turned as DATA.EXIF says; see `data.images.read_image`."""
        return read_image(path, turn=self.config.DATA.EXIF == "apply")

    def words(self) -> str:
        """Return what was loaded, in words."""
        kind = {RAW: "raw weights", EMA: "averaged weights", "": "random weights"}[self.weights]
        name = self.config.MODEL.NAME
        loaded = f"{self.path or name}: {name}, {len(self.classes)} classes ({in_words(self.classes)}), {kind}"
        return "\n".join([*self.notes, loaded])


def load_trained(path: str | Path, *, cfg: str | Path | None = None, weights: str = "") -> TrainedModel:
    """Load a network from a checkpoint alone.

    Args:
        path: a checkpoint of the trainer, or another file of weights together with `cfg`.
        cfg: config file; the checkpoint's own where None.
        weights: ``raw`` or ``ema``; those that the checkpoint was chosen for where empty.

    Raises:
        ValueError: the file holds no such weights, or no config while `cfg` is None.
    """
    checkpoint = load_checkpoint(path)
    config = load_config(cfg) if cfg else _own_config(checkpoint, path)
    network = build_model(config)
    given = pick_weights(checkpoint, path, network, kind=weights)
    network = _fit_classes(network, config, given.weights)
    load_strictly(network, given.weights, path)
    classes = _class_names(checkpoint.get("classes"), num_classes(config))
    return TrainedModel(network.eval(), config, classes, given.kind, str(path), given.notes)


def untrained(config: CfgNode, classes: list[str] | None = None) -> TrainedModel:
    """Return the network of a config as a run with its seed begins, with random weights."""
    torch.manual_seed(config.SEED)
    network = build_model(config).eval()
    return TrainedModel(network, config, _class_names(classes, num_classes(config)), "", "")


def _fit_classes(network: nn.Module, config: CfgNode, weights: dict[str, Tensor]) -> nn.Module:
    """Return the network of a config with as many classes as the weights have, which the config then says."""
    classes = len(weights.get(f"{classifier(network)}.bias", ()))
    if not classes or classes == num_classes(config):
        return network
    set_num_classes(config, classes)
    return build_model(config)


def _own_config(checkpoint: dict[str, Any], path: str | Path) -> CfgNode:
    written = written_config(checkpoint)
    if written is None:
        raise ValueError(f"{path} holds no config; name the one of its architecture, as in --cfg configs/dat_tiny.yaml")
    return complete(written)


def _class_names(known: Any, number: int) -> list[str]:
    if isinstance(known, list) and len(known) == number:
        return known
    if number == IMAGENET_1K:
        info = ImageNetInfo("imagenet-1k")
        return [info.index_to_description(label) for label in range(number)]
    return [f"class {label}" for label in range(number)]
