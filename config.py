"""Every option of a run: default, meaning and allowed values.

A config is one YAML file merged over these defaults, then `--opts KEY VALUE ...`, then the flags. Keys that are not
declared here are errors, both in the file and on the command line.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from yacs.config import CfgNode

from models.build import FAMILIES
from models.detection import DETECTORS
from models.layers import as_pair
from models.options import Check, Option, at_least, did_you_mean, not_negative, one_of, positive, share
from models.segmentation import SEGMENTERS

_CONFIGS = Path(__file__).resolve().parent / "configs"


@dataclass(frozen=True)
class RunOption(Option):
    """An option of a run.

    A default of `{}` declares a section with arbitrary keys, for the arguments of another library.

    Attributes:
        may_change: may differ when a run is resumed, because it does not affect the result.
        flag: the command-line flag that sets it.
        metavar: name of the flag's value in `--help`.
        bare: value of the flag when it is given without one; None if a value is required.
        synonyms: flags of other trainers with the same meaning; the hint for them is this option.
    """

    may_change: bool = False
    flag: str = ""
    metavar: str = ""
    bare: Any = None
    synonyms: Sequence[str] = ()


def _switch(
    default: bool, meaning: str, *, flag: str = "", may_change: bool = False, synonyms: Sequence[str] = ()
) -> RunOption:
    bare = True if flag else None
    return RunOption(default, meaning, flag=flag, bare=bare, may_change=may_change, synonyms=synonyms)


_AREAS = Check(
    lambda pair: len(pair) == 2 and 0 < pair[0] <= pair[1] <= 1,
    "two numbers [smallest, largest], above 0 and at most 1",
)
_RATIOS = Check(lambda pair: len(pair) == 2 and 0 < pair[0] <= pair[1], "two numbers [smallest, largest], above 0")
_NAMES = Check(lambda names: all(isinstance(name, str) for name in names), "a list of names")
_WRITERS = Check(
    lambda names: all(name in ("tensorboard", "wandb", "mlflow") for name in names),
    "a list of tensorboard, wandb and mlflow",
)
_BETAS = Check(lambda pair: len(pair) == 2 and all(0 <= beta < 1 for beta in pair), "two numbers from 0 to below 1")
_SIZE = Check(
    lambda size: len(size) == 2 and min(size) >= 1 if isinstance(size, list) else size >= 1,
    "a number of pixels, at least 1, or [height, width]",
)
_COUNTS = Check(
    lambda sides: all(isinstance(side, int) and side >= 1 for side in sides), "a list of positive whole numbers"
)
_SIDES = Check(lambda sides: bool(sides) and _COUNTS.holds(sides), "a list of positive whole numbers, not empty")
_RANGE = Check(
    lambda pair: len(pair) == 2 and _COUNTS.holds(pair) and pair[0] <= pair[1],
    "two positive whole numbers [smallest, largest]",
)
_FRACTION = Check(lambda value: 0 < value <= 1, "above 0 and at most 1")
_MILESTONES = Check(
    lambda epochs: epochs == sorted(epochs) and all(isinstance(epoch, int) and epoch >= 1 for epoch in epochs),
    "an increasing list of positive epochs",
)
# Windows reserves these names for devices, with any ending.
_DEVICES = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9])(\..*)?", re.IGNORECASE)
_PLAIN_NAME = Check(
    lambda name: (
        bool(name.strip()) and Path(name).name == name and not name.startswith(".") and not _DEVICES.fullmatch(name)
    ),
    "a folder name without a path, and not one that Windows reserves",
)
_FOLDER = Check(lambda path: bool(path.strip()), "a folder for the results, such as output")

OPTIONS: dict[str, Option] = {
    "BASE": RunOption([], "YAML files to inherit from, relative to the file that names them."),
    "TASK": RunOption("classification", "classification, detection or segmentation, see tasks/."),
    # ---- data
    "DATA.DATASET": RunOption(
        "imagenet",
        "Format of the data set, see docs/data.md. imagenet: DATA_PATH/train/<class>/* and DATA_PATH/val/<class>/*, "
        "with any number of classes. csv, tar (archives and shards), parquet, huggingface (saved on disk), cifar10, "
        "cifar100, mnist, fashion_mnist: other formats of classification data. webdataset: shards from pipes and "
        "object stores, in approximately random order. digits: the 1,797 handwritten digits of scikit-learn, which "
        "need no path. TASK detection: coco, voc, yolo, digit_scenes. TASK segmentation: ade20k, masks, coco, "
        "digit_scenes.",
    ),
    "DATA.DATA_PATH": RunOption(
        "",
        "Root of the data set; empty: the environment variable DATA_PATH.",
        synonyms=("--data", "--data-dir", "--dataset-path", "--root"),
        flag="--data-path",
        metavar="FOLDER",
        may_change=True,
    ),
    "DATA.TRAIN": RunOption("", "Name or path of the training split, relative to DATA_PATH or absolute; empty: train."),
    "DATA.VAL": RunOption(
        "", "Likewise for the validation split; empty: val, validation, valid or test; in TASK detection val."
    ),
    "DATA.DOWNLOAD": _switch(
        False, "Download the data set from its published location, for formats that have one.", may_change=True
    ),
    "DATA.SCENES": RunOption(600, "Training scenes of digit_scenes; 150 others are for validation.", at_least(1)),
    "DATA.STREAM.IMAGES": RunOption(
        0, "webdataset: training images per epoch, as a stream has no length.", not_negative()
    ),
    "DATA.STREAM.VAL_IMAGES": RunOption(
        0, "webdataset: total number of validation images, which evaluation checks.", not_negative()
    ),
    "DATA.STREAM.SHUFFLE": RunOption(
        1000, "Size of each worker's shuffle buffer in images, in addition to shuffled shards.", not_negative()
    ),
    "DATA.MULTI_LABEL": _switch(False, "An image may have several labels, or none; the loss is binary cross-entropy."),
    "DATA.IMAGE_COLUMN": RunOption("", "Column of the images in parquet and huggingface; empty: the usual names."),
    "DATA.LABEL_COLUMN": RunOption("", "Column of the labels, likewise."),
    "DATA.CLASS_ORDER": RunOption(
        "name",
        "Order of classes whose names are all numbers: name, as text like torchvision (0, 1, 10, 2), or number.",
        one_of("name", "number"),
    ),
    "DATA.EXIF": RunOption(
        "ignore",
        "EXIF orientation: ignore, as for the published numbers, or apply.",
        one_of("ignore", "apply"),
    ),
    "DATA.ALLOW_LARGER_VAL": _switch(
        False,
        "Accept more validation images than training images; by default the splits are assumed to be swapped.",
        may_change=True,
    ),
    "DATA.BALANCE": RunOption(
        "none",
        "How imbalanced classes are handled. loss: the loss of an image is weighted by the inverse size of its class. "
        "sampling: an epoch keeps its length and draws the same number of images of each class; those of small "
        "classes are repeated, with different augmentation each time, and only some of large classes are used.",
        one_of("none", "loss", "sampling"),
    ),
    "DATA.BATCH_SIZE": RunOption(
        128,
        "Images per process and micro-batch; an update uses BATCH_SIZE x processes x TRAIN.ACCUMULATION_STEPS images.",
        at_least(1),
        synonyms=("-b", "--bs", "--batch"),
        flag="--batch-size",
        metavar="N",
        may_change=True,
    ),
    "DATA.IMG_SIZE": RunOption(
        224,
        "Size of the network's input in pixels: one side, or [height, width].",
        _SIZE,
        also_list=True,
        synonyms=("--input-size", "--image-size", "--crop-size", "--resolution", "--imgsz"),
        flag="--img-size",
        metavar="N",
    ),
    "DATA.INTERPOLATION": RunOption(
        "bicubic",
        "Interpolation for resizing images of classification; the other tasks use bilinear.",
        one_of("bicubic", "bilinear"),
    ),
    "DATA.NUM_WORKERS": RunOption(
        8,
        "Data loader workers per training process, at most one per core; 0: images are loaded in the training process.",
        not_negative(),
        synonyms=("-j", "--num-workers"),
        flag="--workers",
        metavar="N",
        may_change=True,
    ),
    "DATA.CACHE": _switch(
        False,
        "Read all image files into memory at the start, once for all processes of a machine (/dev/shm, Linux), for "
        "data sets that fit into memory and are on slow disks; images that do not fit are read from the disk.",
        may_change=True,
    ),
    "DATA.PIN_MEMORY": _switch(
        True,
        "Page-locked host memory, so that copies to a GPU overlap with computation. Ignored on other devices.",
        may_change=True,
    ),
    "DATA.BAD_IMAGES": RunOption(
        "auto",
        "Handling of unreadable images. raise: stop the run and name the file. skip: training draws a substitute, "
        "evaluation leaves the image out with a warning. auto: skip in training, raise in evaluation.",
        one_of("auto", "raise", "skip"),
        may_change=True,
    ),
    "DATA.MAX_BAD_SHARE": RunOption(
        0.01,
        "The run stops with an error if more than this share of the training images are unreadable.",
        share(),
        may_change=True,
    ),
    "DATA.REDUCE_ZERO_LABEL": _switch(
        False, "Masks: ignore label 0 and subtract one from all others. Always done for ADE20K."
    ),
    "DATA.IGNORE_LABEL": RunOption(
        255, "Masks: value of pixels to ignore.", Check(lambda value: 0 <= value <= 255, "0 to 255")
    ),
    "DATA.LABEL_MAP": RunOption({}, "Masks: class by value, such as {7: 0, 8: 1}; all other values are ignored."),
    # ---- network
    "MODEL.TYPE": RunOption(
        "dat",
        "Model family; each has its section of options, such as MODEL.DAT.",
        one_of(*FAMILIES),
    ),
    "MODEL.NAME": RunOption("dat", "Name of the output folder.", _PLAIN_NAME),
    "MODEL.PRETRAINED": RunOption(
        "",
        "Weights to start from (fine-tuning), with a new optimizer state.",
        synonyms=("--finetune", "--weights-from", "--init-checkpoint"),
        flag="--pretrained",
        metavar="FILE",
        may_change=True,
    ),
    "MODEL.WEIGHTS": RunOption(
        "",
        "Which weights of a file to evaluate or to start from: raw, or ema, the averaged ones. Empty: those the "
        "checkpoint was selected by; if it does not record this, the averaged ones if there are any.",
        one_of("", "raw", "ema"),
        flag="--weights",
        metavar="raw|ema",
        may_change=True,
    ),
    "MODEL.CLASS_MAP": RunOption(
        "",
        "If PRETRAINED or the file to evaluate has other classes: a text file with one line per class of the data set: "
        "the class's index in the weights, its name there or its WordNet id, optionally preceded by the folder name. "
        "Not needed to adapt ImageNet-22K weights to ImageNet-1K.",
        may_change=True,
    ),
    "MODEL.RESUME": RunOption(
        "",
        "Checkpoint to resume or to evaluate.",
        synonyms=(
            "--checkpoint",
            "--ckpt",
            "--ckpt-path",
            "--continue",
            "--load",
            "--load-checkpoint",
            "--load-from",
            "--resume-from",
        ),
        flag="--resume",
        metavar="FILE",
        may_change=True,
    ),
    "MODEL.LABEL_SMOOTHING": RunOption(0.1, "Label smoothing.", share(), synonyms=("--smoothing",)),
    "MODEL.TIMM.NAME": RunOption(
        "",
        "A timm model, such as resnet50; the flag also sets MODEL.TYPE.",
        synonyms=("--arch", "-a", "--backbone", "--model-name", "--network"),
        flag="--model",
        metavar="NAME",
    ),
    "MODEL.TIMM.ARGS": RunOption({}, "Arguments of timm.create_model, such as drop_path_rate: 0.1."),
    "MODEL.DETECTOR.NAME": RunOption(
        "retinanet",
        "Detector on top of the backbone (TASK detection): retinanet, mask_rcnn, cascade (Cascade Mask R-CNN); "
        "detr, conditional_detr, dab_detr, deformable_detr, deformable_detr_refined (boxes refined by each layer), "
        "deformable_detr_two_stage, rt_detr and d_fine of transformers; dino, co_detr.",
        one_of(*DETECTORS),
    ),
    "MODEL.DETECTOR.ARGS": RunOption(
        {},
        "Its arguments, see models/detection/, such as channels: 256; for one of transformers, those of its config.",
    ),
    "MODEL.SEGMENTER.NAME": RunOption(
        "fpn",
        "Segmenter on top of the backbone (TASK segmentation): fpn (Semantic FPN), upernet, mask2former.",
        one_of(*SEGMENTERS),
    ),
    "MODEL.SEGMENTER.ARGS": RunOption(
        {},
        "Its arguments, see models/segmentation/, such as channels: 128; for mask2former, those of Mask2FormerConfig.",
    ),
    # Options of the model families; lists of four in MODEL.DAT have one entry per stage.
    **{
        f"MODEL.{family.upper()}.{name}": option
        for family, networks in FAMILIES.items()
        for name, option in networks.options.items()
    },
    # ---- training
    "TRAIN.EPOCHS": RunOption(300, "Number of epochs.", at_least(1), flag="--epochs", metavar="N"),
    "TRAIN.WARMUP_EPOCHS": RunOption(
        20,
        "Epochs over which the learning rate rises from WARMUP_LR to BASE_LR.",
        not_negative(),
        synonyms=("--warmup",),
        flag="--warmup-epochs",
        metavar="N",
    ),
    "TRAIN.WARMUP_UPDATES": RunOption(0, "The same in updates; 0: use WARMUP_EPOCHS.", not_negative()),
    "TRAIN.WEIGHT_DECAY": RunOption(
        0.05,
        "Weight decay of matrices; biases and norms have none.",
        not_negative(),
        synonyms=("--wd",),
        flag="--weight-decay",
        metavar="X",
    ),
    "TRAIN.BASE_LR": RunOption(
        5e-4,
        "Peak learning rate for 512 images per update; BASE_LR, WARMUP_LR and MIN_LR are multiplied by images per "
        "update / 512.",
        not_negative(),
        synonyms=("--learning-rate", "--base-lr"),
        flag="--lr",
        metavar="X",
    ),
    "TRAIN.WARMUP_LR": RunOption(5e-7, "Learning rate at the start of the warm-up.", not_negative()),
    "TRAIN.MIN_LR": RunOption(5e-6, "Learning rate at the end of cosine and poly.", not_negative()),
    "TRAIN.CLIP_GRAD": RunOption(
        5.0,
        "Maximum gradient norm; 0 disables clipping.",
        not_negative(),
        synonyms=("--grad-clip", "--clip-grad-norm", "--max-grad-norm"),
    ),
    "TRAIN.AUTO_RESUME": _switch(True, "Resume from the newest checkpoint in the output folder.", may_change=True),
    "TRAIN.ALLOW_CONFIG_CHANGE": _switch(
        False,
        "Resume although the checkpoint was written with other options; otherwise the differences are an error.",
        flag="--allow-config-change",
        may_change=True,
    ),
    "TRAIN.ACCUMULATION_STEPS": RunOption(
        1,
        "Micro-batches per update.",
        at_least(1),
        synonyms=("--grad-accum-steps", "--gradient-accumulation-steps", "--accum-iter"),
        flag="--accumulation-steps",
        metavar="N",
        may_change=True,
    ),
    "TRAIN.USE_CHECKPOINT": _switch(
        False,
        "Activation checkpointing: recompute every block in the backward pass; less memory, about a third more time.",
        flag="--use-checkpoint",
        may_change=True,
    ),
    "TRAIN.MAX_NONFINITE": RunOption(
        20,
        "Updates with a non-finite loss or gradient are skipped; this many in a row end the run.",
        at_least(1),
        may_change=True,
    ),
    "TRAIN.ANOMALY_REPORT": _switch(
        False,
        "In that case run the last batch once more and name the first module whose output is not finite. Keeps one "
        "more batch in memory.",
        may_change=True,
    ),
    "TRAIN.FREEZE": RunOption(
        [],
        "Parts that are not trained: names of modules or parameters, with * as a wildcard, such as [patch_proj, "
        "stages.0]. Their norms and dropout stay in evaluation mode.",
        _NAMES,
    ),
    "TRAIN.LAYER_DECAY": RunOption(
        1.0, "Factor on the learning rate from each layer to the preceding one; 1: none.", positive()
    ),
    "TRAIN.HEAD_LR_SCALE": RunOption(
        1.0, "Factor on the learning rate of the layer that computes the logits, such as 10 for a new one.", positive()
    ),
    "TRAIN.BACKBONE_LR_SCALE": RunOption(
        1.0, "Factor on the learning rate of the backbone of a detector or segmenter.", positive()
    ),
    "TRAIN.LR_SCALES": RunOption(
        {},
        'Further factors, by name of modules or parameters with * as a wildcard, such as {"*.sampling_offsets": 0.1}.',
    ),
    "TRAIN.PATIENCE": RunOption(
        0, "Stop after this many consecutive epochs without a better score; 0: no early stopping.", not_negative()
    ),
    "TRAIN.EMA.ENABLED": _switch(
        False,
        "Keep an exponential moving average of the weights and evaluate both; with --eval, evaluate the average.",
        flag="--ema",
        synonyms=("--model-ema",),
    ),
    "TRAIN.EMA.DECAY": RunOption(
        0.9999,
        "Decay of the average per update: min(DECAY, 1 − u^(−2/3)) after u updates.",
        share(),
        synonyms=("--ema-decay", "--model-ema-decay"),
    ),
    "TRAIN.LR_SCHEDULER.NAME": RunOption(
        "cosine",
        "Learning rate schedule.",
        one_of("cosine", "linear", "poly", "step", "milestones"),
        synonyms=("--sched", "--scheduler", "--lr-scheduler", "--lr-schedule", "--lr-policy"),
    ),
    "TRAIN.LR_SCHEDULER.WARMUP_PREFIX": _switch(
        False,
        "Start the decay after the warm-up, instead of at the first update as in the published training. Linear always "
        "starts after the warm-up.",
    ),
    "TRAIN.LR_SCHEDULER.PLANNED_EPOCHS": RunOption(
        0,
        "Length of the schedule in epochs: less than TRAIN.EPOCHS to train a finished run for longer, more to stop "
        "within the schedule; 0: TRAIN.EPOCHS.",
        not_negative(),
    ),
    "TRAIN.LR_SCHEDULER.AFTER": RunOption(
        "hold",
        "Schedule after these epochs, up to TRAIN.EPOCHS. hold: the last learning rate. rewarm: another warm-up and "
        "decay.",
        one_of("hold", "rewarm"),
    ),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": RunOption(30, "step: epochs between decays.", at_least(1)),
    "TRAIN.LR_SCHEDULER.MILESTONES": RunOption(
        [8, 11], "milestones: epochs after which the learning rate decays.", _MILESTONES
    ),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": RunOption(0.1, "step and milestones: factor of each decay.", share()),
    "TRAIN.LR_SCHEDULER.POWER": RunOption(
        0.9, "poly, which ends at MIN_LR: exponent of the fraction of updates left.", positive()
    ),
    "TRAIN.OPTIMIZER.NAME": RunOption(
        "adamw",
        "adamw, sgd, or another optimizer of timm, such as lion or lamb.",
        synonyms=("--opt", "--optim", "--optimizer"),
    ),
    "TRAIN.OPTIMIZER.EPS": RunOption(1e-8, "Epsilon of adamw.", not_negative()),
    "TRAIN.OPTIMIZER.BETAS": RunOption([0.9, 0.999], "Betas of adamw.", _BETAS),
    "TRAIN.OPTIMIZER.MOMENTUM": RunOption(0.9, "Nesterov momentum of sgd.", share()),
    "TRAIN.OPTIMIZER.ARGS": RunOption({}, "Further arguments of the optimizer, such as betas: [0.95, 0.98] for lion."),
    # ---- knowledge distillation, see tasks/distillation.py
    "DISTILL.TEACHER": RunOption(
        "",
        "Checkpoint of the teacher, with the same classes. Checkpoints of this trainer contain their config.",
        flag="--teacher",
        metavar="FILE",
    ),
    "DISTILL.CONFIG": RunOption("", "Config file of the teacher, if its file contains none, such as a published one."),
    "DISTILL.TIMM": RunOption("", "Instead of TEACHER: a pretrained model downloaded by timm, such as regnety_160."),
    "DISTILL.KIND": RunOption(
        "soft",
        "Target of the teacher. soft: its probabilities, with the Kullback-Leibler divergence. hard: its most probable "
        "class.",
        one_of("soft", "hard"),
    ),
    "DISTILL.SHARE": RunOption(0.5, "Weight of the teacher's loss; the loss on the labels has the rest.", share()),
    "DISTILL.TEMPERATURE": RunOption(1.0, "soft: temperature that the logits of both are divided by.", positive()),
    # ---- augmentation
    "AUG.CROP": RunOption(
        "resized",
        "resized: a random crop, resized. padded: a random crop of the image padded with black pixels, for small "
        "images such as CIFAR's.",
        one_of("resized", "padded"),
    ),
    "AUG.CROP_PADDING": RunOption(4, "Padding of a padded crop, in pixels.", not_negative()),
    "AUG.SCALE": RunOption([0.08, 1.0], "Area of a resized crop, as a fraction of the image.", _AREAS),
    "AUG.RATIO": RunOption([0.75, 1.3333333333333333], "Aspect ratio of a resized crop.", _RATIOS),
    "AUG.REPEATS": RunOption(
        1,
        "Repeated augmentation: copies of an image in an epoch, each augmented differently; the epoch keeps its length "
        "and contains fewer images.",
        at_least(1),
    ),
    "AUG.HFLIP": RunOption(0.5, "Probability of a horizontal flip.", share()),
    "AUG.COLOR_JITTER": RunOption(
        0.4, "Strength of the colour jitter, if AUTO_AUGMENT is empty or 3a; 0: none.", not_negative()
    ),
    "AUG.AUTO_AUGMENT": RunOption(
        "rand-m9-mstd0.5-inc1",
        'A timm policy: this one and others of RandAugment, "3a" (three-augment), "original" (AutoAugment), '
        '"augmix-m3-w3", or "" for none.',
    ),
    "AUG.REPROB": RunOption(0.25, "Probability of random erasing.", share()),
    "AUG.REMODE": RunOption("pixel", "Fill of erased areas.", one_of("pixel", "rand", "const")),
    "AUG.RECOUNT": RunOption(1, "Largest number of erased areas of an image.", not_negative()),
    "AUG.MIXUP": RunOption(0.8, "Alpha of mixup; 0: none.", not_negative()),
    "AUG.CUTMIX": RunOption(1.0, "Alpha of cutmix; 0: none.", not_negative()),
    "AUG.MIXUP_PROB": RunOption(1.0, "Probability of mixup or cutmix.", share()),
    "AUG.MIXUP_SWITCH_PROB": RunOption(0.5, "Probability of cutmix if both are on.", share()),
    "AUG.MIXUP_MODE": RunOption(
        "batch", "Whether mixup is drawn per batch, pair or element.", one_of("batch", "pair", "elem")
    ),
    "AUG.MIXUP_OFF_EPOCHS": RunOption(0, "Number of last epochs without mixup and cutmix.", not_negative()),
    # ---- detection
    "DETECTION.SHORT_SIDES": RunOption(
        list(range(480, 801, 32)),
        "Training images are resized to one of these short sides, in pixels.",
        _SIDES,
    ),
    "DETECTION.LONG_SIDE": RunOption(1333, "Maximum of the long side, also in evaluation.", at_least(1)),
    "DETECTION.CROP_SIDES": RunOption(
        [400, 500, 600],
        "Half of the training images are first resized to one of these short sides and cropped; empty: none.",
        _COUNTS,
    ),
    "DETECTION.CROP": RunOption([384, 600], "Minimum and maximum side of that crop, in pixels.", _RANGE),
    "DETECTION.TEST_SHORT_SIDE": RunOption(800, "Short side of validation images, in pixels.", at_least(1)),
    # ---- segmentation
    "SEGMENTATION.SCALE": RunOption(
        [0.5, 2.0],
        "Range of the random scale of a training image, relative to a short side of DATA.IMG_SIZE, before it is "
        "cropped to DATA.IMG_SIZE.",
        _RATIOS,
    ),
    "SEGMENTATION.LARGEST_SHARE": RunOption(
        0.75, "Maximum share of one class in a training crop; larger ones are redrawn, up to ten times.", _FRACTION
    ),
    "SEGMENTATION.PHOTOMETRIC": RunOption(
        0.5, "Probability of each photometric distortion: brightness, contrast, saturation, hue.", share()
    ),
    "SEGMENTATION.TEST_SCALES": RunOption(
        [1.0],
        "Scales of validation images, relative to a short side of DATA.IMG_SIZE; several are averaged.",
        Check(lambda scales: scales and min(scales) > 0, "a list of numbers above 0"),
        may_change=True,
    ),
    "TEST.CROP": _switch(True, "Resize to IMG_SIZE / CROP_RATIO and crop the centre; otherwise resize to IMG_SIZE."),
    "TEST.CLASSES": RunOption(
        "all",
        "For weights with more classes than the data set: all can be predicted, or only those present.",
        one_of("all", "present"),
        may_change=True,
    ),
    "TEST.LABELS": RunOption(
        "",
        "With --eval: JSON file with a list of labels for each validation image, by the number in its name, any of "
        "which counts as correct, such as real.json of ReaL. Images with empty lists are not counted.",
        may_change=True,
    ),
    "TEST.CROP_RATIO": RunOption(0.875, "Side of the centre crop relative to the resized image.", _FRACTION),
    "TEST.RESIZE": RunOption(
        "squash",
        "squash: resize both sides, as published. shorter: resize the shorter side and keep the aspect ratio.",
        one_of("squash", "shorter"),
    ),
    "TEST.FLIP": _switch(
        False,
        "Average the logits of each image and its mirror image; the probabilities in segmentation.",
    ),
    # ---- machine
    "DEVICE": RunOption(
        "",
        "cuda, mps or cpu; empty: the best available.",
        one_of("", "cuda", "mps", "cpu"),
        flag="--device",
        metavar="cuda|mps|cpu",
        may_change=True,
    ),
    "AMP": RunOption(
        "off",
        "Mixed precision of training: off, fp16, bf16, or auto: bf16 if the device supports it, else fp16. Evaluation "
        "is float32, unless --amp is given with --eval.",
        one_of("off", "fp16", "bf16", "auto"),
        synonyms=("--fp16", "--bf16", "--half", "--mixed-precision"),
        flag="--amp",
        metavar="off|fp16|bf16",
        bare="auto",
    ),
    "TF32": _switch(
        False,
        "On NVIDIA GPUs, compute float32 convolutions and matrix products in TF32, which is faster and has a 10-bit "
        "mantissa instead of 23 bits; in training and evaluation.",
        flag="--tf32",
    ),
    "COMPILE": _switch(False, "torch.compile, block by block.", flag="--compile", may_change=True),
    "SEED": RunOption(0, "Seed of all random numbers.", not_negative(), flag="--seed", metavar="N"),
    "DETERMINISTIC": _switch(
        False,
        "Use only deterministic kernels. On CPU runs are reproducible without it.",
        flag="--deterministic",
        may_change=True,
    ),
    # ---- output
    "OUTPUT": RunOption(
        "output",
        "Results are written to OUTPUT/MODEL.NAME/TAG.",
        _FOLDER,
        synonyms=("--output-dir", "--save-dir", "--log-dir", "--out"),
        flag="--output",
        metavar="FOLDER",
        may_change=True,
    ),
    "TAG": RunOption(
        "default",
        "Name of this run.",
        _PLAIN_NAME,
        synonyms=("--name", "--experiment", "--exp", "--exp-name", "--run-name"),
        flag="--tag",
        metavar="NAME",
        may_change=True,
    ),
    "PRINT_FREQ": RunOption(
        10,
        "Updates between log lines.",
        at_least(1),
        synonyms=("--log-interval", "--log-every", "--print-every"),
        flag="--print-freq",
        metavar="N",
        may_change=True,
    ),
    "SAVE_FREQ": RunOption(
        10,
        "Epochs between copies epoch_N.pth (0: none); `last.pth` is written after every epoch.",
        not_negative(),
        synonyms=("--save-every", "--save-interval", "--checkpoint-freq"),
        may_change=True,
    ),
    "KEEP_CHECKPOINTS": RunOption(
        3, "Number of epoch_N.pth to keep, the newest ones (0: all).", not_negative(), may_change=True
    ),
    "SAVE_EVERY_UPDATES": RunOption(
        0, "Also write `last.pth` after this many updates within an epoch (0: off).", not_negative(), may_change=True
    ),
    "SAVE_EVERY_MINUTES": RunOption(
        0.0, "Also write `last.pth` after this many minutes (0: off).", not_negative(), may_change=True
    ),
    "REPORT": _switch(
        True,
        "Write report.html at the end, for which rank 0 evaluates the validation images once more.",
        may_change=True,
    ),
    "LOG.TO": RunOption(
        [],
        "Further loggers: tensorboard, wandb, mlflow; each needs its package.",
        _WRITERS,
        may_change=True,
    ),
    "LOG.PROJECT": RunOption("dat", "Project of Weights & Biases, experiment of MLflow.", may_change=True),
    "LOG.NAME": RunOption("", "Name of the run there; empty: MODEL.NAME-TAG.", may_change=True),
    "TENSORBOARD": _switch(False, "Same as tensorboard in LOG.TO.", may_change=True),
    "WANDB": _switch(False, "Same as wandb in LOG.TO.", may_change=True),
}

_FREE_SECTIONS = [key for key, option in OPTIONS.items() if option.default == {}]


class Config(CfgNode):
    """The options of a run, by section."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the network's input in pixels."""
        return as_pair(self.DATA.IMG_SIZE)

    @property
    def run_folder(self) -> Path:
        """Where the results go."""
        return Path(self.OUTPUT) / self.MODEL.NAME / self.TAG

    def images_per_update(self, processes: int) -> int:
        """Return how many images the processes of a run see together in an update."""
        return self.DATA.BATCH_SIZE * processes * self.TRAIN.ACCUMULATION_STEPS


def default_config() -> Config:
    """Return the defaults."""
    config = Config()
    for key, option in OPTIONS.items():
        *parents, name = key.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, CfgNode())
        node[name] = _as_config(option.default)
    return config


def options(**marks: Any) -> dict[str, RunOption]:
    """Return the options of a run with the given attributes, by key; for example `options(may_change=True)`."""
    found = {key: option for key, option in OPTIONS.items() if isinstance(option, RunOption)}
    return {key: o for key, o in found.items() if all(getattr(o, name) == value for name, value in marks.items())}


def load_config(path: str | Path, overrides: Sequence[Any] = ()) -> Config:
    """Read a config file over the defaults.

    Args:
        path: YAML file; its `BASE` files, relative to it, are merged first.
        overrides: alternating keys and values, `["TRAIN.EPOCHS", "10"]`; values given as text are parsed as YAML.

    Raises:
        ValueError: the file cannot be read, a key is unknown, or a value has the wrong type or is out of range.
    """
    config = default_config()
    _merge_file(config, Path(path))
    config.BASE = []
    apply_overrides(config, overrides)
    return config


def apply_overrides(config: CfgNode, overrides: Sequence[Any]) -> None:
    """Set options and check the values of all.

    Args:
        config: changed in place.
        overrides: alternating keys and values, see `load_config`.

    Raises:
        ValueError: a key has no value or is unknown, or a value has the wrong type or is out of range.
    """
    check_pairs(overrides)
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        set_option(config, str(key), value)
    _validate(config)


def check_pairs(overrides: Sequence[Any]) -> None:
    """Check that there are as many values as keys.

    Raises:
        ValueError: the last key has no value.
    """
    if len(overrides) % 2:
        last = str(overrides[-1])
        hint = f": write {last.replace('=', ' ', 1)}" if "=" in last else ""
        raise ValueError(f"--opts takes pairs of KEY VALUE; {last!r} has no value{hint}")


def set_option(config: CfgNode, key: str, value: Any) -> None:
    """Set the option `key`, such as `TRAIN.EPOCHS`; text is parsed as YAML unless the option is text itself.

    Raises:
        ValueError: there is no such option, or the value has the wrong type.
    """
    if key == "BASE":
        raise ValueError("BASE is only allowed in a config file; on the command line set the options themselves")
    section = next((name for name in _FREE_SECTIONS if key.startswith(f"{name}.")), None)
    if section is None and key not in OPTIONS:
        raise ValueError(_no_option(key))
    if isinstance(value, str) and not isinstance(OPTIONS[section or key].default, str):
        try:
            value = _read_yaml(value)
        except ValueError:
            raise ValueError(f"{key}: {value!r} is not valid YAML; write lists as [1,2,3,4]") from None
    *parents, name = key.split(".")
    node = config
    for parent in parents:
        node = node.setdefault(parent, CfgNode())
    node[name] = _free_value(key, value) if section else _coerce(key, value)


def differences(one: CfgNode, other: CfgNode) -> list[tuple[str, Any, Any]]:
    """Return `(key, value in one, value in other)` of every option that differs; None if a config lacks it."""
    left, right = dict(flatten(one)), dict(flatten(other))
    return [(key, left.get(key), right.get(key)) for key in left | right if left.get(key) != right.get(key)]


def complete(written: CfgNode) -> Config:
    """Return a config of an older version with the missing options at their defaults."""
    config = default_config()
    _lay_over(config, written)
    return config


def _lay_over(config: CfgNode, over: CfgNode) -> None:
    for name, value in over.items():
        if isinstance(value, CfgNode) and isinstance(config.get(name), CfgNode):
            _lay_over(config[name], value)
        else:
            config[name] = value


def flatten(config: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every option as `(dotted key, value)`."""
    for name, value in config.items():
        if isinstance(value, CfgNode):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_unsupported(config: CfgNode, keys: Iterable[str], by: str) -> None:
    """Check that options have their defaults.

    Args:
        config: options of a run.
        keys: the options, as dotted keys.
        by: what does not support them, for the message.

    Raises:
        ValueError: one has another value.
    """
    values = dict(flatten(config))
    for key in keys:
        default = OPTIONS[key].default if key in OPTIONS else ""  # others are in sections with arbitrary keys
        if values[key] != default:
            advice = f"leave it at {default}" if default != "" else "remove it"
            raise ValueError(f"{key} is not supported by {by}; {advice}")


def _merge_file(config: CfgNode, path: Path, children: tuple[Path, ...] = ()) -> None:
    path = path.resolve()
    if path in children:
        raise ValueError(f"BASE of {children[-1]} leads back to itself; remove the cycle")
    if path.is_dir():
        raise ValueError(f"config file {path} is a folder; name a file in it, such as configs/digits.yaml")
    if not path.exists():
        ours = sorted(_CONFIGS.rglob("*.yaml"), key=lambda file: -len(file.parts))  # of equal names, the outermost
        known = {file.stem: file for file in (*ours, *path.parent.glob("*.yaml"))}
        raise ValueError(f"config file {path} does not exist{did_you_mean(path.stem, known, shown=known)}")
    try:
        loaded = _read_yaml(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"config file {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"config file {path} has no options; write them as KEY: value, as in configs/dat_tiny.yaml")
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
        if key in OPTIONS and key not in _FREE_SECTIONS:
            config[name] = _coerce(key, value)
        elif not isinstance(config.get(name), CfgNode):
            raise ValueError(_no_option(key))
        elif not isinstance(value, dict):
            raise ValueError(f"{key} is a section, not {value!r}; its options go below it, indented")
        elif key in _FREE_SECTIONS:
            config[name].update(_free_value(key, value))
        else:
            _merge_dict(config[name], value, f"{key}.")


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys, of which YAML would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is set twice in the section that starts in line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep=deep)


def _read_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML's constructors can raise any exception on a malformed value
        raise ValueError(str(error) or type(error).__name__) from None


def _no_option(key: str) -> str:
    """Return an error message for the unknown `key`, with the option that is probably meant."""
    below = next((name for name in OPTIONS if name.startswith(f"{key}.")), None)
    if below:
        return f"{key} is a section; set one of its options, such as {below}"
    known = {name.upper(): name for name in OPTIONS}
    last = {name.rpartition(".")[2]: option for name, option in known.items()}
    flags = {
        flag.lstrip("-").replace("-", "_").upper(): name
        for name, option in options().items()
        for flag in filter(None, (option.flag, *option.synonyms))
        if name.startswith(key.upper().rpartition(".")[0])
    }
    near = {name: option for name, option in known.items() if _are_near(name, key.upper())}
    hint = (
        did_you_mean(key.upper().rpartition(".")[2], flags, shown=flags, cutoff=1)  # LR or TRAIN.LR, as --lr
        or did_you_mean(key.upper(), near, shown=near, cutoff=0.85)
        # EPOCHS or DATA.EPOCHS instead of TRAIN.EPOCHS
        or did_you_mean(key.upper().rpartition(".")[2], last, shown=last, cutoff=0.8)
        or "; config.py lists all options"
    )
    return f"unknown option {key}{hint}"


def _are_near(one: str, other: str) -> bool:
    """Return whether the last words of two keys are similar; long sections make whole keys similar."""
    return difflib.SequenceMatcher(None, one.rpartition(".")[2], other.rpartition(".")[2]).ratio() >= 0.6


def _coerce(key: str, value: Any) -> Any:
    """Convert `value` to the type of the option `key`, or raise an error that names the type."""
    option, default = OPTIONS[key], _as_config(OPTIONS[key].default)
    if key in _FREE_SECTIONS:
        if not isinstance(value, dict):
            raise ValueError(f"{key} must be a section, such as {{name: value}}, not {value!r}")
        return _free_value(key, value)
    if key == "AMP" and isinstance(value, bool):
        value = "on" if value else "off"  # YAML parses these words as booleans
    if option.also_list and isinstance(value, list):
        return [_coerce_one(f"{key}[{i}]", entry, default) for i, entry in enumerate(value)]
    value = _coerce_one(key, value, default)
    if isinstance(value, list) and default and not isinstance(default[0], list):
        return [_coerce_one(f"{key}[{i}]", entry, default[0]) for i, entry in enumerate(value)]
    return value


def _coerce_one(key: str, value: Any, default: Any) -> Any:
    """Convert `value` to the type of `default`; the entries of a list are not converted."""
    if isinstance(default, float) and isinstance(value, (int, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            value = float(value)  # YAML parses 1 as an integer and 5e-4 as text
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
        raise ValueError(f"{key} must be one line of text without control characters, not {value!r}")
    return value


def _free_value(key: str, value: Any) -> Any:
    """Convert a value of a section with arbitrary keys to its form in a config."""
    if isinstance(value, dict):
        return CfgNode({str(name): _free_value(f"{key}.{name}", entry) for name, entry in value.items()})
    if isinstance(value, list):
        return [_free_value(key, entry) for entry in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+e[-+]?[0-9]+", value, re.IGNORECASE):
        return float(value)  # YAML parses it as text
    if not isinstance(value, (str, int, float, NoneType)):
        raise ValueError(f"{key} must be a number, text, true, false, a list or a section, not {value!r}")
    return value


def _as_config(value: Any) -> Any:
    """Convert a default to its form in a config: dicts to nodes, sequences to new lists."""
    if isinstance(value, dict):
        return CfgNode(value)
    return [_as_config(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _validate(config: CfgNode) -> None:
    values = dict(flatten(config))
    for key, option in OPTIONS.items():
        if option.check and not option.check.holds(values[key]):
            hint = did_you_mean(str(values[key]), [str(choice) for choice in option.check.choices])
            raise ValueError(f"{key} must be {option.check.words}, not {values[key]!r}{hint}")
    settings = config.TRAIN.OPTIMIZER
    for name, only in {"EPS": "adamw", "BETAS": "adamw", "MOMENTUM": "sgd"}.items():
        key = f"TRAIN.OPTIMIZER.{name}"
        if only != settings.NAME and values[key] != OPTIONS[key].default:
            known = settings.NAME in ("adamw", "sgd")
            advice = "remove it" if known else f"use TRAIN.OPTIMIZER.ARGS.{name.lower()} for {settings.NAME}"
            raise ValueError(f"{key} is only for {only}; {advice}")
    for pattern, factor in config.TRAIN.LR_SCALES.items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor <= 0:
            raise ValueError(f"TRAIN.LR_SCALES must have a factor above 0 for {pattern!r}, not {factor!r}")
    model, schedule = config.MODEL, config.TRAIN.LR_SCHEDULER
    if model.TIMM.NAME and model.TYPE != "timm":
        raise ValueError(
            f"MODEL.TIMM.NAME {model.TIMM.NAME} is for MODEL.TYPE timm, not {model.TYPE}; set that type, as --model "
            "does, or remove the name"
        )
    if config.DISTILL.KIND == "hard":
        check_unsupported(config, ["DISTILL.TEMPERATURE"], by="DISTILL.KIND hard")
    if not schedule.PLANNED_EPOCHS:
        check_unsupported(config, ["TRAIN.LR_SCHEDULER.AFTER"], by="a run without TRAIN.LR_SCHEDULER.PLANNED_EPOCHS")
