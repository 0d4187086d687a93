"""Hooks, adapters, pruning and quantization take effect, and copies and transforms of `torch.func` work."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from config import load_config
from models.attention.letters import MIXERS
from models.build import build_model
from models.fusing import may_fuse
from tests.models.small import VARIANTS, build_small, variant_id, without_gradient
from tests.models.test_build import CONFIGS, FILES, narrow

DAT_PP = {"use_dwc_mlps": True, "use_lpus": True}
# Every mixer and option whose fused form reads the parameters of other modules.
FUSED = [
    ("ND", DAT_PP),
    ("LSX", DAT_PP),
    ("EPQ", {}),
    ("D", {"log_cpb": True}),
    ("D", {"dwc_pes": True}),
]


def bearers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold a trained parameter of their own, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    }


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["module", "global"])
def test_hooks_of_every_module_of_every_config_fire(file: str, kind: str) -> None:
    config = narrow(load_config(CONFIGS / file))
    model = build_model(config).eval()
    x = images() if config.MODEL.TYPE == "dat" else torch.randn(2, 3, *config.image_size)
    expected = model(x)
    names = {module: name for name, module in bearers(model).items()}
    called = set()

    def hook(module: nn.Module, *_: Any) -> None:
        called.add(names.get(module))

    handles = (
        [module.register_forward_hook(hook) for module in names]
        if kind == "module"
        else [nn.modules.module.register_module_forward_hook(hook)]
    )
    try:
        logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    assert called - {None} == set(names.values())
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_hooks_fire_with_every_letter_and_option_and_change_nothing(variant: tuple[str, dict[str, Any]]) -> None:
    letter, options = variant
    torch.manual_seed(0)  # some weights make the quotients of linear activations ill-conditioned
    model = build_small(letter, **options).double()
    x = images().double().requires_grad_()
    plain = model(x)
    plain.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    waiting = set(bearers(model))
    for name, module in bearers(model).items():
        module.register_full_backward_hook(lambda *_, name=name: waiting.discard(name))
    watched = model(x)
    watched.square().sum().backward()
    assert waiting == set()
    torch.testing.assert_close(watched, plain)
    torch.testing.assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, gradients)


@pytest.mark.parametrize(("letters", "options"), FUSED)
def test_lora_on_every_linear_and_pointwise_layer(letters: str, options: dict[str, Any]) -> None:
    model = build_small(letters, **options)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]
    expected = model(images())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=names, init_lora_weights=True))
    torch.testing.assert_close(adapted(images()), expected, atol=1e-5, rtol=1e-4)  # LoRA's second factor starts at zero
    second = {name: p for name, p in adapted.named_parameters() if "lora_B" in name}
    assert len(second) == len(names)
    for parameter in second.values():
        nn.init.normal_(parameter, std=0.1)
    logits = adapted(images())
    assert not torch.allclose(logits, expected, atol=1e-3)
    logits.square().sum().backward()
    assert without_gradient(adapted) == []
    assert [name for name, parameter in second.items() if not parameter.grad.any()] == []


@pytest.mark.parametrize("adapter", [LoraConfig, LoHaConfig, LoKrConfig])
@pytest.mark.parametrize("options", [{}, {"fixed_pes": True}], ids=str)
def test_adapters_of_the_depthwise_convolution_of_the_offset_network(adapter: type, options: dict[str, Any]) -> None:
    model = build_small("D", **options)
    expected = model(images())
    adapted = get_peft_model(model, adapter(r=16, target_modules=["conv_offset.0"]))  # r: a multiple of all channels
    torch.testing.assert_close(adapted(images()), expected, atol=1e-5, rtol=1e-4)
    factors = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    for factor in factors:
        nn.init.normal_(factor)
    logits = adapted(images())
    assert not torch.allclose(logits, expected, atol=1e-3)
    logits.square().sum().backward()
    assert all(factor.grad.any() for factor in factors)


def replaced_by_peft(model: nn.Module, name: str) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["proj_q"], modules_to_save=[name]))


def wrapped(wrap: Callable[[nn.Module], nn.Module], model: nn.Module, name: str) -> nn.Module:
    for parent in [module for module in model.modules() if isinstance(getattr(module, name, None), nn.Module)]:
        setattr(parent, name, wrap(getattr(parent, name)))
    return model


@pytest.mark.parametrize("name", ["conv_offset", "linear1", "linear2", "dwc", "chunk"])
@pytest.mark.parametrize(
    "replace",
    [
        replaced_by_peft,
        partial(wrapped, checkpoint_wrapper),
        partial(wrapped, lambda layer: torch.compile(layer, backend="eager")),
    ],
    ids=["peft", "checkpoint", "compile"],
)
def test_wrappers_of_layers_change_nothing(replace: Callable[[nn.Module, str], nn.Module], name: str) -> None:
    torch._dynamo.reset()
    model = build_small("D", use_dwc_mlps=name != "chunk")
    expected = model(images())
    model = replace(model, name)
    logits = model(images())
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    logits.sum().backward()
    assert any(p.grad is not None and p.grad.any() for key, p in model.named_parameters() if name in key)


def attach_weight_norm(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.data.mul_(1.5)


def attach_pruning(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", amount=0.5)


def replace_forward(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def change_input(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda _, arguments: (arguments[0] * 1.5,))


@pytest.mark.parametrize("attach", [attach_weight_norm, attach_pruning, replace_forward, change_input])
@pytest.mark.parametrize(("letters", "options"), FUSED)
def test_what_is_attached_to_a_layer_takes_effect(
    attach: Callable[[nn.Module], None], letters: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    stage = build_small(letters, **options).eval().stages[2]
    x = torch.randn(1, 32, 7, 7)
    with torch.no_grad():
        expected = stage(x)
        for layer in [module for module in stage.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]:
            kept, kind = copy.deepcopy(layer.__dict__), type(layer)
            attach(layer)
            assert not torch.equal(stage(x), expected), layer
            layer.__class__ = kind
            layer.__dict__.clear()
            layer.__dict__.update(kept)
        torch.testing.assert_close(stage(x), expected)


@pytest.mark.parametrize(("letters", "options"), FUSED)
@pytest.mark.filterwarnings("ignore:.*quantiz.*:DeprecationWarning", "ignore:.*quantiz.*:UserWarning")
def test_dynamic_quantization_replaces_the_linear_layers(letters: str, options: dict[str, Any]) -> None:
    model = build_small(letters, **options).eval()
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert all("quantized" in type(quantized.get_submodule(name)).__module__ for name in linears)
    with torch.no_grad():
        expected, logits = model(images()), quantized(images())
    assert not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, atol=0.1 * expected.std().item(), rtol=0.1)


@pytest.mark.parametrize("letter", list(MIXERS))
def test_layers_may_lose_their_biases(letter: str) -> None:
    torch.manual_seed(0)
    model, x = build_small(letter, use_dwc_mlps=True, use_lpus=True), torch.randn(2, 3, 64, 64)
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    expected = model(x)
    for layer in layers:
        layer.bias = None
    torch.testing.assert_close(model(x), expected)


def test_layers_with_quantized_parameters_are_not_fused() -> None:
    class Packed(Tensor):
        pass

    layer = nn.Linear(4, 4)
    assert may_fuse(layer)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Packed))
    assert not may_fuse(layer)


def test_flop_counters_see_all_products() -> None:
    model = build_small("NDLP", **DAT_PP)
    counts = []
    for form in ("auto", "reference"):
        for module in model.modules():
            if hasattr(module, "form") and form == "reference":
                module.form = form
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(images())
        by_module = counter.get_flop_counts()
        counts.append({name: sum(by_module[name].values()) for name in by_module if name.endswith((".mlps.0", "head"))})
    assert counts[0] == counts[1]
    assert all(counts[0].values())


def pure(model: nn.Module) -> tuple[Callable[[dict, Tensor], Tensor], dict[str, Tensor]]:
    """Return a network as a function of its parameters and images, and the parameters."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: t for name, t in model.state_dict().items() if name not in parameters}
    return lambda weights, x: functional_call(model, (weights, rest), (x,)), parameters


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_transforms_of_torch_func(variant: tuple[str, dict[str, Any]]) -> None:
    letter, options = variant
    torch.manual_seed(0)
    model = build_small(letter, **options).double().eval()
    x = images()[:, :, :40, :48].double()
    logits = model(x)
    logits.square().sum().backward()
    function, weights = pure(model)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return function(weights, x).square().sum()

    gradient = grad(loss)(weights, x)
    torch.testing.assert_close(gradient, {name: model.get_parameter(name).grad for name in weights})
    if letter == "D" and torch.__version__ < "2.15":
        return  # grid_sample of PyTorch 2.14 has no forward derivative
    directions = {name: torch.randn_like(weight) for name, weight in weights.items()}
    value, change = jvp(lambda weights: loss(weights, x), (weights,), (directions,))
    torch.testing.assert_close(value, logits.square().sum().detach())
    torch.testing.assert_close(change, sum((gradient[name] * directions[name]).sum() for name in weights))


# Quotients of linear scores are too steep for differences.
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v[1].get("qna_activation") != "linear"], ids=variant_id)
def test_second_derivatives_of_the_plain_form(variant: tuple[str, dict[str, Any]]) -> None:
    letter, options = variant
    torch.manual_seed(0)
    model = build_small(letter, **options).double().eval()
    for module in model.modules():
        if hasattr(module, "form"):
            module.form = "reference"
    for table in model.no_weight_decay():  # with trained position tables, PyTorch chooses plain attention itself
        model.get_parameter(table).requires_grad_(False)
    x = images()[:, :, :40, :48].double().requires_grad_()
    direction = torch.randn_like(x)

    def slope(x: Tensor, **options: bool) -> Tensor:
        return torch.autograd.grad(model(x).square().sum(), x, **options)[0]

    with sdpa_kernel(SDPBackend.MATH) if letter in "LSP" else nullcontext():  # they have no form
        second = torch.autograd.grad((slope(x, create_graph=True) * direction).sum(), x)[0]
    step = 1e-6 * direction
    difference = (slope((x + step).detach().requires_grad_()) - slope((x - step).detach().requires_grad_())) / 2e-6
    torch.testing.assert_close(second, difference, atol=1e-3 * second.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("letters", ["NDP", "LSE", "QX"])
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_vectorized_over_images_and_networks(letters: str) -> None:
    torch.manual_seed(0)
    model = build_small(letters, **DAT_PP).double().eval()
    x = images().double()
    function, weights = pure(model)
    expected = model(x).detach()
    torch.testing.assert_close(vmap(lambda image: function(weights, image[None])[0])(x), expected)
    gradients = vmap(grad(lambda w, image: function(w, image[None]).square().sum()), (None, 0))(weights, x)
    model(x[1:]).square().sum().backward()
    torch.testing.assert_close(
        {name: gradient[1] for name, gradient in gradients.items()},
        {name: model.get_parameter(name).grad for name in weights},
    )
    both = {name: torch.stack((weight, 0.9 * weight)) for name, weight in weights.items()}
    first, second = vmap(function, (0, None))(both, x)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, function({name: 0.9 * weight for name, weight in weights.items()}, x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = build_small("".join(MIXERS), **DAT_PP)
    twin = duplicate(model)
    expected = model(images())
    assert torch.equal(twin(images()), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(images()), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_traces_use_plain_forms() -> None:
    model = build_small("NDL", **DAT_PP).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, images(), check_trace=False)
        torch.testing.assert_close(traced(images()), model(images()), atol=1e-5, rtol=1e-4)
