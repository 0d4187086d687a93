"""Pictures of the windows of locality-aware initialisation of a Vision Transformer, epoch by epoch."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models.ops.locality import Window, window_mask
from models.vit import VisionTransformer

PANEL = 2.3  # inches


def draw_windows(network: VisionTransformer) -> Figure:
    """Draw the attention mask of each window of the schedule, and below it the window of the middle patch.

    Raises:
        ValueError: the network has no windows.
    """
    if network.locality == "none":
        raise ValueError("this Vision Transformer has no windows, MODEL.VIT.locality; there is nothing to draw")
    begins = [0, *(end for end, _ in network.schedule)]
    figure = Figure(figsize=(PANEL * len(begins) + 0.4, 2 * PANEL + 0.9), layout="constrained")
    figure.suptitle(f"which keys (across) each query (down) sees: {network.locality}", fontsize=11)
    rows = figure.subplots(2, len(begins), squeeze=False).T
    for (mask, view), begin, end in zip(rows, begins, [*begins[1:], None], strict=True):
        epochs = f"from epoch {begin + 1} on" if end is None else f"epochs {begin + 1} to {end}"
        window = network.window_at(begin)
        _draw(mask, view, network, window)
        mask.set_title(f"{epochs}\n{f'reach {window.reach}' if window else 'all'}", fontsize=9)
    return figure


def _draw(mask: Axes, view: Axes, network: VisionTransformer, window: Window | None) -> None:
    """Draw one window; visible patches are white."""
    grid, prefix = network.patch_embed.grid_size, network.num_prefix_tokens
    seen = window_mask(grid, prefix, window or Window("sequence", grid[0] * grid[1])).numpy()
    middle = (grid[0] // 2) * grid[1] + grid[1] // 2
    style = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    mask.imshow(seen, **style)
    view.imshow(seen[prefix + middle, prefix:].reshape(grid), **style)
    view.plot(grid[1] // 2, grid[0] // 2, marker="*", markersize=11, color="tab:red", markeredgecolor="white")
    for axes in (mask, view):
        axes.set(xticks=(), yticks=())
