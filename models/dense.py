"""Networks of dense prediction: heads on a backbone, which answers what the trainer asks of a network."""

from __future__ import annotations

from torch import Tensor, nn

from .backbone import DATBackbone, TimmBackbone
from .contract import TakenOver, compile_parts, input_convs, position_tables, set_epoch, taken_over, undecayed
from .tables import Resize

_PREFIX = "backbone."


class DenseModel(nn.Module):
    """A detector or segmenter on ``backbone``, see `models.contract`.

    Args:
        backbone: gives maps ``[B, channels[i], H / strides[i], W / strides[i]]``.
    """

    def __init__(self, backbone: DATBackbone | TimmBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def no_weight_decay(self) -> set[str]:
        """Return the parameters of the backbone that are exempt from weight decay."""
        return {f"{_PREFIX}{name}" for name in undecayed(self.backbone)}

    def position_tables(self) -> dict[str, Resize]:
        """Return how the position tables of the backbone are resized, by name."""
        return {f"{_PREFIX}{name}": resize for name, resize in position_tables(self.backbone).items()}

    def input_convs(self) -> set[str]:
        """Return the convolutions that see the channels of the images."""
        return {f"{_PREFIX}{name}" for name in input_convs(self.backbone)}

    def set_epoch(self, epoch: int) -> None:
        """Tell the backbone which epoch begins."""
        set_epoch(self.backbone, epoch)

    def compile_blocks(self) -> None:
        """Compile the backbone; heads see maps of many sizes and stay as they are."""
        compile_parts(self.backbone)

    def take_over(self, weights: dict[str, Tensor]) -> TakenOver:
        """Take weights of a network like this, or of a classifier or another dense network for the backbone alone."""
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
