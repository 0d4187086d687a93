"""Local attention with learned queries (QnA, arXiv 2112.11435), letter Q."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import linear, pointwise
from ..ops.precision import at_least_float32, autocast_disabled
from ..options import Option, StageOption, StageOptions, at_least, check_divisible, odd, one_of
from ..tables import Resize, square_along
from .letters import Mixer, register

OPTIONS = {
    "heads_q": StageOption((6, 12, 24, 48), "Attention heads of Q."),
    "nqs": StageOption((2, 2, 2, 2), "Number of learned queries of Q.", each=at_least(1)),
    "ksize_qnas": StageOption((3, 3, 3, 3), "Window size of Q.", each=odd()),
    "qna_activation": Option("exp", "Activation of the scores of Q.", one_of("exp", "sigmoid", "linear")),
}

SCORE_FLOOR = -40.0  # keeps sums over a window above 0 if all its scores are far below the largest of the map


class QueryAndAttend(nn.Module):
    """A few learned queries, the same for every pixel, attend to the square window around each pixel.

    Because the queries do not depend on the pixel, numerator and denominator of the attention are depthwise
    convolutions. Windows are cropped at the border of the map. ``attn_scale`` holds learned factors of the weights.

    Args:
        dim: channels C.
        heads: attention heads; divides ``dim``.
        num_queries: number of learned queries.
        kernel_size: side of the window in pixels, odd.
        activation: ``exp``, ``sigmoid`` or ``linear``, applied to the scores of queries and keys.
        proj_drop: dropout rate of the output.

    Raises:
        ValueError: an argument is not allowed or contradicts another.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        num_queries: int,
        kernel_size: int,
        activation: str = "exp",
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_divisible("dim", dim, "heads", heads)
        OPTIONS["nqs"].each.require("num_queries", num_queries)
        OPTIONS["ksize_qnas"].each.require("kernel_size", kernel_size)
        OPTIONS["qna_activation"].check.require("activation", activation)
        self.heads = heads
        self.num_queries = num_queries
        self.kernel_size = kernel_size
        self.activation = activation
        self.scale = (dim // heads) ** -0.5
        self.q_param = nn.Parameter(torch.empty(num_queries, dim))
        self.attn_scale = nn.Parameter(torch.empty(1, 1, kernel_size**2, num_queries * heads))
        self.rpb_table = nn.Parameter(torch.empty(kernel_size**2, num_queries * heads))
        self.reset_parameters()
        self.proj_k = nn.Linear(dim, dim, bias=False)
        self.proj_v = nn.Linear(dim, dim, bias=False)
        self.proj_out = nn.Conv2d(dim, dim, kernel_size=1, bias=False)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        """Initialise queries, factors and the position table; layers initialise themselves."""
        nn.init.trunc_normal_(self.q_param, std=self.q_param.shape[1] ** -0.5)
        nn.init.trunc_normal_(self.rpb_table, std=0.02)
        nn.init.ones_(self.attn_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        x = x.permute(0, 2, 3, 1)
        k = linear(self.proj_k, x).unflatten(-1, (self.heads, -1))  # [B, H, W, heads, d]
        v = linear(self.proj_v, x).permute(0, 3, 1, 2).unflatten(1, (self.heads, -1))  # [B, heads, d, H, W]
        q = self.q_param.unflatten(1, (self.heads, -1)) * self.scale  # [queries, heads, d]
        scores = torch.einsum("bhwnd,qnd->bqnhw", k, q)
        return self.proj_drop(pointwise(self.proj_out, self._attend(scores, v)))

    def position_tables(self) -> dict[str, Resize]:
        """Return the resize function of each position table, by name."""
        return {"rpb_table": square_along(0), "attn_scale": square_along(2)}

    def _attend(self, scores: Tensor, v: Tensor) -> Tensor:
        """Return the sum over the queries of the weighted means of ``v``.

        Args:
            scores: ``[B, queries, heads, H, W]``.
            v: ``[B, heads, d, H, W]``.

        Returns:
            ``[B, heads * d, H, W]``, computed in at least float32, because it is a quotient of small sums.
        """
        dtype = at_least_float32(v.dtype)
        scores = self._activate(scores.to(dtype), dims=(3, 4))
        prior = self._activate(self.rpb_table.to(dtype), dims=(0,))  # [K*K, queries * heads]
        values = scores.unsqueeze(3) * v.to(dtype).unsqueeze(1)  # [B, queries, heads, d, H, W]
        with autocast_disabled(v.device.type):
            numerator = self._window_sum(values, prior * self.attn_scale[0, 0])
            denominator = self._window_sum(scores.unsqueeze(3), prior)
        denominator = torch.where(denominator == 0, 1.0, denominator)  # linear scores may cancel
        return (numerator / denominator).sum(1).flatten(1, 2).to(v.dtype)

    def _window_sum(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return sums of ``[B, queries, heads, d, H, W]`` over each window with ``weight [K*K, queries * heads]``."""
        kernel = weight.t().reshape(-1, 1, self.kernel_size, self.kernel_size).repeat_interleave(x.shape[3], dim=0)
        maps = F.conv2d(x.flatten(1, 3), kernel, padding=self.kernel_size // 2, groups=kernel.shape[0])
        return maps.unflatten(1, x.shape[1:4])

    def _activate(self, scores: Tensor, *, dims: tuple[int, ...]) -> Tensor:
        if self.activation == "linear":
            return scores
        if self.activation == "sigmoid":
            return scores.clamp(min=SCORE_FLOOR).sigmoid()
        # The maximum over the map cancels in the quotient.
        return (scores - scores.amax(dims, keepdim=True).detach()).clamp(min=SCORE_FLOOR).exp()


def _build(stage: StageOptions) -> QueryAndAttend:
    return QueryAndAttend(
        stage["dims"],
        heads=stage["heads_q"],
        num_queries=stage["nqs"],
        kernel_size=stage["ksize_qnas"],
        activation=stage["qna_activation"],
        proj_drop=stage["drop_rate"],
    )


register("Q", Mixer(build=_build, options=OPTIONS, check=lambda stage: stage.divides("heads_q", "dims")))
