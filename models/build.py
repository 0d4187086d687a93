"""Build models from a configuration; the only module under `models` that depends on the config."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import timm
from torch import nn

from .backbone import DATBackbone, TimmBackbone
from .dat import DAT
from .detection import DETECTORS, Detector
from .options import NUM_STAGES
from .segmentation import SEGMENTERS, Segmenter
from .vit import VisionTransformer


def build_model(config: Any) -> nn.Module:
    """Build the model that ``config.MODEL`` describes, on the CPU and in training mode.

    Args:
        config: configuration with ``MODEL.TYPE``: ``dat`` and ``vit`` are built from ``MODEL.DAT`` and
            ``MODEL.VIT``, the arguments of `DAT` and `VisionTransformer` by name, ``timm`` from ``MODEL.TIMM``; all
            with ``TRAIN.USE_CHECKPOINT``. With ``TASK`` ``detection`` or ``segmentation`` it is the backbone
            of a detector or segmenter.

    Raises:
        ValueError: the model is unknown, one of its options is not allowed, or images are too small for it.
    """
    if config.TASK == "detection":
        return build_detector(config)
    if config.TASK == "segmentation":
        return build_segmenter(config)
    if config.MODEL.TYPE == "timm":
        return _build_timm(config)
    if config.MODEL.TYPE == "vit":
        size, use_checkpoint = config.image_size, config.TRAIN.USE_CHECKPOINT
        return VisionTransformer(**config.MODEL.VIT, img_size=size, use_checkpoint=use_checkpoint)
    if config.MODEL.TYPE != "dat":
        raise ValueError(f"MODEL.TYPE = {config.MODEL.TYPE!r} is unknown; choose one of dat, vit, timm")
    model = DAT(**config.MODEL.DAT, use_checkpoint=config.TRAIN.USE_CHECKPOINT)
    smallest = max(model.smallest_image)
    if min(config.image_size) < smallest:
        raise ValueError(
            f"DATA.IMG_SIZE = {config.DATA.IMG_SIZE} leaves no pixel for the last stage; give at least {smallest}"
        )
    return model


def build_backbone(config: Any, *, out_indices: Sequence[int] = (0, 1, 2, 3)) -> DATBackbone | TimmBackbone:
    """Build the model that ``config.MODEL`` describes without its head, for a detector or segmenter.

    Args:
        config: configuration, as for `build_model`; of type ``dat`` or ``timm``.
        out_indices: indices of the returned maps: stages of a DAT, features of a timm model.

    Raises:
        ValueError: the model cannot be a backbone, or one of its options is not allowed.
    """
    if config.MODEL.TYPE == "dat":
        return DATBackbone(**config.MODEL.DAT, out_indices=out_indices, use_checkpoint=config.TRAIN.USE_CHECKPOINT)
    if config.MODEL.TYPE != "timm":
        raise ValueError(f"MODEL.TYPE = {config.MODEL.TYPE!r} cannot be a backbone; choose dat or timm")
    arguments = {name: value for name, value in config.MODEL.TIMM.ARGS.items() if name != "num_classes"}
    return TimmBackbone(_timm_name(config), out_indices=out_indices, **arguments)


def build_detector(config: Any) -> Detector:
    """Build the detector ``MODEL.DETECTOR`` on the backbone that the rest of ``config.MODEL`` describes.

    Raises:
        ValueError: there is no such detector, or it has no such option.
    """
    settings = config.MODEL.DETECTOR
    kind = DETECTORS[settings.NAME]
    first = NUM_STAGES - kind.maps
    # timm models may have a stride-2 map before those of a DAT.
    backbone = build_backbone(
        config, out_indices=range(first, NUM_STAGES) if config.MODEL.TYPE == "dat" else range(-kind.maps, 0)
    )
    try:
        return kind.build(backbone, num_classes=num_classes(config), **settings.ARGS)
    except TypeError as error:  # unknown argument
        raise ValueError(f"MODEL.DETECTOR.ARGS: {error}") from None


def build_segmenter(config: Any) -> Segmenter:
    """Build the segmenter ``MODEL.SEGMENTER`` on the backbone that the rest of ``config.MODEL`` describes.

    Raises:
        ValueError: there is no such segmenter, it has no such option, or the backbone has no maps of four strides.
    """
    settings = config.MODEL.SEGMENTER
    if settings.NAME not in SEGMENTERS:
        raise ValueError(f"MODEL.SEGMENTER.NAME must be one of {', '.join(SEGMENTERS)}, not {settings.NAME!r}")
    # The last four maps: timm models may have a stride-2 map before them.
    backbone = build_backbone(config, out_indices=(0, 1, 2, 3) if config.MODEL.TYPE == "dat" else (-4, -3, -2, -1))
    try:
        return SEGMENTERS[settings.NAME](backbone, num_classes(config), **settings.ARGS)
    except TypeError as error:  # unknown argument
        raise ValueError(f"MODEL.SEGMENTER.ARGS: {error}") from None


def _timm_name(config: Any) -> str:
    name = config.MODEL.TIMM.NAME
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean {near[0]}?" if near else "timm.list_models() names them"
        raise ValueError(f"MODEL.TIMM.NAME: timm has no model {name!r}; {hint}")
    return name


def _build_timm(config: Any) -> nn.Module:
    name, arguments = _timm_name(config), config.MODEL.TIMM.ARGS
    if arguments.get("pretrained"):
        raise ValueError("MODEL.TIMM.ARGS.pretrained would fetch weights; give a file with --pretrained")
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:  # these models need the image size
        arguments = {"img_size": config.image_size, **arguments}
    try:
        model = timm.create_model(name, **arguments)
    except TypeError as error:  # unknown argument
        raise ValueError(f"MODEL.TIMM.ARGS: {error}") from None
    if config.TRAIN.USE_CHECKPOINT:
        model.set_grad_checkpointing()
    return model


def arguments(config: Any) -> Any:
    """Return the config section with the model's arguments, including ``num_classes``."""
    return config.MODEL.TIMM.ARGS if config.MODEL.TYPE == "timm" else config.MODEL[config.MODEL.TYPE.upper()]


def num_classes(config: Any) -> int:
    """Return the number of classes of the configured model."""
    return arguments(config).get("num_classes", 1000)


def set_num_classes(config: Any, number: int) -> None:
    """Set the number of classes of the configured model."""
    arguments(config)["num_classes"] = number
