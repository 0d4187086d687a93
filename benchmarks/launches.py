"""Number of kernels that a network launches on a GPU, and the bytes they read and write, counted without a GPU.

    python -m benchmarks.launches --cfg configs/dat_tiny.yaml --timm swin_tiny_patch4_window7_224

The network runs eagerly on fake tensors on a CUDA device, without values. Every operation on the device counts as one
kernel, with the bytes of its arguments and results; views and allocations are not counted. A custom operator counts
once, with its arguments and results but without its workspaces. The count is not a measure of time: it shows what is
left to fuse.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin()

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import load_config
from models.build import build_model
from tools.arguments import add_opts, image_size

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "as_strided_"}


class Launches(TorchDispatchMode):
    """Counts kernels and bytes of the operations inside the context.

    Attributes:
        kernels: number of kernels by the name of their operation.
        bytes: bytes of arguments and results by the name of the operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        starts_nothing = func.is_view or func.namespace == "prim" or name in ALLOCATIONS
        if not starts_nothing and any(tensor.is_cuda for tensor in tensors):
            self.kernels[name] += 1
            # An in-place operation returns its argument: it reads and writes the same memory.
            self.bytes[name] += sum(_bytes(tensor) for tensor in tensors)
        return result


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's memory; broadcast dimensions count once."""
    values = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        values *= length if stride or not length else 1
    return values * tensor.element_size()


def main() -> None:
    """Count and print the tables."""
    args = _parse_arguments()
    try:
        _print_tables(args)
    except ValueError as error:
        startup.refuse(error)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", nargs="+", default=[], help="config files")
    parser.add_argument("--timm", nargs="+", default=[], help="names of timm models")
    parser.add_argument(
        "--img-size", type=int, nargs="+", help="side, or height and width (default: that of the first config)"
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--operations", type=int, default=0, help="also print the operations with the most bytes")
    add_opts(parser, of="the configs")
    return parser.parse_args()


def _print_tables(args: argparse.Namespace) -> None:
    configs = [load_config(path, args.opts) for path in args.cfg]
    if not (configs or args.timm):
        raise ValueError("nothing to count; give networks with --cfg and --timm")
    if not (configs or args.img_size):
        raise ValueError("without --cfg, give the size of the images with --img-size")
    size = image_size(args.img_size, flag="--img-size") if args.img_size else configs[0].image_size
    makers = {name: lambda name=name: timm.create_model(name) for name in args.timm}
    for path, config in zip(args.cfg, configs, strict=True):
        makers[Path(path).stem] = lambda config=config: build_model(config)

    print(f"batch {args.batch_size}, {size[0]}x{size[1]}, float32, torch {torch.__version__}\n")
    print("| network | task | kernels | GB |\n|---|---|---:|---:|")
    counts = {name: count(make(), (args.batch_size, 3, *size)) for name, make in makers.items()}
    for name, (forward, backward) in counts.items():
        for task, launches in (("forward", forward), ("backward", backward)):
            kernels, moved = launches.kernels.total(), launches.bytes.total()
            print(f"| {name} | {task} | {kernels:,} | {moved / 1e9:.1f} |")
    for name, (forward, backward) in counts.items() if args.operations else ():
        for task, launches in (("forward", forward), ("backward", backward)):
            print(f"\n| {name}, {task} | kernels | GB |\n|---|---:|---:|")
            for operation, moved in launches.bytes.most_common(args.operations):
                print(f"| {operation} | {launches.kernels[operation]:,} | {moved / 1e9:.2f} |")


def count(network: nn.Module, shape: tuple[int, ...]) -> tuple[Launches, Launches]:
    """Return the counts of the forward and backward pass of a training step, without stochastic depth.

    Args:
        network: on the CPU; it is moved permanently to the fake device.
        shape: the shape of the images, ``[B, 3, H, W]``.
    """
    device, forward, backward = torch.device("cuda"), Launches(), Launches()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _new_parameters():
        network._apply(lambda tensor: mode.from_tensor(tensor).to(device))
        network.train()
        for module in network.modules():
            if type(module).__name__ in ("DropPath", "Residual"):
                module.eval()
        images = torch.empty(shape, device=device)
        network(images)  # fills the caches of tensors that depend only on sizes
        with forward:
            out = network(images)
        loss = out.float().logsumexp(-1).mean()
        # Checkpoints recompute their tensors once per backward pass, identified by its number.
        with backward, mock.patch("torch._C._current_graph_task_id", return_value=0):
            _go_back(loss)
    return forward, backward


def _go_back(loss: Tensor) -> None:
    """Call the nodes of the backward pass in order: the autograd engine needs streams of a real device."""
    waiting, reached = Counter(), [loss.grad_fn]
    for node in reached:
        for following, _ in _following(node):
            waiting[following] += 1
            if waiting[following] == 1:
                reached.append(following)

    gradients = {loss.grad_fn: {0: torch.ones_like(loss)}}
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        given, following = gradients.pop(node, {}), _following(node)
        for (to, place), gradient in zip(following, _call(node, given) if given and following else (), strict=False):
            if gradient is not None:
                of, sums = to._input_metadata[place], gradients.setdefault(to, {})
                gradient = gradient.sum_to_size(of.shape).to(of.dtype)
                sums[place] = sums[place] + gradient if place in sums else gradient
        for to, _ in following:
            waiting[to] -= 1
            if not waiting[to]:
                ready.append(to)


def _following(node: Node) -> list[tuple[Node, int]]:
    return [edge for edge in node.next_functions if edge[0] is not None]


def _call(node: Node, gradients: dict[int, Tensor]) -> Iterator[Tensor | None]:
    """Return the gradients of the inputs that need one for those of a node's outputs, by their place."""
    given = [gradients.get(place) for place in range(len(node._input_metadata))]
    if hasattr(node, "needs_input_grad"):  # a function written in Python
        results = node.apply(*given)
        return compress(results if isinstance(results, tuple) else (results,), node.needs_input_grad)
    results = node(*given)
    results = results if isinstance(results, tuple) else (results,)
    return compress(results, (to is not None for to, _ in node.next_functions))


@contextmanager
def _new_parameters() -> Iterator[None]:
    """Replace parameters when modules are moved, as fake tensors cannot be assigned in place."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


if __name__ == "__main__":
    main()
