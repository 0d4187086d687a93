"""Every option of a run, its default and its meaning.

A run is one YAML file merged over these defaults, then `--opts KEY VALUE ...` merged over that. Keys that are not
declared here are errors, in the file and on the command line alike.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

_C = CfgNode()

# YAML files, relative to this one, whose values come first.
_C.BASE = []

# What is trained, see tasks/.
_C.TASK = "classification"

_C.DATA = CfgNode()
# How the data set is stored; docs/data.md describes each.
# "imagenet": DATA_PATH/train/<class>/* and DATA_PATH/val/<class>/*, with any number of classes.
# "csv", "tar" (archives and shards), "parquet", "huggingface" (saved on disk), "cifar10", "cifar100", "mnist",
# "fashion_mnist": the same from other files.
# "digits": the 1,797 handwritten digits inside scikit-learn; needs no path.
_C.DATA.DATASET = "imagenet"
# Root of the data set; `--data-path`, then the environment variable DATA_PATH, where this is empty.
_C.DATA.DATA_PATH = ""
# What the parts are called, below DATA_PATH or in full; empty: train, and val, validation, valid or test.
_C.DATA.TRAIN = ""
_C.DATA.VAL = ""
# Fetch the data set from where it is published, for formats that know where.
_C.DATA.DOWNLOAD = False
# An image may have several labels, or none; they are learnt by binary cross-entropy.
_C.DATA.MULTI_LABEL = False
# Columns of parquet and huggingface; empty: the usual names.
_C.DATA.IMAGE_COLUMN = ""
_C.DATA.LABEL_COLUMN = ""
# Order of classes whose names are all numbers: "name", as text like torchvision (0, 1, 10, 2), or "number".
_C.DATA.CLASS_ORDER = "name"
# Orientation that cameras note in EXIF: "ignore", as published numbers do, or "apply".
_C.DATA.EXIF = "ignore"
# More held-out images than training images are taken for swapped parts; this allows them.
_C.DATA.ALLOW_LARGER_VAL = False
# Images per process and micro-batch; an update sees BATCH_SIZE x processes x TRAIN.ACCUMULATION_STEPS images.
_C.DATA.BATCH_SIZE = 128
# Height and width in pixels of what the network is given.
_C.DATA.IMG_SIZE = 224
_C.DATA.INTERPOLATION = "bicubic"
# Worker processes that decode images, per training process, at most one for each core; 0: the training process itself.
_C.DATA.NUM_WORKERS = 8
# Page-locked host memory, so that copies to a GPU overlap with computing. Ignored on other devices.
_C.DATA.PIN_MEMORY = True
# What an unreadable image does. "raise" stops the run and names the file. "skip" goes on: training draws a substitute,
# evaluation leaves the image out and says so. "auto" skips in training and raises in evaluation.
_C.DATA.BAD_IMAGES = "auto"
# Skipping stops with an error once more than this share of the training images was unreadable.
_C.DATA.MAX_BAD_SHARE = 0.01

_C.MODEL = CfgNode()
_C.MODEL.TYPE = "dat"
# Names the output folder.
_C.MODEL.NAME = "dat"
# Weights to start from (fine-tuning); the optimizer starts afresh. Set by `--pretrained`.
_C.MODEL.PRETRAINED = ""
# Where PRETRAINED has other classes: a text file with the index of its class for each class here, one a line.
# ImageNet-22K weights need none to become ImageNet-1K ones.
_C.MODEL.CLASS_MAP = ""
# Checkpoint to continue, or to evaluate. Set by `--resume`.
_C.MODEL.RESUME = ""
_C.MODEL.LABEL_SMOOTHING = 0.1

# The arguments of models.dat.DAT, under their published names. Lists of four have one entry per stage.
_C.MODEL.DAT = CfgNode()
# The size the tables are built for; any size can be run.
_C.MODEL.DAT.img_size = 224
_C.MODEL.DAT.patch_size = 4
_C.MODEL.DAT.in_chans = 3
# Training builds the head for as many classes as the data set has; this is the number the file is meant for.
_C.MODEL.DAT.num_classes = 1000
# Width of the hidden layer of an MLP, in multiples of the width of the stage.
_C.MODEL.DAT.expansion = 4
_C.MODEL.DAT.dim_stem = 96
_C.MODEL.DAT.dims = [96, 192, 384, 768]
_C.MODEL.DAT.depths = [2, 2, 6, 2]
# One letter a block: L window, S shifted window, D deformable, N neighborhood, P pyramid, Q learned queries,
# E slide attention, X ConvNeXt block. A stage is a string or a list of letters.
_C.MODEL.DAT.stage_spec = [["L", "D"], ["L", "D"], ["L", "D", "L", "D", "L", "D"], ["L", "D"]]
_C.MODEL.DAT.heads = [3, 6, 12, 24]
# Heads of learned-query attention.
_C.MODEL.DAT.heads_q = [6, 12, 24, 48]
# Side of the windows of L and S, and the kernel of X.
_C.MODEL.DAT.window_sizes = [7, 7, 7, 7]
# Window of neighborhood attention, and whether it has a relative position bias.
_C.MODEL.DAT.nat_ksizes = [3, 3, 3, 3]
_C.MODEL.DAT.nat_rpb = True
# Deformable attention: groups that share offsets, stride and kernel of the offset network, and the range of the offsets
# in key cells (below 0: unbounded, positions clamped to the map).
_C.MODEL.DAT.groups = [1, 1, 3, 6]
_C.MODEL.DAT.strides = [1, 1, 1, 1]
_C.MODEL.DAT.ksizes = [9, 7, 5, 3]
_C.MODEL.DAT.offset_range_factor = [1.0, 2.0, 3.0, 4.0]
_C.MODEL.DAT.no_offs = [False, False, False, False]
# Position bias of deformable attention: on or off, and its kind (the sampled table where none of the three is set).
_C.MODEL.DAT.use_pes = [False, False, False, False]
_C.MODEL.DAT.dwc_pes = [False, False, False, False]
_C.MODEL.DAT.fixed_pes = [False, False, False, False]
_C.MODEL.DAT.log_cpb = [False, False, False, False]
# Reference points and query grid of "dat++" (2023) or of "cvpr22" weights.
_C.MODEL.DAT.coordinates = "dat++"
# Reduction of keys and values in pyramid attention.
_C.MODEL.DAT.sr_ratios = [8, 4, 2, 1]
# Learned-query attention: kernel, queries, and "exp", "sigmoid" or "linear".
_C.MODEL.DAT.ksize_qnas = [3, 3, 3, 3]
_C.MODEL.DAT.nqs = [2, 2, 2, 2]
_C.MODEL.DAT.qna_activation = "exp"
# Depthwise convolutions in the MLPs, local perception units before the blocks, overlapping convolutions between stages.
_C.MODEL.DAT.use_dwc_mlps = [False, False, False, False]
_C.MODEL.DAT.use_lpus = [False, False, False, False]
_C.MODEL.DAT.use_conv_patches = False
# Initial layer scale; no layer scale at or below 0.
_C.MODEL.DAT.layer_scale_values = [-1.0, -1.0, -1.0, -1.0]
_C.MODEL.DAT.drop_rate = 0.0
_C.MODEL.DAT.attn_drop_rate = 0.0
_C.MODEL.DAT.drop_path_rate = 0.0

_C.TRAIN = CfgNode()
_C.TRAIN.EPOCHS = 300
_C.TRAIN.WARMUP_EPOCHS = 20
_C.TRAIN.WEIGHT_DECAY = 0.05
# Learning rates for an update of 512 images; each is multiplied by images per update / 512.
_C.TRAIN.BASE_LR = 5e-4
_C.TRAIN.WARMUP_LR = 5e-7
_C.TRAIN.MIN_LR = 5e-6
# Largest gradient norm; 0 switches clipping off.
_C.TRAIN.CLIP_GRAD = 5.0
# Continue from the newest checkpoint of the output folder.
_C.TRAIN.AUTO_RESUME = True
# Continue although the checkpoint was written under other options; without it the differences are listed and refused.
_C.TRAIN.ALLOW_CONFIG_CHANGE = False
# Micro-batches per update.
_C.TRAIN.ACCUMULATION_STEPS = 1
# Recompute every block in the backward pass instead of keeping its activations: less memory, about a third more time.
_C.TRAIN.USE_CHECKPOINT = False
# An update whose loss or gradient is not finite is skipped; so many in a row end the run.
_C.TRAIN.MAX_NONFINITE = 20
# Then run the last batch once more and name the first module whose output is not finite. Keeps a batch more in memory.
_C.TRAIN.ANOMALY_REPORT = False
_C.TRAIN.EMA = CfgNode()
# Keep an exponential moving average of the weights, evaluated beside them.
_C.TRAIN.EMA.ENABLED = False
_C.TRAIN.EMA.DECAY = 0.9999
_C.TRAIN.LR_SCHEDULER = CfgNode()
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"
# Of the step schedule: epochs between decays, and the factor.
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1
_C.TRAIN.OPTIMIZER = CfgNode()
_C.TRAIN.OPTIMIZER.NAME = "adamw"
_C.TRAIN.OPTIMIZER.EPS = 1e-8
_C.TRAIN.OPTIMIZER.BETAS = [0.9, 0.999]
# Of SGD, with Nesterov momentum.
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9

_C.AUG = CfgNode()
# Area and aspect ratio of the random crop, as shares of the image.
_C.AUG.SCALE = [0.08, 1.0]
_C.AUG.RATIO = [0.75, 1.3333333333333333]
# Probability of a horizontal flip.
_C.AUG.HFLIP = 0.5
_C.AUG.COLOR_JITTER = 0.4
# A timm policy such as rand-m9-mstd0.5-inc1, or "" for none.
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
# Random erasing: probability, "pixel", "rand" or "const", and how many areas.
_C.AUG.REPROB = 0.25
_C.AUG.REMODE = "pixel"
_C.AUG.RECOUNT = 1
# Alphas of mixup and cutmix (0 switches one off), their joint probability, that of cutmix where both are on, and
# whether they are drawn per "batch", "pair" or "elem".
_C.AUG.MIXUP = 0.8
_C.AUG.CUTMIX = 1.0
_C.AUG.MIXUP_PROB = 1.0
_C.AUG.MIXUP_SWITCH_PROB = 0.5
_C.AUG.MIXUP_MODE = "batch"

_C.TEST = CfgNode()
# Resize both sides to 256/224 of IMG_SIZE and crop the centre; otherwise resize both sides to IMG_SIZE.
_C.TEST.CROP = True

# "cuda", "mps" or "cpu"; empty: the best there is.
_C.DEVICE = ""
# Mixed precision of training: "off", "fp16", "bf16", or "auto": bf16 where the device has it, else fp16. Evaluation is
# float32.
_C.AMP = "off"
# torch.compile, block by block.
_C.COMPILE = False
# Results lie in OUTPUT/MODEL.NAME/TAG.
_C.OUTPUT = "output"
_C.TAG = "default"
# Log every so many updates.
_C.PRINT_FREQ = 10
_C.SEED = 0
# Choose deterministic kernels only. On CPU runs are reproducible without it.
_C.DETERMINISTIC = False
# `last.pth` is written after every epoch; a copy epoch_N.pth is kept every SAVE_FREQ epochs (0: never), the newest
# KEEP_CHECKPOINTS of them (0: all). Within an epoch `last.pth` is also written every so many updates or minutes
# (0: not).
_C.SAVE_FREQ = 10
_C.KEEP_CHECKPOINTS = 3
_C.SAVE_EVERY_UPDATES = 0
_C.SAVE_EVERY_MINUTES = 0.0
_C.TENSORBOARD = False
_C.WANDB = False

_CHOICES = {
    "DATA.INTERPOLATION": ("bicubic", "bilinear"),
    "DATA.BAD_IMAGES": ("auto", "raise", "skip"),
    "DATA.CLASS_ORDER": ("name", "number"),
    "DATA.EXIF": ("ignore", "apply"),
    "MODEL.TYPE": ("dat",),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step"),
    "TRAIN.OPTIMIZER.NAME": ("adamw", "sgd"),
    "AUG.REMODE": ("pixel", "rand", "const"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    "DEVICE": ("", "cuda", "mps", "cpu"),
    "AMP": ("off", "fp16", "bf16", "auto"),
}
_AT_LEAST_ONE = (
    "DATA.BATCH_SIZE",
    "DATA.IMG_SIZE",
    "MODEL.DAT.num_classes",
    "TRAIN.EPOCHS",
    "TRAIN.ACCUMULATION_STEPS",
    "TRAIN.MAX_NONFINITE",
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS",
    "PRINT_FREQ",
)
_NOT_NEGATIVE = (
    "DATA.NUM_WORKERS",
    "TRAIN.WARMUP_EPOCHS",
    "TRAIN.WEIGHT_DECAY",
    "TRAIN.BASE_LR",
    "TRAIN.WARMUP_LR",
    "TRAIN.MIN_LR",
    "TRAIN.CLIP_GRAD",
    "TRAIN.OPTIMIZER.EPS",
    "AUG.COLOR_JITTER",
    "AUG.RECOUNT",
    "AUG.MIXUP",
    "AUG.CUTMIX",
    "SAVE_FREQ",
    "KEEP_CHECKPOINTS",
    "SAVE_EVERY_UPDATES",
    "SAVE_EVERY_MINUTES",
    "SEED",
)
_SHARES = (
    "DATA.MAX_BAD_SHARE",
    "MODEL.LABEL_SMOOTHING",
    "TRAIN.EMA.DECAY",
    "TRAIN.LR_SCHEDULER.DECAY_RATE",
    "TRAIN.OPTIMIZER.MOMENTUM",
    "AUG.HFLIP",
    "AUG.REPROB",
    "AUG.MIXUP_PROB",
    "AUG.MIXUP_SWITCH_PROB",
)


def default_config() -> CfgNode:
    """Return a copy of the defaults."""
    return _C.clone()


def load_config(path: str | Path, overrides: Sequence[Any] = ()) -> CfgNode:
    """Read a config file over the defaults.

    Args:
        path: YAML file; its `BASE` files, relative to it, come first.
        overrides: alternating keys and values, `["TRAIN.EPOCHS", "10"]`; values given as text are read like YAML.

    Raises:
        ValueError: for a file that cannot be read, an unknown key, or a value of a wrong type or outside its range.
    """
    config = default_config()
    _merge_file(config, Path(path))
    if len(overrides) % 2:
        raise ValueError(f"--opts takes pairs of KEY VALUE; {overrides[-1]!r} has no value")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        set_option(config, str(key), value)
    config.BASE = []
    _validate(config)
    return config


def set_option(config: CfgNode, key: str, value: Any) -> None:
    """Set the option `key`, dotted as in `TRAIN.EPOCHS`; text is read like YAML where the option is not text itself."""
    if key == "BASE":
        raise ValueError("BASE belongs into a config file; on the command line give the options themselves")
    *parents, name = key.split(".")
    node = config
    for parent in parents:
        if not isinstance(node.get(parent), CfgNode):
            raise ValueError(_unknown_key(key))
        node = node[parent]
    if name not in node:
        raise ValueError(_unknown_key(key))
    if isinstance(node[name], CfgNode):
        raise ValueError(f"{key} is a section; set one of its options, such as {key}.{next(iter(node[name]))}")
    if isinstance(value, str) and not isinstance(node[name], str):
        try:
            value = _read_yaml(value)
        except ValueError:
            raise ValueError(f"{key}: {value!r} is no value; write it as in a YAML file, lists as [1,2,3,4]") from None
    node[name] = _coerce(key, value, _default(key))


def differences(one: CfgNode, other: CfgNode) -> list[tuple[str, Any, Any]]:
    """Return `(key, value in one, value in other)` of every option that differs; None where one does not have it."""
    left, right = dict(flatten(one)), dict(flatten(other))
    return [(key, left.get(key), right.get(key)) for key in left | right if left.get(key) != right.get(key)]


def flatten(config: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every option as `(dotted key, value)`."""
    for name, value in config.items():
        if isinstance(value, CfgNode):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _merge_file(config: CfgNode, path: Path, children: tuple[Path, ...] = ()) -> None:
    path = path.resolve()
    if path in children:
        raise ValueError(f"BASE of {children[-1]} leads back to itself; remove the circle")
    if path.is_dir():
        raise ValueError(f"config file {path} is a folder; name a file in it, such as configs/digits.yaml")
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1, cutoff=0.5)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ValueError(f"config file {path} does not exist{hint}")
    try:
        loaded = _read_yaml(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"config file {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"config file {path} holds no options; write them as KEY: value, as in configs/dat_tiny.yaml")
    bases = loaded.pop("BASE", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{path}: BASE must be the name of a config file, or a list of names, not {bases!r}")
    for base in filter(None, bases):
        _merge_file(config, path.parent / base, (*children, path))
    try:
        _merge_dict(config, loaded, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _merge_dict(config: CfgNode, loaded: dict, prefix: str) -> None:
    for name, value in loaded.items():
        key = f"{prefix}{name}"
        if name not in config:
            raise ValueError(_unknown_key(key))
        if isinstance(config[name], CfgNode):
            if not isinstance(value, dict):
                raise ValueError(f"{key} is a section, not {value!r}; its options go below it, indented")
            _merge_dict(config[name], value, f"{key}.")
        else:
            config[name] = _coerce(key, value, _default(key))


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} stands twice in the section that begins in line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep=deep)


def _read_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # the constructors of YAML let whatever a broken value provokes through
        raise ValueError(str(error) or type(error).__name__) from None


def _default(key: str) -> Any:
    node = _C
    for name in key.split("."):
        node = node[name]
    return node


def _unknown_key(key: str) -> str:
    known = {name.upper(): name for name, _ in flatten(_C)}
    last = {name.rpartition(".")[2]: name for name in known}  # of those who write EPOCHS for TRAIN.EPOCHS
    near = difflib.get_close_matches(key.upper(), known, n=1, cutoff=0.6)
    near = near or [last[name] for name in difflib.get_close_matches(key.upper().rpartition(".")[2], last, n=1)]
    hint = f"did you mean {known[near[0]]}?" if near else "every option stands in config.py"
    return f"unknown option {key}; {hint}"


def _coerce(key: str, value: Any, default: Any) -> Any:
    """Return `value` as the type of `default`, or say what the type should be."""
    if key == "AMP" and isinstance(value, bool):
        value = "on" if value else "off"  # YAML reads these bare words as booleans
    if isinstance(default, float) and isinstance(value, (int, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            value = float(value)  # YAML takes 1 for an integer and 5e-4 for text
    if type(value) is not type(default):
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
        hint = "; put it in quotes" if isinstance(default, str) and isinstance(value, (int, float)) else ""
        hint = "; give it a value or remove the line" if value is None else hint
        raise ValueError(f"{key} must be {words[type(default)]}, such as {default!r}, not {value!r}{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, such as {default!r}, not {value!r}")
    if isinstance(value, int) and abs(value) >= 2**31:
        raise ValueError(f"{key} must be below 2^31, not {value}")
    if isinstance(value, str) and not value.isprintable():
        raise ValueError(f"{key} must be text of one line without control characters, not {value!r}")
    if isinstance(value, list) and default and not isinstance(default[0], list):
        return [_coerce(f"{key}[{i}]", entry, default[0]) for i, entry in enumerate(value)]
    return value


def _validate(config: CfgNode) -> None:
    values = dict(flatten(config))
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            near = difflib.get_close_matches(values[key], choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"{key} must be one of {', '.join(c or repr(c) for c in choices)}, not {values[key]!r}{hint}"
            )
    for keys, holds, words in (
        (_AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        (_SHARES, lambda value: 0 <= value <= 1, "between 0 and 1"),
    ):
        for key in keys:
            if not holds(values[key]):
                raise ValueError(f"{key} must be {words}, not {values[key]}")
    for key, low, high in (("AUG.SCALE", 0, 1), ("AUG.RATIO", 0, math.inf)):
        pair = values[key]
        if len(pair) != 2 or not low < pair[0] <= pair[1] <= high:
            bound = f" and at most {high}" if math.isfinite(high) else ""
            raise ValueError(f"{key} must be two numbers [smallest, largest], above {low}{bound}, not {pair}")
    betas = values["TRAIN.OPTIMIZER.BETAS"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"TRAIN.OPTIMIZER.BETAS must be two numbers from 0 to below 1, not {betas}")
    if not config.OUTPUT.strip():
        raise ValueError("OUTPUT is empty; give a folder for the results, such as output")
    for key in ("MODEL.NAME", "TAG"):
        if not values[key].strip() or Path(values[key]).name != values[key] or values[key].startswith("."):
            raise ValueError(f"{key} names a folder and must be a plain name, not {values[key]!r}")
