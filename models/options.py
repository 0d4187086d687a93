"""The options of one stage, checked against each other before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from .ops.grids import COORDINATES

LETTERS = "LSDNPQXE"
QNA_ACTIVATIONS = ("exp", "sigmoid", "linear")
NUM_STAGES = 4

LIST_NAMES = {
    "dim": "dims",
    "depth": "depths",
    "letters": "stage_spec",
    "heads": "heads",
    "heads_q": "heads_q",
    "window_size": "window_sizes",
    "groups": "groups",
    "stride": "strides",
    "ksize": "ksizes",
    "offset_range_factor": "offset_range_factor",
    "use_pe": "use_pes",
    "dwc_pe": "dwc_pes",
    "fixed_pe": "fixed_pes",
    "log_cpb": "log_cpb",
    "no_off": "no_offs",
    "sr_ratio": "sr_ratios",
    "nat_ksize": "nat_ksizes",
    "nq": "nqs",
    "ksize_qna": "ksize_qnas",
    "use_dwc_mlp": "use_dwc_mlps",
    "use_lpu": "use_lpus",
    "layer_scale_value": "layer_scale_values",
}


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What the blocks of one stage are built from; `LIST_NAMES` gives the list that an option is one entry of."""

    index: int
    map_size: int
    dim: int
    depth: int
    letters: str
    heads: int
    heads_q: int
    window_size: int
    groups: int
    stride: int
    ksize: int
    offset_range_factor: float
    use_pe: bool
    dwc_pe: bool
    fixed_pe: bool
    log_cpb: bool
    no_off: bool
    sr_ratio: int
    nat_ksize: int
    nq: int
    ksize_qna: int
    use_dwc_mlp: bool
    use_lpu: bool
    layer_scale_value: float
    expansion: int
    nat_rpb: bool
    qna_activation: str
    coordinates: str
    drop_rate: float
    attn_drop_rate: float

    @property
    def position_bias(self) -> str:
        """The kind of position bias of the stage's deformable attention: none, table, log_cpb, fixed or dwc."""
        if not self.use_pe or self.no_off:
            return "none"
        if self.dwc_pe:
            return "dwc"
        if self.fixed_pe:
            return "fixed"
        return "log_cpb" if self.log_cpb else "table"

    def __post_init__(self) -> None:
        self._check_types()
        self._at_least("dim", "depth")
        if len(self.letters) != self.depth:
            raise ValueError(f"{self._show('letters')} does not name as many blocks as {self._show('depth')}")
        for letter in dict.fromkeys(self.letters):
            self._check_letter(letter)

    def _check_types(self) -> None:
        accepted = {"int": int, "float": (int, float), "bool": bool, "str": str}
        for field in fields(self):
            value = getattr(self, field.name)
            is_right = isinstance(value, accepted[field.type]) and isinstance(value, bool) == (field.type == "bool")
            if field.name in LIST_NAMES and not is_right:
                raise ValueError(f"{self._show(field.name)} must be of type {field.type}, not {type(value).__name__}")

    def _check_letter(self, letter: str) -> None:
        if letter in "LSDNPE":
            self._divides("heads", "dim")
        match letter:
            case "L" | "S":
                self._at_least("window_size")
            case "D":
                self._divides("groups", "heads")
                self._at_least("stride", "ksize")
                self._at_most_one("dwc_pe", "fixed_pe", "log_cpb")
            case "N":
                self._odd("nat_ksize")
            case "P":
                self._at_least("sr_ratio")
            case "Q":
                self._divides("heads_q", "dim")
                self._at_least("nq")
                self._odd("ksize_qna")
            case "E":
                self._divides("heads", "dim", factor=4)
            case "X":
                self._odd("window_size")
            case _:
                raise ValueError(f"{self._show('letters')} holds {letter!r}; the letters are {', '.join(LETTERS)}")

    def _show(self, name: str) -> str:
        """Return an option as the person wrote it, for example ``heads[2] = 5``."""
        return f"{LIST_NAMES[name]}[{self.index}] = {getattr(self, name)!r}"

    def _at_least(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{self._show(name)} must be at least 1 for the blocks {self.letters!r}")

    def _divides(self, divisor: str, number: str, *, factor: int = 1) -> None:
        self._at_least(divisor)
        if getattr(self, number) % (factor * getattr(self, divisor)):
            times = f"{factor} times " if factor > 1 else ""
            raise ValueError(f"{times}{self._show(divisor)} does not divide {self._show(number)}; change one of them")

    def _odd(self, name: str) -> None:
        self._at_least(name)
        if getattr(self, name) % 2 == 0:
            raise ValueError(
                f"{self._show(name)} must be odd for the blocks {self.letters!r}, so that a pixel is its centre"
            )

    def _at_most_one(self, *names: str) -> None:
        chosen = [self._show(name) for name in names if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other; choose one kind of position bias")


def _joined(letters: object, index: int) -> str:
    """Return a list of letters as a string."""
    if not isinstance(letters, Sequence) or not all(isinstance(letter, str) for letter in letters):
        raise ValueError(f"stage_spec[{index}] = {letters!r} must be letters, such as 'ND' or ['N', 'D']")
    return "".join(letters)


def split_stages(lists: dict[str, Sequence], *, map_size: int, **common: object) -> list[StageOptions]:
    """Split lists of four entries, keyed as `LIST_NAMES` is, into the options of the four stages.

    Args:
        lists: one list per option of a stage; ``letters`` may hold strings (``"ND"``) or lists of letters.
        map_size: native side of the first stage's map; it halves from stage to stage.
        **common: the remaining fields of `StageOptions`, the same for every stage.

    Raises:
        ValueError: a list is not one or has the wrong length, or options contradict each other.
    """
    for name, values in lists.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != NUM_STAGES:
            raise ValueError(f"{LIST_NAMES[name]} = {values!r} must be a list of {NUM_STAGES} entries, one per stage")
    stages = []
    for i in range(NUM_STAGES):
        options = {name: values[i] for name, values in lists.items()}
        if not isinstance(options["letters"], str):
            options["letters"] = _joined(options["letters"], i)
        stages.append(StageOptions(index=i, map_size=map_size >> i, **options, **common))
    return stages


def check_network(
    *,
    img_size: int,
    patch_size: int,
    dim_stem: int,
    num_classes: int,
    expansion: int,
    use_conv_patches: bool,
    qna_activation: str,
    coordinates: str,
    rates: dict[str, float],
) -> None:
    """Check the options that all stages share; see `models.dat.DAT` for their meaning.

    Raises:
        ValueError: an option is not allowed; the message names it, its value and what is allowed.
    """
    counts = {
        "img_size": img_size,
        "patch_size": patch_size,
        "dim_stem": dim_stem,
        "num_classes": num_classes,
        "expansion": expansion,
    }
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} = {value!r} must be a whole number of at least 1")
    smallest = patch_size << (NUM_STAGES - 1)
    if img_size < smallest:
        raise ValueError(f"img_size = {img_size} leaves no pixel for the last stage; choose at least {smallest}")
    if use_conv_patches and (patch_size % 2 or dim_stem % 2):
        raise ValueError(
            f"patch_size = {patch_size} and dim_stem = {dim_stem} must both be even with use_conv_patches, "
            "whose stem has two halving steps"
        )
    for name, value, allowed in (
        ("qna_activation", qna_activation, QNA_ACTIVATIONS),
        ("coordinates", coordinates, COORDINATES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} = {value!r} is unknown; choose one of {', '.join(allowed)}")
    for name, value in rates.items():
        if not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"{name} = {value!r} must be a number in [0, 1)")
