"""Contradictory options are refused with a message that names the value and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from models.dat import DAT
from tests.models.small import SMALL

WRONG = [
    ({"dims": [8, 16, 32]}, r"dims = \[8, 16, 32\] must be a list of 4 entries"),
    ({"stage_spec": "NDND"}, "stage_spec = 'NDND' must be a list of 4 entries"),
    ({"heads": 4}, "heads = 4 must be a list of 4 entries"),
    ({"dims": [8, 16, "32", 64]}, r"dims\[2\] = '32' must be of type int, not str"),
    ({"dims": [8, 16, 32.0, 64]}, r"dims\[2\] = 32.0 must be of type int, not float"),
    ({"heads": [1, True, 4, 8]}, r"heads\[1\] = True must be of type int, not bool"),
    ({"use_pes": [1, 1, 1, 1]}, r"use_pes\[0\] = 1 must be of type bool, not int"),
    ({"stage_spec": [["D"], ["D"], 5, ["D"]]}, r"stage_spec\[2\] = 5 must be letters, such as 'ND'"),
    ({"stage_spec": ["D", "Z", "D", "D"]}, r"stage_spec\[1\] = 'Z' holds 'Z'; the letters are L, S, D, N, P, Q, X, E"),
    ({"depths": [1, 2, 1, 1]}, r"stage_spec\[1\] = 'D' does not name as many blocks as depths\[1\] = 2"),
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
    ({"img_size": 0}, "img_size = 0 must be a whole number of at least 1"),
    ({"num_classes": 0}, "num_classes = 0 must be a whole number of at least 1"),
    ({"expansion": 2.5}, "expansion = 2.5 must be a whole number"),
    ({"patch_size": 3, "img_size": 96}, "patch_size = 3 and dim_stem = 8 must both be even"),
    ({"drop_path_rate": 1.0}, r"drop_path_rate = 1.0 must be a number in \[0, 1\)"),
    ({"drop_rate": -0.1}, r"drop_rate = -0.1 must be a number in \[0, 1\)"),
    ({"coordinates": "dat"}, r"coordinates = 'dat' is unknown; choose one of dat\+\+, cvpr22"),
    ({"qna_activation": "relu"}, "qna_activation = 'relu' is unknown; choose one of exp, sigmoid, linear"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DAT(**{**SMALL, "stage_spec": ["D"] * 4, **options})


def test_misspelt_option_is_refused() -> None:
    with pytest.raises(TypeError, match="use_pe"):
        DAT(**SMALL, use_pe=[True] * 4)


def test_options_of_absent_letters_do_not_matter() -> None:
    DAT(**{**SMALL, "stage_spec": ["L"] * 4, "groups": [-1] * 4, "strides": [-1] * 4, "sr_ratios": [-1] * 4})


def test_strings_and_lists_of_letters_are_the_same() -> None:
    options = {**SMALL, "depths": [2] * 4}
    one = DAT(**options, stage_spec=["ND", "ND", "LS", "DD"])
    other = DAT(**options, stage_spec=[["N", "D"], ["N", "D"], ["L", "S"], ["D", "D"]])
    assert one.state_dict().keys() == other.state_dict().keys()
