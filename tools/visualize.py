"""Draw sampling points and attention of deformable attention: a picture per image, and an interactive page.

    python tools/visualize.py photo.jpg --checkpoint output/digits/default/best.pth
    python tools/visualize.py *.jpg --checkpoint best.pth --before --query 0.3 0.6 --stages 3 4
    python tools/visualize.py photo.jpg --checkpoint dat_pp_tiny_in1k_224.pth --cfg configs/dat_tiny.yaml --size 384

For each stage with deformable attention: the reference grid, the sampling points of each offset group, the importance
of the keys (their share of the attention) and the attention of query points by several heads. `--before` also shows the
network with its initial weights, or an earlier checkpoint.

    python tools/visualize.py --cfg configs/compare/digits.yaml --opts MODEL.VIT.locality box

Without images: the windows of locality-aware initialisation of a Vision Transformer, by epoch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin("matplotlib")

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from config import load_config
from data.transforms import as_pixels
from data.wording import counted
from models.segmentation.parts import pad_to
from models.vit import VisionTransformer
from tools.arguments import add_network, add_opts, check_network, free_name, image_size
from tools.deformations import BlockAttention, Place, inspect_blocks
from tools.drawing import NetworkAttention, draw
from tools.windows import draw_windows
from training.report import markup
from training.trained_model import TrainedModel, load_trained, untrained

TEMPLATE = Path(__file__).parent / "templates" / "visualize.html"
# Maximum number of attention weights of a block on the page; above, only every second, third, ... query is kept.
MOST_WEIGHTS = 3_000_000


def main() -> None:
    """Run the command line."""
    parser = _parser()
    args = parser.parse_args()
    try:
        visualize(args)
    except (ValueError, OSError) as error:
        startup.refuse(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="images; without any, windows of a ViT are drawn")
    add_network(parser)
    add_opts(parser, of="--cfg")
    parser.add_argument(
        "--before", nargs="?", const="", metavar="FILE", help="also show the initial weights, or an earlier checkpoint"
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[], metavar="N", help="default: all with the letter D")
    parser.add_argument("--every-block", action="store_true", help="all blocks of a stage (default: the last one)")
    parser.add_argument(
        "--query",
        type=float,
        nargs=2,
        action="append",
        metavar=("Y", "X"),
        help="query point, from 0 0 at the top left to 1 1; may be repeated (default: the centre)",
    )
    parser.add_argument("--heads", type=int, nargs="+", default=[], metavar="N", help="heads in the picture, from 1")
    parser.add_argument("--size", type=int, nargs="+", default=[], metavar="PIXELS", help="side, or height and width")
    parser.add_argument(
        "--output", type=Path, default=Path("output/visualize"), metavar="FOLDER", help="default: output/visualize"
    )
    return parser


def visualize(args: argparse.Namespace) -> None:
    """Write a picture for each image and the page of all.

    Raises:
        ValueError: wrong input.
    """
    queries = [_place(query) for query in args.query or [[0.5, 0.5]]]
    if any(head < 1 for head in args.heads):
        raise ValueError(f"--heads are counted from 1, not {min(args.heads)}")
    size = image_size(args.size) if args.size else None
    networks = _networks(args)
    if not args.images:
        show_windows(networks[-1][1], args.output)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    entries, taken = [], set()
    for path in args.images:
        pixels, seen = attention_of(path, networks, size, stages=args.stages, every_block=args.every_block)
        _check_blocks(seen, args.heads)
        target = args.output / f"{free_name(Path(path).stem, taken)}.png"
        draw(pixels, seen, queries=queries, heads=[head - 1 for head in args.heads]).savefig(target, dpi=130)
        print(target)
        entries.append(page_entry(Path(path).name, pixels, seen))
    page = args.output / "index.html"
    values = {"images": entries, "query": queries[0]}
    title = f"Deformable attention of {networks[-1][1].config.MODEL.NAME}"
    page.write_text(
        markup.fill(TEMPLATE, title=markup.text(title), data=markup.data(values)), encoding="utf-8", newline="\n"
    )
    print(page)


def _check_blocks(seen: Sequence[NetworkAttention], heads: Sequence[int]) -> None:
    """Check that the networks can be drawn side by side with these heads.

    Raises:
        ValueError: they have different blocks, or one has fewer heads.
    """
    first, *others = ([block.name for block in one.blocks] for one in seen)
    for one, names in zip(seen[1:], others, strict=True):
        if names != first:
            raise ValueError(
                f"--before: the deformable blocks of {seen[0].title} are {', '.join(first)}, those of {one.title} "
                f"{', '.join(names)}; give a checkpoint of the same architecture"
            )
    most = min(max(block.heads for block in one.blocks) for one in seen)
    if max(heads, default=0) > most:
        raise ValueError(f"--heads {max(heads)}: the blocks have at most {counted(most, 'head')}")


def show_windows(model: TrainedModel, folder: Path) -> None:
    """Write the picture of a Vision Transformer's windows.

    Raises:
        ValueError: the network is another one, or has no windows.
    """
    if not isinstance(model.network, VisionTransformer):
        raise ValueError("give images; without any, the windows of a Vision Transformer are drawn (MODEL.TYPE vit)")
    figure = draw_windows(model.network)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "windows.png"
    figure.savefig(target, dpi=110)
    print(target)


def attention_of(
    path: str | Path,
    networks: Sequence[tuple[str, TrainedModel]],
    size: tuple[int, int] | None,
    *,
    stages: Sequence[int] = (),
    every_block: bool = False,
) -> tuple[NDArray[np.uint8], list[NetworkAttention]]:
    """Return the input pixels ``[H, W, 3]`` of an image file, and the attention of each network."""
    tensors = [_prepare(model, model.read(path), size) for _, model in networks]
    seen = [
        NetworkAttention(title, inspect_blocks(model.network, tensor, stages=stages, every_block=every_block))
        for (title, model), tensor in zip(networks, tensors, strict=True)
    ]
    return as_pixels(tensors[-1]), seen


def _prepare(model: TrainedModel, image: Image.Image, size: tuple[int, int] | None) -> Tensor:
    """Return the input ``[3, H, W]`` of the network: of this size, or as in the evaluation of its task."""
    pixels = model.transform(size)(image)
    if model.config.TASK not in ("detection", "segmentation"):
        return pixels
    # Padded as the network would do: the figures show places as shares of the image that its backbone sees.
    return pad_to(pixels, model.network.divisor)


def page_entry(name: str, pixels: NDArray[np.uint8], seen: Sequence[NetworkAttention]) -> dict[str, Any]:
    """Return the data of one image for the page."""
    networks = [{"title": one.title, "blocks": [_block_entry(block) for block in one.blocks]} for one in seen]
    height, width = pixels.shape[:2]
    source = markup.picture(Image.fromarray(pixels))
    return {"name": name, "source": source, "height": height, "width": width, "networks": networks}


def _block_entry(block: BlockAttention) -> dict[str, Any]:
    """Return a block for the page: attention weights as bytes, 255 for the maximum of each query and head."""
    heads, _, keys = block.weights.shape
    rows, columns = block.map_size
    step = 1
    while heads * keys * -(-rows // step) * -(-columns // step) > MOST_WEIGHTS:
        step += 1
    # The middle one of each step x step queries, or the last.
    y, x = (np.minimum(np.arange(0, side, step) + step // 2, side - 1) for side in block.map_size)
    weights = block.weights.reshape(heads, rows, columns, keys)[:, y][:, :, x]
    scale = np.maximum(weights.max(-1, keepdims=True), 1e-30)
    return {
        "title": block.title,
        "map": block.map_size,
        "queries": weights.shape[1:3],
        "count": keys,
        "heads": heads,
        "groups": block.groups,
        "reference": markup.numbers(block.reference),
        "places": markup.numbers(block.places),
        "importance": markup.numbers(block.importance()),
        "weights": markup.numbers((weights / scale * 255).round().astype(np.uint8)),
        "scale": markup.numbers(scale.astype(np.float32)),
    }


def _networks(args: argparse.Namespace) -> list[tuple[str, TrainedModel]]:
    """Return the networks with their titles, the earlier one first."""
    check_network(args)
    if not args.checkpoint:
        if args.before is not None:
            raise ValueError("--before needs the --checkpoint that comes after it")
        initial = untrained(load_config(args.cfg, args.opts))
        print(initial.words())
        return [("random weights", initial)]
    if args.opts:
        raise ValueError("--opts changes a config without weights; remove it, or --checkpoint")
    after = load_trained(args.checkpoint, cfg=args.cfg, weights=args.weights)
    print(after.words())
    if args.before is None:
        return [(after.config.MODEL.NAME, after)]
    if not args.before:
        return [("before training", untrained(after.config, after.classes)), ("after training", after)]
    before = load_trained(args.before, cfg=args.cfg, weights=args.weights)
    print(before.words())
    return [(Path(args.before).stem, before), (Path(args.checkpoint).stem, after)]


def _place(query: Sequence[float]) -> Place:
    if not all(0 <= share <= 1 for share in query):
        raise ValueError(f"--query {query[0]:g} {query[1]:g} is outside the image; give fractions from 0 to 1")
    return query[0], query[1]


if __name__ == "__main__":
    main()
