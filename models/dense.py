"""The base class of detectors and segmenters, which implements the trainer's interface for the backbone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .backbone import DATBackbone, TimmBackbone
from .contract import (
    ConvertedWeights,
    compile_parts,
    convert_weights,
    input_convs,
    no_weight_decay,
    position_tables,
    set_epoch,
)
from .tables import Resize

_PREFIX = "backbone."


class DenseModel(nn.Module):
    """A detector or segmenter on ``backbone``, see `models.contract`.

    Args:
        backbone: maps images to feature maps ``[B, channels[i], H / strides[i], W / strides[i]]``.

    Attributes:
        sized_by_classes: beginnings of the names of the entries, apart from those of the classifier, whose first
            dimension depends on the number of classes. Weights of other classes do not change them.
    """

    sized_by_classes: tuple[str, ...] = ()

    def __init__(self, backbone: DATBackbone | TimmBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def divisor(self) -> int:
        """Images are padded so that it divides their sides."""
        return self.backbone.strides[-1]

    def no_weight_decay(self) -> set[str]:
        """Return the names of the backbone's parameters exempt from weight decay."""
        return {f"{_PREFIX}{name}" for name in no_weight_decay(self.backbone)}

    def position_tables(self) -> dict[str, Resize]:
        """Return the resize function of each position table of the backbone, by name."""
        return {f"{_PREFIX}{name}": resize for name, resize in position_tables(self.backbone).items()}

    def input_convs(self) -> set[str]:
        """Return the names of the convolutions applied to the image."""
        return {f"{_PREFIX}{name}" for name in input_convs(self.backbone)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that group the parameters of the backbone into layers, in timm's format.

        Those outside the backbone match none and are in the last layer.

        Args:
            coarse: group by stage instead of by block.

        Raises:
            ValueError: the backbone does not define its layers.
        """
        if not hasattr(self.backbone, "group_matcher"):
            raise ValueError(
                f"TRAIN.LAYER_DECAY: {type(self.backbone).__name__} does not define its layers; leave it at 1.0"
            )
        groups = self.backbone.group_matcher(coarse=coarse)
        return {name: _of_backbone(patterns) for name, patterns in groups.items()}

    def set_epoch(self, epoch: int) -> None:
        """Notify the backbone of the start of an epoch, counted from 0."""
        set_epoch(self.backbone, epoch)

    def compile_blocks(self) -> None:
        """Compile the backbone. The heads process maps of many sizes and are not compiled."""
        compile_parts(self.backbone)

    def convert_weights(self, weights: dict[str, Tensor]) -> ConvertedWeights:
        """Convert the weights of the same network, or of the backbone alone: of a classifier or another dense model."""
        heads = {name for name in self.state_dict() if not name.startswith(_PREFIX)}
        backbone = {name[len(_PREFIX) :]: value for name, value in weights.items() if name.startswith(_PREFIX)}
        others = {name: value for name, value in weights.items() if backbone and not name.startswith(_PREFIX)}
        source_prefix = _PREFIX if backbone else ""
        converted = convert_weights(self.backbone, backbone or weights)
        body = {f"{_PREFIX}{name}": value for name, value in converted.weights.items()}
        new = {f"{_PREFIX}{name}" for name in converted.new}
        unused = {f"{source_prefix}{name}" for name in converted.unused}
        if heads <= others.keys():
            return ConvertedWeights(body | others, new, unused)
        return ConvertedWeights(body, new | heads, unused | others.keys())


def _of_backbone(patterns: str | list[tuple[str, Any]]) -> str | list[tuple[str, Any]]:
    """Return patterns of names of the backbone's parameters, which start with ``^``, for those of the whole network."""
    if isinstance(patterns, str):
        return patterns.replace("^", f"^{_PREFIX}")
    return [(_of_backbone(pattern), order) for pattern, order in patterns]
