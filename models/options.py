"""Declarations of options: default, type, meaning and check.

An option is declared once, next to the code that uses it. Constructors, the config, error messages and the
documentation are derived from the declaration.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

NUM_STAGES = 4
OFF = (False,) * NUM_STAGES  # default of a switch per stage

_TYPES = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    tuple: ((tuple, list), "a list"),
}


@dataclass(frozen=True)
class Check:
    """The allowed values of an option.

    Attributes:
        holds: returns whether a value of the right type is allowed.
        words: description of the allowed values, as it follows "must be".
        choices: the allowed values, if they can be listed.
    """

    holds: Callable[[Any], bool]
    words: str
    choices: tuple[Any, ...] = ()

    def require(self, name: str, value: Any) -> None:
        """Raise a ValueError unless a value is allowed."""
        if not self.holds(value):
            raise ValueError(f"{name} = {value!r} must be {self.words}")


def at_least(smallest: float) -> Check:
    """Return the check that a number is at least ``smallest``."""
    return Check(lambda value: value >= smallest, f"at least {smallest}")


def positive_count() -> Check:
    """Return the check that a number is whole and at least 1, for arguments whose type is not checked otherwise."""
    return Check(lambda value: isinstance(value, Integral) and value >= 1, "a whole number, at least 1")


def not_negative() -> Check:
    """Return the check that a number is not negative."""
    return Check(lambda value: value >= 0, "0 or more")


def positive() -> Check:
    """Return the check that a number is above 0."""
    return Check(lambda value: value > 0, "above 0")


def share() -> Check:
    """Return the check that a number lies between 0 and 1."""
    return Check(lambda value: 0 <= value <= 1, "between 0 and 1")


def rate() -> Check:
    """Return the check of a dropout probability, which cannot be 1."""
    return Check(lambda value: 0 <= value < 1, "a number in [0, 1)")


def odd() -> Check:
    """Return the check that a kernel or window size is positive and odd."""
    return Check(lambda value: value >= 1 and value % 2 == 1, "odd")


def one_of(*choices: str) -> Check:
    """Return the check that a value is one of the given choices."""
    return Check(lambda value: value in choices, f"one of {', '.join(c or repr(c) for c in choices)}", choices)


def check_divisible(name: str, number: int, by: str, divisor: int) -> None:
    """Raise a ValueError unless ``number``, called ``name``, is a multiple of ``divisor``, called ``by``."""
    at_least(1).require(by, divisor)
    if number % divisor:
        raise ValueError(f"{name} = {number} is not divisible by {by} = {divisor}; change one of them")


@dataclass(frozen=True)
class Option:
    """An option.

    Attributes:
        default: default value, which also determines the type.
        meaning: one or two sentences for the documentation.
        check: allowed values; None allows all values of the type.
        also_list: whether a list of such values is also accepted.
    """

    default: Any
    meaning: str
    check: Check | None = None
    also_list: bool = False


@dataclass(frozen=True)
class StageOption(Option):
    """An option with one entry per stage.

    Attributes:
        each: allowed entries, checked only in stages that use the option.
    """

    each: Check | None = None


class DeclaredSignature:
    """Descriptor for ``__signature__``: `inspect.signature` and `help` show a class's options as keyword arguments."""

    def __get__(self, instance: object, owner: Any) -> inspect.Signature:
        if instance is not None:  # the signature is that of the constructor, not of an instance's `__call__`
            raise AttributeError("__signature__")
        kind = inspect.Parameter.KEYWORD_ONLY
        declared = [inspect.Parameter(name, kind, default=o.default) for name, o in owner.options().items()]
        others = inspect.signature(owner.__init__).parameters.values()
        return inspect.Signature([*declared, *(parameter for parameter in others if parameter.kind is kind)])


def did_you_mean(
    name: str, known: Iterable[str], *, shown: Mapping[str, object] | None = None, cutoff: float = 0.6
) -> str:
    """Return the end of an error message that suggests the known name closest to ``name``; empty if none is close.

    Args:
        name: the unknown name.
        known: the known names.
        shown: what the message shows for each known name; None for the name itself.
        cutoff: smallest similarity, from 0 to 1.
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {shown[near[0]] if shown else near[0]}?" if near else ""


def complete(given: Mapping[str, Any], declared: Mapping[str, Option]) -> dict[str, Any]:
    """Return the values of all declared options: the given ones, otherwise the defaults.

    Numbers of other libraries, such as NumPy's, become Python's. Entries of a `StageOption` are checked by
    `split_stages`, all other values here.

    Raises:
        TypeError: an option is unknown.
        ValueError: a value is not allowed; the message names the value and the allowed values.
    """
    for name in given.keys() - declared.keys():
        hint = did_you_mean(name, declared) or f"; the options are {', '.join(declared)}"
        raise TypeError(f"unknown option {name!r}{hint}")
    values = {name: given.get(name, option.default) for name, option in declared.items()}
    for name, option in declared.items():
        value = values[name]
        if isinstance(option, StageOption):
            if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != NUM_STAGES:
                raise ValueError(f"{name} = {value!r} must be a list of {NUM_STAGES} entries, one per stage")
            continue
        shown = f"{name} = {value!r}"
        if option.also_list and isinstance(value, Sequence):
            value = [_of_type(shown, entry, option.default) for entry in value]
        else:
            value = _of_type(shown, value, option.default)
        if option.check:
            option.check.require(name, value)
        values[name] = value
    return values


def _of_type(shown: str, value: Any, default: Any) -> Any:
    """Return a value, as Python's if it is a number; raise a ValueError if it is not of the type of the default."""
    accepted, words = _TYPES[type(default)]
    if not isinstance(value, accepted) or isinstance(value, bool) != isinstance(default, bool):
        raise ValueError(f"{shown} must be {words}")
    return type(default)(value) if isinstance(value, Real) else value


@dataclass(frozen=True)
class StageOptions:
    """The options of one stage: ``stage["dims"]`` is its own entry, ``stage["coordinates"]`` is shared by all stages.

    Attributes:
        index: index of the stage, from 0.
        map_size: native height and width of its map in pixels.
        letters: letters of its blocks, in order.
        values: values of all options by name.
        lists: names of the options with one entry per stage.
    """

    index: int
    map_size: tuple[int, int]
    letters: str
    values: Mapping[str, Any]
    lists: frozenset[str]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def show(self, name: str) -> str:
        """Return an option and its value for a message, for example ``heads[2] = 5``."""
        return f"{name}[{self.index}] = {self[name]!r}" if name in self.lists else f"{name} = {self[name]!r}"

    def require(self, name: str, check: Check) -> None:
        """Raise a ValueError if a check fails for an option."""
        if not check.holds(self[name]):
            raise ValueError(f"{self.show(name)} must be {check.words} for the blocks {self.letters!r}")

    def divides(self, divisor: str, number: str, *, factor: int = 1) -> None:
        """Raise a ValueError unless ``factor`` times the first option divides the second."""
        self.require(divisor, at_least(1))
        if self[number] % (factor * self[divisor]):
            times = f"{factor} times " if factor > 1 else ""
            raise ValueError(f"{times}{self.show(divisor)} does not divide {self.show(number)}; change one of them")

    def at_most_one(self, *names: str, of: str) -> None:
        """Raise a ValueError if more than one of some switches is on; ``of`` names what they choose from."""
        chosen = [self.show(name) for name in names if self[name]]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other; choose one {of}")


def split_stages(
    values: Mapping[str, Any], declared: Mapping[str, Option], *, map_size: tuple[int, int]
) -> list[StageOptions]:
    """Split options into those of the four stages, and check the type of every entry.

    Args:
        values: values of all options, from `complete`; ``stage_spec`` holds strings (``"ND"``) or lists of letters.
        declared: declarations of the options.
        map_size: native size of the first stage's map, which halves from stage to stage.

    Raises:
        ValueError: an entry has the wrong type, or a stage does not have one letter per block.
    """
    lists = {name: option for name, option in declared.items() if isinstance(option, StageOption)}
    stages = []
    for i in range(NUM_STAGES):
        own = {
            name: _of_type(f"{name}[{i}] = {values[name][i]!r}", values[name][i], option.default[0])
            for name, option in lists.items()
            if name != "stage_spec"
        }
        own["stage_spec"] = _letters(values["stage_spec"], i)
        size = map_size[0] >> i, map_size[1] >> i
        stage = StageOptions(i, size, own["stage_spec"], {**values, **own}, frozenset(lists))
        for name in ("dims", "depths"):
            stage.require(name, lists[name].each)
        if len(stage.letters) != stage["depths"]:
            raise ValueError(f"{stage.show('stage_spec')} must have one letter per block; {stage.show('depths')}")
        stages.append(stage)
    return stages


def _letters(spec: Sequence, index: int) -> str:
    """Return the letters of a stage as a string."""
    letters = spec[index]
    if not isinstance(letters, Sequence) or not all(isinstance(letter, str) for letter in letters):
        raise ValueError(f"stage_spec[{index}] = {letters!r} must be letters, such as 'ND' or ['N', 'D']")
    return "".join(letters)


def as_table(options: Mapping[str, Option]) -> str:
    """Return options as a Markdown table for the documentation."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for name, option in options.items():
        check = getattr(option, "each", None) or option.check
        allowed = f" Must be {check.words}." if check else ""
        flag = f" Flag: `{option.flag}`." if getattr(option, "flag", "") else ""
        default = option.default
        if name == "stage_spec":
            default = ["".join(letters) for letters in default]
        elif isinstance(default, tuple):
            default = list(default)
        shown = "" if default == "" else f"`{default}`"
        rows.append(f"| `{name}` | {shown} | {_escaped(option.meaning + allowed + flag)} |")
    return "\n".join(rows)


def _escaped(text: str) -> str:
    """Return text with a backslash before the characters that mean something in a Markdown table, except in code."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([|<*])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)
