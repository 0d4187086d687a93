from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from models.layers import ConvMLP, LayerNorm, LayerScale, Residual, pointwise


def test_stochastic_depth_keeps_the_mean_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, 3, 2, 2)
    y = Residual(0.25).train()(torch.zeros_like(x), x)
    samples = y.flatten(1)
    assert (samples == samples[:, :1]).all()
    assert set(samples[:, 0].tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(y.mean().item() - 1) < 0.03
    assert torch.equal(Residual(0.25).train()(x, torch.zeros_like(x)), x)
    assert torch.equal(Residual(0.25).eval()(x, x), x + x)


def test_pointwise_equals_the_convolution() -> None:
    conv = nn.Conv2d(5, 7, kernel_size=1)
    x = torch.randn(2, 5, 4, 3)
    torch.testing.assert_close(pointwise(conv, x), conv(x))


def test_layer_norm_is_over_channels() -> None:
    y = LayerNorm(6)(3 * torch.randn(2, 6, 4, 3) + 1)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 4, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.var(1, unbiased=False), torch.ones(2, 4, 3), atol=1e-4, rtol=0)


def test_conv_mlp_adds_the_depthwise_convolution_to_its_input() -> None:
    mlp = ConvMLP(4, expansion=3, drop=0.0)
    x = torch.randn(2, 4, 5, 6)
    first, second = mlp.linear1[0], mlp.linear2[0]
    hidden = F.conv2d(x, first.weight, first.bias)
    hidden = F.gelu(hidden + F.conv2d(hidden, mlp.dwc.weight, mlp.dwc.bias, padding=1, groups=12))
    torch.testing.assert_close(mlp(x), F.conv2d(hidden, second.weight, second.bias))


def test_a_layer_scale_may_be_a_whole_number() -> None:
    scale = LayerScale(3, 1)
    assert scale.weight.dtype == torch.float32
