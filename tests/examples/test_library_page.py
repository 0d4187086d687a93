"""The code of docs/library.md runs, from its first block to its last."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

import models  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("output/finetune/pets")
    run.mkdir(parents=True)
    torch.save({"model": timm.create_model("dat_tiny").state_dict()}, "dat_pp_tiny_in1k_224.pth")
    torch.save({"model": timm.create_model("dat_tiny", num_classes=37).state_dict(), "epoch": 3}, run / "best.pth")
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8").replace("path/to/clone", str(ROOT))
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {"images": torch.rand(1, 3, 64, 64)}
    for block in blocks:  # here the package is called models, as in any clone
        exec(re.sub(r"\b(import|from) dat\b", r"\1 models", block), names)
    assert names["logits"].shape == (1, 37)
    assert [x.shape[1] for x in names["maps"]] == [128, 256, 512]
    assert names["backbone"].backbone.patch_proj[0].weight.equal(names["state"]["patch_proj.0.weight"])
    assert len({group["lr_scale"] for group in names["optimizer"].param_groups}) == 28  # stem, 26 blocks, head
