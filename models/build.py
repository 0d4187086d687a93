"""Building models from a config. No other module of `models` depends on the config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import nn

from .backbone import DATBackbone, TimmBackbone
from .contract import recompute_activations, smallest_image
from .dat import DAT
from .detection import DETECTORS, Detector
from .options import Option, did_you_mean
from .segmentation import SEGMENTERS, Segmenter
from .vit import VisionTransformer


@dataclass(frozen=True)
class Family:
    """The models of one ``MODEL.TYPE``.

    Attributes:
        build: returns the classifier for a config.
        backbone: returns the backbone for a config and the keyword ``out_indices``; None if the family has none.
        options: options in the family's section of the config, such as ``MODEL.DAT``.
    """

    build: Callable[[Any], nn.Module]
    backbone: Callable[..., DATBackbone | TimmBackbone] | None = None
    options: Mapping[str, Option] = field(default_factory=dict)


def build_model(config: Any) -> nn.Module:
    """Build the model of a config, on the CPU and in training mode.

    Args:
        config: configuration. ``MODEL.TYPE`` is one of `FAMILIES`, whose section (``MODEL.DAT``, ``MODEL.VIT`` or
            ``MODEL.TIMM``) holds the arguments of the model. If ``TASK`` is ``detection`` or ``segmentation``, the
            model becomes the backbone of ``MODEL.DETECTOR`` or ``MODEL.SEGMENTER``.

    Raises:
        ValueError: the model is unknown, one of its options is not allowed, or images are too small for it.
    """
    if config.TASK == "detection":
        return build_detector(config)
    if config.TASK == "segmentation":
        return build_segmenter(config)
    model = _family(config).build(config)
    smallest = max(smallest_image(model))
    if min(config.image_size) < smallest:
        raise ValueError(
            f"DATA.IMG_SIZE = {config.DATA.IMG_SIZE} leaves no pixel for the last stage; give at least {smallest}"
        )
    if config.TRAIN.USE_CHECKPOINT:
        recompute_activations(model)
    return model


def _family(config: Any) -> Family:
    """Return the family of the configured model, after checking its type and its image channels."""
    if config.MODEL.TYPE not in FAMILIES:
        raise ValueError(f"MODEL.TYPE = {config.MODEL.TYPE!r} is unknown; choose one of {', '.join(FAMILIES)}")
    if (channels := arguments(config).get("in_chans", 3)) != 3:
        raise ValueError(f"in_chans = {channels} is not supported here: data sets give RGB images, with 3 channels")
    return FAMILIES[config.MODEL.TYPE]


def build_backbone(config: Any, *, out_indices: Sequence[int]) -> DATBackbone | TimmBackbone:
    """Build the model of a config without its head, for a detector or segmenter.

    Args:
        config: configuration, as for `build_model`.
        out_indices: indices of the returned maps: stages of a DAT, features of a timm model; negative ones count from
            the end.

    Raises:
        ValueError: the model cannot be a backbone, or one of its options is not allowed.
    """
    build = _family(config).backbone
    if build is None:
        able = " or ".join(name for name, family in FAMILIES.items() if family.backbone)
        raise ValueError(f"MODEL.TYPE = {config.MODEL.TYPE!r} cannot be a backbone; choose {able}")
    model = build(config, out_indices=out_indices)
    if config.TRAIN.USE_CHECKPOINT:
        recompute_activations(model)
    return model


def build_detector(config: Any) -> Detector:
    """Build the detector ``MODEL.DETECTOR`` on the model of a config as its backbone.

    Raises:
        ValueError: the model cannot be a backbone, or the detector has no such option.
    """
    settings = config.MODEL.DETECTOR
    kind = DETECTORS[settings.NAME]
    backbone = build_backbone(config, out_indices=range(-kind.maps, 0))
    try:
        return kind.build(backbone, num_classes=num_classes(config), **settings.ARGS)
    except TypeError as error:  # unknown argument
        raise ValueError(f"MODEL.DETECTOR.ARGS: {error}") from None


def build_segmenter(config: Any) -> Segmenter:
    """Build the segmenter ``MODEL.SEGMENTER`` on the model of a config as its backbone.

    Raises:
        ValueError: the model cannot be a backbone, the segmenter has no such option, or the backbone has no maps of
            four strides.
    """
    settings = config.MODEL.SEGMENTER
    # The last four maps: timm models may have a stride-2 map before them.
    backbone = build_backbone(config, out_indices=range(-4, 0))
    try:
        return SEGMENTERS[settings.NAME](backbone, num_classes=num_classes(config), **settings.ARGS)
    except TypeError as error:  # unknown argument
        raise ValueError(f"MODEL.SEGMENTER.ARGS: {error}") from None


def _build_timm(config: Any) -> nn.Module:
    name, options = _timm_name(config), config.MODEL.TIMM.ARGS
    if options.get("pretrained"):
        raise ValueError("MODEL.TIMM.ARGS.pretrained would download weights; give a file with --pretrained")
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:  # these models need the image size
        options = {"img_size": config.image_size, **options}
    try:
        return timm.create_model(name, **options)
    except TypeError as error:  # unknown argument
        raise ValueError(f"MODEL.TIMM.ARGS: {error}") from None


def _build_timm_backbone(config: Any, *, out_indices: Sequence[int]) -> TimmBackbone:
    options = {name: value for name, value in config.MODEL.TIMM.ARGS.items() if name != "num_classes"}
    return TimmBackbone(_timm_name(config), out_indices=out_indices, **options)


def _timm_name(config: Any) -> str:
    name = config.MODEL.TIMM.NAME
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models()) or "; timm.list_models() lists them"
        raise ValueError(f"MODEL.TIMM.NAME: timm has no model {name!r}{hint}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        model, _, tag = name.partition(".")
        known = {name.partition(".")[2]: name for name in timm.list_models(f"{model}.*", include_tags=True)}
        hint = did_you_mean(tag, known, shown=known) or f"; use one of {', '.join([model, *known.values()])}"
        raise ValueError(f"MODEL.TIMM.NAME: timm's {model} has no weights {tag!r}{hint}") from None
    return name


FAMILIES: Mapping[str, Family] = {
    "dat": Family(
        lambda config: DAT(**config.MODEL.DAT),
        lambda config, **maps: DATBackbone(**config.MODEL.DAT, **maps),
        options=DAT.options(),
    ),
    "vit": Family(
        lambda config: VisionTransformer(**config.MODEL.VIT, img_size=config.image_size),
        options=VisionTransformer.options(),
    ),
    "timm": Family(_build_timm, _build_timm_backbone),  # with timm's own options
}


def arguments(config: Any) -> Any:
    """Return the section of a config with the arguments of the model, including ``num_classes``."""
    return config.MODEL.TIMM.ARGS if config.MODEL.TYPE == "timm" else config.MODEL[config.MODEL.TYPE.upper()]


def num_classes(config: Any) -> int:
    """Return the number of classes of the configured model."""
    return arguments(config).get("num_classes", 1000)


def set_num_classes(config: Any, number: int) -> None:
    """Set the number of classes of the configured model."""
    arguments(config)["num_classes"] = number
