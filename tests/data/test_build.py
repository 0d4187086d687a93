"""Data sets, loaders and mixup built from a config."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from yacs.config import CfgNode

from config import set_option
from data.build import build_erasing, build_mixup, loader_warnings, open_dataset, request
from data.datasets import Batch
from data.detection.build import open_dataset as open_objects
from data.formats import FORMATS
from data.generators import seed_generators
from data.images import UnreadableImage
from data.samplers import EvalSampler, TrainSampler
from data.sources import ArraySource, Dataset, Request
from tests.data.samples import build_eval_loader, build_train_loader, small_config, write_folder

LAYOUT = {"train/cat": 9, "train/dog": 8, "train/emu": 6, "val/cat": 3, "val/emu": 2}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data", LAYOUT)


def train_batches(config: CfgNode, epoch: int = 0, start: int = 0, **ranks: int) -> list[Batch]:
    loader = build_train_loader(config, **{"rank": 0, "world_size": 1, **ranks})
    loader.sampler.set_position(epoch, start)
    return list(loader)


def equal(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and a.unreadable == b.unreadable
        for a, b in zip(one, other, strict=True)
    )


def test_training_batches(root: Path) -> None:
    config = small_config(root)
    loader = build_train_loader(config, rank=0, world_size=1)
    assert isinstance(loader.sampler, TrainSampler)
    batches = list(loader)
    assert len(batches) == len(loader) == loader.sampler.updates_per_epoch == 23 // 4
    for batch in batches:
        assert batch.images.shape == (4, 3, 32, 32)
        assert batch.images.dtype == torch.uint8
        assert batch.targets.dtype == torch.int64
        assert batch.unreadable == []
    assert {target for batch in batches for target in batch.targets.tolist()} == {0, 1, 2}


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_evaluation_batches_hold_each_image_once(root: Path, world_size: int) -> None:
    loaders = [build_eval_loader(small_config(root), rank=rank, world_size=world_size) for rank in range(world_size)]
    assert all(isinstance(loader.sampler, EvalSampler) and len(loader.dataset) == 5 for loader in loaders)
    targets = [target for loader in loaders for batch in loader for target in batch.targets.tolist()]
    assert sorted(targets) == [0, 0, 0, 2, 2]  # the labels of train, where emu comes third


def test_augmentation_does_not_depend_on_workers(root: Path) -> None:
    inline = train_batches(small_config(root), epoch=3)
    assert equal(inline, train_batches(small_config(root, NUM_WORKERS=2), epoch=3))
    assert not equal(inline, train_batches(small_config(root), epoch=4))


def test_resuming_gives_the_remaining_batches(root: Path) -> None:
    config = small_config(root, NUM_WORKERS=2)
    config.TRAIN.ACCUMULATION_STEPS = 2
    loader = build_train_loader(config, rank=0, world_size=1)
    loader.sampler.set_position(1)
    whole = list(loader)
    assert len(whole) == 4
    loader.sampler.set_position(1, start=8)  # the workers go on from epoch to epoch
    assert equal(list(loader), whole[2:])
    assert equal(train_batches(config, epoch=1, start=8), whole[2:])


def test_two_processes_see_the_batches_of_one(root: Path) -> None:
    one = train_batches(small_config(root, BATCH_SIZE=6), epoch=2)
    halves = [train_batches(small_config(root, BATCH_SIZE=3), epoch=2, rank=rank, world_size=2) for rank in (0, 1)]
    joined = [
        Batch(torch.cat([a.images, b.images]), torch.cat([a.targets, b.targets]), [])
        for a, b in zip(*halves, strict=True)
    ]
    assert equal(joined, one)


@pytest.mark.parametrize("workers", [0, 2])
def test_generators_of_the_training_process_are_not_disturbed(root: Path, workers: int) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    train_batches(small_config(root, NUM_WORKERS=workers))
    list(build_eval_loader(small_config(root, NUM_WORKERS=workers), rank=0, world_size=1))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DATA.INTERPOLATION", "bilinear"),
        ("AUG.SCALE", [0.5, 0.6]),
        ("AUG.RATIO", [1.0, 1.1]),
        ("AUG.HFLIP", 1.0),
        ("AUG.COLOR_JITTER", 0.1),
        ("AUG.AUTO_AUGMENT", "rand-m3-inc1"),
        ("AUG.CROP", "padded"),
        ("AUG.REPEATS", 2),
        ("DATA.IMG_SIZE", 48),
        ("SEED", 1),
    ],
)
def test_options_reach_training(root: Path, key: str, value: object) -> None:
    config = small_config(root)
    config.AUG.AUTO_AUGMENT, config.AUG.HFLIP = "", 0.0
    before = train_batches(config)
    set_option(config, key, value)
    assert not equal(train_batches(config), before)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DATA.INTERPOLATION", "bilinear"),
        ("TEST.CROP", False),
        ("TEST.CROP_RATIO", 1.0),
        ("TEST.RESIZE", "shorter"),
    ],
)
def test_options_reach_evaluation(root: Path, key: str, value: object) -> None:
    config = small_config(root)
    before = list(build_eval_loader(config, rank=0, world_size=1))
    set_option(config, key, value)
    assert not equal(list(build_eval_loader(config, rank=0, world_size=1)), before)


def test_options_reach_erasing() -> None:
    config = small_config()
    config.AUG.REPROB, config.AUG.REMODE, config.AUG.RECOUNT = 1.0, "const", 1
    images = torch.ones(8, 3, 32, 32)
    seed_generators(0)
    assert (build_erasing(config)(images.clone()) == 0).flatten(1).any(1).all()
    for option, value in (("REPROB", 0.0), ("RECOUNT", 0)):
        off = config.clone()
        off.AUG[option] = value
        assert build_erasing(off) is None


def break_images(root: Path, *names: str) -> list[str]:
    for name in names:
        (root / name).write_bytes(b"no image")
    return [str(root / name) for name in names]


@pytest.mark.parametrize("policy", ["auto", "skip"])
def test_training_skips_unreadable_images(root: Path, policy: str) -> None:
    good = train_batches(small_config(root))
    names = [f"train/cat/{number}.jpg" for number in range(9)]
    broken = break_images(root, *names[:4])
    batches = train_batches(small_config(root, BAD_IMAGES=policy))
    assert [batch.images.shape for batch in batches] == [batch.images.shape for batch in good]
    assert all((batch.targets >= 0).all() for batch in batches)
    met = [path for batch in batches for path in batch.unreadable]
    assert set(met) <= set(broken)
    assert len(met) >= 3  # an epoch leaves out 3 of 23 images, so at least one of the four
    assert equal(batches, train_batches(small_config(root, BAD_IMAGES=policy, NUM_WORKERS=2)))
    untouched = [(a, b) for a, b in zip(good, batches, strict=True) if not b.unreadable]
    assert all(torch.equal(a.images, b.images) for a, b in untouched)


def test_evaluation_leaves_unreadable_images_out(root: Path) -> None:
    broken = break_images(root, "val/cat/1.jpg", "val/emu/0.jpg")
    (batch, rest) = build_eval_loader(small_config(root, BAD_IMAGES="skip"), rank=0, world_size=1)
    assert batch.targets.tolist() == [0, -1, 0, -1]
    assert rest.targets.tolist() == [2]
    assert batch.unreadable == broken


@pytest.mark.parametrize(
    ("policy", "split", "workers"), [("raise", "train", 0), ("raise", "val", 0), ("auto", "val", 0), ("auto", "val", 1)]
)
def test_unreadable_images_are_named_in_one_line(root: Path, policy: str, split: str, workers: int) -> None:
    (broken,) = break_images(root, f"{split}/cat/1.jpg")
    config = small_config(root, BAD_IMAGES=policy, NUM_WORKERS=workers, BATCH_SIZE=1)
    loader = (build_train_loader if split == "train" else build_eval_loader)(config, rank=0, world_size=1)
    message = None
    try:  # pytest.raises would keep the traceback, and with it the loader's iterator, until its workers time out
        list(loader)
    except UnreadableImage as error:
        message = str(error)
    assert message == f"cannot read image '{broken}': cannot identify image file"


def test_machine_errors_are_not_unreadable_images(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    loader = build_train_loader(small_config(root, BAD_IMAGES="skip", NUM_WORKERS=1), rank=0, world_size=1)
    monkeypatch.setattr(Path, "read_bytes", fail)
    line = ""
    try:  # as above
        list(loader)
    except OSError as error:
        line = str(error).strip().rpartition("\n")[2]
    assert re.search(rf"\[Errno {errno.EMFILE}\] Too many open files: '{root}/train/\w+/\d\.jpg'$", line)


@pytest.mark.parametrize(
    ("device", "gpu", "pinned"),
    [("", True, True), ("cuda", True, True), ("cpu", True, False), ("mps", True, False), ("", False, False)],
)
def test_memory_is_pinned_for_cuda_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch, device: str, gpu: bool, pinned: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    config = small_config(root)
    config.DEVICE = device
    for build in (build_train_loader, build_eval_loader):
        assert build(config, rank=0, world_size=1).pin_memory is pinned
    config.DATA.PIN_MEMORY = False
    assert not build_train_loader(config, rank=0, world_size=1).pin_memory


def test_more_workers_than_cores(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3})
    for build in (build_train_loader, build_eval_loader):
        assert build(small_config(root, NUM_WORKERS=32), rank=0, world_size=1).num_workers == 2
    assert loader_warnings(small_config(root, NUM_WORKERS=2), (32, 32)) == []
    assert loader_warnings(small_config(root, NUM_WORKERS=32), (32, 32)) == [
        "DATA.NUM_WORKERS 32 is reduced to 2, the number of cores here"
    ]


@pytest.mark.parametrize(
    ("cores", "env", "workers"),
    [
        (8, {"LOCAL_WORLD_SIZE": "4"}, 2),  # torchrun's processes share the cores
        (8, {"LOCAL_WORLD_SIZE": "16"}, 1),
        (8, {"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_ON_NODE": "32"}, 8),  # each task is bound to cores of its own
        (16, {"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_ON_NODE": "32"}, 8),  # two tasks are bound to each half
        (8, {"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_ON_NODE": "8"}, 2),  # no task is bound
    ],
)
def test_processes_share_the_cores(
    root: Path, monkeypatch: pytest.MonkeyPatch, cores: int, env: dict[str, str], workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert build_train_loader(small_config(root, NUM_WORKERS=10), rank=0, world_size=1).num_workers == workers
    warning = loader_warnings(small_config(root, NUM_WORKERS=10), (32, 32))[0]
    processes = env["LOCAL_WORLD_SIZE"]
    assert warning == (
        f"DATA.NUM_WORKERS 10 is reduced to {workers}, the number of cores here for each of {processes} processes"
    )


def test_small_shared_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(root, NUM_WORKERS=1)
    wanted = train_batches(config)
    needed = 4 * 4 * 32 * 32 * 4  # four batches of four images
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, needed))
    assert loader_warnings(config, (32, 32)) == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (warning,) = loader_warnings(config, (32, 32))
    assert "/dev/shm has 0 MiB free" in warning
    assert "with --shm-size or --ipc=host" in warning
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", lambda *_: pytest.fail("shared memory is used"))
    batches = train_batches(config)
    assert equal(batches, wanted)
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in batches)
    config.DATA.NUM_WORKERS = 0
    assert loader_warnings(config, (32, 32)) == []


def test_image_that_vanishes_during_training(root: Path) -> None:
    loader = build_train_loader(small_config(root), rank=0, world_size=1)
    list(loader)
    for number in range(9):
        (root / "train" / "cat" / f"{number}.jpg").unlink()
    batches = list(loader)
    assert all((batch.targets > 0).all() for batch in batches)
    assert any(batch.unreadable for batch in batches)


def test_digits_go_through_the_same_loaders() -> None:
    config = small_config(IMG_SIZE=24, BATCH_SIZE=64)
    assert open_dataset(config).classes == [str(digit) for digit in range(10)]
    train, held_out = (build(config, rank=0, world_size=1) for build in (build_train_loader, build_eval_loader))
    assert (len(train.dataset), len(held_out.dataset)) == (1437, 360)
    assert next(iter(train)).images.shape == (64, 3, 24, 24)
    counts = torch.bincount(torch.cat([batch.targets for batch in held_out]))
    assert counts.sum() == 360
    assert set(counts.tolist()) <= {34, 35, 36, 37}


def test_classes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_dataset(small_config(root)).classes == ["cat", "dog", "emu"]
    config = small_config(root, DATA_PATH="")
    monkeypatch.setenv("DATA_PATH", str(root))
    assert open_dataset(config).classes == ["cat", "dog", "emu"]
    monkeypatch.setenv("HOME", str(root.parent))
    assert open_dataset(small_config(root, DATA_PATH="~/data"), ("val",)).classes == ["cat", "dog", "emu"]


def test_digits_reject_a_path_but_ignore_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_PATH", "elsewhere")
    assert len(open_dataset(small_config()).held_out) == 360
    with pytest.raises(ValueError, match="the digits are part of scikit-learn and take no --data-path"):
        open_dataset(small_config(DATA_PATH="elsewhere"))


def test_splits_that_are_not_needed_are_not_opened(root: Path) -> None:
    for config in (small_config(root), small_config()):
        assert open_dataset(config, ("val",)).train is None
        assert open_dataset(config, ("train",)).held_out is None


def test_classes_without_held_out_images(root: Path) -> None:
    assert open_dataset(small_config(root)).warnings() == ["1 of 3 classes without validation images: dog"]
    assert open_dataset(small_config(root), ("train",)).warnings() == []
    assert open_dataset(small_config()).warnings() == []


@pytest.mark.parametrize(("train", "val"), [("val", "train"), ("test.csv", ""), ("", "training")])
def test_splits_that_are_swapped_by_name(root: Path, train: str, val: str) -> None:
    with pytest.raises(ValueError, match=r"^DATA\.(TRAIN|VAL) \S+: the splits seem swapped; exchange DATA\.TRAIN and"):
        open_dataset(small_config(root, TRAIN=train, VAL=val))


@pytest.mark.parametrize(
    ("train", "val", "needs"),
    [
        ("", "train", ("val",)),
        ("val", "train", ("val",)),
        ("val", "emu", ("train", "val")),
        ("train", "train", ("train", "val")),
        ("test.csv", "", ("train",)),
    ],
)
def test_splits_that_may_have_the_usual_name_of_the_other(train: str, val: str, needs: tuple[str, ...]) -> None:
    opened = request(small_config(TRAIN=train, VAL=val), needs)
    assert (opened.train, opened.val, opened.needs) == (train, val, needs)


@pytest.mark.parametrize(
    ("key", "value", "default"),
    [("LABEL_MAP.7", 0, "{}"), ("IGNORE_LABEL", 0, "255"), ("REDUCE_ZERO_LABEL", True, "False")],
)
def test_options_of_masks_are_for_segmentation(key: str, value: object, default: str) -> None:
    for task, opened in (("classification", open_dataset), ("detection", open_objects)):
        config = small_config(DATASET="digits" if task == "classification" else "digit_scenes")
        config.TASK = task
        set_option(config, f"DATA.{key}", value)
        says = rf"^DATA\.{key.partition('.')[0]} is not supported by TASK {task}; leave it at {default}$"
        with pytest.raises(ValueError, match=says):
            opened(config, ("val",))


def test_splits_that_are_swapped_by_size(root: Path) -> None:
    (root / "train").rename(root / "other")
    (root / "val").rename(root / "train")
    (root / "other").rename(root / "val")
    for name in ("cat", "dog", "emu"):
        (root / "train" / name).mkdir(exist_ok=True)
        shutil.copy(root / "val" / name / "0.jpg", root / "train" / name / "0.jpg")
    with pytest.raises(ValueError, match=r"^there are 23 validation images and only \d for training: .*LARGER_VAL"):
        open_dataset(small_config(root))
    assert len(open_dataset(small_config(root, ALLOW_LARGER_VAL=True)).held_out) == 23
    assert len(open_dataset(small_config(root), ("val",)).held_out) == 23


def test_numbered_classes(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"{split}/{name}": 1 for split in ("train", "val") for name in ("2", "10")})
    assert open_dataset(small_config(tmp_path)).classes == ["10", "2"]
    assert open_dataset(small_config(tmp_path, CLASS_ORDER="number")).classes == ["2", "10"]


def test_classes_that_are_not_all_numbers(root: Path) -> None:
    with pytest.raises(ValueError, match="the classes are not all numbers, such as cat; leave DATA"):
        open_dataset(small_config(root, CLASS_ORDER="number"))


def test_unknown_format() -> None:
    with pytest.raises(ValueError, match=r"^DATA\.DATASET must be one of imagenet, .* did you mean digits"):
        open_dataset(small_config(DATASET="digit"))


def test_custom_format_needs_only_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_squares(request: Request) -> Dataset:
        assert request.root("DATA_PATH holds squares") == tmp_path
        pixels = np.full((6, 5, 5, 3), 40, np.uint8) * np.arange(6, dtype=np.uint8)[:, None, None, None]
        parts = {part: ArraySource(pixels, np.arange(6) % 2, part) for part in request.needs}
        return Dataset(classes=["even", "odd"], train=parts.get("train"), held_out=parts.get("val"))

    monkeypatch.setitem(FORMATS, "squares", open_squares)
    config = small_config(tmp_path, DATASET="squares", BATCH_SIZE=6)
    (batch,) = build_eval_loader(config, rank=0, world_size=1)
    assert batch.targets.tolist() == [0, 1] * 3
    assert batch.images.float().mean((1, 2, 3)).tolist() == [40 * i for i in range(6)]
    (batch,) = build_train_loader(config, rank=0, world_size=1)
    assert sorted(batch.targets.tolist()) == [0] * 3 + [1] * 3


def test_no_data_path(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA_PATH", raising=False)
    with pytest.raises(
        ValueError, match=r"\Ano data set given; pass --data-path FOLDER or set the variable DATA_PATH; "
    ):
        open_dataset(small_config(root, DATA_PATH=""))


def test_loaders_check_the_layout(root: Path) -> None:
    for build, split in ((build_train_loader, "train"), (build_eval_loader, "val")):
        (root / split).rename(root / "elsewhere")
        with pytest.raises(ValueError, match=f"no folder '{split}' in data path"):
            build(small_config(root), rank=0, world_size=1)
        (root / "elsewhere").rename(root / split)


def test_data_set_smaller_than_an_update(root: Path) -> None:
    with pytest.raises(ValueError, match=r"one update needs .* training images, .*, and there are 23; reduce"):
        build_train_loader(small_config(root, BATCH_SIZE=24), rank=0, world_size=1)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_mixup(mixup: float, cutmix: float) -> None:
    config = small_config()
    config.AUG.MIXUP, config.AUG.CUTMIX, config.MODEL.LABEL_SMOOTHING = mixup, cutmix, 0.2
    mix = build_mixup(config, num_classes=5)
    images = torch.stack([torch.full((3, 16, 16), float(value)) for value in range(4)])
    seen = set()
    seed_generators(0)
    for _ in range(30):
        mixed, targets = mix(images.clone(), torch.tensor([0, 1, 2, 3]))
        assert torch.allclose(targets.sum(1), torch.ones(4))
        assert targets.min() == pytest.approx(0.2 / 5)
        # The share of the other image of the pair, 3, in the first image, and of its label in the first target.
        assert mixed[0].mean() / 3 == pytest.approx((targets[0, 3].item() - 0.04) / 0.8, abs=1e-5)
        seen.add("cutmix" if set(mixed[0].unique().tolist()) <= {0.0, 3.0} else "mixup")
    assert seen == {name for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha}


@pytest.mark.parametrize(("mode", "shares"), [("batch", 1), ("pair", 2), ("elem", 4)])
def test_mixup_draws_per_batch_pair_or_image(mode: str, shares: int) -> None:
    config = small_config()
    config.AUG.CUTMIX, config.AUG.MIXUP_MODE = 0.0, mode
    seed_generators(0)
    _, targets = build_mixup(config, num_classes=4)(torch.rand(4, 3, 8, 8), torch.arange(4))
    assert len({round(share, 5) for share in targets.diagonal().tolist()}) == shares


def test_mixup_is_off(root: Path) -> None:
    for options in ({"MIXUP": 0.0, "CUTMIX": 0.0}, {"MIXUP_PROB": 0.0}):
        config = small_config(root, BATCH_SIZE=3)
        for name, value in options.items():
            config.AUG[name] = value
        assert build_mixup(config, num_classes=3) is None


def test_mixup_needs_pairs() -> None:
    with pytest.raises(ValueError, match=r"DATA\.BATCH_SIZE must be even for mixup and cutmix, not 5; change it, or"):
        build_mixup(small_config(BATCH_SIZE=5), num_classes=3)
