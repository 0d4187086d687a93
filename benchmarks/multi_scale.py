"""Time and memory of multi-scale deformable attention compared with that of `transformers` (Deformable DETR).

    python -m benchmarks.multi_scale --threads 1
    python -m benchmarks.multi_scale --queries 300

Both layers have the same weights and take turns in this process on random input at the size of Deformable DETR's
encoder. Peak memory is measured in a new process per layer, as the increase over that before the call: resident memory
on a CPU (Linux only), allocated memory on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin("transformers")

import torch
import transformers
from torch import Tensor
from transformers.models.deformable_detr.configuration_deformable_detr import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

from benchmarks.memory import peak_in_new_process, peak_increase
from benchmarks.timing import environment, spread, take_turns
from models.attention import MSDeformAttn

LEVELS = [(76, 106), (38, 53), (19, 27), (10, 14)]
DIM, HEADS, POINTS = 256, 8, 4
LAYERS = ("transformers", "ours")


def main() -> None:
    """Measure and print the table."""
    args = _parse_arguments()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.peak:
        layer, task = args.peak
        print(peak_increase(partial(TASKS[task], *_layer(layer, args, device)), device))
        return
    queries = args.queries or sum(height * width for height, width in LEVELS)
    print(
        f"{environment(device, args.threads)}, transformers {transformers.__version__}; batch {args.batch_size}, "
        f"{queries} queries, best of {args.runs}, spread of the median over the best\n"
    )
    print("| task | transformers, ms | ours, ms | ratio | transformers, MiB | ours, MiB | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for task in TASKS:
        candidates = {name: partial(TASKS[task], *_layer(name, args, device)) for name in LAYERS}
        seconds = take_turns(candidates, runs=args.runs, device=device)
        times = {name: min(runs) * 1e3 for name, runs in seconds.items()}
        peaks = {name: peak_in_new_process("benchmarks.multi_scale", name, task) for name in LAYERS}
        cells = [f"{times[name]:.0f} ({spread(seconds[name])})" for name in LAYERS]
        memory = [f"{peaks[name]:.0f}" for name in LAYERS]
        ratios = [f"{values['ours'] / values['transformers']:.2f}" for values in (times, peaks)]
        print(f"| {task} | {' | '.join((*cells, ratios[0], *memory, ratios[1]))} |", flush=True)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--queries", type=int, help="learned queries, as in the decoder (default: the pixels)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each layer")
    parser.add_argument("--peak", nargs=2, metavar=("LAYER", "TASK"), help="only print one peak memory")
    return parser.parse_args()


def _layer(name: str, args: argparse.Namespace, device: torch.device) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a call of a layer, and its arguments that require a gradient."""
    torch.manual_seed(0)
    layer = MSDeformAttn(DIM, len(LEVELS), HEADS, POINTS)
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.05)
    torch.nn.init.normal_(layer.attention_weights.weight, std=0.05)
    pixels = torch.randn(args.batch_size, sum(height * width for height, width in LEVELS), DIM, device=device)
    query = pixels if args.queries is None else torch.randn(args.batch_size, args.queries, DIM, device=device)
    points = torch.rand(*query.shape[:2], 1, 2, device=device)
    if args.queries is None:
        points = _centres(device).expand(args.batch_size, -1, -1, -1)
    points = points.expand(-1, -1, len(LEVELS), -1)
    starts = [0, *accumulate(height * width for height, width in LEVELS[:-1])]
    leaves = [query.clone().requires_grad_(), pixels.clone().requires_grad_()]
    if name == "ours":
        layer = layer.to(device)
        return lambda: layer(leaves[0], points, leaves[1], LEVELS, starts), [*leaves, *layer.parameters()]
    config = DeformableDetrConfig(d_model=DIM, num_feature_levels=len(LEVELS))
    theirs = DeformableDetrMultiscaleDeformableAttention(config, HEADS, POINTS)
    theirs.load_state_dict(layer.state_dict())
    theirs = theirs.to(device)
    shapes, start_index = torch.tensor(LEVELS, device=device), torch.tensor(starts, device=device)
    return lambda: theirs(
        leaves[0],
        encoder_hidden_states=leaves[1],
        reference_points=points,
        spatial_shapes=shapes,
        spatial_shapes_list=LEVELS,
        level_start_index=start_index,
    )[0], [*leaves, *theirs.parameters()]


def _centres(device: torch.device) -> Tensor:
    """Return the position of every pixel of every level, ``[1, S, 1, 2]``."""
    planes = []
    for height, width in LEVELS:
        y, x = ((torch.arange(length, device=device) + 0.5) / length for length in (height, width))
        planes.append(torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).flatten(0, 1))
    return torch.cat(planes)[None, :, None]


def _inference(run: Callable[[], Tensor], _: list[Tensor]) -> None:
    with torch.inference_mode():
        run()


def _training(run: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    out = run()
    torch.autograd.grad(out, leaves, torch.ones_like(out))


TASKS = {"forward": _inference, "forward + backward": _training}


if __name__ == "__main__":
    main()
