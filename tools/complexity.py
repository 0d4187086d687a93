"""Parameters and multiply-accumulates (MACs) of configs, compared with the published figures.

    python tools/complexity.py configs/dat_tiny.yaml configs/cvpr22/dat_tiny.yaml
    python tools/complexity.py configs/dat_tiny.yaml --size 384
    python tools/complexity.py configs/dat_tiny.yaml --size 512 768

PyTorch's FLOP counter counts the matrix products and convolutions for one image, on tensors without data. It sees the
reference form of every attention, so additional work of a faster form, such as masked keys, is not counted. Biases,
norms, activations and bilinear sampling are left out; with them the published figures are up to 1 % higher.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin()

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import load_config
from models.build import build_model
from models.detection import Detector
from tools.arguments import add_opts, image_size


class Published(NamedTuple):
    """Cost of a model as published: million parameters, image side in pixels, and billion MACs or None."""

    parameters: float
    size: int
    macs: float | None


# By MODEL.NAME, from arXiv 2309.01430 and, for CVPR 2022, arXiv 2201.00520.
PUBLISHED = {
    "dat_tiny": Published(23.96, 224, 4.3),
    "dat_small": Published(53.13, 224, 9.4),
    "dat_base": Published(93.69, 224, 16.6),
    "dat_base_384": Published(93.69, 384, 49.7),
    "dat_p": Published(22.77, 224, None),
    "cvpr22_dat_tiny": Published(28.32, 224, 4.6),
    "cvpr22_dat_small": Published(49.70, 224, 9.0),
    "cvpr22_dat_base": Published(87.88, 224, 15.8),
    "cvpr22_dat_base_384": Published(88.18, 384, 49.8),
}
_NO_CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"
COLUMNS = "{:<29} {:>9} {:>11} {:>10} {:>21} {:>15}"


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, trained or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, size: tuple[int, int]) -> int:
    """Return the multiply-accumulates of matrix products and convolutions for one image.

    Args:
        model: a network of images ``[1, 3, H, W]``, not changed. A detector counts with its maximum number of regions.
        size: height and width of the image in pixels.
    """
    model = with_plain_operations(deepcopy(model).cpu().eval().requires_grad_(False))
    run = model.run_layers if isinstance(model, Detector) else model
    counter = FlopCounterMode(display=False)
    # The plain form of attention consists of matrix products, which every release of PyTorch counts.
    fake, plain = FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH)
    with fake, plain, torch.no_grad(), _unchecked(), counter:
        run(torch.empty(1, 3, *size))
    return counter.get_total_flops() // 2


def with_plain_operations(network: nn.Module) -> nn.Module:
    """Set every operation of a network to its plain form, ``reference``, and return the network."""
    for module in network.modules():
        if hasattr(module, "form"):
            module.form = "reference"
    return network


@contextmanager
def _unchecked() -> Iterator[None]:
    """Disable transformers' checks of tensor values; fake tensors have none."""
    before = os.environ.get(_NO_CHECKS)
    os.environ[_NO_CHECKS] = "1"
    try:
        yield
    finally:
        os.environ.pop(_NO_CHECKS)
        os.environ.update({} if before is None else {_NO_CHECKS: before})


def table_row(config_path: str, size: Sequence[int] | None, overrides: Sequence[str]) -> str:
    """Return the table row for one config, with published figures if the image size matches."""
    config = load_config(config_path, overrides)
    model = build_model(config)
    height, width = image_size(size or config.image_size)
    published = PUBLISHED.get(config.MODEL.NAME)
    macs = count_macs(model, (height, width))
    columns = [config.MODEL.NAME, f"{height}x{width}", f"{count_parameters(model) / 1e6:.2f} M", f"{macs / 1e9:.3f} G"]
    columns.append(f"{published.parameters:.2f} M" if published else "-")
    comparable = published and published.macs and height == width == published.size
    columns.append(f"{published.macs:.1f} G" if comparable else "-")
    return COLUMNS.format(*columns)


def main() -> None:
    """Print the table of the configs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML files")
    parser.add_argument("--size", type=int, nargs="+", help="image size, one side or height and width (DATA.IMG_SIZE)")
    add_opts(parser, of="the configs")
    arguments = parser.parse_args()
    print(COLUMNS.format("model", "image", "parameters", "MACs", "published parameters", "published MACs"))
    for path in arguments.configs:
        try:
            print(table_row(path, arguments.size, arguments.opts), flush=True)
        except ValueError as error:
            startup.refuse(error)


if __name__ == "__main__":
    main()
