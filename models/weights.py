"""Adapt the weights of one network to another: with other classes, map sizes, windows or image channels.

All functions work on state dicts.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.data.imagenet_info import infer_imagenet_subset
from timm.models import adapt_input_conv
from torch import Tensor, nn

from .class_names import IMAGENET_1K, NEW_ROW, as_numbers, imagenet_rows, read_class_map, rows_by_name
from .contract import classifier, convert_weights, input_convs, position_tables
from .tables import Resize

# Buffers that do not follow from sizes: statistics of batch norms, and the random features that a Performer drew.
_STATE = ("running_mean", "running_var", "num_batches_tracked", "random.source")


@dataclass(kw_only=True)
class Report:
    """Report on how the entries of a state dict were adapted. Entries are given by name.

    Attributes:
        entries: number of entries of the network.
        loaded: entries that were loaded unchanged.
        resized: shapes before and after of each position table that was resized.
        channels: shapes before and after of each layer that was adapted to other image channels.
        remapped: entries of the head whose rows were selected by class.
        reinitialised: entries of the head that keep the network's own initialisation.
        of_other_classes: further entries that depend on the classes, newly initialised because these differ.
        new: entries without a counterpart in weights of this kind, newly initialised.
        left_out: entries of the weights that were not used.
        head: how the classes were mapped; empty if the head was loaded unchanged.
        renamed: names in the weights and here of classes that are taken for the same, as no name agrees.
    """

    entries: int
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    channels: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    remapped: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    of_other_classes: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    head: str = ""
    renamed: list[tuple[str, str]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the report as text, one line per kind of change."""
        lines = [f"loaded unchanged: {len(self.loaded)} of {self.entries} entries"]
        tables = defaultdict(list)
        for name, shapes in self.resized.items():
            tables[shapes].append(name)
        for (before, after), names in tables.items():
            lines.append(f"tables resized from {before} to {after}: {', '.join(names)}")
        for name, (before, after) in self.channels.items():
            lines.append(f"adapted from {before[1]} to {after[1]} image channels: {name}")
        for words, names in (
            (f"rows selected ({self.head})", self.remapped),
            (f"newly initialised ({self.head})", self.reinitialised),
            ("newly initialised, as the weights are of other classes", self.of_other_classes),
            ("newly initialised, not in weights of this kind", self.new),
            (
                "left out of the weights",
                [name for name in self.left_out if name not in {*self.reinitialised, *self.of_other_classes}],
            ),
        ):
            if names:
                lines.append(f"{words}: {', '.join(names)}")
        if self.renamed:
            pairs = ", ".join(f"{before} -> {now}" for before, now in self.renamed)
            lines.append(f"classes taken for new names of those of the weights: {pairs}")
        return lines


def adapt(
    weights: dict[str, Tensor],
    model: nn.Module,
    *,
    class_map: Path | None = None,
    classes: Sequence[str] = (),
    names: Sequence[str] = (),
) -> tuple[dict[str, Tensor], Report]:
    """Adapt weights of the same architecture to ``model``, whatever classes and sizes they were trained for.

    Position tables of other map sizes, windows or kernels are resized bicubically. Buffers for indices and masks depend
    only on sizes and are always the model's own. Weights for three image channels are adapted to other numbers as in
    timm: summed for one, repeated and scaled for more. If the classes differ, the rows of the head are selected by
    ``class_map``, by class name, by number if there are no names, or by synset from a head for ImageNet-22K, 21K or 12K
    to ImageNet-1K. Otherwise the head is newly initialised. Other entries of detectors and segmenters that depend on
    the classes (see `models.dense`) are newly initialised whenever these differ.

    Args:
        weights: state dict of another network; not modified.
        model: target network; not modified.
        class_map: see `models.class_names.read_class_map`.
        classes: class names of ``model`` by label, if known.
        names: class names of ``weights`` by label, if known.

    Returns:
        A state dict that loads strictly into `model`, and a report.

    Raises:
        ValueError: the weights are of another architecture, or the class map does not fit.
    """
    own = model.state_dict()
    weights, new, unused = convert_weights(model, weights)
    names = [unicodedata.normalize("NFC", name) for name in names]
    report = Report(entries=len(own), left_out=sorted(unused))
    if class_map is not None and not classifier(model):
        raise ValueError(f"{type(model).__name__} has no classifier to apply a class map to; remove MODEL.CLASS_MAP")
    head = _head_entries(weights, own, classifier(model))
    state = own | _adapt_head(weights, own, head, class_map, classes, names, report)
    done = {*head, *_other_classes(weights, model, classes, names, report)}
    changed = {*report.remapped, *report.reinitialised, *report.of_other_classes}
    if len(names) == len(classes) and not changed and not set(names) & set(classes):
        report.renamed = list(zip(names, classes, strict=True))
    return state | _adapt_entries(weights, model, [name for name in own if name not in done], new, report), report


def _adapt_entries(
    weights: dict[str, Tensor], model: nn.Module, entries: Sequence[str], new: Set[str], report: Report
) -> dict[str, Tensor]:
    """Return entries that do not depend on the classes, and add them to the report; ``new`` are not in the weights.

    Raises:
        ValueError: the weights are of another architecture.
    """
    own, state = model.state_dict(), {}
    buffers = {name for name, _ in model.named_buffers() if not name.endswith(_STATE)}
    tables, inputs = position_tables(model), {f"{name}.weight" for name in input_convs(model)}
    misfits = _unknown_entries(weights, model, report)
    for name in entries:
        value, target = weights.get(name), own[name]
        if name in new:
            report.new.append(name)
        elif name in buffers:
            _report_buffer(name, value, target, report)
        elif value is None:
            misfits.add(name)
        elif value.shape == target.shape:
            state[name] = value
            report.loaded.append(name)
        elif name in inputs and value.shape[1:2] == (3,) and value.shape[2:] == target.shape[2:]:
            state[name] = adapt_input_conv(target.shape[1], value)
            report.channels[name] = tuple(value.shape), tuple(target.shape)
        elif name in tables and (table := _resized(value, target.shape, tables[name])) is not None:
            state[name] = table
            report.resized[name] = tuple(value.shape), tuple(target.shape)
        else:
            misfits.add(name)
    if misfits:
        given, wanted = ({name: x for name, x in tensors.items() if name in misfits} for tensors in (weights, own))
        raise ValueError(f"the weights are of another architecture: {mismatches(given, wanted)}")
    return state


def mismatches(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Describe how weights differ from the ``own`` entries of a network in names and shapes; empty if they do not.

    Describes the first four entries and gives the number of the others.
    """
    found = [f"{name} is missing" for name in own.keys() - weights.keys()]
    found += [f"{name} is not in this model" for name in weights.keys() - own.keys()]
    found += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
    return f"{'; '.join(sorted(found)[:4])}{more}"


def _unknown_entries(weights: dict[str, Tensor], model: nn.Module, report: Report) -> set[str]:
    """Return the entries that the network does not have; report those of a head that it does without as left out."""
    unknown = weights.keys() - model.state_dict().keys()
    if not getattr(model, "num_classes", 1) and classifier(model):
        report.left_out += sorted(name for name in unknown if name.startswith(f"{classifier(model)}."))
    return unknown - set(report.left_out)


def _report_buffer(name: str, value: Tensor | None, own: Tensor, report: Report) -> None:
    if value is None:
        return
    same = value.shape == own.shape and torch.equal(value.to(own), own)
    (report.loaded if same else report.left_out).append(name)


def fit_tables(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights with position tables resized for ``model``, and with its own buffers.

    A table that differs in more than its size is not changed, so that `load_state_dict` reports it.
    """
    fitted = dict(weights)
    for name, resize in position_tables(model).items():
        shape = model.get_parameter(name).shape
        if name in weights and (table := _resized(weights[name], shape, resize)) is not None:
            fitted[name] = table
    return fitted | dict(model.named_buffers())


def _resized(table: Tensor, shape: torch.Size, resize: Resize) -> Tensor | None:
    """Return a resized position table, or None if it differs in more than its size."""
    if table.ndim != len(shape):
        return None
    table = resize(table, shape)
    return table if table.shape == shape else None


def _head_entries(weights: dict[str, Tensor], own: dict[str, Tensor], head: str) -> list[str]:
    """Return the entries of the classifier that `_adapt_head` handles.

    These are all of them if the weights have all of them, of the same width, or none of them, as those of a backbone.
    """
    names = [name for name in own if head and name.startswith(f"{head}.")]
    if not weights.keys() & set(names):
        return names
    if not all(name in weights for name in names):
        return []
    same = all(weights[name].shape[1:] == own[name].shape[1:] for name in names)
    return names if same and len({len(weights[name]) for name in names}) == 1 else []


def _other_classes(
    weights: dict[str, Tensor], model: nn.Module, classes: Sequence[str], names: Sequence[str], report: Report
) -> list[str]:
    """Return the entries of the weights that depend on other classes, except for the head; add them to the report.

    Classes are others if their number or their order differs, or if only some of them have other names. If all have,
    they are taken for other names of the same classes.
    """
    own, sized = model.state_dict(), getattr(model, "sized_by_classes", ())
    differ = bool(report.remapped) or (list(names) != list(classes) and bool(set(names) & set(classes)))
    for name in (name for name in own if name in weights and name.startswith(sized)):
        before, after = weights[name].shape, own[name].shape
        if before[1:] == after[1:] and (differ or before != after):
            report.of_other_classes.append(name)
    report.left_out += report.of_other_classes
    return report.of_other_classes


def _adapt_head(
    weights: dict[str, Tensor],
    own: dict[str, Tensor],
    entries: list[str],
    class_map: Path | None,
    classes: Sequence[str],
    names: Sequence[str],
    report: Report,
) -> dict[str, Tensor]:
    """Return the entries of the head for the classes of the network, and add them to the report."""
    if not entries:
        return {}
    if entries[0] not in weights:
        report.reinitialised += entries
        report.head = "the weights have no classifier"
        return {}
    source, target = len(weights[entries[0]]), len(own[entries[0]])
    if class_map is not None:
        rows = read_class_map(class_map, num_classes=source, classes=classes or [""] * target, names=names)
        origin = str(class_map)
    elif names and list(names) != list(classes) and (rows := rows_by_name(classes, names)):
        origin = "name"
    elif not names and source == target and (numbers := as_numbers(classes, source)) != sorted(numbers):
        rows, origin = numbers, "number"
    elif source != target == IMAGENET_1K and (subset := infer_imagenet_subset({"num_classes": source})):
        rows, origin = imagenet_rows(subset), f"{subset} to imagenet-1k"
    elif source == target:
        report.loaded += entries
        return {name: weights[name] for name in entries}
    else:
        report.reinitialised += entries
        report.left_out += entries
        report.head = f"number of classes: {source} in the weights, {target} here"
        return {}
    new = [row for row, index in enumerate(rows) if index == NEW_ROW]
    report.remapped += entries
    report.head = f"{target - len(new)} of {target} classes out of {source}, by {origin}"
    if new:
        report.head += f"; newly initialised: class {', '.join(map(str, new))}"
    return {name: _select_rows(weights[name], own[name], torch.tensor(rows)) for name in entries}


def _select_rows(source: Tensor, own: Tensor, rows: Tensor) -> Tensor:
    """Return the rows of ``source`` by index, and the network's own rows where the index is `NEW_ROW`."""
    found = rows != NEW_ROW
    selected = own.clone()
    selected[found] = source[rows[found]].to(own)
    return selected
