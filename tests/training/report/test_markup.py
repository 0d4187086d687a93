"""Self-contained HTML pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.report import markup


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    path.write_text("<style>{{style}}</style><h1>{{title}}</h1><p>{{summary}}</p>", encoding="utf-8")
    return path


def test_values_are_not_templates(template: Path) -> None:
    page = markup.fill(template, title="{{summary}}", summary="one image")
    assert page.endswith("</style><h1>{{summary}}</h1><p>one image</p>")
    assert "font-family" in page  # of the style


def test_every_place_of_a_template_gets_a_value(template: Path) -> None:
    with pytest.raises(AssertionError, match=r"page\.html"):
        markup.fill(template, title="")
