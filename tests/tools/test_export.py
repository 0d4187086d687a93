"""Exported files have the output of the network; a difference is an error."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import timm
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor
from torch._inductor.exc import InductorError, InvalidCxxCompiler

from config import load_config
from data.images import read_image
from examples import serve
from examples.serve import Classifier, build_app
from models.vit import ATTENTIONS
from tasks import Task
from tasks.classification import Classification
from tasks.segmentation import Segmentation
from tests.data.segmentation.samples import write_masks
from tests.runs import call, write_config
from tests.tools.samples import CLASSES, write_checkpoint, write_photograph
from tools import export, exported
from tools.export import Difference, Exported, compare
from tools.exported import FORMATS, Source, run_onnx
from training.trained_model import load_trained, untrained

# Detectors whose graph holds for any number of images.
QUERIES = (
    *("detr", "conditional_detr", "dab_detr", "dino", "co_detr"),
    *("deformable_detr", "deformable_detr_refined", "deformable_detr_two_stage"),
)
CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = ("--cfg", str(CONFIGS / "digits.yaml"))


@pytest.mark.slow
def test_files_of_a_checkpoint_equal_the_network_and_are_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = write_checkpoint(tmp_path)
    formats = ("onnx", "onnx-fp16", "onnx-int8", "pt2", "safetensors")
    status, out, _ = call(export.main, "--checkpoint", checkpoint, "--output", tmp_path, "--formats", *formats)
    assert (status, out.count("largest difference")) == (0, len(formats))
    assert "pre-processing" not in caplog.text
    modes = {(tmp_path / "tiny" / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1  # whoever may read the one may read the other
    stored = json.loads((tmp_path / "tiny" / "config.json").read_text())["pretrained_cfg"]
    assert (stored["mean"], stored["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    model, path = load_trained(checkpoint), tmp_path / "tiny.onnx"
    assert not any(node.metadata_props for node in onnx.load(path).graph.node)  # no paths of this machine
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    saved = path.stat().st_size - (tmp_path / "tiny.fp16.onnx").stat().st_size
    assert saved > 0.9 * 2 * parameters  # two of the four bytes of each
    assert timm.create_model(f"local-dir:{tmp_path / 'tiny'}", pretrained=True).num_classes == 10

    photograph = write_photograph(tmp_path / "photo.png")
    image = model.read(photograph)
    expected = model.transform()(image)[None]
    np.testing.assert_allclose(Classifier(path).prepare(image), expected.numpy(), atol=1e-5)
    client = TestClient(build_app(path))
    assert client.get("/health").json() == {"status": "ok", "classes": 10}
    with torch.inference_mode():
        best = model.network(expected).softmax(1)[0].max(0)
    (answer,) = client.post("/predict?top=1", files={"image": photograph.read_bytes()}).json()
    assert answer["class"] == CLASSES[best.indices]
    assert answer["probability"] == pytest.approx(best.values.item(), abs=1e-5)
    refused = client.post("/predict", files={"image": ("notes.txt", b"no image")})
    assert refused.status_code == 415
    assert refused.json()["detail"] == "notes.txt is not a readable image: cannot identify image file"


@pytest.mark.parametrize("path", ["", "nowhere.onnx"])
def test_a_server_without_a_file_says_what_is_missing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", path)
    with pytest.raises(SystemExit, match=rf"MODEL must name an ONNX file of tools/export.py, not '{path}'"):
        _ = serve.app


def classifier(monkeypatch: pytest.MonkeyPatch, exif: str = "ignore") -> Classifier:
    """Return the server's classifier with the metadata of a network, which cannot predict."""
    model = untrained(load_config(CONFIGS / "digits.yaml", ["DATA.EXIF", exif]))
    metadata = {key: json.dumps(value) for key, value in Source(model, (32, 32)).metadata().items()}
    session = SimpleNamespace(get_modelmeta=lambda: SimpleNamespace(custom_metadata_map=metadata))
    monkeypatch.setattr(serve.onnxruntime, "InferenceSession", lambda *_, **__: session)
    return Classifier("file.onnx")


def test_the_server_gives_several_labels_their_own_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    served = classifier(monkeypatch)
    served.session.run = lambda *_: [np.array([[0.0, 2.0, -200.0, *[-3.0] * 7]], np.float32)]
    image = Image.new("RGB", (32, 32))
    assert sum(one["probability"] for one in served(image, 10)) == pytest.approx(1)
    served.about["multi_label"] = True
    assert [one["probability"] for one in served(image, 2)] == pytest.approx([0.8808, 0.5], abs=1e-4)


def test_metadata_have_the_task_and_crops_of_classifiers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = untrained(load_config(CONFIGS / "digits.yaml"))
    about = Source(model, (32, 32)).metadata()
    assert (about["task"], about["multi_label"], "crop_ratio" in about) == ("classification", False, True)
    model.config.TASK = "segmentation"
    about = Source(model, (32, 32)).metadata()
    assert (about["task"], "crop_ratio" in about, "resize" in about) == ("segmentation", False, False)


def test_safetensors_have_the_normalisation_of_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def save(network: object, path: Path, **given: dict) -> None:
        stored.update(given["data_config"])
        for name in ("config.json", "model.safetensors"):
            (path / name).touch()

    stored: dict[str, object] = {}
    monkeypatch.setattr(exported, "save_for_hf", save)
    FORMATS["safetensors"].write(Source(untrained(load_config(CONFIGS / "digits.yaml")), (32, 32)), tmp_path)
    assert (stored["mean"], stored["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_validation_refuses_images_of_other_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_trained(write_checkpoint(tmp_path, classes=CLASSES[::-1]))
    task = SimpleNamespace(classes=CLASSES)
    monkeypatch.setattr(export, "build_task", lambda *_, **__: task)
    with pytest.raises(ValueError, match=r"the classes of the data .* are not those of .*best\.pth"):
        export._held_out(Source(model, (32, 32)), None)


@pytest.mark.parametrize(("exif", "size"), [("ignore", (60, 40)), ("apply", (40, 60))])
def test_the_server_turns_photographs_as_in_training(
    exif: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, orientation = io.BytesIO(), Image.Exif()
    orientation[0x0112] = 6  # a quarter turn
    Image.new("RGB", (60, 40)).save(content, "jpeg", exif=orientation)
    assert classifier(monkeypatch, exif).read(content.getvalue()).size == size


def test_the_server_reads_16_bits_of_grey_as_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grey.png"
    Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)).save(path)
    served = classifier(monkeypatch).read(path.read_bytes())
    assert np.array_equal(np.asarray(served), np.asarray(read_image(path)))


def test_a_file_that_differs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = FORMATS["pt2"]._replace(
        write=lambda _, path: path.touch(), load=lambda _: lambda images: images[:, 0, :10, 0]
    )
    monkeypatch.setitem(export.FORMATS, "pt2", other)
    words = ("--checkpoint", write_checkpoint(tmp_path), "--output", tmp_path, "--formats", "pt2")
    status, out, _ = call(export.main, *words)
    assert status == 1
    assert "MISMATCH" in out
    assert not Difference(float("nan"), 1.0).within(1e-4)


@pytest.mark.parametrize(
    ("task", "scores", "flags", "status", "said"),
    [
        (Classification, (90.0, 89.4), (), 1, "score 89.40 % (the network: 90.00 %)"),
        (Classification, (90.0, 89.6), (), 0, "score 89.60 % (the network: 90.00 %)"),
        (Classification, (90.0, 89.6), ("--max-drop", 0.3), 1, "score 89.60 %"),
        (Segmentation, (0.92, 0.45), (), 1, "score 0.450 (the network: 0.920)"),
        (Segmentation, (0.92, 0.916), (), 0, "score 0.916 (the network: 0.920)"),
    ],
)
def test_a_score_that_falls_is_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: type[Task],
    scores: tuple[float, float],
    flags: tuple,
    status: int,
    said: str,
) -> None:
    write_exact(monkeypatch)
    results = iter(scores)
    monkeypatch.setattr(export, "_held_out", lambda *_: SimpleNamespace(score=task.score))
    monkeypatch.setattr(export, "_evaluate", lambda *_: next(results))
    words = ("--checkpoint", write_checkpoint(tmp_path), "--output", tmp_path, "--formats", "pt2", "--validate")
    ended, out, _ = call(export.main, *words, *flags)
    assert ended == status
    assert said in out


def write_exact(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int] | None = None) -> None:
    """Replace pt2 by files that are the network itself, optionally for images of one height and width."""

    def load(_: Path) -> Callable[[Tensor], Tensor]:
        def network(images: Tensor) -> Tensor:
            assert size in (None, tuple(images.shape[-2:]))
            return networks[-1](images)

        return network

    networks: list[torch.nn.Module] = []
    kind = FORMATS["pt2"]._replace(
        write=lambda source, path: path.touch() or networks.append(source.network), load=load
    )
    monkeypatch.setitem(export.FORMATS, "pt2", kind)


def segmenter(folder: Path, *, images: int = 2, **sections: object) -> tuple[object, ...]:
    """Return arguments that export and validate a segmenter of images of 32 x 32 pixels."""
    root = write_masks(folder / "data", val=images)  # the first is 48 x 40 pixels
    data = {"DATASET": "masks", "DATA_PATH": str(root), "IMG_SIZE": 32, "BATCH_SIZE": 2, "NUM_WORKERS": 0}
    config = write_config(folder, TASK="segmentation", DATA=data, MODEL={"DAT": {"num_classes": 3}}, **sections)
    return "--cfg", config, "--output", folder, "--formats", "pt2", "--validate"


def test_a_segmenter_is_validated_over_mirrored_images_and_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_exact(monkeypatch)
    words = segmenter(tmp_path, TEST={"FLIP": True}, SEGMENTATION={"TEST_SCALES": [1.0, 1.5]})
    status, out, _ = call(export.main, *words, "--dynamic-size")
    assert status == 0
    found = re.search(r"score (0\.\d{3}) \(the network: (0\.\d{3})\)", out)
    assert found[1] == found[2]


def test_validation_refuses_images_of_other_sizes_than_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_exact(monkeypatch, (32, 32))
    status, _, err = call(export.main, *segmenter(tmp_path))
    assert status == 2
    says = "become 32 x 38 pixels (height x width), but the file has a fixed size of 32 x 32; add --dynamic-size"
    assert says in err


def test_validation_of_a_segmenter_whose_images_have_the_size_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_exact(monkeypatch, (40, 48))
    status, *_ = call(export.main, *segmenter(tmp_path, images=1), "--size", 40, 48)
    assert status == 0


def test_a_program_of_torch_export_can_be_evaluated() -> None:
    source = Source(untrained(load_config(CONFIGS / "digits.yaml")), (2, 3))
    program = torch.export.export(torch.nn.Flatten(), (torch.ones(2, 3, 2, 3),)).module()
    assert Exported(program, source).eval()(torch.ones(2, 3, 2, 3)).shape == (2, 18)
    source.dynamic = True
    with pytest.raises(ValueError, match=r"become 2 x 4 pixels .* but the file does not take them; leave --validate"):
        Exported(program, source)(torch.ones(2, 3, 2, 4))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give --checkpoint FILE, or --cfg FILE for a network with random weights"),
        ([*DIGITS, "--weights", "raw"], "--weights chooses a set of weights of a --checkpoint, and there is none"),
        ([*DIGITS, "--data-path", "photos"], "--data-path is for --validate; add it, or leave --data-path out"),
        ([*DIGITS, "--max-drop", "0"], "--max-drop is for --validate; add it, or leave --max-drop out"),
        (
            [*DIGITS, "--opset", "18", "--formats", "pt2", "safetensors"],
            "--opset is for ONNX files; leave it out, or add one of --formats onnx, onnx-fp16, onnx-int8",
        ),
        ([*DIGITS, "--size", "1", "2", "3"], "--size 1 2 3 must be one side, or height"),
    ],
)
def test_wrong_input_is_reported(words: list[str], says: str) -> None:
    status, _, err = call(export.main, *words)
    assert status == 2
    assert says in err


def test_size_that_cannot_be_dynamic_is_rejected() -> None:
    model = untrained(load_config(CONFIGS / "compare" / "digits.yaml", ["MODEL.VIT.depth", "1"]))
    with pytest.raises(ValueError, match="depends on the size of the images"):
        _ = Source(model, (24, 24), dynamic=True).program


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 48])
def test_dynamic_sizes_start_where_no_window_is_padded(size: int) -> None:
    source = Source(untrained(load_config(CONFIGS / "digits.yaml")), (size, size), dynamic=True)
    if size == 48:  # the window of 3 times the stride of 16
        assert source.program
        return
    with pytest.raises(ValueError, match=r"digits depends on .*; export from a larger --size"):
        _ = source.program


def test_a_missing_compiler_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_program(*_: object, **__: object) -> None:
        raise InductorError(InvalidCxxCompiler(), None)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_program)
    with pytest.raises(ValueError, match=r"aoti needs a C\+\+ compiler, and none works; install g\+\+"):
        FORMATS["aoti"].write(SimpleNamespace(program=None), tmp_path / "x.pt2")


class OfTwoImages(torch.nn.Module):
    """A network whose graph holds for two images only."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :10] + torch.arange(2.0)[:, None]


def test_a_graph_of_one_number_of_images_is_refused() -> None:
    model = dataclasses.replace(untrained(load_config(CONFIGS / "digits.yaml")), network=OfTwoImages())
    with pytest.raises(ValueError, match="digits cannot be exported for any number of images: "):
        _ = Source(model, (32, 32)).program


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn", "cascade"])
def test_detectors_with_non_maximum_suppression_are_rejected(name: str) -> None:
    model = untrained(load_config(CONFIGS / "detection" / f"digits_{name}.yaml"))
    with pytest.raises(ValueError, match=f"{name} selects its boxes by non-maximum suppression"):
        _ = Source(model, (64, 64)).network


def test_detectors_need_a_size_without_padding() -> None:
    model = untrained(load_config(CONFIGS / "detection" / "digits_dino.yaml"))
    with pytest.raises(ValueError, match="the detector is exported without padding; choose sides that 32 divides"):
        _ = Source(model, (64, 80)).network


def check_onnx(source: Source, path: Path) -> None:
    FORMATS["onnx"].write(source, path)
    assert compare(source.network, run_onnx(path), source.sizes()).largest < 1e-4


class Head(torch.nn.Module):
    """A network that is exported within a second."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.mean((2, 3)))


def test_an_opset_is_reached_or_refused() -> None:
    model = dataclasses.replace(untrained(load_config(CONFIGS / "digits.yaml")), network=Head().eval())
    (version,) = (one.version for one in Source(model, (4, 4), opset=20).onnx.opset_import if not one.domain)
    assert version == 20
    with pytest.raises(ValueError, match=r"--opset 5: PyTorch exports this network with opset \d+, which could not be"):
        _ = Source(model, (4, 4), opset=5).onnx


def test_the_tiny_network_becomes_a_program_and_onnx(tmp_path: Path) -> None:
    source = Source(load_trained(write_checkpoint(tmp_path)), (32, 32))
    for name in ("pt2", "onnx"):
        FORMATS[name].write(source, tmp_path / name)
        assert compare(source.network, FORMATS[name].load(tmp_path / name), source.sizes()).largest < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_vision_transformer_becomes_onnx(attention: str, tmp_path: Path) -> None:
    options = ["MODEL.VIT.attention", attention, "MODEL.VIT.depth", "2"]
    check_onnx(Source(untrained(load_config(CONFIGS / "compare" / "digits.yaml", options)), (24, 24)), tmp_path / "x")


@pytest.mark.slow
def test_a_network_of_timm_becomes_onnx(tmp_path: Path) -> None:
    options = ["MODEL.TYPE", "timm", "MODEL.TIMM.NAME", "test_vit"]
    model = untrained(load_config(CONFIGS / "dat_tiny.yaml", options))
    check_onnx(Source(model, (160, 160)), tmp_path / "x")


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 288])
def test_dat_tiny_in_onnx_runtime(size: int, tmp_path: Path) -> None:
    check_onnx(Source(untrained(load_config(CONFIGS / "dat_tiny.yaml")), (size, size)), tmp_path / "x")


@pytest.mark.slow
def test_dynamic_sizes(tmp_path: Path) -> None:
    model = untrained(load_config(CONFIGS / "digits.yaml"))
    check_onnx(Source(model, (64, 64), dynamic=True), tmp_path / "x.onnx")
    described = {entry.key: entry.value for entry in onnx.load(tmp_path / "x.onnx").metadata_props}
    assert json.loads(described["classes"]) == model.classes


@pytest.mark.slow
def test_a_compiled_package(tmp_path: Path) -> None:
    model = load_trained(write_checkpoint(tmp_path))
    source, kind = Source(model, (32, 32)), FORMATS["aoti"]
    kind.write(source, tmp_path / "x.aoti.pt2")
    assert compare(model.network, kind.load(tmp_path / "x.aoti.pt2"), source.sizes()).within(kind.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["fpn", "upernet", "mask2former"])
def test_segmenters_become_onnx(head: str, tmp_path: Path) -> None:
    torch.manual_seed(0)  # Mask2Former attends where a mask exceeds 0.5: rounding errors matter for few random weights
    config = load_config(CONFIGS / "segmentation" / f"digits_{head}.yaml")
    check_onnx(Source(untrained(config), (64, 64)), tmp_path / "x")


@pytest.mark.slow
@pytest.mark.parametrize("name", QUERIES)
def test_detectors_with_queries_become_onnx(name: str, tmp_path: Path) -> None:
    file = CONFIGS / "detection" / f"digits_{name.removesuffix('_two_stage').removesuffix('_refined')}.yaml"
    model = untrained(load_config(file, ["MODEL.DETECTOR.NAME", name]))
    check_onnx(Source(model, (128, 128)), tmp_path / "x")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rt_detr", "d_fine"])
def test_detectors_whose_graph_has_a_fixed_batch_are_rejected(name: str) -> None:
    model = untrained(load_config(CONFIGS / "detection" / f"digits_{name}.yaml"))
    with pytest.raises(ValueError, match=f"digits_{name} cannot be exported for any number of images"):
        _ = Source(model, (64, 64)).program
