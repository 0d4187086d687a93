"""The Python code of README and docs runs, block by block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

from config import load_config
from models.build import set_num_classes
from tests.test_docs import ROOT, blocks

CODE: dict[Path, list[str]] = {}
for page, block in blocks("python"):
    CODE.setdefault(page, []).append(block)
CLASSES = 37


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files that the pages name: configs, published weights, and a checkpoint of a run."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "configs").symlink_to(ROOT / "configs")
    torch.save({"model": timm.create_model("dat_tiny").state_dict()}, folder / "dat_pp_tiny_in1k_224.pth")
    config = load_config(ROOT / "configs" / "finetune.yaml")
    set_num_classes(config, CLASSES)
    checkpoint = {
        "format": 1,
        "model": timm.create_model("dat_tiny", num_classes=CLASSES).state_dict(),
        "ema": None,
        "classes": [f"pet {i}" for i in range(CLASSES)],
        "config": config.dump(),
    }
    run = folder / "output" / "finetune" / "pets"
    run.mkdir(parents=True)
    torch.save(checkpoint, run / "best.pth")
    return folder


def run_code(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Run the blocks of a page in a folder, and return the names they define."""
    monkeypatch.chdir(folder)
    names = {"images": torch.rand(1, 3, 64, 64)}
    for block in CODE[ROOT / page]:  # in a clone the package dat is called models
        code = re.sub(r"\b(import|from) dat\b", r"\1 models", block.replace("path/to/clone", str(ROOT)))
        exec(compile(code, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in CODE])
def test_the_code_of_a_page_runs(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_code(page, folder, monkeypatch)
    if page == "README.md":
        assert names["names"][0].startswith("pet ")
        assert [x.shape[1] for x in names["maps"]] == [128, 256, 512, 1024]
    elif page == "docs/library.md":
        assert names["logits"].shape == (1, CLASSES)
        assert len({group["lr_scale"] for group in names["optimizer"].param_groups}) == 28  # stem, 26 blocks, head
    elif page == "docs/backbones.md":
        assert [x.shape[1] for x in names["maps"]] == [128, 256, 512]
        assert names["backbone"].backbone.patch_proj[0].weight.equal(names["state"]["patch_proj.0.weight"])
