"""Wrong input of every kind: one line with the fault and what to do, exit status 2, and no files."""

from __future__ import annotations

import logging
import os
import pickle
import re
import sys
import tarfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from yacs.config import CfgNode

import main
from data.formats.tar import open_tar
from data.sources import Request
from tests.data.detection.samples import row, write_coco, write_instances
from tests.data.formats.writers import add_bytes, write_shards, write_tar
from tests.data.samples import write_folder
from tests.data.segmentation.samples import write_masks
from tests.launched import run_forked
from tests.runs import ROOT, run_command, write_config
from utils import StopSignal

pytestmark = pytest.mark.xdist_group("wrong input")  # which share one run

PHOTOS = {"train/cat": 4, "train/dog": 4, "val/cat": 2, "val/dog": 2}
DATA = {"DATASET": "imagenet", "DATA_PATH": "photos", "BATCH_SIZE": 2, "NUM_WORKERS": 0}
LAYOUT = r"the layout is DATA_PATH/train/<class>/\*\.jpg and DATA_PATH/val/<class>/\*\.jpg"
WITHOUT_STATE = "has no training state that can be resumed; to start from its weights use --pretrained"


@dataclass(kw_only=True)
class Wrong:
    """A wrong input: flags or a whole command line, files, or sections merged over a valid config."""

    name: str
    says: str
    flags: Sequence[str] = ()
    argv: Sequence[str] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str | bytes] = field(default_factory=dict)
    prepare: Callable[[], Any] | None = None

    def command(self) -> list[str]:
        """Write what the row needs into the current folder and return the command line."""
        for name, content in self.files.items():
            Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        if self.prepare:
            self.prepare()
        if self.argv is not None:
            return list(self.argv)
        data = {**DATA, **self.config.get("DATA", {})}
        config = write_config(Path(), **{"OUTPUT": "out", **self.config, "DATA": data})
        return ["--cfg", str(config), *self.flags]


def dat(name: str, says: str, **options: Any) -> Wrong:
    """Return a row of wrong options of the network."""
    return Wrong(name=f"network: {name}", says=says, config={"MODEL": {"DAT": options}})


def opts(name: str, key: str, value: str, says: str) -> Wrong:
    """Return a row of a wrong option on the command line."""
    return Wrong(name=f"option: {name}", says=says, flags=("--opts", key, value))


def text(name: str, content: str | bytes, says: str) -> Wrong:
    """Return a row of a wrong config file."""
    return Wrong(name=f"config file: {name}", says=says, argv=("--cfg", "wrong.yaml"), files={"wrong.yaml": content})


def folder(name: str, layout: dict[str, int], says: str, prepare: Callable[[Path], Any] | None = None) -> Wrong:
    """Return a row of a data folder with a wrong layout."""

    def write() -> None:
        Path("wrong").mkdir()
        write_folder(Path("wrong"), layout)
        if prepare:
            prepare(Path("wrong"))

    return Wrong(name=f"data: {name}", says=says, flags=("--data-path", "wrong"), prepare=write)


def table(name: str, content: str | bytes, says: str) -> Wrong:
    """Return a row of a wrong table of training images with a valid one of held-out images."""

    def write() -> None:
        Path("wrong").mkdir()
        Path("wrong/photos").symlink_to(Path("photos").absolute())
        Path("wrong/train.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        Path("wrong/val.csv").write_text("photos/val/cat/0.jpg,cat\n")

    config = {"DATA": {"DATASET": "csv", "DATA_PATH": "wrong"}}
    return Wrong(name=f"data: table, {name}", says=says, config=config, prepare=write)


def archive(
    name: str, damage: Callable[[Path], Any], says: str, pack: Callable[[Path, Path], Path] = write_tar
) -> Wrong:
    """Return a row of valid archives after `damage`."""

    def write() -> None:
        damage(pack(Path("photos"), Path("wrong")))

    config = {"DATA": {"DATASET": "tar", "DATA_PATH": "wrong"}}
    return Wrong(name=f"data: archive, {name}", says=says, config=config, prepare=write)


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    """Rewrite a file."""
    path.write_bytes(edit(path.read_bytes()))


def repack(path: Path, edit: Callable[[str, bytes], tuple[str, bytes]]) -> None:
    """Rewrite an archive with changed names or contents of its members."""
    with tarfile.open(path) as archive:
        members = [edit(member.name, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(path, "w") as archive:
        for member in members:
            add_bytes(archive, *member)


def index(root: Path) -> None:
    """Write the indexes of archives like an earlier run."""
    with suppress(ValueError):
        open_tar(Request(path=str(root)))


def swap(root: Path) -> None:
    """Exchange the names of two archives."""
    (root / "val.tar").rename(root / "other")
    (root / "train.tar").rename(root / "val.tar")
    (root / "other").rename(root / "train.tar")


def annotated(name: str, says: str, damage: Callable[[Path], Any] = lambda root: None, **model: Any) -> Wrong:
    """Return a row of a detector on a valid data set in the layout of COCO after `damage`."""
    config = {"TASK": "detection", "DATA": {"DATASET": "coco", "DATA_PATH": "wrong"}, "MODEL": {"DETECTOR": model}}
    return Wrong(
        name=f"data: detection, {name}", says=says, config=config, prepare=lambda: damage(write_coco(Path("wrong")))
    )


def without_boxes(root: Path, category: int = 7, width: int = 0) -> None:
    """Leave one annotation of the training part, without an area."""
    images = [{"id": 1, "file_name": "0.png", "height": 32, "width": 40}]
    write_instances(root, "train", images, [row(5, 1, category, [3, 3, width, 4])])


def repeat_an_id(root: Path) -> None:
    """Give two held-out images one id."""
    images = [{"id": 1, "file_name": f"{number}.png", "height": 32, "width": 40} for number in range(2)]
    write_instances(root, "val", images, [row(5, 1, 7, [3, 3, 6, 4])])


def masked(name: str, says: str, damage: Callable[[Path], Any]) -> Wrong:
    """Return a row of a segmenter on valid images and masks after `damage`."""
    config = {"TASK": "segmentation", "DATA": {"DATASET": "masks", "DATA_PATH": "wrong"}}
    return Wrong(
        name=f"data: segmentation, {name}", says=says, config=config, prepare=lambda: damage(write_masks(Path("wrong")))
    )


def weights(name: str, write: Callable[[], Any], says: str, *flags: str) -> Wrong:
    """Return a row of a wrong checkpoint, which `write` makes out of trained.pth."""
    return Wrong(name=f"checkpoint: {name}", says=says, flags=flags, prepare=write)


def trained(**changes: Any) -> dict[str, Any]:
    """Return the content of trained.pth with changes."""
    return torch.load("trained.pth", weights_only=True) | changes


def save(content: Any) -> None:
    """Write a checkpoint."""
    torch.save(content, "wrong.pth")


def optimizer_of(value: Any) -> dict[str, Any]:
    """Return the state of the optimizer in trained.pth with one value replaced."""
    optimizer = trained()["optimizer"]
    next(iter(optimizer["state"].values()))["exp_avg"] = value
    return optimizer


class Hostile:
    """Runs a shell command when unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch victim",)


ROWS = [
    # The command line.
    Wrong(name="flag: no config", argv=(), says="no config given; pass one as --cfg FILE, such as configs/digits.yaml"),
    Wrong(
        name="flag: misspelt", flags=("--batchsize", "4"), says="unknown argument --batchsize; did you mean --batch-s"
    ),
    Wrong(
        name="flag: --cfg misspelt", argv=("--cgf", "tiny.yaml"), says=r"unknown argument --cgf; did you mean --cfg\?"
    ),
    Wrong(name="flag: unlike any", flags=("--quick",), says="unknown argument --quick; options .* by --opts KEY VALUE"),
    Wrong(name="flag: no flag", flags=("fast",), says="unknown argument fast; options of config.py are set by --opts"),
    Wrong(
        name="flag: no value", flags=("--batch-size",), says="argument --batch-size: expected one argument; see pyth"
    ),
    Wrong(name="flag: empty", flags=("--resume", ""), says="--resume is empty; give it a value or leave it out"),
    Wrong(name="flag: needless value", flags=("--ema=yes",), says="argument --ema: ignored explicit argument 'yes'"),
    Wrong(name="flag: two modes", flags=("--eval", "--throughput"), says="--throughput: not allowed with .* --eval"),
    Wrong(
        name="flag: text for a number", flags=("--seed", "x"), says="SEED must be a whole number, such as 0, not 'x'"
    ),
    Wrong(name="flag: --amp", flags=("--amp", "fp32"), says="AMP must be one of off, fp16, bf16, auto, not 'fp32'"),
    Wrong(name="flag: --device", flags=("--device", "cuda:0"), says=r"DEVICE must be one of .*did you mean cuda\?"),
    Wrong(name="flag: --tag", flags=("--tag", "a/b"), says="TAG must be a folder name without a path, .*, not 'a/b'"),
    Wrong(name="flag: --tag of a device", flags=("--tag", "CON"), says="not one that Windows reserves, not 'CON'"),
    Wrong(
        name="flag: of another trainer", flags=("--learning-rate", "1"), says=r"--learning-rate; did you mean --lr\?"
    ),
    Wrong(
        name="flag: of an option without one",
        flags=("--optimizer", "sgd"),
        says=r"unknown argument --optimizer; did you mean --opts TRAIN.OPTIMIZER.NAME VALUE\?",
    ),
    Wrong(
        name="flag: --weights",
        flags=("--weights", "best"),
        says="MODEL.WEIGHTS must be one of '', raw, ema, not 'best'",
    ),
    Wrong(name="flag: --weights without a file", flags=("--weights", "ema"), says="--weights needs .*--pretrained"),
    Wrong(
        name="flag: no checkpoint to evaluate", flags=("--eval",), says="--eval needs a checkpoint: pass .* --resume"
    ),
    Wrong(name="flag: --opts without value", flags=("--opts", "SEED"), says="pairs of KEY VALUE; 'SEED' has no value"),
    Wrong(
        name="flag: second --opts without value",
        flags=("--opts", "SEED", "1", "--opts", "TAG"),
        says="'TAG' has no value",
    ),
    # Options.
    opts("misspelt", "TRAIN.EPOCH", "1", r"unknown option TRAIN.EPOCH; did you mean TRAIN.EPOCHS\?"),
    opts("without its section", "EPOCHS", "1", r"unknown option EPOCHS; did you mean TRAIN.EPOCHS\?"),
    opts("in small letters", "train.epochs", "1", r"unknown option train.epochs; did you mean TRAIN.EPOCHS\?"),
    opts("unlike any", "QUICKLY", "1", "unknown option QUICKLY; config.py lists all options"),
    opts(
        "frozen part", "TRAIN.FREEZE", "[patch_prj]", "TRAIN.FREEZE: the network has no part named 'patch_prj'; did you"
    ),
    opts("image without sides", "DATA.IMG_SIZE", "[]", r"DATA.IMG_SIZE must be a number of pixels, at least 1, or"),
    opts("one side of a crop", "DETECTION.CROP", "[384]", r"DETECTION.CROP must be two positive whole numbers"),
    opts(
        "sides of a crop swapped", "DETECTION.CROP", "[600,384]", r"DETECTION.CROP must be two positive whole numbers"
    ),
    opts("no short side", "DETECTION.SHORT_SIDES", "[]", "DETECTION.SHORT_SIDES must be a list of positive whole"),
    opts(
        "another optimizer's", "TRAIN.OPTIMIZER.MOMENTUM", "0.8", "TRAIN.OPTIMIZER.MOMENTUM is only for sgd; remove it"
    ),
    opts(
        "teacher missing",
        "DISTILL.KIND",
        "hard",
        "DISTILL.KIND is not supported by a run without a teacher; leave it at",
    ),
    opts("rewarm", "TRAIN.LR_SCHEDULER.AFTER", "rewarm", "is not supported by a run without .*PLANNED_EPOCHS; leave"),
    Wrong(
        name="option: temperature of classes",
        flags=("--teacher", "trained.pth", "--opts", "DISTILL.KIND", "hard", "DISTILL.TEMPERATURE", "2"),
        says="DISTILL.TEMPERATURE is not supported by DISTILL.KIND hard; leave it at 1.0",
    ),
    opts("model of timm", "MODEL.TIMM.NAME", "resnet18", "MODEL.TIMM.NAME resnet18 is for MODEL.TYPE timm, not dat; "),
    Wrong(
        name="option: another type than --model",
        flags=("--model", "resnet18", "--opts", "MODEL.TYPE", "dat"),
        says="MODEL.TIMM.NAME resnet18 is for MODEL.TYPE timm, not dat; set that type, as --model does, or remove",
    ),
    Wrong(
        name="option: weights of timm",
        flags=("--model", "resnet50.a1_in1kk"),
        says=r"timm's resnet50 has no weights 'a1_in1kk'; did you mean resnet50\.a1_in1k\?",
    ),
    Wrong(
        name="option: weights of timm's backbones",
        config={"TASK": "detection", "DATA": {"DATASET": "digit_scenes", "DATA_PATH": ""}},
        flags=("--model", "test_resnet.zzz"),
        says=r"timm's test_resnet has no weights 'zzz'; use one of test_resnet, test_resnet\.",
    ),
    opts("recorder", "LOG.TO", "[wandbb]", "LOG.TO must be a list of tensorboard, wandb and mlflow, not"),
    opts(
        "sides",
        "DATA.IMG_SIZE",
        "[32]",
        r"DATA.IMG_SIZE must be a number of pixels, at least 1, or \[height, width\], not",
    ),
    opts("below an option", "TAG.NAME", "1", "unknown option TAG.NAME; "),
    opts("section", "TRAIN", "1", "TRAIN is a section; set one of its options, such as TRAIN.EPOCHS"),
    opts("BASE", "BASE", "x.yaml", "BASE is only allowed in a config file"),
    opts("no YAML", "TRAIN.EPOCHS", "[1", r"TRAIN.EPOCHS: '\[1' is not valid YAML; write lists as"),
    opts("text for a number", "TRAIN.BASE_LR", "high", "TRAIN.BASE_LR must be a number, such as 0.0005, not 'high'"),
    opts("fraction of an epoch", "TRAIN.EPOCHS", "1.5", "TRAIN.EPOCHS must be a whole number, such as 300, not 1.5"),
    opts("nothing", "TRAIN.EPOCHS", "", "TRAIN.EPOCHS must be a whole number, .*; give it a value or remove the line"),
    opts("number for a switch", "TEST.CROP", "1", "TEST.CROP must be true or false, such as True, not 1"),
    opts("number for a list", "AUG.SCALE", "0.5", r"AUG.SCALE must be a list, such as \[0.08, 1.0\], not 0.5"),
    opts("nan", "TRAIN.BASE_LR", "nan", "TRAIN.BASE_LR must be a finite number, such as 0.0005, not nan"),
    opts("infinite", "TRAIN.CLIP_GRAD", "inf", "TRAIN.CLIP_GRAD must be a finite number, such as 5.0, not inf"),
    opts("huge", "TRAIN.EPOCHS", "9" * 20, r"TRAIN.EPOCHS must be below 2\^31, not 99999999999999999999"),
    opts("negative", "TRAIN.WEIGHT_DECAY", "-1", "TRAIN.WEIGHT_DECAY must be 0 or more, not -1"),
    opts("zero", "DATA.BATCH_SIZE", "0", "DATA.BATCH_SIZE must be at least 1, not 0"),
    opts("no probability", "AUG.REPROB", "2", "AUG.REPROB must be between 0 and 1, not 2"),
    opts("no optimizer", "TRAIN.OPTIMIZER.NAME", "adamv", r"there is no optimizer 'adamv'; did you mean adam"),
    opts("length of a pair", "AUG.RATIO", "[1]", r"AUG.RATIO must be two numbers \[smallest, largest\], above 0, not"),
    opts("order of a pair", "AUG.SCALE", "[1, 0.5]", r"two numbers \[smallest, largest\], above 0 and at most 1, not"),
    opts("entry of a pair", "AUG.SCALE", "[a, b]", r"AUG.SCALE\[0\] must be a number, such as 0.08, not 'a'"),
    opts("betas", "TRAIN.OPTIMIZER.BETAS", "[0.9, 1]", "BETAS must be two numbers from 0 to below 1, not"),
    opts("augmentation", "AUG.AUTO_AUGMENT", "rand-x9", "'rand-x9' is not a policy of timm; use one such as rand-m9-"),
    opts("control character", "OUTPUT", "a\nb", r"OUTPUT must be one line of text .*, not 'a\\nb'"),
    opts("no name", "TAG", "..", r"TAG must be a folder name without a path, .*, not '\.\.'"),
    opts("class map without weights", "MODEL.CLASS_MAP", "map.txt", "MODEL.CLASS_MAP needs .*--pretrained"),
    # The network.
    dat("three dims", r"dims = \[8, 16, 16\] must be a list of 4 entries, one per stage", dims=[8, 16, 16]),
    dat("no list", r"MODEL.DAT.dims must be a list, such as \[96, 192, 384, 768\], not 8", dims=8),
    dat(
        "letters as dims", r"MODEL.DAT.dims\[0\] must be a whole number, such as 96, not 'a'", dims=["a", "b", "c", "d"]
    ),
    dat("nested dims", r"MODEL.DAT.dims\[0\] must be a whole number, such as 96, not \[8\]", dims=[[8], [8], [8], [8]]),
    dat("negative dims", r"dims\[0\] = -8 must be at least 1", dims=[-8, 16, 16, 16]),
    dat("heads", r"heads\[1\] = 3 does not divide dims\[1\] = 16; change one of them", heads=[1, 3, 2, 2]),
    dat("groups", r"groups\[1\] = 3 does not divide heads\[1\] = 2; change one of them", groups=[1, 3, 1, 1]),
    dat(
        "letter", r"stage_spec\[0\] = 'Z' contains 'Z'; the letters are D, E, L, N, P, Q, S, X", stage_spec=list("ZDDD")
    ),
    dat(
        "letters and depth",
        r"stage_spec\[0\] = 'ND' must have one letter per block; depths\[0\]",
        stage_spec=["ND", *"DDD"],
    ),
    dat("no letters", r"stage_spec\[0\] = 1 must be letters, such as 'ND'", stage_spec=[1, 2, 3, 4]),
    dat(
        "even kernel",
        r"window_sizes\[0\] = 4 must be odd for the blocks 'X'",
        stage_spec=list("XDDD"),
        window_sizes=[4] * 4,
    ),
    dat("even window", r"nat_ksizes\[0\] = 4 must be odd for the blocks 'N'", nat_ksizes=[4, 3, 3, 3]),
    dat("rate", r"drop_path_rate.* must be a number in \[0, 1\)", drop_path_rate=1.0),
    dat("coordinates", r"coordinates.* must be one of dat\+\+, cvpr22", coordinates="dat"),
    dat("image", "img_size = 16 leaves no pixel for the last stage; choose at least 32", img_size=16),
    Wrong(
        name="network: size of the images",
        config={"DATA": {"IMG_SIZE": 16}, "MODEL": {"DAT": {"use_conv_patches": False}}},
        says="DATA.IMG_SIZE = 16 leaves no pixel for the last stage; give at least 32",
    ),
    dat("misspelt", r"unknown option MODEL.DAT.dim; did you mean MODEL.DAT.dims\?", dim=[8, 16, 16, 16]),
    # Config files.
    Wrong(
        name="config file: missing",
        argv=("--cfg", str(ROOT / "configs/dat_tinny.yaml")),
        says=r"config file .*dat_tinny.yaml does not exist; did you mean .*configs/dat_tiny.yaml\?",
    ),
    Wrong(
        name="config file: only its name",
        argv=("--cfg", "dat_tiny"),
        says=r"config file .*dat_tiny does not exist; did you mean .*configs/dat_tiny.yaml\?",
    ),
    Wrong(
        name="config file: folder", argv=("--cfg", "photos"), says="config file .*photos is a folder; name a file in"
    ),
    Wrong(name="config file: name too long", argv=("--cfg", "x" * 300), says="File name too long: '.*xxx"),
    text("empty", "", "wrong.yaml has no options; write them as KEY: value, as in configs/dat_tiny.yaml"),
    text("list", "- DATA", "wrong.yaml has no options"),
    text("no YAML", "DATA: [", "wrong.yaml cannot be read as YAML: .* line 1"),
    text("tabs", "DATA:\n\tBATCH_SIZE: 2", r"wrong.yaml cannot be read as YAML: .*'\\t'.* line 2"),
    text("no text", b"\xff\xfe\x00", "wrong.yaml cannot be read as YAML: .*utf-8"),
    text("Python", "TAG: !!python/object/apply:os.system [id]", "cannot be read as YAML: could not determine"),
    text("deeply nested", "[" * 5000, "cannot be read as YAML: maximum recursion depth"),
    text("key twice", "TAG: a\nTAG: b", "TAG is set twice in the section that starts in line 1"),
    text("key", "DATA: {BATCHSIZE: 2}", r"wrong.yaml: unknown option DATA.BATCHSIZE; did you mean DATA.BATCH_SIZE\?"),
    text("number as key", "1: 2", "wrong.yaml: unknown option 1; config.py lists all options"),
    text("no section", "DATA: 5", "wrong.yaml: DATA is a section, not 5; its options go below it, indented"),
    text("empty section", "DATA:", "wrong.yaml: DATA is a section, not None; its options go below it, indented"),
    text("number for text", "TAG: 5", "wrong.yaml: TAG must be text, such as 'default', not 5; put it in quotes"),
    text("circle", "BASE: wrong.yaml", "BASE of .*wrong.yaml leads back to itself; remove the cycle"),
    text("missing BASE", "BASE: other.yaml", "config file .*other.yaml does not exist"),
    text("number as BASE", "BASE: 5", "wrong.yaml: BASE must be the name of a config file, or a list of names, not 5"),
    # Data sets.
    Wrong(
        name="data: none", config={"DATA": {"DATA_PATH": ""}}, says="no data set given; pass --data-path FOLDER or set"
    ),
    Wrong(
        name="data: missing folder",
        flags=("--data-path", "nowhere"),
        says=f"cannot read folder nowhere: No such file or directory; {LAYOUT}",
    ),
    Wrong(
        name="data: file", flags=("--data-path", "trained.pth"), says="cannot read folder trained.pth: Not a directory"
    ),
    Wrong(
        name="data: unknown user", flags=("--data-path", "~nobody-here/x"), says="there is no such user; give the fu"
    ),
    Wrong(
        name="data: split of the digits",
        config={"DATA": {"DATASET": "digits", "DATA_PATH": "", "VAL": "test"}},
        says="DATA.DATASET digits has fixed splits; remove DATA.TRAIN and DATA.VAL",
    ),
    Wrong(
        name="data: folder for the digits",
        config={"DATA": {"DATASET": "digits"}},
        says="the digits are part of scikit-learn and take no --data-path; .*, add --opts DATA.DATASET imagenet",
    ),
    folder("empty folder", {}, f"no folder 'train' in data path wrong: it contains no folders; {LAYOUT}"),
    folder("no train", {"val/cat": 1}, f"no folder 'train' in data path wrong: it contains val; {LAYOUT}"),
    folder("no val", {"train/cat": 4}, f"no folder 'val' in data path wrong: it contains train; {LAYOUT}"),
    folder("classes without train and val", {"cat": 4, "dog": 4}, "no folder 'train' .*: it contains cat, dog;"),
    folder("images without classes", {"train": 4, "val": 2}, f"no class folders in wrong/train; {LAYOUT}"),
    folder(
        "class without images", {"train/cat": 4, "train/dog": 0, "val/cat": 2}, "no images in wrong/train/dog; add so"
    ),
    folder(
        "class of other files",
        {"train/cat": 4, "val/cat": 0},
        r"no images in wrong/val/cat; .*images end in \.jpg",
        lambda root: (root / "val/cat/notes.txt").write_text("no image"),
    ),
    folder(
        "class of val alone",
        {"train/cat": 4, "val/cow": 2},
        "wrong/val has classes that wrong/train does not have: cow; ",
    ),
    folder(
        "link to nothing",
        {"train/cat": 4, "val/cat": 2},
        "wrong/train/dog is a broken link; repair or remove it",
        lambda root: (root / "train/dog").symlink_to("nowhere"),
    ),
    folder("line break in a name", {"train/cat": 4, "val/c\now": 2}, r"wrong/train does not have: c\\now; "),
    Wrong(
        name="data: batch larger than the data set",
        flags=("--batch-size", "16"),
        says="one update needs .* training images, .*, and there are 8; reduce --batch-size, --accumulation-steps or",
    ),
    Wrong(
        name="data: odd batch with mixup",
        flags=("--batch-size", "3"),
        config={"AUG": {"MIXUP": 0.8}},
        says="DATA.BATCH_SIZE must be even for mixup and cutmix, not 3; .*AUG.MIXUP 0 AUG.CUTMIX 0",
    ),
    Wrong(
        name="data: unreadable image in evaluation",
        flags=("--data-path", "wrong", "--eval", "--resume", "trained.pth"),
        prepare=lambda: (write_folder(Path("wrong"), PHOTOS) / "val/dog/1.jpg").write_text("no image"),
        says="cannot read image 'wrong/val/dog/1.jpg': cannot identify image file",
    ),
    table(
        "missing file",
        "photos/train/cat/0.jpg,cat\ngone.jpg,cat\n",
        r"wrong/train.csv, line 2: there is no file wrong/",
    ),
    table("label out of range", "photos/train/cat/0.jpg,-1\n", "wrong/train.csv, line 1: label -1 is out of range; "),
    table(
        "label of another encoding",
        b"photos/train/cat/0.jpg,K\xe4tzchen\n",
        r"wrong/train.csv, line 1: label 'K\\udce4tzchen' is not UTF-8 text; save the table as UTF-8",
    ),
    table(
        "folder for a file", "photos/train/cat,cat\n", r"wrong/train.csv, line 1: there is no file .*/train/cat; paths"
    ),
    table(
        "no file of all", "a.jpg,cat\nb.jpg,dog\n", r"line 1: there is no file wrong/a\.jpg, nor those of 1 more line"
    ),
    table("empty label", "photos/train/cat/0.jpg,cat\nphotos/train/dog/0.jpg,\n", "line 2: the label is empty; give"),
    table("huge label", "photos/train/cat/0.jpg,7000\n", "line 1: label 7000 is out of range; labels count from 0"),
    table(
        "classes in other letters",
        "photos/train/cat/0.jpg,Cat\n",
        r"has classes that .* does not have: cat \(train has Cat\)",
    ),
    table("text in UTF-16", "a\0,\0b\0\n", "table wrong/train.csv is not UTF-8 text; convert it"),
    table(
        "other classes", "photos/train/cat/0.jpg,emu\n", "wrong/val.csv has classes that .*train.csv does not have: cat"
    ),
    archive(
        "cut off",
        lambda root: (root / "train.tar").write_bytes((root / "train.tar").read_bytes()[:4000]),
        r"archive wrong/train\.tar is truncated or damaged .*; copy it again",
    ),
    archive(
        "stale index",
        lambda root: (index(root), (root / "train.tar").open("ab").write(bytes(512))),
        r"index wrong/train\.index does not match the archives: train\.tar had \d+ bytes and has \d+; ",
    ),
    archive(
        "shard missing",
        lambda root: ((root / "train.tar").rename(root / "train-3.tar"), (root / "train-1.tar").touch()),
        "shard 2 missing next to wrong/train-1.tar and train-3.tar; copy again what is missing",
    ),
    archive(
        "without its end",
        lambda root: change(root / "train.tar", lambda content: content.rstrip(b"\0") + bytes(200)),
        r"archive wrong/train\.tar is truncated or damaged .*; copy it again",
    ),
    archive(
        "space of what was not copied",
        lambda root: change(root / "train.tar", lambda content: content + bytes(2**21)),
        r"archive wrong/train\.tar is truncated or damaged \(it ends after \d+ of \d+ bytes\); copy it again",
    ),
    archive(
        "several in a row",
        lambda root: change(root / "train.tar", lambda content: content + content),
        r"archive wrong/train\.tar has data after its end: several archives were joined, or it is damaged; use",
    ),
    archive(
        "index of another program",
        lambda root: (root / "train.index").write_text("dat listing 1\n{}\n"),
        r"index wrong/train\.index is damaged or not an index; delete it to rebuild it",
    ),
    archive(
        "index of members of other names",
        lambda root: (
            repack(root / "train.tar", lambda *member: member),
            index(root),
            repack(root / "train.tar", lambda name, content: (name.replace("cat", "cow"), content)),
        ),
        r"index wrong/train\.index does not match the archives: train\.tar does not contain cat/\d\.jpg at the ",
    ),
    archive(
        "last shard missing beside an index",
        lambda root: (index(root), (root / "train-000002.tar").unlink()),
        r"index wrong/train\.index does not match the archives: train-000002\.tar is missing; ",
        write_shards,
    ),
    archive(
        "last shard of a number missing",
        lambda root: (root / "val-000000.tar").rename(root / "val-00000-of-00002.tar"),
        "shard 1 missing next to wrong/val-00000-of-00002.tar; copy again what is missing",
        lambda photos, root: write_shards(photos, root, size=8),
    ),
    archive(
        "label below 0",
        lambda root: repack(
            root / "train-000000.tar", lambda name, content: (name, b"-1" if name == "00000000.cls" else content)
        ),
        r"wrong/train-000000\.tar, 00000000\.jpg: label -1 is out of range; labels count from 0",
        write_shards,
    ),
    archive(
        "other classes",
        lambda root: (
            repack(root / "val.tar", lambda name, content: (name.replace("cat", "cow"), content)),
            index(root),
        ),
        r"wrong/val\.tar has classes that wrong/train\.tar does not have: cow; ",
    ),
    archive(
        "parts swapped by size",
        lambda root: (swap(root), index(root)),
        "there are 8 validation images and only 4 for training: the splits seem swapped; ",
    ),
    *(
        Wrong(
            name=f"data: parts swapped by name of {kind}",
            config={"DATA": {"TRAIN": train, "VAL": val}},
            says=rf"DATA.TRAIN {re.escape(train)}: the splits seem swapped; exchange DATA.TRAIN and DATA.VAL",
        )
        for kind, train, val in (
            ("shards", "val-*.tar", "train-*.tar"),
            ("folders", "/photos/validation", "/photos/train"),
            ("tables", "test.csv", "train.csv"),
        )
    ),
    *(
        Wrong(
            name=f"data: balanced {task}",
            config={"TASK": task, "DATA": {"DATASET": "digit_scenes", "BALANCE": "sampling"}},
            says=f"DATA.BALANCE is not supported by TASK {task}; leave it at none",
        )
        for task in ("detection", "segmentation")
    ),
    *(
        Wrong(
            name=f"data: no folder of {kind}",
            config={"TASK": task, "DATA": {"DATASET": kind, "DATA_PATH": "nowhere"}},
            says="data path nowhere does not exist; ",
        )
        for task, kind in (
            ("classification", "tar"),
            ("classification", "parquet"),
            ("detection", "coco"),
            ("segmentation", "masks"),
        )
    ),
    Wrong(
        name="data: several labels in folders",
        config={"DATA": {"DATASET": "imagenet", "MULTI_LABEL": True}, "AUG": {"MIXUP": 0.0, "CUTMIX": 0.0}},
        says="DATA.DATASET imagenet has one label per image; leave DATA.MULTI_LABEL at False",
    ),
    Wrong(
        name="data: several labels, balanced",
        config={"DATA": {"DATASET": "csv", "MULTI_LABEL": True, "BALANCE": "loss"}},
        says="DATA.BALANCE is not supported by DATA.MULTI_LABEL; leave it at none",
    ),
    Wrong(
        name="data: label lists for objects",
        config={"TASK": "detection", "DATA": {"DATASET": "digit_scenes"}, "TEST": {"LABELS": "real.json"}},
        says="TEST.LABELS is not supported by TASK detection; remove it",
    ),
    Wrong(
        name="data: mirrored images for objects",
        config={"TASK": "detection", "DATA": {"DATASET": "digit_scenes"}, "TEST": {"FLIP": True}},
        says="TEST.FLIP is not supported by TASK detection; leave it at False",
    ),
    Wrong(
        name="data: masks for objects",
        config={"TASK": "detection", "DATA": {"DATASET": "digit_scenes", "IGNORE_LABEL": 0}},
        says="DATA.IGNORE_LABEL is not supported by TASK detection; leave it at 255",
    ),
    *(
        Wrong(
            name=f"data: mapped labels for {task}",
            config={"TASK": task, "DATA": {"DATASET": kind, "DATA_PATH": "", "LABEL_MAP": {7: 0}}},
            says=rf"DATA.LABEL_MAP is not supported by {by}; leave it at {{}}",
        )
        for task, kind, by in (
            ("classification", "digits", "TASK classification"),
            ("detection", "digit_scenes", "TASK detection"),
            ("segmentation", "digit_scenes", "digit_scenes"),
        )
    ),
    *(
        Wrong(
            name=f"data: named splits of scenes for {task}",
            config={"TASK": task, "DATA": {"DATASET": "digit_scenes", "DATA_PATH": "", "VAL": "minival"}},
            says="digit_scenes without a path has fixed splits; remove DATA.TRAIN and DATA.VAL",
        )
        for task in ("detection", "segmentation")
    ),
    Wrong(
        name="data: stream without a size",
        config={"DATA": {"DATASET": "webdataset", "DATA_PATH": ".", "TRAIN": "pipe:cat train-{0..3}.tar"}},
        files={"classes.txt": "cat\ndog\n"},
        says="the number of images of a stream is unknown; set DATA.STREAM.IMAGES",
    ),
    Wrong(
        name="data: stream of balanced classes",
        config={"DATA": {"DATASET": "webdataset", "BALANCE": "sampling"}},
        says="DATA.BALANCE sampling needs random access, which a stream does not have; leave it at none",
    ),
    Wrong(
        name="data: parts swapped by name",
        flags=("--opts", "DATA.TRAIN", "val", "DATA.VAL", "train"),
        says="DATA.TRAIN val: the splits seem swapped; exchange DATA.TRAIN and DATA.VAL",
    ),
    folder(
        "parts swapped by size",
        {"train/cat": 4, "val/cat": 9},
        "there are 9 validation images and only 4 for training: the splits seem swapped; exchange them, or set DATA",
    ),
    Wrong(
        name="data: unknown format",
        config={"DATA": {"DATASET": "folder"}},
        says="DATA.DATASET must be one of imagenet, csv, tar, .*, not 'folder'",
    ),
    # Checkpoints.
    weights(
        "missing",
        lambda: None,
        r"checkpoint traind.pth does not exist; did you mean trained.pth\?",
        *("--eval", "--resume", "traind.pth"),
    ),
    weights("folder", lambda: None, "checkpoint photos is a folder; name a file in it", "--resume", "photos"),
    weights("http", lambda: None, "only downloaded by https", "--resume", "http://localhost/a.pth"),
    weights("address without hash", lambda: None, "needs the file's hash", "--resume", "https://localhost/a.pth"),
    weights(
        "truncated",
        lambda: Path("wrong.pth").write_bytes(Path("trained.pth").read_bytes()[:20_000]),
        "wrong.pth is damaged, truncated or not a PyTorch checkpoint",
        *("--resume", "wrong.pth"),
    ),
    weights(
        "empty",
        lambda: Path("wrong.pth").touch(),
        "wrong.pth is empty; the download failed, download the file again",
        *("--pretrained", "wrong.pth"),
    ),
    weights(
        "web page",
        lambda: Path("wrong.pth").write_text("<!DOCTYPE html><html>not found</html>"),
        "wrong.pth is a text page, not a checkpoint; the download failed, download the file again",
        *("--eval", "--resume", "wrong.pth"),
    ),
    weights(
        "hostile",
        lambda: save(trained(config=Hostile())),
        "wrong.pth contains a pickled posix.system, which could execute code when loaded; it is rejected",
        *("--pretrained", "wrong.pth"),
    ),
    weights(
        "hostile pickle of a newer protocol",
        lambda: Path("wrong.pth").write_bytes(pickle.dumps(Hostile(), protocol=4)),
        "wrong.pth is damaged or not a PyTorch checkpoint",
        *("--resume", "wrong.pth"),
    ),
    weights("no dict", lambda: save([1, 2]), "wrong.pth contains a list, not a dict", "--resume", "wrong.pth"),
    weights("no weights", lambda: save({"model": 3}), "neither a `model` entry nor a", "--pretrained", "wrong.pth"),
    weights("numbered weights", lambda: save({1: torch.ones(1)}), "contains no weights", "--pretrained", "wrong.pth"),
    weights(
        "published, to continue",
        lambda: save({"model": trained()["model"], "epoch": 299, "config": CfgNode({"TAG": "published"})}),
        f"wrong.pth {WITHOUT_STATE}",
        *("--resume", "wrong.pth"),
    ),
    weights(
        "half a state", lambda: save(trained(optimizer=None)), f"wrong.pth {WITHOUT_STATE}", "--resume", "wrong.pth"
    ),
    weights("negative epoch", lambda: save(trained(epoch=-1)), f"wrong.pth {WITHOUT_STATE}", "--resume", "wrong.pth"),
    weights(
        "config of no YAML",
        lambda: save(trained(config="TAG: [")),
        f"wrong.pth {WITHOUT_STATE}",
        *("--resume", "wrong.pth"),
    ),
    weights(
        "config of no options",
        lambda: save(trained(config="TAG: 2020-02-02")),
        f"wrong.pth {WITHOUT_STATE}",
        *("--resume", "wrong.pth"),
    ),
    weights(
        "another version of the code",
        lambda: save(trained(format=2)),
        "wrong.pth is from another version of this code: its format is 2, the current one is 1; resume it",
        *("--resume", "wrong.pth"),
    ),
    weights(
        "empty optimizer",
        lambda: save(trained(optimizer={})),
        "wrong.pth has the state of another optimizer; start from its weights with --pretrained",
        *("--resume", "wrong.pth"),
    ),
    weights(
        "optimizer of other shapes",
        lambda: save(trained(optimizer=optimizer_of(torch.zeros(3)))),
        "wrong.pth has the state of another optimizer; start from its weights with --pretrained",
        *("--resume", "wrong.pth"),
    ),
    weights(
        "optimizer of no tensors",
        lambda: save(trained(optimizer=optimizer_of("much"))),
        "wrong.pth has the state of another optimizer; start from its weights with --pretrained",
        *("--resume", "wrong.pth"),
    ),
    weights(
        "optimizer of no state",
        lambda: save(trained(optimizer={**trained()["optimizer"], "state": 5})),
        "wrong.pth has the state of another optimizer; start from its weights with --pretrained",
        *("--resume", "wrong.pth"),
    ),
    weights(
        "losses of no pairs",
        lambda: save(trained(unlogged=[1, 2])),
        f"wrong.pth {WITHOUT_STATE}",
        *("--resume", "wrong.pth"),
    ),
    weights("format of no number", lambda: save(trained(format="abc")), WITHOUT_STATE, *("--resume", "wrong.pth")),
    weights(
        "renamed classes",
        lambda: write_folder(Path("wrong"), {"train/ape": 4, "train/dog": 4, "val/ape": 2, "val/dog": 2}),
        "written with other options: class 0: 'cat' in the checkpoint, 'ape' now. Give another --tag",
        *("--data-path", "wrong", "--resume", "trained.pth"),
    ),
    weights(
        "another data set",
        lambda: write_folder(Path("wrong"), {**PHOTOS, "train/cat": 5}),
        "written with other options: training images: 8 in the checkpoint, 9 now. Give another --tag",
        *("--data-path", "wrong", "--resume", "trained.pth"),
    ),
    weights(
        "another config",
        lambda: None,
        "written with other options: TRAIN.BASE_LR: 0.02 in the checkpoint, 0.5 now. .*--tag .*--allow-config-change",
        *("--resume", "trained.pth", "--opts", "TRAIN.BASE_LR", "0.5"),
    ),
    weights(
        "another optimizer",
        lambda: None,
        "trained.pth has the state of another optimizer; start from its weights with --pretrained",
        *("--resume", "trained.pth", "--allow-config-change", "--opts", "TRAIN.OPTIMIZER.NAME", "sgd"),
    ),
    weights(
        "averages to continue",
        lambda: None,
        "trained.pth holds no averaged weights to continue; leave out --ema, or start from its weights by --pretrain",
        *("--resume", "trained.pth", "--ema", "--allow-config-change"),
    ),
    weights(
        "averages alone to continue",
        lambda: None,
        "--weights needs --pretrained or --eval; give one, or remove it",
        *("--resume", "trained.pth", "--weights", "ema"),
    ),
    weights(
        "class map to continue",
        lambda: Path("map.txt").write_text("0\n1\n"),
        "MODEL.CLASS_MAP needs the weights of --pretrained; give those too, or remove it",
        *("--resume", "trained.pth", "--opts", "MODEL.CLASS_MAP", "map.txt"),
    ),
    weights(
        "end of another run",
        lambda: save(trained(epoch=2, update=0)),
        "wrong.pth is the end of a run of 2 epochs, so nothing is left to train; evaluate it with --eval, or",
        *("--resume", "wrong.pth"),
    ),
    weights(
        "larger data set",
        lambda: save(trained(epoch=0, update=5)),
        "after 5 updates of an epoch, which has 4 now; continue with the data set that the run started with",
        *("--resume", "wrong.pth"),
    ),
    weights(
        "no averaged weights",
        lambda: None,
        "trained.pth holds no averaged weights; use --weights raw, or train with --ema",
        *("--eval", "--ema", "--resume", "trained.pth"),
    ),
    weights(
        "names of another layout",
        lambda: save({"net": {f"layer{i}.weight": torch.ones(1) for i in range(9)}, "epoch": 3}),
        r"contains no weights of this architecture, .*; it contains net: 9 tensors, layer0.weight, .*; 1 other ent",
        *("--eval", "--resume", "wrong.pth"),
    ),
    weights(
        "architecture, to evaluate",
        lambda: None,
        "trained.pth has a different architecture than --cfg: cls_head.weight is .* and [0-9]+ more",
        *("--eval", "--resume", "trained.pth", "--opts", "MODEL.DAT.dims", "[8, 16, 16, 32]"),
    ),
    weights(
        "of another task, to evaluate",
        lambda: save(trained(config=trained()["config"].replace("TASK: classification", "TASK: detection"))),
        "wrong.pth is of TASK detection and --cfg of classification; give the config of that run",
        *("--eval", "--resume", "wrong.pth"),
    ),
    weights(
        "architecture, to fine-tune",
        lambda: None,
        "--pretrained trained.pth: the weights are of another architecture: cls_head.weight is .* more",
        *("--pretrained", "trained.pth", "--opts", "MODEL.DAT.dims", "[8, 16, 16, 32]"),
    ),
    weights(
        "number of classes",
        lambda: write_folder(Path("wrong"), {"train/a": 4, "train/b": 4, "train/c": 4, "val/a": 2}),
        "the weights have no class a, b, c, but 0 = cat, 1 = dog: give a MODEL.CLASS_MAP, .* with --pretrained",
        *("--data-path", "wrong", "--eval", "--resume", "trained.pth"),
    ),
    weights(
        "number of classes without names",
        lambda: (
            write_folder(Path("wrong"), {"val/a": 1, "val/b": 1, "val/c": 1}),
            save({"model": trained()["model"]}),
        ),
        "trained for 2 classes, the data set has 3; to evaluate it in TASK classification, name their labels in a MODE",
        *("--data-path", "wrong", "--eval", "--resume", "wrong.pth"),
    ),
    weights(
        "missing class map",
        lambda: None,
        "class map map.txt cannot be read: .*No such file",
        *("--pretrained", "trained.pth", "--opts", "MODEL.CLASS_MAP", "map.txt"),
    ),
    weights(
        "class map",
        lambda: Path("map.txt").write_text("0\n2\n"),
        "class map map.txt, line 2: '2' is not a class of the weights; give 0 to 1, or -1",
        *("--pretrained", "trained.pth", "--opts", "MODEL.CLASS_MAP", "map.txt"),
    ),
    weights(
        "class map of another encoding",
        lambda: Path("map.txt").write_bytes("cat 0\ndog 1\n".encode("utf-16")),
        "class map map.txt is not UTF-8 text; save it as UTF-8",
        *("--eval", "--resume", "trained.pth", "--opts", "MODEL.CLASS_MAP", "map.txt"),
    ),
    weights(
        "one class that the weights do not know",
        lambda: write_folder(Path("wrong"), {"val/cat": 1, "val/emu": 1}),
        "the weights have no class emu, but 0 = cat, 1 = dog: give a MODEL.CLASS_MAP, leave the images out, or fine-",
        *("--data-path", "wrong", "--eval", "--resume", "trained.pth"),
    ),
    weights(
        "TorchScript",
        lambda: torch.jit.script(torch.nn.ReLU()).save("wrong.pth"),
        "wrong.pth is a TorchScript program, which could execute code; if you trust it, save its weights: torch.save",
        *("--eval", "--resume", "wrong.pth"),
    ),
    weights(
        "class map, to evaluate",
        lambda: Path("map.txt").write_text("0\n-1\n"),
        "class map map.txt has no class of the weights for dog; leave its images out",
        *("--eval", "--resume", "trained.pth", "--opts", "MODEL.CLASS_MAP", "map.txt"),
    ),
    weights(
        "class map without a class",
        lambda: Path("map.txt").write_text("cat 0\nbird 1\n"),
        "class map map.txt has no line for dog; give each class one, with -1 where the weights have none",
        *("--eval", "--resume", "trained.pth", "--opts", "MODEL.CLASS_MAP", "map.txt"),
    ),
    weights(
        "class map, one label twice",
        lambda: Path("map.txt").write_text("cat 1\ndog 1\n"),
        "classes cat, dog share label 1 of the weights by map.txt; merge their images",
        *("--eval", "--resume", "trained.pth", "--opts", "MODEL.CLASS_MAP", "map.txt"),
    ),
    weights(
        "numbers that are no labels",
        lambda: (
            write_folder(Path("wrong"), {"val/2": 1, "val/10": 1}),
            save({name: value for name, value in trained().items() if name != "classes"}),
        ),
        "the classes are numbers up to 10, and the weights have 2 classes without names: give DATA.CLASS_ORDER number",
        *("--data-path", "wrong", "--eval", "--resume", "wrong.pth"),
    ),
    weights(
        "missing labels",
        lambda: None,
        "labels real.json cannot be read: .*No such file",
        *("--eval", "--resume", "trained.pth", "--opts", "TEST.LABELS", "real.json"),
    ),
    weights(
        "label out of range",
        lambda: (
            write_folder(Path("wrong/val"), {"cat": 2}),
            (Path("wrong/val/cat/0.jpg").rename("wrong/val/cat/2.jpg")),
            Path("real.json").write_text("[[0], [2]]"),
        ),
        r"labels real.json: \[2\] of image 2 are not labels of the weights, 0 to 1",
        *("--data-path", "wrong", "--eval", "--resume", "trained.pth", "--opts", "TEST.LABELS", "real.json"),
    ),
    opts("classes to score", "TEST.CLASSES", "some", "TEST.CLASSES must be one of all, present, not 'some'"),
    opts("labels of a run", "TEST.LABELS", "real.json", "TEST.LABELS is only for --eval; remove it"),
    # Detection and segmentation.
    annotated(
        "images in folders by class",
        r"no file instances_train\.json in data path wrong; expected instances_train\.json, instances_val\.json, ",
        lambda root: (root / "instances_train.json").unlink(),
    ),
    annotated(
        "broken JSON",
        "wrong/instances_val.json cannot be read as JSON: .*line 1",
        lambda root: (root / "instances_val.json").write_text('{"images": ['),
    ),
    annotated(
        "JSON of something else",
        "wrong/instances_val.json is not a COCO annotation file: it has no list of images, annotations, categories",
        lambda root: (root / "instances_val.json").write_text("[]"),
    ),
    annotated(
        "annotation without a box",
        r"instances_train.json: each of its annotations needs bbox, category_id, id, image_id, unlike \{.id.: 1\}",
        lambda root: write_instances(root, "train", [], [{"id": 1}]),
    ),
    annotated(
        "box of two numbers",
        r"instances_train.json: a bbox is \[x, y, width, height\], four numbers, unlike \[3, 3\] of annotation 5",
        lambda root: write_instances(root, "train", [], [row(5, 1, 7, [3, 3, 4, 4]) | {"bbox": [3, 3]}]),
    ),
    annotated(
        "box of text",
        r"a bbox is \[x, y, width, height\], four numbers, unlike \['3', 3, 4, 4\] of annotation 5",
        lambda root: write_instances(root, "train", [], [row(5, 1, 7, [3, 3, 4, 4]) | {"bbox": ["3", 3, 4, 4]}]),
    ),
    annotated(
        "boxes without an area",
        "has no image with an object; .* left out 1 box without an area: annotation 5",
        without_boxes,
    ),
    annotated(
        "unknown category",
        "has no image with an object; .* left out 1 box of an unknown class: annotation 5",
        lambda root: without_boxes(root, category=99, width=4),
    ),
    annotated(
        "no images",
        r"none of the 5 images of wrong/instances_val.json exists: .*; check the data path",
        lambda root: (root / "val").rename(root / "value"),
    ),
    annotated(
        "two images of one id", r"wrong/instances_val\.json: two images have the id 1; give each its own", repeat_an_id
    ),
    annotated("misspelt detector", r"MODEL.DETECTOR.NAME must be one of .*; did you mean retinanet\?", NAME="retina"),
    annotated("argument of a detector", "MODEL.DETECTOR.ARGS: .*unexpected .*'chanels'", ARGS={"chanels": 8}),
    annotated(
        "masks of boxes",
        "mask_rcnn needs masks, but the data set has only boxes .objects without masks: annotation 5 in .*; use a box",
        lambda root: without_boxes(root, width=4),
        NAME="mask_rcnn",
    ),
    Wrong(
        name="data: detection, layout of classification",
        config={"TASK": "detection"},
        says="DATA.DATASET must be one of digit_scenes, coco, voc, yolo for TASK detection, not 'imagenet'",
    ),
    masked(
        "values outside the classes",
        "wrong/masks/train/0.png.* has the value 9, which is none of the 3 classes",
        lambda root: Image.new("L", (48, 40), 9).save(root / "masks/train/0.png"),
    ),
    masked(
        "no masks",
        "has no folder masks/train; the layout is DATA_PATH",
        lambda root: (root / "masks").rename(root / "m"),
    ),
    masked(
        "missing mask",
        "1 of 8 images in wrong/images/train without a mask in wrong/masks/train: 0; add masks named",
        lambda root: (root / "masks/train/0.png").unlink(),
    ),
    # The output folder. Permissions would not stop root, who may run this.
    Wrong(
        name="output: file in its place",
        flags=("--output", "trained.pth"),
        says=r"output folder trained.pth/tiny/default cannot be written \(Not a directory\); choose another with --out",
    ),
    Wrong(
        name="output: no place for folders",
        flags=("--output", "/proc/results"),
        says="output folder /proc/results/tiny/default cannot be written .*; choose another with --output",
    ),
    Wrong(name="output: name too long", flags=("--tag", "x" * 300), says=r"cannot be written \(File name too long\); "),
    # The machine.
    Wrong(
        name="device: no GPU",
        flags=("--device", "cuda"),
        says="--device cuda: PyTorch sees no CUDA device on .*; use --device cpu, or check the driver",
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, and trained.pth of a run after the first of its two epochs."""
    root = tmp_path_factory.mktemp("wrong")
    write_folder(root / "photos", PHOTOS)
    config = write_config(root, OUTPUT=str(root), DATA={**DATA, "DATA_PATH": str(root / "photos")})
    run_forked("--cfg", config, "--opts", "SAVE_FREQ", 1)
    state = torch.load(root / "tiny/default/epoch_1.pth", weights_only=True)
    torch.save(state, root / "trained.pth")
    return root


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with only links to the files of `place`."""
    for name in ("photos", "trained.pth"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_PATH", raising=False)
    return tmp_path


def files_in(root: Path) -> dict[str, tuple[int, int]]:
    """Return size and modification time of everything in a folder."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in root.rglob("*")}


@pytest.mark.parametrize("wrong", ROWS, ids=lambda wrong: wrong.name)
def test_wrong_input_is_refused(
    wrong: Wrong, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(StopSignal, "listen", lambda self: None)  # the signals stay those of the test
    monkeypatch.setattr(main, "train", lambda run: pytest.fail("it went on to train"))
    argv = wrong.command()
    before = files_in(here)
    status = main.main(argv)
    printed = capsys.readouterr().err
    assert status == 2
    assert re.fullmatch(r"main\.py: [^\n]+\n", printed), printed
    assert re.search(wrong.says, printed), printed
    assert files_in(here) == before


def test_correct_input_is_accepted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopSignal, "listen", lambda self: None)
    monkeypatch.setattr(main, "train", lambda run: 0)
    for flags in (
        (),
        ("--resume", "trained.pth"),
        ("--pretrained", "trained.pth"),
        ("--eval", "--resume", "trained.pth"),
    ):
        assert main.main(Wrong(name="good", says="", flags=flags).command()) == 0, flags


def test_more_processes_than_gpus(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    argv = Wrong(name="GPUs", says="", flags=("--device", "cuda", "--check")).command()
    assert main.main(argv) == 2
    assert capsys.readouterr().err == (
        "main.py: 4 processes were started here, but this machine has 2 GPUs; start at most 2, or use --device cpu\n"
    )


def test_successful_check_writes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopSignal, "listen", lambda self: None)
    argv = Wrong(name="good", says="", flags=("--check",)).command()
    before = files_in(here)
    assert main.main(argv) == 0
    assert files_in(here) == before


def test_a_network_larger_than_the_memory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(logging.getLogger("dat"), "error", logged.append)
    flags = ("--opts", "MODEL.DAT.dims", str([2**22] * 4))  # 70 TB
    before = files_in(here)
    assert main.main(Wrong(name="memory", says="", flags=flags).command()) == 1
    assert [line.partition(";")[0] for line in logged] == ["out of memory"]
    assert files_in(here).keys() - before.keys() == {str(here / "tiny.yaml")}


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["train.sh"], r"usage: bash train.sh <gpus> <config> \[tag\] \[main.py flags...\]"),
        (["train.sh", "1"], "usage: bash train.sh"),
        (
            ["evaluate.sh", "1", "tiny.yaml"],
            r"usage: bash evaluate.sh <gpus> <config> <checkpoint> \[main.py flags...\]",
        ),
        (["train_slurm.sh", "8"], "usage: bash train_slurm.sh <gpus> <config> <job-name>"),
        (["train.sh", "tiny.yaml", "1"], "the number of GPUs must be a positive whole number, not 'tiny.yaml'"),
        (["train.sh", "0", "tiny.yaml"], "the number of GPUs must be a positive whole number, not '0'"),
        (["evaluate.sh", "-1", "tiny.yaml", "x"], "the number of GPUs must be a positive whole number, not '-1'"),
        (["train_slurm.sh", "two", "tiny.yaml", "x"], "the number of GPUs must be a positive whole number, not 'two'"),
    ],
)
def test_launchers_print_their_usage(command: list[str], says: str) -> None:
    done = run_command("bash", *command)
    assert done.returncode == 2
    assert re.fullmatch(f"{says}[^\n]*\n", done.stderr)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["train.sh", "1", "configs/digit.yaml"], "digit.yaml does not exist; did you mean .*configs/digits.yaml"),
        (
            ["train.sh", "2", "{tiny}", "default", "--output", "/proc/results"],
            "output folder .* choose another with --o",
        ),
        (
            ["train.sh", "2", "{tiny}", "--batch-size", "1000"],
            "one update needs .* batch size 1000 x 2 proc",
        ),
        (["evaluate.sh", "2", "{tiny}", "{tiny}"], "tiny.yaml is damaged"),
    ],
)
def test_launchers_reject_wrong_input_once_and_start_nothing(command: list[str], says: str, tmp_path: Path) -> None:
    tiny = write_config(tmp_path, OUTPUT=str(tmp_path / "out"))
    started = tmp_path / "started"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> "{started}"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = run_command("bash", *(word.format(tiny=tiny) for word in command), PYTHON=str(python))
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(f"main\\.py: [^\n]*{says}[^\n]*\n", done.stderr), done.stderr
    assert len(started.read_text().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_there_is_a_row_for_every_kind_of_wrong_input() -> None:
    kinds = {"flag", "option", "network", "config file", "data", "checkpoint", "output", "device"}
    assert {row.name.partition(":")[0] for row in ROWS} == kinds
    assert len({row.name for row in ROWS}) == len(ROWS) >= 50
