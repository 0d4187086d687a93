"""Pictures of deformable attention: their numbers, the files, and the page in a browser."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from yacs.config import CfgNode

from config import load_config
from models.build import build_model
from models.vit import VisionTransformer
from tests.browser import Browser, needs_browser
from tests.runs import call, printed_by, write_config
from tests.tools.samples import tiny_config, write_checkpoint, write_photograph
from tools.deformations import inspect_blocks
from tools.drawing import first_heads
from tools.visualize import attention_of, main
from tools.windows import draw_windows
from training.trained_model import untrained


def page_data(page: Path) -> dict:
    found = re.search(r"const DATA = (\{.*\});", page.read_text(encoding="utf-8"))
    return json.loads(found[1])


def test_zero_offsets_leave_the_keys_at_their_reference(tmp_path: Path) -> None:
    network = build_model(tiny_config(tmp_path)).eval()
    for stage in list(network.stages)[1:]:
        torch.nn.init.zeros_(stage.attns[0].conv_offset[3].weight)
    seen = inspect_blocks(network, torch.randn(3, 32, 48))
    assert [one.title for one in seen] == ["stage 2, block 1", "stage 3, block 1", "stage 4, block 1"]
    for one in seen:
        # The published reference leaves small maps; places are held between the centres of the corner pixels.
        edge = 0.5 / np.array(one.map_size)
        assert np.allclose(one.places, one.reference.clip(edge, 1 - edge), atol=1e-6)
    middle = seen[1]
    assert middle.map_size == middle.key_size == (2, 3)  # of 32 x 48 pixels, each cell a key
    assert middle.groups == 2
    assert middle.weights.shape == (4, 6, 6)


def test_positions_are_fractions_of_the_image(tmp_path: Path) -> None:
    network = build_model(tiny_config(tmp_path)).eval()
    attention = network.stages[1].attns[0]
    kept = {}
    attention.register_forward_pre_hook(lambda module, inputs: kept.update(seen=module.inspect(inputs[0])))
    one = inspect_blocks(network, torch.randn(3, 32, 32), stages=[2])[0]
    size = one.map_size[0]
    y, x = kept["seen"].positions[0, 0, 0].tolist()
    # -1 is the centre of the first pixel of the map, half a pixel from the edge; +1 half a pixel from the other edge.
    assert one.places[0, 0] == pytest.approx([0.5 / size + (v + 1) / 2 * (1 - 1 / size) for v in (y, x)], abs=1e-6)


def test_importance_and_attention_are_shares(tmp_path: Path) -> None:
    for one in inspect_blocks(build_model(tiny_config(tmp_path)).eval(), torch.randn(3, 32, 32)):
        assert one.importance().shape == (one.groups, one.key_size[0] * one.key_size[1])
        assert one.importance().sum(1) == pytest.approx(1, abs=1e-5)
        assert one.weights.sum(2) == pytest.approx(1, abs=1e-5)
        first = one.weights[: one.heads // one.groups].mean((0, 1))
        assert one.importance()[0] == pytest.approx(first, abs=1e-6)


def test_queries_and_heads_are_found(tmp_path: Path) -> None:
    one = inspect_blocks(build_model(tiny_config(tmp_path)).eval(), torch.randn(3, 32, 48), stages=[3])[0]
    assert [one.query_at(place) for place in ((0, 0), (0.49, 0.4), (0.51, 0.99), (1, 1))] == [0, 1, 5, 5]
    assert [one.group_of(head) for head in range(4)] == [0, 0, 1, 1]
    assert first_heads(one, 2) == [0, 2]
    assert first_heads(one, 3) == [0, 1, 2]


def test_stages_without_deformable_attention_are_refused(tmp_path: Path) -> None:
    network = build_model(tiny_config(tmp_path)).eval()
    with pytest.raises(ValueError, match="stage 1 has no deformable attention; choose from 2, 3, 4"):
        inspect_blocks(network, torch.randn(3, 32, 32), stages=[1])
    with pytest.raises(ValueError, match="the letter D"):
        inspect_blocks(torch.nn.Linear(3, 3), torch.randn(3, 32, 32))


@pytest.mark.parametrize(("task", "section"), [("segmentation", "SEGMENTER"), ("detection", "DETECTOR")])
def test_blocks_of_a_detector_or_segmenter_are_found_by_stage(tmp_path: Path, task: str, section: str) -> None:
    config = tiny_config(tmp_path)
    config.TASK, config.MODEL.DAT.depths, config.MODEL.DAT.stage_spec[2] = task, [1, 1, 2, 1], "DD"
    config.MODEL[section].ARGS = CfgNode({"channels": 8})
    network, image = build_model(config).eval(), torch.randn(3, 64, 64)
    seen = inspect_blocks(network, image)
    assert [one.title for one in seen] == ["stage 2, block 1", "stage 3, block 2", "stage 4, block 1"]
    seen = inspect_blocks(network, image, stages=[3], every_block=True)
    assert [one.name for one in seen] == ["backbone.stages.2.attns.0", "backbone.stages.2.attns.1"]


@pytest.mark.parametrize(
    ("task", "size", "shape"),
    [
        ("segmentation", None, (32, 64)),  # 32 x 48 pixels, padded to whole cells
        ("segmentation", (64, 32), (64, 32)),
        ("detection", None, (64, 96)),  # 60 x 90 pixels, padded
    ],
)
def test_images_are_prepared_as_in_the_evaluation_of_the_task(
    tmp_path: Path, task: str, size: tuple[int, int] | None, shape: tuple[int, int]
) -> None:
    config = tiny_config(tmp_path)
    config.TASK, config.MODEL.DETECTOR.ARGS, config.DETECTION.TEST_SHORT_SIDE = task, CfgNode({"channels": 8}), 60
    model, photograph = untrained(config), write_photograph(tmp_path / "one.png")  # 60 x 40 pixels
    pixels, (seen,) = attention_of(photograph, [("one", model)], size, stages=[4])
    assert pixels.shape == (*shape, 3)
    assert seen.blocks[0].map_size == (shape[0] // 32, shape[1] // 32)


def test_a_picture_for_each_photograph_and_one_page(tmp_path: Path) -> None:
    photographs = [write_photograph(tmp_path / name / "one.png", seed=i) for i, name in enumerate(_folders(tmp_path))]
    printed_by(main, *photographs, "--checkpoint", write_checkpoint(tmp_path), "--output", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.html", "one-2.png", "one.png"]
    page = page_data(tmp_path / "out" / "index.html")
    assert [image["name"] for image in page["images"]] == ["one.png", "one.png"]
    blocks = page["images"][0]["networks"][0]["blocks"]
    assert [entry["title"] for entry in blocks] == ["stage 2, block 1", "stage 3, block 1", "stage 4, block 1"]
    assert Image.open(tmp_path / "out" / "one.png").width > 600


def _folders(folder: Path) -> list[str]:
    for name in ("a", "b"):
        (folder / name).mkdir()
    return ["a", "b"]


def test_before_and_after_stand_side_by_side(tmp_path: Path) -> None:
    image, checkpoint = write_photograph(tmp_path / "one.png"), write_checkpoint(tmp_path)
    printed_by(main, image, "--checkpoint", checkpoint, "--output", tmp_path / "one")
    printed_by(main, image, "--checkpoint", checkpoint, "--before", "--output", tmp_path / "two")
    networks = page_data(tmp_path / "two" / "index.html")["images"][0]["networks"]
    assert [network["title"] for network in networks] == ["before training", "after training"]
    assert networks[0]["blocks"][0]["weights"] != networks[1]["blocks"][0]["weights"]
    assert networks[1] | {"title": "tiny"} == page_data(tmp_path / "one" / "index.html")["images"][0]["networks"][0]
    single, double = (Image.open(tmp_path / name / "one.png") for name in ("one", "two"))
    assert double.width > 1.8 * single.width


def test_large_maps_keep_some_of_their_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.visualize.MOST_WEIGHTS", 40)
    image, checkpoint = write_photograph(tmp_path / "one.png"), write_checkpoint(tmp_path)
    printed_by(main, image, "--checkpoint", checkpoint, "--stages", 3, "--output", tmp_path / "out")
    entry = page_data(tmp_path / "out" / "index.html")["images"][0]["networks"][0]["blocks"][0]
    assert entry["map"] == [2, 2]
    assert entry["queries"] == [1, 1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--query", "0.5", "1.5"], "--query 0.5 1.5 is outside the image"),
        (["--heads", "0"], "--heads are counted from 1, not 0"),
        (["--heads", "1", "5"], "--heads 5: the blocks have at most 4 heads"),
        (["--size", "32", "32", "32"], "--size 32 32 32 must be one side"),
        (["--stages", "1"], "stage 1 has no deformable attention"),
    ],
)
def test_error_if_nothing_can_be_drawn(tmp_path: Path, words: list[str], said: str) -> None:
    image, checkpoint = write_photograph(tmp_path / "one.png"), write_checkpoint(tmp_path)
    status, _, err = call(main, image, "--checkpoint", checkpoint, "--output", tmp_path / "out", *words)
    assert status == 2
    assert said in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give --checkpoint FILE, or --cfg FILE for a network with random weights"),
        (
            ("--cfg", "tiny.yaml", "--weights", "ema"),
            "--weights chooses a set of weights of a --checkpoint, and there is",
        ),
    ],
)
def test_flags_that_name_no_weights_are_refused(words: tuple[str, ...], said: str) -> None:
    status, _, err = call(main, "photo.jpg", *words)
    assert status == 2
    assert err.startswith(f"visualize.py: {said}")


def write_other(folder: Path, *options: str) -> Path:
    """Write a checkpoint of another architecture."""
    config = load_config(write_config(folder), options)
    torch.save({"format": 1, "model": build_model(config).state_dict(), "config": config.dump()}, folder / "other.pth")
    return folder / "other.pth"


def test_networks_with_other_blocks_are_not_compared(tmp_path: Path) -> None:
    other = write_other(tmp_path, "MODEL.DAT.stage_spec", "[N, N, D, D]")
    words = (write_photograph(tmp_path / "one.png"), "--checkpoint", write_checkpoint(tmp_path), "--before", other)
    status, _, err = call(main, *words, "--output", tmp_path / "out")
    assert status == 2
    assert err == (
        "visualize.py: --before: the deformable blocks of other are stages.2.attns.0, stages.3.attns.0, those of best "
        "stages.1.attns.0, stages.2.attns.0, stages.3.attns.0; give a checkpoint of the same architecture\n"
    )


def test_heads_are_those_of_all_networks(tmp_path: Path) -> None:
    image, checkpoint, other = write_photograph(tmp_path / "one.png"), write_checkpoint(tmp_path), write_other(tmp_path)
    for pair in ((checkpoint, other), (other, checkpoint)):
        words = (image, "--checkpoint", pair[0], "--before", pair[1], "--output", tmp_path / "out")
        status, _, err = call(main, *words, "--heads", 3)
        assert (status, err) == (2, "visualize.py: --heads 3: the blocks have at most 2 heads\n")


@needs_browser
def test_the_page_follows_the_mouse(tmp_path: Path) -> None:
    images = [write_photograph(tmp_path / f"{name}.png", seed=seed) for seed, name in enumerate("ab")]
    printed_by(main, *images, "--checkpoint", write_checkpoint(tmp_path), "--before", "--output", tmp_path / "out")
    with Browser(tmp_path / "profile") as browser:
        browser.open(tmp_path / "out" / "index.html", ready="document.body.dataset.ready")

        def drawn() -> list[str]:
            return browser.evaluate("[...document.querySelectorAll('canvas.main')].map(c => c.toDataURL())")

        pictures = [drawn()]
        assert len(pictures[0]) == 2
        browser.mouse("canvas.main", 0.2, 0.3)
        pictures.append(drawn())
        assert "row 2 of 4, column 1 of 4" in browser.evaluate("document.querySelector('.said').textContent")
        for selector, value in (
            ("#block", "1"),
            ("#head", "3"),
            ("#group", "0"),
            ("#image", "1"),
            ("#mode", "importance"),
        ):
            browser.choose(selector, value)
            pictures.append(drawn())
        # The head of the second group gave way to the first group.
        assert browser.evaluate("document.querySelector('#head').value") == "-1"
        for before, after in pairwise(pictures):
            assert all(one != other for one, other in zip(before, after, strict=True))
        browser.choose("#mode", "query")
        browser.mouse("canvas.main", 0.8, 0.8, click=True)
        held = drawn()
        browser.mouse("canvas.main", 0.1, 0.1)
        assert drawn() == held
        assert browser.problems == []


def test_windows_of_a_vision_transformer_by_epochs(tmp_path: Path) -> None:
    vit = {"embed_dim": 8, "depth": 1, "num_heads": 2, "locality_reach": [0, 1], "locality_epochs": [2, 5]}
    for locality, seen in (("sequence", [1, 3, 16]), ("box", [1, 9, 16])):
        network = VisionTransformer(img_size=16, locality=locality, **vit)
        axes = draw_windows(network).axes
        assert [one.get_title() for one in axes[:3]] == [
            "epochs 1 to 2\nreach 0",
            "epochs 3 to 5\nreach 1",
            "from epoch 6 on\nall",
        ]
        assert [one.images[0].get_array().shape for one in axes[2:4]] == [(17, 17), (4, 4)]
        assert [int(one.images[0].get_array().sum()) for one in axes[3:]] == seen
    config = write_config(tmp_path, MODEL={"TYPE": "vit", "VIT": vit}, DATA={"IMG_SIZE": 16})
    words = ("--cfg", config, "--output", tmp_path / "out")
    assert ", random weights\n" in printed_by(main, *words, "--opts", "MODEL.VIT.locality", "box")
    assert (tmp_path / "out" / "windows.png").stat().st_size > 1000
    (tmp_path / "dat").mkdir()
    dat = ("--cfg", write_config(tmp_path / "dat"))
    for wrong, says in ((words, "has no windows"), (dat, "give images; without any, the windows of a Vision Trans")):
        status, _, err = call(main, *wrong)
        assert status == 2
        assert says in err
