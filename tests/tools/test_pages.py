"""Self-contained HTML pages."""

from __future__ import annotations

import pytest

from tools import pages


def test_values_are_not_templates() -> None:
    page = pages.fill("predict.html", title="{{summary}}", summary="one image", images="{{title}}", unreadable="")
    assert "<title>{{summary}}</title>" in page
    assert page.count("one image") == 1


def test_every_place_of_a_template_gets_a_value() -> None:
    with pytest.raises(AssertionError, match=r"predict\.html"):
        pages.fill("predict.html", title="", summary="", images="")
