"""The wheel: its contents, and that it works outside the repository."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import models
from models.registry import CONFIGS
from tests.test_imports import imports_of, tops_of

ROOT = Path(__file__).resolve().parents[1]
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")
# Run in a folder outside the repository, with an interpreter that has the wheel.
SCRIPT = """
import json, sys
import timm, torch
import dat
from dat.backbone import DATBackbone

assert not {"models", "configs", "config", "data", "tasks", "training", "utils"} & sys.modules.keys()
assert "dat.detection" not in sys.modules
small = {"dims": [8, 16, 32, 64], "dim_stem": 8, "heads": [1, 2, 4, 8], "groups": [1, 1, 2, 4]}
model = timm.create_model("dat_tiny.in1k", num_classes=5, **small)
model(torch.rand(1, 3, 64, 64)).sum().backward()
maps = timm.create_model("dat_cvpr22_tiny", features_only=True)(torch.rand(1, 3, 64, 64))
print(json.dumps({
    "file": dat.__file__,
    "version": dat.__version__,
    "names": timm.list_models("dat_*", include_tags=True),
    "strides": [64 // x.shape[-1] for x in maps],
    "channels": DATBackbone(**small).channels,
}))
"""

# Run by the same interpreter, with the clone to be found, too: both have their operators.
BOTH = """
import torch
import dat.ops.multi_scale, models.ops.multi_scale

value, places, weights = torch.rand(1, 6, 2, 4), torch.rand(1, 3, 2, 1, 2, 2), torch.rand(1, 3, 2, 1, 2)
arguments = value.requires_grad_(), [(2, 3)], [0], places, weights
first, second, again = (
    package.ops.multi_scale.ms_deform_attn(*arguments, form="op") for package in (dat, models, dat)
)
assert torch.equal(first, second) and torch.equal(first, again)
(first + second + again).sum().backward()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel, built from a copy of the tree."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("models", "configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=IGNORED)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist"]
    built = subprocess.run([*command, folder / "source"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.mark.xdist_group("wheel")
def test_wheel_contains_only_models_and_configs(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    info = next(name.partition("/")[0] for name in files if name.endswith(".dist-info/METADATA"))
    own = {name for name in files if not name.startswith(info)}
    code = {f"dat/{path.relative_to(ROOT / 'models').as_posix()}" for path in (ROOT / "models").rglob("*.py")}
    configs = {f"dat/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert own == code | configs | {"dat/py.typed"}
    assert {f"{info}/licenses/LICENSE"} <= files


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    """Return the metadata of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


@pytest.mark.xdist_group("wheel")
def test_package_and_wheel_have_the_same_version(metadata: Message) -> None:
    assert models.__version__ == metadata["Version"]


@pytest.mark.xdist_group("wheel")
def test_requirements_of_the_wheel_match_the_tested_versions(metadata: Message) -> None:
    tested = set((ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n"))
    needed = {re.split(r" *;", requirement)[0] for requirement in metadata.get_all("Requires-Dist")}
    assert needed <= tested
    assert {"huggingface", "detection", "segmentation", "export"} == set(metadata.get_all("Provides-Extra"))


def test_importing_the_package_needs_only_its_dependencies() -> None:
    waiting, seen, needed = ["models"], set(), set()
    while waiting:
        name = waiting.pop()
        place = ROOT.joinpath(*name.split("."))
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if name in seen or not path.is_file():  # a name in a module
            continue
        seen.add(name)
        # With a module, Python imports the packages that it is in.
        waiting += [name.rpartition(".")[0], *(other for other in imports_of(path) if other.startswith("models"))]
        needed |= tops_of(path)
    assert "models.dat" in seen
    optional = {"triton", "natten"}  # imported when they are used
    assert needed - sys.stdlib_module_names - optional == {"models", "torch", "timm", "einops", "yaml"}


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_the_wheel_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "fresh"], check=True)
    python = tmp_path / "fresh" / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", wheel]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    fresh = Path(subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip())
    # torch and timm are borrowed from here: a fresh copy takes 6 GB and a network.
    (fresh / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    done = subprocess.run([python, "-I", "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["file"] == str(fresh / "dat" / "__init__.py")
    assert found["version"] == models.__version__
    assert found["names"] == sorted(CONFIGS)
    assert found["strides"] == [4, 8, 16, 32]
    assert found["channels"] == [8, 16, 32, 64]
    both = f"import sys; sys.path.append({str(ROOT)!r})\n{BOTH}"
    done = subprocess.run([python, "-I", "-c", both], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
