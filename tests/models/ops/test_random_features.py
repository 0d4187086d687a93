"""Random features: what they approximate, how fast the error decreases, and large and small inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.ops.linear_attention import linear_attention
from models.ops.random_features import features, orthogonal_directions


def approximation(q: Tensor, k: Tensor, v: Tensor, count: int, seed: int) -> Tensor:
    directions = orthogonal_directions(count, q.shape[-1], seed).double()
    scale = q.shape[-1] ** -0.25
    q, k = (features(x * scale, directions, kind="positive", role=r) for x, r in ((q, "query"), (k, "key")))
    return linear_attention(q, k, v)


def test_the_error_decreases_with_the_root_of_the_number_of_features() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 40, 16, dtype=torch.float64) for _ in range(3))
    q, k = q / 2, k / 2  # the variance grows exponentially with the square of their length
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    counts = [64, 256, 1024, 4096]
    errors = []
    for count in counts:
        squares = [(approximation(q, k, v, count, seed) - exact).square().mean() for seed in range(12)]
        errors.append(torch.stack(squares).mean().sqrt().item())
    x, y = torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert -0.6 < slope < -0.4
    assert errors[-1] < 0.1 * exact.std()


def test_directions_are_orthogonal_and_gaussian() -> None:
    directions = orthogonal_directions(20, 8, seed=3).double()
    for block in directions.split(8):
        products = block @ block.t()
        assert (products - products.diagonal().diag()).abs().max() < 1e-5
    assert torch.equal(directions.float(), orthogonal_directions(20, 8, seed=3))
    assert not torch.equal(directions.float(), orthogonal_directions(20, 8, seed=4))
    many = orthogonal_directions(4000, 8, seed=0).double()
    assert many.mean().abs() < 0.02
    torch.testing.assert_close(many.t() @ many / 4000, torch.eye(8).double(), atol=0.1, rtol=0)
    assert many.square().sum(1).mean().item() == pytest.approx(8, rel=0.05)  # chi-squared with 8 degrees of freedom
    assert many.square().sum(1).var().item() == pytest.approx(16, rel=0.15)


def test_orthogonal_directions_are_better_than_independent_ones() -> None:
    torch.manual_seed(0)
    q, k = (0.5 * torch.randn(32, 8, dtype=torch.float64) for _ in range(2))
    exact = (q @ k.t()).exp()

    def error(directions: Tensor) -> float:
        products = [(x @ directions.t() - x.square().sum(1, keepdim=True) / 2).exp() for x in (q, k)]
        return ((products[0] @ products[1].t() / len(directions)) - exact).square().mean().item()

    orthogonal = sum(error(orthogonal_directions(8, 8, seed).double()) for seed in range(300))
    independent = sum(error(torch.randn(8, 8, dtype=torch.float64)) for _ in range(300))
    assert orthogonal < independent


def test_images_and_heads_do_not_influence_each_other() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 6, 4) for _ in range(3))
    alone = approximation(q.double(), k.double(), v.double(), 16, 0)
    k[1] *= 50
    together = approximation(q.double(), k.double(), v.double(), 16, 0)
    assert torch.equal(alone[0], together[0])


@pytest.mark.parametrize("kind", ["positive", "relu"])
def test_features_are_finite_at_any_magnitude(kind: str) -> None:
    for size in (1e-3, 1.0, 30.0, 1e3):
        torch.manual_seed(0)
        x = (size * torch.randn(2, 3, 50, 16)).bfloat16().requires_grad_()
        directions = orthogonal_directions(32, 16, 0)
        found = {role: features(x, directions, kind=kind, role=role) for role in ("query", "key")}
        assert all(f.dtype == torch.float32 and f.isfinite().all() and (f >= 0).all() for f in found.values())
        out = linear_attention(found["query"], found["key"], torch.randn(2, 3, 50, 16))
        assert out.isfinite().all()
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert gradient.isfinite().all()


def test_one_feature_equals_its_formula() -> None:
    x, w = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([[0.3, 0.4]])
    exponents = [0.3 + 0.8 - 2.5, 0.15 - 0.4 - 0.625]
    keys = features(x, w, kind="positive", role="key")
    torch.testing.assert_close(keys[:, 0], torch.tensor([math.exp(exponents[0] - max(exponents)), 1.0]))
    queries = features(x, w, kind="positive", role="query")
    torch.testing.assert_close(queries[:, 0], torch.ones(2))  # a single feature is the largest of its query
    torch.testing.assert_close(features(x, w, kind="relu", role="key")[:, 0], torch.tensor([1.101, 0.001]))
