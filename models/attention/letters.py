"""The registry of mixers by their letter in ``stage_spec``.

The module of a mixer registers its letter together with the options that it declares, and is imported in
`models.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from ..options import Option, StageOption, StageOptions


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """The definition of one letter.

    Attributes:
        build: builds the mixer, a module from ``[B, C, H, W]`` to ``[B, C, H, W]``, from the options of a stage. If it
            holds parameters or buffers itself, it has a method ``reset_parameters`` that initialises them.
        options: the options that it declares; letters that share an option declare the same object.
        check: raises a ValueError if options of a stage contradict each other; None if they cannot.
        single_residual: whether mixer and MLP form one residual branch, as in ConvNeXt, instead of one each.
    """

    build: Callable[[StageOptions], nn.Module]
    options: Mapping[str, Option] = field(default_factory=dict)
    check: Callable[[StageOptions], None] | None = None
    single_residual: bool = False


MIXERS: dict[str, Mixer] = {}


def register(letter: str, mixer: Mixer) -> None:
    """Register a letter for ``stage_spec``, and the options of its mixer for `models.dat.DAT`."""
    assert len(letter) == 1, f"{letter!r} is not one letter"
    assert letter not in MIXERS, f"the letter {letter!r} is taken"
    known = declared_options()
    assert all(known.get(name, option) is option for name, option in mixer.options.items()), "option declared twice"
    MIXERS[letter] = mixer


def declared_options() -> dict[str, Option]:
    """Return the options of all mixers by name."""
    return {name: option for mixer in MIXERS.values() for name, option in mixer.options.items()}


def check_letters(stage: StageOptions) -> None:
    """Check the options of a stage that its mixers use.

    Raises:
        ValueError: a letter is unknown, or an option is not allowed or contradicts another.
    """
    for letter in dict.fromkeys(stage.letters):
        if letter not in MIXERS:
            known = ", ".join(sorted(MIXERS))
            raise ValueError(f"{stage.show('stage_spec')} contains {letter!r}; the letters are {known}")
        mixer = MIXERS[letter]
        for name, option in mixer.options.items():
            if isinstance(option, StageOption) and option.each:
                stage.require(name, option.each)
        if mixer.check:
            mixer.check(stage)
