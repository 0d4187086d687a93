"""Find the weights in a checkpoint file of any trainer, and whether they are averaged.

The weights are where most parameter names of the network are found. Any nesting of entries (`model`, `state_dict`,
`teacher`, ...) and prefixes (`module.`, `_orig_mod.`, `backbone.`, ...) is therefore recognised.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.wording import counted
from models.contract import classifier, converts_weights, rename_weights

# Sets of weights in a file: raw, and their exponential moving average.
RAW, EMA = "raw", "ema"
WEIGHTS = (RAW, EMA)
_IN_WORDS = {RAW: "raw weights", EMA: "averaged weights"}

# Wrappers of torch.compile, activation checkpointing and FSDP, which can appear before any part of a name.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# Entries and prefixes of moving averages; the teacher of self-distillation is the average of its student.
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?|shadow|polyak|teacher|momentum)(?:[._]|$)")
# Fraction of the network's names that must be found. Other architectures share a few names.
_RECOGNISED = 0.1
# Sets with at least this fraction of the names of the best one are alternatives to it.
_ALTERNATIVE = 0.9
_DEPTH = 3


@dataclass(frozen=True)
class WeightSet:
    """Weights of a file under the names of the network.

    Attributes:
        weights: tensors by name.
        kind: ``raw`` or ``ema``.
        choice: description of the selected set; empty if there is only one.
        notes: what was recognised, for the log; empty for files written by this trainer.
    """

    weights: dict[str, Tensor]
    kind: str
    choice: str
    notes: list[str]


@dataclass(frozen=True)
class _Candidate:
    """Tensors of one entry of a file whose names start with one prefix."""

    entry: str
    prefix: str
    wrappers: list[str]
    tensors: dict[str, Tensor]
    others: list[str]
    found: int

    @property
    def kind(self) -> str:
        averaged = "n_averaged" in self.others or _is_averaged(f"{self.entry}.{self.prefix}")
        return EMA if averaged else RAW

    def place(self) -> str:
        """Return a description of entry and prefix."""
        prefix = self.prefix and f"names with prefix {self.prefix}"
        wrapped = f"names with {', '.join(self.wrappers)}" if self.wrappers else ""
        return ", ".join(filter(None, (self.entry or "a state dict", prefix, wrapped)))


def pick_weights(checkpoint: dict[str, Any], path: str | Path, network: nn.Module, *, kind: str = "") -> WeightSet:
    """Return the weights of a file for a network.

    Args:
        checkpoint: content of the file.
        path: its name, for messages.
        network: the weights are found by its parameter names.
        kind: ``raw`` or ``ema``. If empty, the set that the checkpoint was selected by: the one it names, otherwise the
            average if there is one.

    Raises:
        ValueError: there are no weights, none of this kind, or none with the names of the network.
    """
    names = network.state_dict().keys()
    candidates = [one for entry, held in _tensors(checkpoint) for one in _candidates(entry, held, names)]
    if not candidates:
        raise ValueError(
            f"{path} contains no weights: neither a `model` entry nor a state dict; it contains {layout(checkpoint)}"
        )
    sets = _best(candidates, network)
    if not sets:
        raise ValueError(
            f"{path} contains no weights of this architecture, which has names such as {next(iter(names))}; it "
            f"contains {layout(checkpoint)}"
        )
    kinds = {one.kind for one in sets}
    wanted = kind or (checkpoint["chosen"] if checkpoint.get("chosen") in WEIGHTS else EMA)
    if wanted not in kinds:
        (other,) = kinds
        if kind:
            advice = ", or train with --ema" if kind == EMA else ""
            raise ValueError(f"{path} holds no {_IN_WORDS[kind]}; use --weights {other}{advice}")
        wanted = other
    mine = [one for one in sets if one.kind == wanted]
    taken = next((one for one in mine if "best" in one.entry), mine[0])
    choice = "" if len(sets) == 1 and wanted == RAW else _IN_WORDS[wanted]
    notes = _notes(taken, sets, path)
    if wanted == RAW and (nameless := _nameless_averages(checkpoint)):
        notes.append(f"{path}: averaged weights in {nameless} have no names and are not used")
    weights = rename_weights(network, taken.tensors)
    if weights.keys() != taken.tensors.keys():
        notes.append(f"{path}: the names of another library were translated")
    return WeightSet(weights, wanted, choice, notes)


def count_classes(weights: dict[str, Tensor], network: nn.Module) -> int:
    """Return the number of classes of weights under the names of `network`; 0 if they have no classifier."""
    return len(weights.get(f"{classifier(network)}.bias", ()))


def layout(checkpoint: dict[str, Any]) -> str:
    """Describe the contents of a file: its entries, the number of tensors in each, and their first names."""
    words = [f"{entry or 'at the top level'}: {_first(list(held), 'tensor')}" for entry, held in _tensors(checkpoint)]
    tops = {entry.partition(".")[0] for entry, held in _tensors(checkpoint)}
    others = [str(name) for name, value in checkpoint.items() if name not in tops and not isinstance(value, Tensor)]
    return "; ".join(words + ([_first(others, "other entry", "other entries")] if others else [])) or "nothing"


def _first(names: list[str], one: str, several: str = "", most: int = 3) -> str:
    return f"{counted(len(names), one, several)}, {', '.join(names[:most])}" + (", ..." if len(names) > most else "")


def _tensors(held: Any, entry: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the dicts of named tensors in a file with their location."""
    if not isinstance(held, dict) or depth > _DEPTH:
        return
    named = {name: value for name, value in held.items() if isinstance(name, str)}
    tensors = {name: x for name, x in named.items() if isinstance(x, Tensor) and x.layout == torch.strided}
    if tensors:
        yield entry, tensors
    seen = set()  # two names may refer to the same dict
    for name, value in named.items():
        if name.startswith("optim") or id(value) in seen:  # optimizer state may use the names of the weights
            continue
        seen.add(id(value))
        yield from _tensors(value, f"{entry}.{name}" if entry else name, depth + 1)


def _is_averaged(entry: str) -> bool:
    """Return whether an entry holds averaged weights, by its words: ema_model, modelEma, EMACallback."""
    return bool(_AVERAGED.search(re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", entry).lower()))


def _nameless_averages(held: Any, entry: str = "", depth: int = 0) -> str:
    """Return the entry with averaged weights as a list of tensors, like `shadow_params` of torch_ema; else empty."""
    if isinstance(held, (list, tuple)) and held and all(isinstance(value, Tensor) for value in held):
        return entry if _is_averaged(entry) else ""
    if not isinstance(held, dict) or depth > _DEPTH:
        return ""
    below = (
        _nameless_averages(value, f"{entry}.{name}" if entry else str(name), depth + 1)
        for name, value in held.items()
        if not str(name).startswith("optim")
    )
    return next(filter(None, below), "")


def _candidates(entry: str, held: dict[str, Tensor], names: Collection[str]) -> Iterator[_Candidate]:
    """Yield the tensors of one dict for each prefix under which names of the network are found."""
    bare = {_WRAPPERS.sub("", name): value for name, value in held.items()}
    wrappers = sorted({wrapper for name in held for wrapper in _WRAPPERS.findall(name)})
    found: Counter[str] = Counter({_wrapper(bare): 0})
    for name in bare:
        parts = name.split(".")
        found.update(".".join([*parts[:i], ""]) for i in range(len(parts)) if ".".join(parts[i:]) in names)
    most = max(found.values())
    for prefix, count in found.items():
        if count >= _ALTERNATIVE * most:
            tensors = {name[len(prefix) :]: value for name, value in bare.items() if name.startswith(prefix)}
            others = [name for name in bare if not name.startswith(prefix)]
            yield _Candidate(entry, prefix, wrappers, tensors, others, count)


def _best(candidates: Sequence[_Candidate], network: nn.Module) -> list[_Candidate]:
    """Return the sets of weights with the most names of the network; empty if all have too few.

    A network that converts weights may have none of their names: then the largest sets.
    """
    most = max(one.found for one in candidates)
    if most >= _RECOGNISED * len(network.state_dict()):
        return [one for one in candidates if one.found >= _ALTERNATIVE * most]
    if not converts_weights(network):
        return []
    largest = max(len(one.tensors) for one in candidates)
    return [one for one in candidates if len(one.tensors) >= _ALTERNATIVE * largest]


def _wrapper(names: Collection[str]) -> str:
    """Return the prefix of distributed training if all names have it."""
    return "module." if all(name.startswith("module.") for name in names) else ""


def _notes(taken: _Candidate, sets: list[_Candidate], path: str | Path) -> list[str]:
    notes = []
    if taken.entry not in ("", "model", "ema") or taken.prefix or taken.wrappers:
        notes.append(f"{path}: the weights were recognised in {taken.place()}")
    if taken.others and taken.prefix:
        left = _first(taken.others, "entry without that prefix", "entries without that prefix")
        notes.append(f"{path}: not used: {left}")
    if {one.entry for one in sets} - {"model", "ema"} and len(sets) > 1:
        rest = "; ".join(one.place() for one in sets if one is not taken)
        notes.append(f"{path}: {_IN_WORDS[taken.kind]} are taken from {taken.place()}; it also contains {rest}")
    return notes
