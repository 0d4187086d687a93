"""The config: precedence, writing and reading, and the files in configs/."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from config import OPTIONS, complete, default_config, differences, flatten, load_config, set_option
from models.dat import DAT
from models.options import as_table
from tests.runs import ROOT
from training.command_line import parse

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MODELS = [path for path in CONFIGS if path.parent.name != "_base"]


def write(path: Path, content: str) -> Path:
    """Write a config file and create its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def refusal(*overrides: Any) -> str:
    """Return the error message for options."""
    with pytest.raises(ValueError, match="option") as error:
        load_config(ROOT / "configs/digits.yaml", overrides)
    return str(error.value)


def test_defaults_then_base_then_file_then_opts_then_flags(tmp_path: Path) -> None:
    write(tmp_path / "far.yaml", "TRAIN: {EPOCHS: 1, WARMUP_EPOCHS: 1, BASE_LR: 1.0, MIN_LR: 1.0}\nSEED: 1")
    write(tmp_path / "near.yaml", "BASE: far.yaml\nTRAIN: {WARMUP_EPOCHS: 2, BASE_LR: 2.0, MIN_LR: 2.0}\nSEED: 2")
    path = write(tmp_path / "file.yaml", "BASE: near.yaml\nTRAIN: {BASE_LR: 3.0, MIN_LR: 3.0}\nSEED: 3")
    _, config = parse(["--cfg", str(path), "--seed", "5", "--opts", "TRAIN.MIN_LR", "4", "SEED", "4"])
    assert config.TRAIN.WEIGHT_DECAY == default_config().TRAIN.WEIGHT_DECAY
    assert (config.TRAIN.EPOCHS, config.TRAIN.WARMUP_EPOCHS) == (1, 2)
    assert (config.TRAIN.BASE_LR, config.TRAIN.MIN_LR, config.SEED) == (3.0, 4.0, 5)


def test_bases_are_relative_to_their_file_and_the_later_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "shared/one.yaml", "SEED: 1\nTAG: one")
    write(tmp_path / "shared/two.yaml", "SEED: 2")
    path = write(tmp_path / "mine/file.yaml", 'BASE: ["", ../shared/one.yaml, ../shared/two.yaml]')
    monkeypatch.chdir(tmp_path / "shared")
    config = load_config(path)
    assert (config.SEED, config.TAG) == (2, "one")


def test_one_base_may_be_reached_twice(tmp_path: Path) -> None:
    write(tmp_path / "root.yaml", "SEED: 7")
    for name in ("left", "right"):
        write(tmp_path / f"{name}.yaml", "BASE: root.yaml")
    assert load_config(write(tmp_path / "file.yaml", "BASE: [left.yaml, right.yaml]\nTAG: both")).SEED == 7


def test_base_cycle_over_two_files_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path / "one.yaml", "BASE: two.yaml\nSEED: 1")
    write(tmp_path / "two.yaml", "BASE: one.yaml\nSEED: 2")
    with pytest.raises(ValueError, match=r"BASE of .*two.yaml leads back to itself"):
        load_config(path)


def test_repeated_opts_are_combined() -> None:
    _, config = parse(["--cfg", str(MODELS[0]), "--opts", "SEED", "1", "--opts", "TAG", "second"])
    assert (config.SEED, config.TAG) == (1, "second")


def test_loading_leaves_the_defaults_as_they_are(tmp_path: Path) -> None:
    before = dict(flatten(default_config()))
    config = load_config(write(tmp_path / "file.yaml", "MODEL: {DAT: {dims: [8, 8, 8, 8]}}"))
    config.MODEL.DAT.heads.append(1)
    config.AUG.SCALE[0] = 0.5
    assert dict(flatten(default_config())) == before


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_written_config_gives_the_same_config(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["TAG", "5e-4", "AMP", "bf16", "TRAIN.BASE_LR", "1e-30", "DATA.DATA_PATH", "~/ö: #x"])
    written = load_config(write(tmp_path / "config.yaml", config.dump()))
    assert written == config
    assert differences(written, config) == []
    for (key, one), (_, other) in zip(sorted(flatten(written)), sorted(flatten(config)), strict=True):
        assert (type(one), repr(one)) == (type(other), repr(other)), key


@pytest.mark.parametrize("path", MODELS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_config_opens_with_its_commands_and_its_result(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert any(line.startswith("# bash train") and f" {name}" in line for line in header)
    assert any(line.startswith("# bash evaluate.sh ") and f" {name} " in line for line in header)
    assert any(line.startswith("# Trained here: ") for line in header)


def test_every_config_has_its_own_output_folder() -> None:
    names = [load_config(path).MODEL.NAME for path in MODELS]
    assert len(set(names)) == len(names) == len(MODELS)


def test_the_options_of_the_network_are_its_arguments() -> None:
    arguments = inspect.signature(DAT).parameters.keys() - {"use_checkpoint"}
    assert default_config().MODEL.DAT.keys() == arguments


def test_every_option_has_a_meaning_and_a_default_that_passes_its_check() -> None:
    for key, value in flatten(default_config()):
        assert OPTIONS[key].meaning.strip(), key
        assert OPTIONS[key].check is None or OPTIONS[key].check.holds(value), key
    flags = [option.flag for option in OPTIONS.values() if getattr(option, "flag", "")]
    assert len(set(flags)) == len(flags)


def test_the_documentation_lists_every_option() -> None:
    sections = defaultdict(dict)
    for key, option in OPTIONS.items():
        if not key.startswith(("MODEL.DAT.", "MODEL.VIT.")):  # arguments of the models, see their pages
            sections[key.rpartition(".")[0]][key] = option
    page = (Path(__file__).parents[1] / "docs/options.md").read_text(encoding="utf-8")
    for section, options in sections.items():
        if (table := as_table(options)) not in page:
            pytest.fail(f"docs/options.md should hold, under {section or 'Run'},\n{table}", pytrace=False)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("TRAIN.BASE_LR", "5e-4", 5e-4),
        ("TRAIN.BASE_LR", "1", 1.0),
        ("TRAIN.BASE_LR", "1.0e-3", 1e-3),
        ("TRAIN.EPOCHS", "12", 12),
        ("TEST.CROP", "false", False),
        ("TEST.CROP", "off", False),
        ("TEST.CROP", "True", True),
        ("AMP", "off", "off"),
        ("TAG", "off", "off"),
        ("TAG", "5", "5"),
        ("TAG", "null", "null"),
        ("AUG.SCALE", "[5e-1, 1]", [0.5, 1.0]),
        ("AUG.SCALE", "[0.5, 1.0]", [0.5, 1.0]),
        ("AUG.AUTO_AUGMENT", "", ""),
        ("MODEL.DAT.dims", "[8, 8, 8, 8]", [8, 8, 8, 8]),
        ("MODEL.DAT.layer_scale_values", "[1e-6, 1, -1, 0]", [1e-6, 1.0, -1.0, 0.0]),
        ("MODEL.DAT.stage_spec", "[ND, ND, ND, DD]", ["ND", "ND", "ND", "DD"]),
        ("DATA.IMG_SIZE", "[192, 224]", [192, 224]),
        ("TRAIN.FREEZE", "[patch_proj, stages.0]", ["patch_proj", "stages.0"]),
        ("MODEL.TIMM.ARGS.drop_path_rate", "1e-1", 0.1),
        ("MODEL.TIMM.ARGS.img_size", "[64, 32]", [64, 32]),
        ("MODEL.TIMM.ARGS.norm_layer", "null", None),
        ("TRAIN.OPTIMIZER.ARGS.caution", "true", True),
        ("MODEL.DAT.stage_spec", "[[N, D], ND, [N], D]", [["N", "D"], "ND", ["N"], "D"]),
    ],
)
def test_text_is_read_by_the_type_of_the_option(key: str, text: str, value: Any) -> None:
    config = default_config()
    set_option(config, key, text)
    set = dict(flatten(config))[key]
    assert (type(set), repr(set)) == (type(value), repr(value))


@pytest.mark.parametrize(
    ("content", "key", "value"),
    [
        ("TRAIN: {BASE_LR: 5e-4}", "TRAIN.BASE_LR", 5e-4),  # text to YAML, which wants a dot
        ("TRAIN: {BASE_LR: 1}", "TRAIN.BASE_LR", 1.0),
        ("AMP: off", "AMP", "off"),  # False to YAML
        ("TEST: {CROP: no}", "TEST.CROP", False),
        ("MODEL: {DAT: {offset_range_factor: [1, 2.5, 1e1, -1]}}", "MODEL.DAT.offset_range_factor", [1, 2.5, 10, -1]),
    ],
)
def test_yaml_scalars_become_what_was_meant(content: str, key: str, value: Any, tmp_path: Path) -> None:
    assert dict(flatten(load_config(write(tmp_path / "file.yaml", content))))[key] == value


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("TRAIN.EPOCH", "TRAIN.EPOCHS"),
        ("EPOCHS", "TRAIN.EPOCHS"),
        ("BATCH_SIZE", "DATA.BATCH_SIZE"),
        ("TRAIN.BATCH_SIZE", "DATA.BATCH_SIZE"),
        ("train.base_lr", "TRAIN.BASE_LR"),
        ("MODEL.dims", "MODEL.DAT.dims"),
        ("dims", "MODEL.DAT.dims"),
        ("MODEL.DAT.use_pe", "MODEL.DAT.use_pes"),
        ("AUG.MIX_UP", "AUG.MIXUP"),
        ("TRAIN.LR", "TRAIN.BASE_LR"),
        ("lr", "TRAIN.BASE_LR"),
        ("TRAIN.WARMUP", "TRAIN.WARMUP_EPOCHS"),
        ("EMA", "TRAIN.EMA.ENABLED"),
        ("TRAIN.LR_SCHEDULER.GAMMA", None),
        ("TRAIN.QUICKLY", None),
        ("TRAIN.EMA", None),
        ("QUICKLY", None),
    ],
)
def test_unknown_option_suggests_a_similar_one(written: str, meant: str | None) -> None:
    message = refusal(written, "1")
    if written == "TRAIN.EMA":
        assert message == "TRAIN.EMA is a section; set one of its options, such as TRAIN.EMA.ENABLED"
    else:
        hint = f"did you mean {meant}?" if meant else "config.py lists all options"
        assert message == f"unknown option {written}; {hint}"


@pytest.mark.parametrize("text", ["text", "", "{a: 1}", "2024-01-01", "!!int x", "9" * 400, "-.inf", ".nan"])
def test_every_option_rejects_a_value_of_another_type(text: str) -> None:
    for key, default in flatten(default_config()):
        if not isinstance(default, str) and key != "BASE":
            with pytest.raises(ValueError, match=rf"^{key}.*(must be|is not valid YAML)"):
                set_option(default_config(), key, text)


def test_differences_name_what_one_side_lacks() -> None:
    one, other = default_config(), default_config()
    assert differences(one, other) == []
    one.TRAIN.EPOCHS = 5
    other.AUG.SCALE = [0.5, 1.0]
    del one.TRAIN.EMA["DECAY"]
    other.LATER = 1
    assert set(map(repr, differences(one, other))) == {
        "('TRAIN.EPOCHS', 5, 300)",
        "('AUG.SCALE', [0.08, 1.0], [0.5, 1.0])",
        "('TRAIN.EMA.DECAY', None, 0.9999)",
        "('LATER', None, 1)",
    }


def test_free_sections_take_any_key_merge_over_files_and_come_back(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "MODEL: {TIMM: {NAME: resnet18, ARGS: {drop_rate: 0.1, act: {name: gelu}}}}")
    path = write(tmp_path / "file.yaml", "BASE: base.yaml\nMODEL: {TYPE: timm, TIMM: {ARGS: {drop_rate: 2e-1}}}")
    config = load_config(path, ["MODEL.TIMM.ARGS.act.approximate", "tanh"])
    assert config.MODEL.TIMM.ARGS == {"drop_rate": 0.2, "act": {"name": "gelu", "approximate": "tanh"}}
    assert load_config(write(tmp_path / "config.yaml", config.dump())) == config
    with pytest.raises(ValueError, match=r"MODEL\.TIMM\.ARGS must be a section, such as .*, not 'quick'"):
        load_config(path, ["MODEL.TIMM.ARGS", "quick"])
    with pytest.raises(ValueError, match=r"MODEL\.TIMM\.ARGS is a section, not 5"):
        load_config(write(tmp_path / "wrong.yaml", "MODEL: {TIMM: {ARGS: 5}}"))


def test_a_config_of_an_earlier_version_is_completed_by_defaults() -> None:
    written = default_config()
    del written.TRAIN.LR_SCHEDULER["WARMUP_PREFIX"]
    written.TRAIN.EPOCHS = 5
    written.MODEL.TIMM.ARGS.depth = 3
    whole = complete(written)
    assert dict(flatten(whole)) == {**dict(flatten(default_config())), "TRAIN.EPOCHS": 5, "MODEL.TIMM.ARGS.depth": 3}


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--epochs", "3"], "TRAIN.EPOCHS", 3),
        (["--lr", "1e-3"], "TRAIN.BASE_LR", 1e-3),
        (["--workers", "2"], "DATA.NUM_WORKERS", 2),
        (["--img-size", "64"], "DATA.IMG_SIZE", 64),
        (["--img-size", "[64, 32]"], "DATA.IMG_SIZE", [64, 32]),
        (["--weight-decay", "0"], "TRAIN.WEIGHT_DECAY", 0.0),
        (["--warmup-epochs", "0"], "TRAIN.WARMUP_EPOCHS", 0),
        (["--model", "resnet18"], "MODEL.TIMM.NAME", "resnet18"),
        (["--model", "resnet18"], "MODEL.TYPE", "timm"),
        (["--amp"], "AMP", "auto"),
        (["--amp", "fp16"], "AMP", "fp16"),
        (["--tf32"], "TF32", True),
        (["--ema"], "TRAIN.EMA.ENABLED", True),
    ],
)
def test_flags_set_their_options(flags: list[str], key: str, value: Any) -> None:
    _, config = parse(["--cfg", str(ROOT / "configs/digits.yaml"), *flags])
    assert dict(flatten(config))[key] == value


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--epoch", "did you mean --epochs?"),
        ("--batch_size", "did you mean --batch-size?"),
        ("--learning-rate", "did you mean --lr?"),
        ("--data", "did you mean --data-path?"),
        ("--dataset", "did you mean --opts DATA.DATASET VALUE?"),
        ("--num_workers", "did you mean --workers?"),
        ("-j", "did you mean --workers?"),
        ("--name", "did you mean --tag?"),
        ("--fp16", "did you mean --amp?"),
        ("--checkpoint", "did you mean --resume?"),
        ("--momentum", "did you mean --opts TRAIN.OPTIMIZER.MOMENTUM VALUE?"),
        ("--mixup", "did you mean --opts AUG.MIXUP VALUE?"),
        ("--drop-path", "did you mean --opts MODEL.DAT.drop_path_rate VALUE?"),
        ("--warmup", "did you mean --warmup-epochs?"),
        ("--evaluate", "did you mean --eval?"),
        ("--config", "did you mean --cfg?"),
        ("--model-ema", "did you mean --ema?"),
        ("--ema-decay", "did you mean --opts TRAIN.EMA.DECAY VALUE?"),
        ("--ckpt-path", "did you mean --resume?"),
        ("--load-checkpoint", "did you mean --resume?"),
        ("--checkpoint-freq", "did you mean --opts SAVE_FREQ VALUE?"),
        ("--no-amp", "did you mean --amp off?"),
        ("--cpu", "did you mean --device cpu?"),
        ("--nodes", "options of config.py"),
        ("--start-epoch", "options of config.py"),
        ("--fast", "options of config.py"),
        ("--gpus", "options of config.py"),
    ],
)
def test_unknown_flags_suggest_similar_ones(flag: str, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"unknown argument {flag}; {hint}")):
        parse(["--cfg", str(ROOT / "configs/digits.yaml"), flag, "1"])


def test_evaluated_checkpoint_is_given_or_the_best_of_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "config.yaml", f"OUTPUT: {tmp_path}\nMODEL: {{NAME: run, PRETRAINED: start.pth}}")
    argv = ["--cfg", str(path), "--eval"]
    with pytest.raises(ValueError, match=r"--eval needs a checkpoint.*start\.pth.* is what the run starts from"):
        parse(argv)
    best = write(tmp_path / "run/default/best.pth", "")
    assert str(best) == parse(argv)[1].MODEL.RESUME
    for flag in ("--resume", "--pretrained"):
        assert parse([*argv, flag, "other.pth"])[1].MODEL.RESUME == "other.pth"
    assert parse([*argv, "--opts", "MODEL.RESUME", "other.pth"])[1].MODEL.RESUME == "other.pth"


def test_config_of_a_moved_run_evaluates_the_run_in_its_folder(tmp_path: Path) -> None:
    text = f"OUTPUT: {tmp_path}\nMODEL: {{NAME: run}}"
    other = write(tmp_path / "run/default/best.pth", "")  # which has taken its place
    path = write(tmp_path / "moved/config.yaml", text)
    assert str(other) == parse(["--cfg", str(path), "--eval"])[1].MODEL.RESUME  # no run lies there
    write(tmp_path / "moved/last.pth", "")
    with pytest.raises(ValueError, match=r"pass it as --resume FILE; .*/moved has no best\.pth, but last\.pth"):
        parse(["--cfg", str(path), "--eval"])
    best = write(tmp_path / "moved/best.pth", "")
    assert str(best) == parse(["--cfg", str(path), "--eval"])[1].MODEL.RESUME
    assert str(other) == parse(["--cfg", str(path), "--eval", "--tag", "default"])[1].MODEL.RESUME
