"""Time and memory of the operations of DAT++, each in its plain form and in the form selected for the shape.

    python -m benchmarks.attention --models T S B --sizes 224 384 --threads 1
    python -m benchmarks.attention --memory --models T --sizes 224 --batch-size 128 --operations layer

The two forms take turns in this process on random input. The position bias tables are those of 224x224. The first table
has the best run of each. The second, with `--memory`, has the memory that autograd saves between forward and backward,
without the arguments, which both forms need.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin()

import torch
from torch import Tensor

from benchmarks.memory import kept_for_backward
from benchmarks.timing import environment, take_turns
from models.attention import DeformableAttention
from models.ops.deformable import choose_form as choose_deformable
from models.ops.deformable import deformable_attention
from models.ops.depthwise import choose_form as choose_mlp
from models.ops.depthwise import conv_mlp
from models.ops.linear import choose_form as choose_linear
from models.ops.linear import linear
from models.ops.neighborhood import choose_form as choose_neighborhood
from models.ops.neighborhood import neighborhood_attention

# Channels of the first stage and offset groups of DAT-T++, DAT-S++ and DAT-B++.
WIDTHS = {"T": 64, "S": 96, "B": 128}
GROUPS = {"T": (1, 2, 4, 8), "S": (1, 2, 3, 6), "B": (2, 4, 8, 16)}
HEAD_DIM = 32
NATIVE = 224
KERNEL = 7


class Operation(NamedTuple):
    """One operation at the shape of one stage.

    Attributes:
        name: its name in the tables.
        run: called with the form and the arguments.
        arguments: tensors that require a gradient.
        chosen: the form selected by default.
    """

    name: str
    run: Callable[..., Tensor]
    arguments: list[Tensor]
    chosen: str


def main() -> None:
    """Measure and print the tables."""
    args = _parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    print(f"{environment(device, args.threads)}; batch {args.batch_size}, best of {args.runs}\n")
    columns = ["plain saved, MiB", "saved, MiB", "ratio"]
    if not args.memory:
        columns = ["plain, ms", "ms", "ratio", "plain f+b, ms", "f+b, ms", "ratio"]
    print(f"| model | size | stage | operation | form | {' | '.join(columns)} |")
    print(f"|---|---:|---:|---|---|{'---:|' * len(columns)}")
    for model in args.models:
        for size in args.sizes:
            for stage in range(4):
                for make in (OPERATIONS[name] for name in args.operations):
                    operation = make(model, size, stage, args.batch_size, device)
                    if operation is not None:
                        cells = _memory(operation) if args.memory else _times(operation, args.runs, device)
                        print(
                            f"| {model} | {size} | {stage} | {operation.name} | {operation.chosen} | {cells} |",
                            flush=True,
                        )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 384], help="sides of the images, multiples of 32")
    parser.add_argument(
        "--operations", nargs="+", choices=OPERATIONS, default=["neighborhood", "deformable", "mlp", "linear"]
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each form")
    parser.add_argument("--memory", action="store_true", help="memory saved by autograd, instead of times")
    return parser.parse_args()


def _neighborhood(model: str, size: int, stage: int, batch: int, device: torch.device) -> Operation | None:
    if stage == 3:
        return None  # the last stage has none
    side, heads = size // (4 << stage), (WIDTHS[model] << stage) // HEAD_DIM
    arguments = [_random(batch, side, side, heads, HEAD_DIM, device=device) for _ in range(3)]
    arguments.append(_random(heads, 2 * KERNEL - 1, 2 * KERNEL - 1, device=device))

    def run(form: str, *arguments: Tensor) -> Tensor:
        return neighborhood_attention(*arguments, kernel_size=KERNEL, scale=HEAD_DIM**-0.5, form=form)

    return Operation("neighborhood attention", run, arguments, choose_neighborhood(arguments[0]))


def _deformable(model: str, size: int, stage: int, batch: int, device: torch.device) -> Operation:
    side, native, heads = size // (4 << stage), NATIVE // (4 << stage), (WIDTHS[model] << stage) // HEAD_DIM
    keys = (side // (8 >> stage)) ** 2
    positions = torch.rand(batch, GROUPS[model][stage], keys, 2, device=device) * 2 - 1
    arguments = [
        _random(batch, side * side, heads, HEAD_DIM, device=device),
        *(_random(batch, keys, heads, HEAD_DIM, device=device) for _ in range(2)),
        positions.requires_grad_(),
        _random(heads, 2 * native - 1, 2 * native - 1, device=device),
    ]
    options = {"map_size": (side, side), "coordinates": "dat++", "clamped": True}

    def run(form: str, *arguments: Tensor) -> Tensor:
        return deformable_attention(*arguments, scale=HEAD_DIM**-0.5, form=form, **options)

    return Operation("deformable attention", run, arguments, choose_deformable(arguments[0], native=side == native))


def _mlp(model: str, size: int, stage: int, batch: int, device: torch.device) -> Operation:
    side, dim = size // (4 << stage), WIDTHS[model] << stage
    hidden = 4 * dim
    shapes = (batch, side, side, dim), (hidden, dim), (hidden,), (hidden, 1, 3, 3), (hidden,), (dim, hidden), (dim,)
    arguments = [_random(*shape, device=device) for shape in shapes]

    def run(form: str, *arguments: Tensor) -> Tensor:
        return conv_mlp(*arguments, form=form)

    return Operation("convolutional MLP", run, arguments, choose_mlp(arguments[0]))


def _linear(model: str, size: int, stage: int, batch: int, device: torch.device) -> Operation:
    """Return the layer that computes queries, keys and values of a pixel."""
    side, dim = size // (4 << stage), WIDTHS[model] << stage
    arguments = [_random(*shape, device=device) for shape in ((batch, side, side, dim), (3 * dim, dim), (3 * dim,))]

    def run(form: str, *arguments: Tensor) -> Tensor:
        return linear(*arguments, form=form)

    return Operation("linear layer", run, arguments, choose_linear(*arguments))


def _layer(model: str, size: int, stage: int, batch: int, device: torch.device) -> Operation:
    """Return a complete mixer D: projections, offset network, sampling and attention."""
    side, native, dim = size // (4 << stage), NATIVE // (4 << stage), WIDTHS[model] << stage
    layer = DeformableAttention(
        dim,
        heads=dim // HEAD_DIM,
        groups=GROUPS[model][stage],
        map_size=native,
        stride=8 >> stage,
        kernel_size=9 - 2 * stage,
    ).to(device)
    x = _random(batch, dim, side, side, device=device).detach().contiguous(memory_format=torch.channels_last)

    def run(form: str, *arguments: Tensor) -> Tensor:
        layer.form = form
        return layer(arguments[0])

    chosen = choose_deformable(x, native=side == native)
    return Operation("deformable layer", run, [x.requires_grad_(), *layer.parameters()], chosen)


def _random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).requires_grad_()


OPERATIONS = {
    "neighborhood": _neighborhood,
    "deformable": _deformable,
    "mlp": _mlp,
    "linear": _linear,
    "layer": _layer,
}


def _times(operation: Operation, runs: int, device: torch.device) -> str:
    def inference(form: str) -> None:
        with torch.inference_mode():
            operation.run(form, *operation.arguments)

    def training(form: str) -> None:
        out = operation.run(form, *operation.arguments)
        torch.autograd.grad(out, operation.arguments, torch.ones_like(out))

    cells = []
    for task in (inference, training):
        candidates = {form: partial(task, form) for form in ("reference", operation.chosen)}
        plain, fast = (min(seconds) * 1e3 for seconds in take_turns(candidates, runs=runs, device=device).values())
        cells.append(f"{plain:.1f} | {fast:.1f} | {fast / plain:.2f}")
    return " | ".join(cells)


def _memory(operation: Operation) -> str:
    runs = (partial(operation.run, form) for form in ("reference", operation.chosen))
    plain, fast = (kept_for_backward(run, operation.arguments) / 2**20 for run in runs)
    return f"{plain:.1f} | {fast:.1f} | {f'{fast / plain:.2f}' if plain else '-'}"


if __name__ == "__main__":
    main()
