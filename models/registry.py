"""The published models, registered with timm: ``timm.create_model("dat_tiny.in1k")``.

A name consists of the architecture and, after the dot, a tag for the data and image size of the published weights. A
YAML file in ``configs/`` defines each model. Importing this module registers all names; ``hubconf.py`` does so for
`torch.hub`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from .dat import DAT
from .options import did_you_mean
from .weights import fit_tables

CONFIGS = {
    "dat_tiny.in1k": "dat_tiny.yaml",
    "dat_small.in1k": "dat_small.yaml",
    "dat_base.in1k": "dat_base.yaml",
    "dat_base.in1k_384": "dat_base_384.yaml",
    "dat_plus.in1k": "dat_p.yaml",
    "dat_cvpr22_tiny.in1k": "cvpr22/dat_tiny.yaml",
    "dat_cvpr22_small.in1k": "cvpr22/dat_small.yaml",
    "dat_cvpr22_base.in1k": "cvpr22/dat_base.yaml",
    "dat_cvpr22_base.in1k_384": "cvpr22/dat_base_384.yaml",
}
PAPERS = {
    False: ("arXiv:2309.01430", "DAT++: Spatially Dynamic Vision Transformer with Deformable Attention"),
    True: ("arXiv:2201.00520", "Vision Transformer with Deformable Attention"),
}
EVALUATION = {"CROP": True, "CROP_RATIO": 0.875}  # the defaults of `config`
# The configs are next to this file in an installed package, and next to its folder in the repository.
_HERE = Path(__file__).resolve().parent
FOLDER = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"

# The published files contain a yacs `CfgNode`. PyTorch's safe unpickler supports only dicts and OrderedDicts, so it is
# read as an OrderedDict, which executes no code.
torch.serialization.add_safe_globals([(OrderedDict, "yacs.config.CfgNode")])


@cache
def read_config(path: Path) -> dict[str, Any]:
    """Return the options of a config file and of its ``BASE`` file, as nested sections."""
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = loaded.pop("BASE", None)
    return _merged(read_config(path.parent / base), loaded) if base else loaded


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    sections = {name: _merged(base[name], value) for name, value in over.items() if isinstance(base.get(name), dict)}
    return base | over | sections


def model_options(name: str) -> dict[str, Any]:
    """Return the options of `DAT` for a published model, without stochastic depth, which belongs to the recipe.

    Args:
        name: name of the model, with or without a tag; without, its first tag in `CONFIGS` is used.

    Raises:
        ValueError: there is no such name.
    """
    first = {tagged.partition(".")[0]: tagged for tagged in reversed(CONFIGS)}
    known = first | {tagged: tagged for tagged in CONFIGS}
    if name not in known:
        hint = did_you_mean(name, known) or f"; choose one of {', '.join(CONFIGS)}"
        raise ValueError(f"there is no published model {name!r}{hint}")
    options = read_config(FOLDER / CONFIGS[known[name]])["MODEL"]["DAT"]
    return {option: deepcopy(value) for option, value in options.items() if option != "drop_path_rate"}


def _default_cfg(name: str) -> dict[str, Any]:
    config = read_config(FOLDER / CONFIGS[name])
    size, evaluation = config["DATA"]["IMG_SIZE"], EVALUATION | config.get("TEST", {})
    paper, title = PAPERS["cvpr22" in name]
    return {
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": evaluation["CROP_RATIO"] if evaluation["CROP"] else 1.0,
        "crop_mode": "squash",
        "first_conv": "patch_proj.0",
        "classifier": "cls_head",
        "license": "apache-2.0",
        "paper_ids": paper,
        "paper_name": title,
    }


default_cfgs = generate_default_cfgs({name: _default_cfg(name) for name in CONFIGS})


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a published file, a checkpoint of the trainer, or a state dict, adapted to ``model``.

    Position tables are resized. timm itself handles other numbers of classes, which this function finds in the file,
    and of image channels.

    Raises:
        ValueError: the file lacks entries of the network other than the head.
    """
    weights = fit_tables(state_dict.get("model", state_dict), model)
    head = f"{model.pretrained_cfg['classifier']}."
    # timm loads files of other classes without comparing their names.
    if missing := sorted(name for name in model.state_dict().keys() - weights.keys() if not name.startswith(head)):
        raise ValueError(
            f"the pretrained file lacks {len(missing)} of {len(model.state_dict())} entries of the network, such as "
            f"{missing[0]}; it is of another architecture or layout"
        )
    if (rows := weights.get(f"{head}weight")) is not None:
        model.pretrained_cfg["num_classes"] = len(rows)
    return weights


def _create(
    variant: str,
    pretrained: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **arguments: Any,
) -> nn.Module:
    wanted = [arguments.get(name) for name in ("pretrained_cfg", "pretrained_cfg_overlay")]
    source = resolve_pretrained_cfg(variant, *wanted)
    if pretrained and not (source.has_weights or source.state_dict):
        raise ValueError(
            f"the weights of {variant} cannot be downloaded by name; give their file as "
            'pretrained_cfg_overlay={"file": PATH}'
        )
    name = f"{variant}.{source.tag}"
    model = build_model_with_cfg(
        partial(DAT, **model_options(name if name in CONFIGS else variant)),
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **arguments,
    )
    return model.to(device=device, dtype=dtype)


def _entrypoint(variant: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **arguments: Any) -> nn.Module:
        return _create(variant, pretrained, **arguments)

    files = [f"configs/{CONFIGS[f'{variant}.{tag}']}" for tag in default_cfgs[variant].tags]
    create.__name__ = create.__qualname__ = variant
    create.__doc__ = f"""Return the network of {" or ".join(files)}, a `DAT`.

    Args:
        pretrained: load the weights that are given as ``pretrained_cfg_overlay={{"file": PATH}}``.
        **arguments: arguments of `timm.create_model`, and options of `DAT` that replace those of the config.
    """
    return create


ENTRYPOINTS = {variant: register_model(_entrypoint(variant)) for variant in default_cfgs}
