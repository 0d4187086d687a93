"""Adapting weights to another network: different classes, map sizes and windows.

Everything here works on state dicts, whose names and shapes are those of the published weights.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.models import adapt_input_conv
from torch import Tensor, nn

from .contract import classifier, input_convs, position_tables, taken_over
from .tables import Resize

IMAGENET_1K = 1000
NEW_ROW = -1  # in a class map: a class that the weights do not have
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # batch norm statistics, which are learned


@dataclass(kw_only=True)
class Report:
    """Report on how the entries of a state dict were adapted, by name.

    Attributes:
        entries: number of entries of the network.
        loaded: entries loaded unchanged.
        resized: shape before and after of each position table that was resized.
        channels: shape before and after of each layer that was adapted to other channels of the images.
        remapped: entries of the head whose rows were selected by class.
        reinitialised: entries of the head that keep the network's own initialisation.
        new: entries that the kind of network the weights come from does not have.
        left_out: entries of the weights that were not used.
        head: description of how the classes were mapped; empty if the head was loaded unchanged.
    """

    entries: int
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    channels: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    remapped: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    head: str = ""

    def lines(self) -> list[str]:
        """Return the report as text, one line per kind of change."""
        lines = [f"loaded as they are: {len(self.loaded)} of {self.entries} entries"]
        tables = defaultdict(list)
        for name, shapes in self.resized.items():
            tables[shapes].append(name)
        for (before, after), names in tables.items():
            lines.append(f"resized from {before} to {after}: {len(names)} tables, {', '.join(names)}")
        for name, (before, after) in self.channels.items():
            lines.append(f"adapted from {before[1]} to {after[1]} channels of the images: {name}")
        for words, names in (
            (f"rows picked ({self.head})", self.remapped),
            (f"newly initialised ({self.head})", self.reinitialised),
            ("newly initialised, as such weights have none", self.new),
            ("left out of the weights", [name for name in self.left_out if name not in self.reinitialised]),
        ):
            if names:
                lines.append(f"{words}: {', '.join(names)}")
        return lines


def adapt(
    weights: dict[str, Tensor],
    model: nn.Module,
    *,
    class_map: Path | None = None,
    classes: Sequence[str] = (),
    names: Sequence[str] = (),
) -> tuple[dict[str, Tensor], Report]:
    """Adapt weights of the same architecture to `model`, whatever classes and sizes they were trained for.

    Position tables of other map sizes, windows or kernels are resized bicubically. Index and mask buffers follow from
    the sizes and are always those of the model. Weights for three image channels are adapted to others as timm does:
    summed for one, repeated and scaled for more. If the classes differ, rows of the head are selected by `class_map`,
    by name, by number if there are no names, or by synset from an ImageNet-22K head (also 21K and 12K) for
    ImageNet-1K; otherwise the head is new.

    Args:
        weights: state dict of another network; unchanged.
        model: the network to fit; unchanged.
        class_map: see `read_class_map`.
        classes: class names of `model` by label, if known; `names` are those of `weights`.

    Returns:
        A state dict that loads strictly into `model`, and a report.

    Raises:
        ValueError: the weights are of another architecture, or the class map does not fit.
    """
    expected = model.state_dict()
    weights, new, unused = taken_over(model, weights)
    buffers = {name for name, _ in model.named_buffers() if not name.endswith(_STATISTICS)}
    head = _head_entries(weights, expected, classifier(model))
    tables, inputs = position_tables(model), {f"{name}.weight" for name in input_convs(model)}
    state, report = dict(expected), Report(entries=len(expected), left_out=sorted(unused))
    misfits = _misfits(weights, model, report)
    for name, own in expected.items():
        value = weights.get(name)
        if name in head:
            continue
        if name in new:
            report.new.append(name)
        elif name in buffers:
            _note_buffer(name, value, own, report)
        elif value is None:
            misfits.append(f"{name} is missing")
        elif value.shape == own.shape:
            state[name] = value
            report.loaded.append(name)
        elif name in inputs and value.shape[1:2] == (3,) and value.shape[2:] == own.shape[2:]:
            state[name] = adapt_input_conv(own.shape[1], value)
            report.channels[name] = tuple(value.shape), tuple(own.shape)
        elif name in tables and (table := _resized(value, own.shape, tables[name])) is not None:
            state[name] = table
            report.resized[name] = tuple(value.shape), tuple(own.shape)
        else:
            misfits.append(f"{name} is {tuple(value.shape)} instead of {tuple(own.shape)}")
    if misfits:
        raise ValueError(f"the weights are of another architecture: {_shown(misfits)}")
    heads = _adapt_head(weights, expected, head, class_map, classes, names, report) if head else {}
    return state | heads, report


def _misfits(weights: dict[str, Tensor], model: nn.Module, report: Report) -> list[str]:
    """Return the entries that the network lacks; those of an unused head are reported as left out."""
    unknown = weights.keys() - model.state_dict().keys()
    if not getattr(model, "num_classes", 1) and classifier(model):
        report.left_out += sorted(name for name in unknown if name.startswith(f"{classifier(model)}."))
    return [f"{name} is not in this model" for name in unknown - set(report.left_out)]


def _shown(misfits: list[str]) -> str:
    more = f"; and {len(misfits) - 4} more names" if len(misfits) > 4 else ""
    return f"{'; '.join(sorted(misfits)[:4])}{more}"


def _note_buffer(name: str, value: Tensor | None, own: Tensor, report: Report) -> None:
    if value is None:
        return
    same = value.shape == own.shape and torch.equal(value.to(own), own)
    (report.loaded if same else report.left_out).append(name)


def fit_tables(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights whose position tables have the sizes of `model`; index and mask buffers are its own.

    A table that differs in more than its size is left unchanged, so `load_state_dict` reports it.
    """
    fitted = dict(weights)
    for name, resize in position_tables(model).items():
        shape = model.get_parameter(name).shape
        if name in weights and (table := _resized(weights[name], shape, resize)) is not None:
            fitted[name] = table
    return fitted | dict(model.named_buffers())


def _resized(table: Tensor, shape: torch.Size, resize: Resize) -> Tensor | None:
    """Return a position table in another shape, or None if it differs in more than its size."""
    if table.ndim != len(shape):
        return None
    table = resize(table, shape)
    return table if table.shape == shape else None


def _head_entries(weights: dict[str, Tensor], expected: dict[str, Tensor], head: str) -> list[str]:
    """Return the entries of the classifier if the weights have them for the same features, whatever the classes.

    Backbone weights have none of them.
    """
    names = [name for name in expected if head and name.startswith(f"{head}.")]
    if not weights.keys() & set(names):
        return names
    if not all(name in weights for name in names):
        return []
    same = all(weights[name].shape[1:] == expected[name].shape[1:] for name in names)
    return names if same and len({len(weights[name]) for name in names}) == 1 else []


def _adapt_head(
    weights: dict[str, Tensor],
    expected: dict[str, Tensor],
    names: list[str],
    class_map: Path | None,
    classes: Sequence[str],
    known: Sequence[str],
    report: Report,
) -> dict[str, Tensor]:
    """Return the entries of the head for the classes of the network, and add them to the report."""
    if names[0] not in weights:
        report.reinitialised += names
        report.head = "the weights have no classifier"
        return {}
    there, here = len(weights[names[0]]), len(expected[names[0]])
    if class_map is not None:
        rows = read_class_map(class_map, there=there, classes=classes or [""] * here, names=known)
        origin = str(class_map)
    elif known and list(known) != list(classes) and (rows := _rows_by_name(classes, known)):
        origin = "name"
    elif not known and there == here and (numbers := as_numbers(classes, there)) != sorted(numbers):
        rows, origin = numbers, "number"
    elif there != here == IMAGENET_1K and (subset := infer_imagenet_subset({"num_classes": there})):
        rows, origin = _imagenet_rows(subset), f"{subset} to imagenet-1k"
    elif there == here:
        report.loaded += names
        return {name: weights[name] for name in names}
    else:
        report.reinitialised += names
        report.left_out += names
        report.head = f"{there} classes in the weights, {here} here"
        return {}
    new = [row for row, source in enumerate(rows) if source == NEW_ROW]
    report.remapped += names
    report.head = f"{here - len(new)} of {here} classes out of {there}, by {origin}"
    if new:
        report.head += f"; newly initialised: class {', '.join(map(str, new))}"
    source = torch.tensor(rows)
    head = {}
    for name in names:
        own = expected[name].clone()
        own[source != NEW_ROW] = weights[name][source[source != NEW_ROW]].to(own)
        head[name] = own
    return head


def find_labels(classes: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the index of each class in `names`, or [] if one is missing."""
    places = {name: label for label, name in enumerate(names)}
    return [places[name] for name in classes] if places.keys() >= set(classes) else []


def _rows_by_name(classes: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return for each class its index in `names`, or [].

    Where there are as many, a class that is missing there is `NEW_ROW`, as the row in its place belongs to another
    class; if all are missing, they are other names for the same classes.
    """
    if len(classes) != len(names):
        return find_labels(classes, names)
    places = {name: label for label, name in enumerate(names)}
    return [places.get(name, NEW_ROW) for name in classes] if places.keys() & set(classes) else []


def as_numbers(classes: Sequence[str], there: int) -> list[int]:
    """Return the labels of classes named by numbers below `there`, or [] if any is not."""
    return [int(name) for name in classes] if all(name.isdecimal() and int(name) < there for name in classes) else []


def synsets(there: int) -> list[str]:
    """Return the WordNet ids by label of the ImageNet set with `there` classes, or [] if there is none."""
    subset = "imagenet-1k" if there == IMAGENET_1K else infer_imagenet_subset({"num_classes": there})
    return ImageNetInfo(subset).label_names() if subset else []


def _imagenet_rows(subset: str) -> list[int]:
    """Return for each class of ImageNet-1K its index in a larger set, `NEW_ROW` if its synset is missing there."""
    indices = {synset: index for index, synset in enumerate(ImageNetInfo(subset).label_names())}
    return [indices.get(synset, NEW_ROW) for synset in synsets(IMAGENET_1K)]


def read_class_map(path: Path, *, there: int, classes: Sequence[str], names: Sequence[str] = ()) -> list[int]:
    """Read the mapping from the classes of a data set to those of the weights.

    Args:
        path: text file with a line for each class, in their order, or with a class and, behind a tab, a comma or a
            space, its counterpart on each line, in any order; such a file may name further classes. A counterpart is
            an index, counted from 0, a name, or -1 if there is none.
        there: number of classes of the weights.
        classes: class names of the data set.
        names: class names of the weights; WordNet ids if they have none and their number is that of an ImageNet set.

    Raises:
        ValueError: the file cannot be read, or does not fit.
    """
    try:
        text = unicodedata.normalize("NFC", path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"class map {path} cannot be read: {error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"class map {path} is not UTF-8 text; save it as UTF-8") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    known = {name: label for label, name in enumerate(names or synsets(there))}
    pairs = [(number, *_split(line)) for number, line in lines]
    if all(name for _, name, _ in pairs) and not all(line in known for _, line in lines):
        lines = _of_classes(pairs, classes, path)
    elif len(lines) != len(classes):
        raise ValueError(
            f"class map {path} has {len(lines)} lines for {len(classes)} classes; give one index for each class"
        )
    labels = []
    for number, label in lines:
        if not (re.fullmatch(r"-1|[0-9]+", label) and int(label) < there) and label not in known:
            raise ValueError(
                f"class map {path}, line {number}: {label!r} is not a class of the weights; give 0 to {there - 1}, "
                "or -1"
            )
        labels.append(known[label] if label in known and not label.isdecimal() else int(label))
    return labels


def _split(line: str) -> tuple[str, str]:
    """Return a class and its counterpart; a line of one word has no class."""
    mark = next((mark for mark in "\t," if mark in line), None)
    name, *label = (part.strip() for part in line.rsplit(mark, 1))
    return (name, label[0]) if label else ("", name)


def _of_classes(pairs: Sequence[tuple[int, str, str]], classes: Sequence[str], path: Path) -> list[tuple[int, str]]:
    """Return the line and the counterpart of each class."""
    lines: dict[str, tuple[int, str]] = {}
    for number, name, label in pairs:
        if lines.setdefault(name, (number, label))[1] != label:
            raise ValueError(f"class map {path}, line {number}: {name} has another line already; give it one")
    missing = [name for name in classes if name not in lines]
    if missing:
        raise ValueError(
            f"class map {path} has no line for {missing[0]}; give each class one, with -1 where the weights have none"
        )
    return [lines[name] for name in classes]
