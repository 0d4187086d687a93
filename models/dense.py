"""Dense prediction networks: heads on a backbone, which implements the trainer's interface."""

from __future__ import annotations

from torch import Tensor, nn

from .backbone import DATBackbone, TimmBackbone
from .contract import TakenOver, compile_parts, input_convs, position_tables, set_epoch, taken_over, undecayed
from .tables import Resize

_PREFIX = "backbone."


class DenseModel(nn.Module):
    """A detector or segmenter on ``backbone``, see `models.contract`.

    Args:
        backbone: returns maps ``[B, channels[i], H / strides[i], W / strides[i]]``.
    """

    def __init__(self, backbone: DATBackbone | TimmBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def no_weight_decay(self) -> set[str]:
        """Return the backbone parameters exempt from weight decay."""
        return {f"{_PREFIX}{name}" for name in undecayed(self.backbone)}

    def position_tables(self) -> dict[str, Resize]:
        """Return the resize function of each position table of the backbone, by name."""
        return {f"{_PREFIX}{name}": resize for name, resize in position_tables(self.backbone).items()}

    def input_convs(self) -> set[str]:
        """Return the convolutions applied to the image channels."""
        return {f"{_PREFIX}{name}" for name in input_convs(self.backbone)}

    def set_epoch(self, epoch: int) -> None:
        """Notify the backbone that an epoch begins."""
        set_epoch(self.backbone, epoch)

    def compile_blocks(self) -> None:
        """Compile the backbone; the heads run on maps of many sizes and are not compiled."""
        compile_parts(self.backbone)

    def take_over(self, weights: dict[str, Tensor]) -> TakenOver:
        """Convert the weights of the same network, or only those of the backbone from a classifier or dense network."""
        heads = {name for name in self.state_dict() if not name.startswith(_PREFIX)}
        if heads <= weights.keys():
            return TakenOver(weights)
        inside = {name[len(_PREFIX) :]: value for name, value in weights.items() if name.startswith(_PREFIX)}
        others = weights.keys() - {f"{_PREFIX}{name}" for name in inside} if inside else set()
        taken = taken_over(self.backbone, inside or weights)
        there = _PREFIX if inside else ""
        return TakenOver(
            {f"{_PREFIX}{name}": value for name, value in taken.weights.items()},
            heads | {f"{_PREFIX}{name}" for name in taken.new},
            others | {f"{there}{name}" for name in taken.unused},
        )
