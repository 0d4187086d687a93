"""Options of DAT: errors name the value and what is allowed, and declarations reach signature and documentation."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.attention.letters import MIXERS, Mixer, register
from models.contract import no_weight_decay
from models.dat import DAT
from models.layers import as_pair
from models.options import StageOption, as_table, complete, did_you_mean, odd
from models.tables import Resize, by_cells
from models.weights import adapt
from tests.models.small import SMALL

WRONG = [
    ({"dims": [8, 16, 32]}, r"dims = \[8, 16, 32\] must be a list of 4 entries"),
    ({"stage_spec": "NDND"}, "stage_spec = 'NDND' must be a list of 4 entries"),
    ({"heads": 4}, "heads = 4 must be a list of 4 entries"),
    ({"dims": [8, 16, "32", 64]}, r"dims\[2\] = '32' must be a whole number"),
    ({"dims": [8, 16, 32.0, 64]}, r"dims\[2\] = 32.0 must be a whole number"),
    ({"heads": [1, True, 4, 8]}, r"heads\[1\] = True must be a whole number"),
    ({"use_pes": [1, 1, 1, 1]}, r"use_pes\[0\] = 1 must be true or false"),
    ({"stage_spec": [["D"], ["D"], 5, ["D"]]}, r"stage_spec\[2\] = 5 must be letters, such as 'ND'"),
    (
        {"stage_spec": ["D", "?", "D", "D"]},
        r"stage_spec\[1\] = '\?' contains '\?'; the letters are " + ", ".join(sorted(MIXERS)),
    ),
    ({"depths": [1, 2, 1, 1]}, r"stage_spec\[1\] = 'D' must have one letter per block; depths\[1\] = 2"),
    ({"depths": [1, 1, 0, 1]}, r"depths\[2\] = 0 must be at least 1"),
    ({"dims": [0, 16, 32, 64]}, r"dims\[0\] = 0 must be at least 1"),
    ({"heads": [1, 3, 4, 8]}, r"heads\[1\] = 3 does not divide dims\[1\] = 16; change one of them"),
    ({"heads": [0, 2, 4, 8]}, r"heads\[0\] = 0 must be at least 1"),
    ({"groups": [1, 1, 3, 4]}, r"groups\[2\] = 3 does not divide heads\[2\] = 4"),
    ({"groups": [-1, 1, 2, 4]}, r"groups\[0\] = -1 must be at least 1 for the blocks 'D'"),
    ({"strides": [-1, 4, 2, 1]}, r"strides\[0\] = -1 must be at least 1"),
    ({"ksizes": [0, 7, 5, 3]}, r"ksizes\[0\] = 0 must be at least 1"),
    (
        {"log_cpb": [True] * 4, "dwc_pes": [False, True, False, False]},
        r"dwc_pes\[1\] = True and log_cpb\[1\] = True exclude each other",
    ),
    ({"stage_spec": ["N"] * 4, "nat_ksizes": [7, 6, 7, 7]}, r"nat_ksizes\[1\] = 6 must be odd"),
    ({"stage_spec": ["X"] * 4, "window_sizes": [7, 4, 7, 7]}, r"window_sizes\[1\] = 4 must be odd"),
    ({"stage_spec": ["L"] * 4, "window_sizes": [0, 4, 7, 7]}, r"window_sizes\[0\] = 0 must be at least 1"),
    ({"stage_spec": ["P"] * 4, "sr_ratios": [8, 0, 2, 1]}, r"sr_ratios\[1\] = 0 must be at least 1"),
    ({"stage_spec": ["E"] * 4, "heads": [4, 2, 4, 8]}, r"4 times heads\[0\] = 4 does not divide dims\[0\] = 8"),
    ({"stage_spec": ["Q"] * 4, "heads_q": [3, 2, 4, 8]}, r"heads_q\[0\] = 3 does not divide dims\[0\] = 8"),
    ({"stage_spec": ["Q"] * 4, "nqs": [0, 2, 2, 2]}, r"nqs\[0\] = 0 must be at least 1"),
    ({"stage_spec": ["Q"] * 4, "ksize_qnas": [2, 3, 3, 3]}, r"ksize_qnas\[0\] = 2 must be odd"),
    ({"img_size": 16}, "img_size = 16 leaves no pixel for the last stage; choose at least 32"),
    ({"img_size": 0}, "img_size = 0 must be at least 1"),
    ({"img_size": [64, 16]}, r"img_size = \[64, 16\] leaves no pixel for the last stage; choose at least 32"),
    ({"img_size": [64]}, r"img_size = \[64\] must be at least 1, or \[height, width\]"),
    ({"img_size": [64, 64.0]}, r"img_size = \[64, 64.0\] must be a whole number"),
    ({"in_chans": 0}, "in_chans = 0 must be at least 1"),
    ({"num_classes": -1}, "num_classes = -1 must be at least 0"),
    ({"expansion": 2.5}, "expansion = 2.5 must be a whole number"),
    ({"patch_size": 3, "img_size": 96}, "patch_size = 3 and dim_stem = 8 must both be even"),
    ({"drop_path_rate": 1.0}, r"drop_path_rate = 1.0 must be a number in \[0, 1\)"),
    ({"drop_rate": -0.1}, r"drop_rate = -0.1 must be a number in \[0, 1\)"),
    ({"coordinates": "dat"}, r"coordinates = 'dat' must be one of dat\+\+, cvpr22"),
    ({"qna_activation": "relu"}, "qna_activation = 'relu' must be one of exp, sigmoid, linear"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_options_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DAT(**{**SMALL, "stage_spec": ["D"] * 4, **options})


def test_misspelt_options_are_rejected() -> None:
    with pytest.raises(TypeError, match=r"unknown option 'use_pe'; did you mean use_pes\?"):
        DAT(**SMALL, use_pe=[True] * 4)


def test_the_closest_known_name_is_suggested() -> None:
    known = {"adam": "Adam", "adamw": "AdamW"}
    assert did_you_mean("adamww", known) == "; did you mean adamw?"
    assert did_you_mean("adamww", known, shown=known) == "; did you mean AdamW?"
    assert did_you_mean("adamww", known, cutoff=1) == did_you_mean("sgd", known) == ""


def test_the_signature_shows_the_declared_options() -> None:
    parameters = inspect.signature(DAT).parameters
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert list(parameters) == [*DAT.options(), "use_checkpoint"]
    assert all(parameters[name].default == option.default for name, option in DAT.options().items())
    with pytest.raises(TypeError, match="positional"):
        DAT(224)


def test_rectangular_image_sizes_give_rectangular_tables() -> None:
    model = DAT(**{**SMALL, "img_size": [64, 96]}, stage_spec=["D"] * 4)
    assert model.stages[1].attns[0].rpe_table.shape == (2, 15, 23)
    assert model(torch.randn(1, 3, 64, 96)).isfinite().all()


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("use_conv_patches", [False, True])
def test_images_of_any_number_of_channels(in_chans: int, use_conv_patches: bool) -> None:
    options = {**SMALL, "in_chans": in_chans, "use_conv_patches": use_conv_patches}
    assert DAT(**options, stage_spec=["N"] * 4)(torch.randn(1, in_chans, 64, 64)).shape == (1, 10)


def test_no_classes_give_features() -> None:
    features = DAT(**{**SMALL, "num_classes": 0}, stage_spec=["N"] * 4)(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, 64)


def test_options_of_unused_letters_are_not_checked() -> None:
    DAT(**{**SMALL, "stage_spec": ["L"] * 4, "groups": [-1] * 4, "strides": [-1] * 4, "sr_ratios": [-1] * 4})


def test_strings_and_lists_of_letters_are_equivalent() -> None:
    options = {**SMALL, "depths": [2] * 4}
    one = DAT(**options, stage_spec=["ND", "ND", "LS", "DD"])
    other = DAT(**options, stage_spec=[["N", "D"], ["N", "D"], ["L", "S"], ["D", "D"]])
    assert one.state_dict().keys() == other.state_dict().keys()


@pytest.fixture
def toy_letter() -> Iterator[None]:
    """Register another letter, as a contributor would do in a new module."""

    class Toy(nn.Conv2d):
        def __init__(self, dim: int, kernel: int, cells: int) -> None:
            super().__init__(dim, dim, kernel, padding="same")
            self.table = nn.Parameter(torch.ones(1, cells, cells))

        def position_tables(self) -> dict[str, Resize]:
            return {"table": by_cells}

        def no_weight_decay(self) -> set[str]:
            return {"table"}

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.table.mean()

    register(
        "T",
        Mixer(
            build=lambda stage: Toy(stage["dims"], stage["toy_sizes"], stage.map_size[0]),
            options={"toy_sizes": StageOption((1, 3, 5, 7), "Kernel of T.", each=odd())},
            check=lambda stage: stage.divides("toy_sizes", "dims"),
        ),
    )
    yield
    del MIXERS["T"]


@pytest.mark.usefixtures("toy_letter")
def test_options_and_tables_of_a_new_letter_are_used() -> None:
    assert "toy_sizes" in inspect.signature(DAT).parameters
    model = DAT(**SMALL, stage_spec=["T"] * 4, toy_sizes=[1] * 4)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)
    with pytest.raises(ValueError, match=r"toy_sizes\[1\] = 4 must be odd for the blocks 'T'"):
        DAT(**SMALL, stage_spec=["T"] * 4, toy_sizes=[1, 4, 1, 1])
    with pytest.raises(ValueError, match=r"toy_sizes\[0\] = 3 does not divide dims\[0\] = 8"):
        DAT(**SMALL, stage_spec=["T"] * 4, toy_sizes=[3] * 4)
    DAT(**SMALL, stage_spec=["N"] * 4, toy_sizes=[4] * 4)
    assert "stages.1.attns.0.table" in no_weight_decay(model)
    larger = DAT(**{**SMALL, "img_size": 128}, stage_spec=["T"] * 4, toy_sizes=[1] * 4)
    _, report = adapt(model.state_dict(), larger)
    assert report.resized["stages.1.attns.0.table"] == ((1, 8, 8), (1, 16, 16))


def test_the_documentation_lists_the_declared_options() -> None:
    page = (Path(__file__).parents[2] / "docs/model.md").read_text(encoding="utf-8")
    table = as_table(DAT.options())
    if table not in page:  # an assertion would prefix each line, and the table could not be copied
        pytest.fail(f"docs/model.md should hold\n{table}", pytrace=False)


def test_numbers_of_numpy_are_taken() -> None:
    whole, real = np.int64, np.float32
    model = DAT(
        **{**SMALL, "img_size": whole(64), "num_classes": whole(5), "dims": [whole(dim) for dim in SMALL["dims"]]},
        stage_spec=["D"] * 4,
        drop_path_rate=real(0.5),
        layer_scale_values=[real(0.5)] * 4,
    )
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    assert {type(info["num_chs"]) for info in model.feature_info} == {int}
    assert model.stages[3].residuals[0].rate == 0.5
    values = complete({"img_size": [whole(64), 96]}, {"img_size": DAT.options()["img_size"]})
    assert [type(side) for side in values["img_size"]] == [int, int]
    assert [type(side) for side in as_pair(whole(8))] == [int, int]
    for wrong, words in (({"num_classes": real(5)}, "a whole number"), ({"drop_rate": "0.5"}, "a number")):
        with pytest.raises(ValueError, match=f"must be {words}"):
            DAT(**{**SMALL, "stage_spec": ["D"] * 4, **wrong})
