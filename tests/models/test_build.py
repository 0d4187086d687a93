"""Building models from configs: all configs, families and errors."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from yacs.config import CfgNode

from config import default_config, load_config
from models.build import FAMILIES, Family, build_backbone, build_model, num_classes, set_num_classes
from models.options import Option, at_least
from tests.models.small import without_gradient

CONFIGS = Path(__file__).parents[2] / "configs"
# Configs of dense prediction are tested with their models.
OTHERS = {"_base", "detection", "segmentation"}
FILES = sorted(
    path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml") if path.parent.name not in OTHERS
)


def narrow(config: CfgNode) -> CfgNode:
    """Reduce the channels of a config to four per head."""
    dat = config.MODEL.DAT
    dat.dims = [4 * heads for heads in dat.heads]
    dat.dim_stem = dat.dims[0]
    return config


@pytest.mark.parametrize("file", FILES)
def test_every_config_trains_every_parameter(file: str) -> None:
    config = narrow(load_config(CONFIGS / file))
    torch.manual_seed(0)
    model = build_model(config)
    size = (64, 64) if config.MODEL.TYPE == "dat" else config.image_size
    logits = model(torch.randn(1, 3, *size))
    logits.square().sum().backward()
    assert logits.shape == (1, num_classes(config))
    assert without_gradient(model) == []


@pytest.mark.parametrize("options", [["MODEL.DAT.in_chans", 1], ["MODEL.TYPE", "timm", "MODEL.TIMM.ARGS.in_chans", 4]])
def test_other_image_channels_are_rejected(options: list[object]) -> None:
    with pytest.raises(ValueError, match=r"in_chans = \d is not supported here: data sets give RGB images"):
        build_model(load_config(CONFIGS / "digits.yaml", options))


def test_use_checkpoint_of_the_config_is_applied() -> None:
    for use_checkpoint in (False, True):
        config = load_config(CONFIGS / "digits.yaml", ["TRAIN.USE_CHECKPOINT", str(use_checkpoint)])
        assert {stage.use_checkpoint for stage in build_model(config).stages} == {use_checkpoint}


def test_unknown_model_types_are_rejected() -> None:
    config = default_config()
    config.MODEL.TYPE = "dit"
    with pytest.raises(ValueError, match=f"MODEL.TYPE = 'dit' is unknown; choose one of {', '.join(FAMILIES)}"):
        build_model(config)


@pytest.mark.parametrize("name", ["resnet10t", "inception_v3"])
def test_models_without_activation_checkpointing_are_rejected(name: str) -> None:
    options = ["MODEL.TYPE", "timm", "MODEL.TIMM.NAME", name, "TRAIN.USE_CHECKPOINT", "True"]
    config = load_config(CONFIGS / "digits.yaml", options)
    if name == "resnet10t":
        assert build_model(config).grad_checkpointing
        assert build_backbone(config, out_indices=(-1,)).body.model.grad_checkpointing
    else:
        with pytest.raises(ValueError, match="--use-checkpoint: InceptionV3 cannot recompute activations"):
            build_model(config)


class Toy(torch.nn.Module):
    """A network of another family."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.stem, self.head = torch.nn.Conv2d(3, width, 4, 4), torch.nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x).mean((2, 3)))


def test_the_config_has_the_options_of_a_new_family(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"width": Option(8, "Channels.", at_least(1)), "num_classes": Option(10, "Size of the logits.")}
    monkeypatch.setitem(FAMILIES, "toy", Family(lambda config: Toy(**config.MODEL.TOY), options=options))
    load = runpy.run_path(str(CONFIGS.parent / "config.py"))["load_config"]  # it reads the families at import
    config = load(CONFIGS / "digits.yaml", ["MODEL.TYPE", "toy", "MODEL.TOY.width", "4"])
    set_num_classes(config, 7)
    assert build_model(config)(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"MODEL\.TOY\.width must be at least 1"):
        load(CONFIGS / "digits.yaml", ["MODEL.TOY.width", "0"])
    with pytest.raises(ValueError, match=r"did you mean MODEL\.TOY\.width\?"):
        load(CONFIGS / "digits.yaml", ["MODEL.TOY.widht", "4"])


def test_timm_models_are_built_for_the_configured_classes() -> None:
    config = load_config(CONFIGS / "digits.yaml", ["MODEL.TYPE", "timm", "MODEL.TIMM.NAME", "test_resnet"])
    config.MODEL.TIMM.ARGS.drop_rate = 0.25
    assert num_classes(config) == 1000
    set_num_classes(config, 7)
    model = build_model(config)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert model.drop_rate == 0.25


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["MODEL.TIMM.NAME", "resnet81"], r"timm has no model 'resnet81'; did you mean resnet"),
        (["MODEL.TIMM.NAME", ""], r"timm has no model ''; timm\.list_models"),
        (["MODEL.TIMM.NAME", "test_resnet", "MODEL.TIMM.ARGS.deep", "3"], r"MODEL\.TIMM\.ARGS: .*deep"),
    ],
)
def test_unknown_timm_models_and_arguments_are_rejected(options: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build_model(load_config(CONFIGS / "digits.yaml", ["MODEL.TYPE", "timm", *options]))


def test_image_sizes_may_be_rectangular() -> None:
    config = load_config(CONFIGS / "digits.yaml", ["DATA.IMG_SIZE", "[32, 64]"])
    assert config.image_size == (32, 64)
    build_model(config)
    with pytest.raises(ValueError, match=r"DATA\.IMG_SIZE = \[32, 1\] leaves no pixel"):
        build_model(load_config(CONFIGS / "dat_p.yaml", ["DATA.IMG_SIZE", "[32, 1]"]))
