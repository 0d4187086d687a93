"""Evaluation from the command line: precision, checkpoints and classes."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
import torch
from torch import nn

from config import load_config
from main import main
from models.build import build_model, set_num_classes
from models.dat import DAT
from tasks import build_task
from tasks.classes import labels_of, read_label_sets
from tasks.classification import LabelledImages
from tests.data.samples import write_folder
from tests.runs import write_config
from tests.tools.samples import CLASSES, tiny_config, write_checkpoint
from training.command_line import parse
from training.evaluation import CheckpointEvaluation, build_evaluation
from training.resume import start_from_pretrained
from utils import World

CPU = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def own_config(folder: Path) -> Path:
    """Write the config of the network of `write_checkpoint`."""
    path = folder / "own.yaml"
    path.write_text(tiny_config(folder).dump(), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), torch.float32),
        (("--amp",), torch.bfloat16),
        (("--amp", "bf16"), torch.bfloat16),
        (("--amp", "off"), torch.float32),
        (("--opts", "AMP", "bf16"), torch.float32),  # the precision of training, as in the config.yaml of a run
    ],
)
def test_evaluation_has_the_precision_of_its_flag(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    expected: torch.dtype,
) -> None:
    config = write_config(tmp_path)
    weights = build_model(load_config(config, ["MODEL.DAT.num_classes", 10])).state_dict()
    torch.save({"model": weights}, tmp_path / "weights.pth")
    seen, forward = set(), DAT.forward

    def watch(model: DAT, images: torch.Tensor) -> torch.Tensor:
        logits = forward(model, images)
        seen.add(logits.dtype)
        return logits

    monkeypatch.setattr(DAT, "forward", watch)
    assert main(["--cfg", str(config), "--eval", "--resume", str(tmp_path / "weights.pth"), *flags]) == 0
    assert seen == {expected}
    printed = capsys.readouterr().out
    assert ("process, in bf16\n" in printed) == (expected == torch.bfloat16)


@pytest.mark.parametrize(
    ("flags", "entry"),
    [
        ((), "ema"),
        (("--weights", "raw"), "model"),
        (("--weights", "ema"), "ema"),
        (("--ema",), "ema"),
        (("--opts", "TRAIN.EMA.ENABLED", "False"), "model"),
    ],
)
def test_the_weights_are_those_that_the_checkpoint_was_chosen_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    entry: str,
) -> None:
    path = write_checkpoint(tmp_path, ema=True)
    config = tmp_path / "own.yaml"
    config.write_text(torch.load(path)["config"], encoding="utf-8")
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(CheckpointEvaluation, "run", lambda self: (seen.append(self.network.cls_head.weight), 0)[1])
    assert main(["--cfg", str(config), "--eval", "--resume", str(path), *flags]) == 0
    assert torch.equal(seen[0], torch.load(path)[entry]["cls_head.weight"])
    monkeypatch.undo()
    assert main(["--cfg", str(config), "--eval", "--resume", str(path), *flags]) == 0
    words = {"ema": "averaged weights", "model": "raw weights"}[entry]
    assert f"evaluating {path}, {words}, on 360 images" in capsys.readouterr().out


@pytest.mark.parametrize(("weights", "entry"), [("", "ema"), ("raw", "model"), ("ema", "ema")])
def test_fine_tuning_starts_from_the_weights_that_the_checkpoint_was_chosen_for(
    tmp_path: Path, weights: str, entry: str
) -> None:
    path = write_checkpoint(tmp_path, ema=True)
    config = tiny_config(tmp_path)
    config.MODEL.PRETRAINED, config.MODEL.WEIGHTS = str(path), weights
    network = build_model(config)
    notes, _ = start_from_pretrained(config, network, build_task(config, CPU, training=False))
    assert torch.equal(network.cls_head.weight, torch.load(path)[entry]["cls_head.weight"])
    assert notes[0] == f"starting from {path}, {'averaged' if entry == 'ema' else 'raw'} weights"


def test_weights_of_a_backbone_are_fine_tuned_with_a_new_classifier(tmp_path: Path) -> None:
    state = torch.load(write_checkpoint(tmp_path))["model"]
    backbone = {f"backbone.{name}": value for name, value in state.items() if not name.startswith("cls_head.")}
    config = tiny_config(tmp_path)
    config.MODEL.PRETRAINED = str(tmp_path / "backbone.pth")
    torch.save({"state_dict": backbone}, config.MODEL.PRETRAINED)
    network = build_model(config)
    head = network.cls_head.weight.clone()
    notes = "\n".join(start_from_pretrained(config, network, build_task(config, CPU, training=False))[0])
    assert "newly initialised (the weights have no classifier): cls_head.weight, cls_head.bias" in notes
    assert torch.equal(network.cls_norm.norm.weight, state["cls_norm.norm.weight"])
    assert torch.equal(network.cls_head.weight, head)


@pytest.mark.parametrize(
    ("folders", "known", "labels"),
    [
        (["dog", "emu"], True, [3, 4]),  # by name
        (["0", "3", "7"], False, [0, 3, 7]),  # numbers of labels
        ([str(label) for label in range(10)], False, list(range(10))),
        (["01", "9"], False, [1, 9]),
    ],
)
@pytest.mark.parametrize("space", ["all", "present"])
def test_weights_are_evaluated_on_some_of_their_classes(
    tmp_path: Path, folders: list[str], known: bool, labels: list[int], space: str
) -> None:
    path = write_checkpoint(tmp_path, **({} if known else {"classes": None}))
    images = write_folder(tmp_path / "images", {f"val/{name}": 1 for name in folders})
    config = tiny_config(tmp_path)
    config.DATA.DATASET, config.DATA.DATA_PATH, config.MODEL.RESUME = "imagenet", str(images), str(path)
    config.TEST.CLASSES = space
    evaluation = build_evaluation(config, CPU)
    batch = next(iter(evaluation.loader))
    assert batch.targets.tolist() == labels
    how = "by name" if known else "by their numbers"
    assert evaluation.notes[0].startswith(f"classes by label, found {how}: {labels[0]} = {folders[0]}, ")
    assert not any("in the checkpoint" in warning for warning in evaluation.warnings)
    meter = evaluation.task.meter(len(labels), CPU.device)
    logits = torch.arange(10.0).expand(len(labels), 10)  # the last class is the most probable
    meter.add(nn.Identity(), LabelledImages(logits, batch.targets))
    right = space == "present" or 9 in labels
    assert meter.result().metrics["top1"] == pytest.approx(100 * right / len(labels))


@pytest.mark.parametrize(
    ("folders", "number", "says"),
    [
        ([f"class{label}" for label in range(12)], 12, r"sorted as text \(class0, class1, class10, \.\.\.\), not by"),
        ([f"{label:02d}_x" for label in range(12)], 12, ""),
        (["ant", "bee", "cat"], 3, ""),
    ],
)
def test_numbers_within_names_may_mean_another_order(
    tmp_path: Path, folders: list[str], number: int, says: str
) -> None:
    path = write_checkpoint(tmp_path, num_classes=number, classes=None)
    images = write_folder(tmp_path / "images", {f"val/{name}": 1 for name in folders})
    config = tiny_config(tmp_path)
    config.DATA.DATASET, config.DATA.DATA_PATH, config.MODEL.RESUME = "imagenet", str(images), str(path)
    warnings = [warning for warning in build_evaluation(config, CPU).warnings if "sorted as text" in warning]
    assert len(warnings) == bool(says)
    assert all(re.search(says, warning) for warning in warnings)


def test_single_predictable_class_gives_a_warning(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", {"val/cat": 1})
    config = tiny_config(tmp_path)
    config.DATA.DATASET, config.DATA.DATA_PATH = "imagenet", str(images)
    config.MODEL.RESUME, config.TEST.CLASSES = str(write_checkpoint(tmp_path)), "present"
    assert any("every image is correct" in warning for warning in build_evaluation(config, CPU).warnings)


def test_a_class_map_labels_the_images_to_evaluate(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", {"val/x": 1, "val/y": 1})
    config = tiny_config(tmp_path)
    config.DATA.DATASET, config.DATA.DATA_PATH = "imagenet", str(images)
    config.MODEL.RESUME, config.MODEL.CLASS_MAP = str(write_checkpoint(tmp_path)), str(tmp_path / "map.txt")
    Path(config.MODEL.CLASS_MAP).write_text("9\n2\n")
    evaluation = build_evaluation(config, CPU)
    assert next(iter(evaluation.loader)).targets.tolist() == [9, 2]
    assert evaluation.notes[0].endswith("map.txt: 9 = x, 2 = y; scored over all 10")
    set_num_classes(config, 10)
    Path(config.MODEL.CLASS_MAP).write_text("9\n-1\n")
    with pytest.raises(ValueError, match=r"map\.txt has no class of the weights for y; leave its images out"):
        build_evaluation(config, CPU)


def test_folders_of_wordnet_ids_are_classes_of_imagenet() -> None:
    assert labels_of(["n01443537", "n01440764"], [], 1000, "") == ([1, 0], "by WordNet id")
    assert labels_of(["n01443537-goldfish", "n01440764_tench"], [], 1000, "")[0] == [1, 0]
    assert labels_of(["cat"], [], 1000, "") == ([], "by WordNet id")
    assert labels_of(["cat"], ["dog"], 1, "")[0] == []


@pytest.mark.parametrize(
    ("folders", "options", "labels"),
    [
        (["n01440764", "n01443537", "n02007558"], ["TEST.CLASSES", "present"], [0, 1, 130]),  # ImageNet-A and -R
        (["0", "10", "2"], [], [0, 10, 2]),  # ImageNet-V2
        (["a tench", "flamingo"], ["MODEL.CLASS_MAP", "{root}/classes.txt"], [0, 130]),
    ],
)
def test_image_folders_beside_imagenet_as_documented(
    tmp_path: Path, folders: list[str], options: list[str], labels: list[int]
) -> None:
    root = write_folder(tmp_path / "images", dict.fromkeys(folders, 1))
    (root / "classes.txt").write_text("a tench n01440764\nflamingo n02007558\nan ant 310\n")
    path = write_checkpoint(tmp_path, num_classes=1000, classes=None)
    words = ["--cfg", own_config(tmp_path), "--eval", "--resume", path, "--data-path", root]
    words += ["--opts", "DATA.DATASET", "imagenet", "DATA.VAL", ".", *(word.format(root=root) for word in options)]
    evaluation = build_evaluation(parse([str(word) for word in words])[1], CPU)
    assert next(iter(evaluation.loader)).targets.tolist() == labels
    assert f"{labels[1]} = {folders[1]}, " in f"{evaluation.notes[0]}, ".replace(";", ",")


def test_names_of_the_weights_in_another_form_of_unicode_are_known() -> None:
    composed, apart = (unicodedata.normalize(form, "K\u00e4se") for form in ("NFC", "NFD"))
    assert labels_of([composed], [apart, "dog"], 2, "") == ([0], "by name")


@pytest.mark.parametrize(
    "text",
    [
        "1\n0\n",
        "\ufeffn01443537\r\nn01440764\r\n\r\n",  # as editors of Windows write it
        "tench 0\ngold fish 1\nshark 2\n",
        "class\tid\ntench\tn01440764\ngold fish\tn01443537\n",
        "tench,0\ngold fish, n01443537",
    ],
)
def test_a_class_map_names_places_numbers_or_wordnet_ids(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map.txt"
    path.write_text(text, encoding="utf-8", newline="")
    assert labels_of(["gold fish", "tench"], [], 1000, str(path)) == ([1, 0], f"by {path}")


@pytest.mark.parametrize(
    ("classes", "text", "says"),
    [
        (["cat", "dog"], "cat 0\n", "has no line for dog; give each class one, with -1 where"),
        (["cat", "dog"], "cat 0\ncat 1\ndog 1\n", "line 2: cat already has another line; keep one of them"),
        (["cat", "dog"], "cat 10\ndog 1\n", "line 1: '10' is not a class of the weights; give 0 to 9, or -1"),
        (["cat", "dog"], "cat ant\ndog -1\n", "no class of the weights for dog; leave its images out"),
        (["cat", "dog"], "3\n3\n", "classes cat, dog share label 3 of the weights by .*; merge their images"),
        (["cat", "zebra"], "", "the weights have no class zebra, but 0 = ant, "),
        ([*CLASSES[:9], "zebra"], "", "the weights have no class zebra, but 0 = ant, "),
        (["Cat", "DOG"], "", r"have no class Cat \(the weights have cat\), DOG \(the weights have dog\), but 0 = ant"),
        (["1", "01"], "", "classes 1, 01 share label 1 of the weights by their numbers; merge"),
        (["1", "10", "2"], "", "numbers up to 10, and the weights have 10 classes without names: .* MODEL.CLASS_MAP"),
    ],
)
def test_classes_missing_in_the_weights_are_rejected(tmp_path: Path, classes: list[str], text: str, says: str) -> None:
    path = tmp_path / "map.txt"
    path.write_text(text)
    known = [] if classes[0] == "1" else CLASSES
    with pytest.raises(ValueError, match=says):
        labels_of(classes, known, 10, str(path) if text else "")


def test_evaluation_ignores_the_class_map_of_the_config(tmp_path: Path) -> None:
    config = write_config(tmp_path, MODEL={"CLASS_MAP": "of the start file.txt"})
    flags = ["--cfg", str(config), "--eval", "--resume", "x.pth"]
    assert parse(flags)[1].MODEL.CLASS_MAP == ""
    assert parse([*flags, "--opts", "MODEL.CLASS_MAP", "given.txt"])[1].MODEL.CLASS_MAP == "given.txt"


def test_any_label_of_an_image_is_correct(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", {"val/x": 2, "val/y": 1})
    for number, name in enumerate(("x/1", "y/0", "x/0"), start=1):
        (images / f"val/{name}.jpg").rename(images / f"val/{name[0]}/ILSVRC2012_val_0000000{number}.JPEG")
    config = tiny_config(tmp_path)
    config.DATA.DATASET, config.DATA.DATA_PATH = "imagenet", str(images)
    config.MODEL.RESUME, config.TEST.LABELS = str(write_checkpoint(tmp_path)), str(tmp_path / "real.json")
    (tmp_path / "real.json").write_text("[[3, 9], [], [4], [5]]")
    evaluation = build_evaluation(config, CPU)
    assert evaluation.notes[0].endswith(
        "has labels for 2 of 3 images, 3 of 3 classes; any label of an image counts as correct"
    )
    batch = evaluation.task.to_device(next(iter(evaluation.loader)), CPU.device)
    assert [row.nonzero().flatten().tolist() for row in batch.targets] == [[3, 9], [4], []]  # sorted by folder
    meter = evaluation.task.meter(3, CPU.device)
    logits = torch.arange(10.0).expand(3, 10)
    meter.add(nn.Identity(), LabelledImages(logits, batch.targets))
    result = meter.result()
    share = logits[0].softmax(0)
    loss = -(share[9] + share[3]).log() - share[4].log()
    assert result.metrics == pytest.approx({"top1": 50.0, "top5": 50.0, "loss": loss.item() / 2})
    assert result.lines[-1] == "Accuracy of the network on the 2 test images: 50.0%"
    assert result.warnings == ["1 image has no label and is not counted"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "must be a list with a list of labels for each image"),
        ("[3, 4]", "must be a list with a list of labels"),
        ("[[10], [0]]", r"\[10\] of image 1 are not labels of the weights, 0 to 9"),
        ("[[1]]", "are for images numbered 1 to 1; '2.jpg' is not one of them"),
        ("no JSON", "cannot be read: Expecting value"),
    ],
)
def test_wrong_lists_of_labels_are_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        read_label_sets(tmp_path / "real.json", ["1.jpg", "2.jpg"], 10)
