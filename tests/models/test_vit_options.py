"""The config and the documentation contain the options that the Vision Transformer declares."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from config import default_config
from models.options import as_table
from models.vit import VisionTransformer


def test_the_config_has_the_arguments_and_their_defaults() -> None:
    parameters = inspect.signature(VisionTransformer).parameters
    declared = {
        name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for name, parameter in parameters.items()
        if name not in ("img_size", "use_checkpoint")  # set in DATA and TRAIN
    }
    assert dict(default_config().MODEL.VIT) == declared


def test_the_documentation_lists_the_declared_options() -> None:
    page = (Path(__file__).parents[2] / "docs/attention-modules.md").read_text(encoding="utf-8")
    table = as_table(VisionTransformer.options())
    if table not in page:  # an assertion would prefix each line, and the table could not be copied
        pytest.fail(f"docs/attention-modules.md should hold\n{table}", pytrace=False)
