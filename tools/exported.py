"""Export formats: how each is written and run."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import NamedTuple

import onnx
import onnxruntime
import onnxscript.optimizer
import timm
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch._inductor.exc import InductorError, InvalidCxxCompiler
from torch.export import Dim, ExportedProgram

from models.attention import MSDeformAttn
from models.detection.backbone_adapter import Sampling
from models.detection.set_prediction import AllQueries, SetDetector
from training.trained_model import TrainedModel

# From normalised images ``[B, 3, H, W]`` to logits ``[B, classes]``, or of a detector to boxes and probabilities
# ``[B, Q, 4 + classes]``; float32 both.
Run = Callable[[Tensor], Tensor]
INPUT, OUTPUT = "images", "logits"


class Source:
    """A network to export; intermediate results shared by formats are computed once.

    Args:
        model: the network with its config and classes.
        size: height and width of the images in pixels.
        dynamic: whether the exported network also takes other sizes; the batch size is always dynamic.
        opset: version of the operators of ONNX; None for PyTorch's default.
    """

    def __init__(
        self, model: TrainedModel, size: tuple[int, int], *, dynamic: bool = False, opset: int | None = None
    ) -> None:
        self.model, self.size, self.dynamic, self.opset = model, size, dynamic, opset

    @cached_property
    def network(self) -> nn.Module:
        """The exported module: the network, or for a detector the predictions of all queries.

        Raises:
            ValueError: the detector needs non-maximum suppression, or images of this size would need padding.
        """
        network = self.model.network
        if self.model.config.TASK != "detection":
            return network
        if not isinstance(network, SetDetector):
            raise ValueError(
                f"{self.model.config.MODEL.DETECTOR.NAME} selects its boxes by non-maximum suppression, which cannot "
                "be exported; export a detector with queries, such as dino"
            )
        if any(side % network.divisor for side in self.size):
            height, width = self.size
            raise ValueError(
                f"--size {height} {width} (height and width): the detector is exported without padding; choose sides "
                f"that {network.divisor} divides"
            )
        return AllQueries(network)

    @cached_property
    def program(self) -> ExportedProgram:
        """The graph of the network, with PyTorch's own operators only.

        Raises:
            ValueError: the graph depends on the number of images, or on their size although that is dynamic.
        """
        network = copy.deepcopy(self.network)
        for module in network.modules():
            if isinstance(module, (MSDeformAttn, Sampling)):
                module.form = "reference"  # a file with a custom operator could only be loaded with this code
        free = {0: Dim("batch"), **dict.fromkeys((2, 3) if self.dynamic else (), Dim.DYNAMIC)}
        try:
            with torch.no_grad():
                program = torch.export.export(network, (torch.randn(2, 3, *self.size),), dynamic_shapes=(free,))
                for size in self.sizes():  # the guards of the graph may reject a size
                    program.module()(torch.randn(1, 3, *size))
        except (RuntimeError, AssertionError, TypeError, ValueError, UserError) as error:
            name, reason = self.model.config.MODEL.NAME, str(error).splitlines()[0]
            if not self.dynamic:
                raise ValueError(f"{name} cannot be exported for any number of images: {reason}") from error
            raise ValueError(
                f"--dynamic-size: the graph of {name} depends on the size of the images "
                f"({shorten(reason, 100, placeholder='...')}); export from a larger --size, or one file per --size"
            ) from error
        return program

    def sizes(self) -> list[tuple[int, int]]:
        """Return heights and widths of images for testing the exported network."""
        height, width = self.size
        return [self.size, (height + 64, width + 32), (2 * height, 2 * width)] if self.dynamic else [self.size]

    @cached_property
    def onnx(self) -> onnx.ModelProto:
        """The ONNX graph, with classes and preprocessing in its metadata.

        Raises:
            ValueError: it cannot be of the wanted opset.
        """
        names = {0: "batch", **({2: "height", 3: "width"} if self.dynamic else {})}
        with torch.no_grad():
            exported = torch.onnx.export(
                self.program,
                dynamo=True,
                dynamic_shapes=(names,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=self.opset,
                verbose=False,
                optimize=False,  # onnxscript's rewriting takes minutes on graphs of this size; runtimes have their own
            )
        onnxscript.optimizer.fold_constants(exported.model)
        onnxscript.optimizer.remove_unused_nodes(exported.model)
        proto = exported.model_proto
        (opset,) = (one.version for one in proto.opset_import if not one.domain)
        if self.opset not in (None, opset):
            raise ValueError(
                f"--opset {self.opset}: PyTorch exports this network with opset {opset}, which could not be converted; "
                f"use --opset {opset}, or leave it out"
            )
        for part in (proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
            part.ClearField("metadata_props")  # source locations of the operators: as large as the weights
        onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in self.metadata().items()})
        return proto

    def metadata(self) -> dict[str, object]:
        """Return preprocessing and class names."""
        config = self.model.config
        # Detectors and segmenters resize whole images, each by its own rule.
        cropped = {
            "interpolation": config.DATA.INTERPOLATION,
            "crop_ratio": config.TEST.CROP_RATIO if config.TEST.CROP else 1.0,
            "resize": config.TEST.RESIZE,
        }
        return {
            "task": config.TASK,
            "classes": self.model.classes,
            "multi_label": config.DATA.MULTI_LABEL,
            "size": self.size,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "exif": config.DATA.EXIF,
            **(cropped if config.TASK == "classification" else {}),
        }


class Format(NamedTuple):
    """An export format.

    Attributes:
        ending: the ending of the file's name.
        write: writes a network to a path.
        load: returns what runs the file.
        tolerance: largest difference from the logits of the network, if these are at most 1.
    """

    ending: str
    write: Callable[[Source, Path], object]
    load: Callable[[Path], Run]
    tolerance: float


def _write_onnx(source: Source, path: Path) -> None:
    onnx.save(source.onnx, path)


def _write_half(source: Source, path: Path) -> None:
    """Store weights and compute in float16; images and logits stay float32."""
    onnx.save(convert_float_to_float16(source.onnx, keep_io_types=True), path)


def _write_int8(source: Source, path: Path) -> None:
    """Store weights of linear layers in 8 bits, one scale per column; their inputs are quantized dynamically."""
    with TemporaryDirectory() as folder:
        plain, folded = Path(folder, "plain.onnx"), Path(folder, "folded.onnx")
        onnx.save(source.onnx, plain)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)  # with transposed weights as constants
        onnxruntime.InferenceSession(plain, options, providers=["CPUExecutionProvider"])
        kinds = {"weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul", "Gemm"]}
        logging.disable(logging.WARNING)  # it advises to fold constants first, as done above
        try:
            quantize_dynamic(folded, path, per_channel=True, **kinds)
        finally:
            logging.disable(logging.NOTSET)


def run_onnx(path: Path) -> Run:
    """Return a function that runs an ONNX file on the CPU."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _write_aoti(source: Source, path: Path) -> None:
    try:
        torch._inductor.aoti_compile_and_package(source.program, package_path=str(path))
    except InductorError as error:
        if not isinstance(error.inner_exception, InvalidCxxCompiler):
            raise
        raise ValueError("aoti needs a C++ compiler, and none works; install g++, or name one in CXX") from error


def _write_safetensors(source: Source, path: Path) -> None:
    config = source.model.config
    if config.TASK in ("detection", "segmentation"):
        raise ValueError(f"safetensors: timm has no networks for TASK {config.TASK}; choose another format")
    if config.MODEL.TYPE not in ("dat", "timm"):
        raise ValueError(f"safetensors: timm has no name for MODEL.TYPE {config.MODEL.TYPE}; export dat or timm")
    is_dat = config.MODEL.TYPE == "dat"
    # Any registered name works: the options of the network are stored with it.
    name, options = ("dat_tiny", config.MODEL.DAT) if is_dat else (config.MODEL.TIMM.NAME, config.MODEL.TIMM.ARGS)
    network = timm.create_model(name, **options)
    network.load_state_dict(source.model.network.state_dict())
    preprocessing = {
        "input_size": (3, *source.size),
        "mean": IMAGENET_DEFAULT_MEAN,  # timm's default is that of the architecture
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": config.DATA.INTERPOLATION,
        "crop_pct": config.TEST.CROP_RATIO if config.TEST.CROP else 1.0,
        "crop_mode": "squash" if config.TEST.RESIZE == "squash" else "center",
    }
    labels = {"label_names": source.model.classes}
    save_for_hf(network, path, model_config=labels, safe_serialization=True, data_config=preprocessing)
    # safetensors writes a file for its owner alone; the server that reads it may be another user.
    (path / "model.safetensors").chmod((path / "config.json").stat().st_mode)


def _run_safetensors(path: Path) -> Run:
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


FORMATS = {
    "onnx": Format(".onnx", _write_onnx, run_onnx, 1e-4),
    "onnx-fp16": Format(".fp16.onnx", _write_half, run_onnx, 2e-2),
    "onnx-int8": Format(".int8.onnx", _write_int8, run_onnx, 2e-1),
    "pt2": Format(
        ".pt2",
        lambda source, path: torch.export.save(source.program, path),
        lambda path: torch.export.load(path).module(),
        1e-4,
    ),
    "safetensors": Format("", _write_safetensors, _run_safetensors, 1e-4),
    "aoti": Format(".aoti.pt2", _write_aoti, lambda path: torch._inductor.aoti_load_package(str(path)), 1e-4),
}
ONNX_FORMATS = tuple(name for name, kind in FORMATS.items() if kind.load is run_onnx)
