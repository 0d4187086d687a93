"""Serve an exported network: upload an image, get the most probable classes. ONNX Runtime, FastAPI, no PyTorch.

    .venv/bin/python tools/export.py --checkpoint output/demo/digits/default/best.pth
    MODEL=output/export/digits.onnx .venv/bin/python -m uvicorn examples.serve:app
    curl -F image=@photo.jpg 'localhost:8000/predict?top=3'

Classes and preprocessing come from the metadata that tools/export.py writes into the file.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
from fastapi import FastAPI, HTTPException, Query, UploadFile
from PIL import Image, ImageOps


class Classifier:
    """A network in an ONNX file, with classes and preprocessing from its metadata."""

    def __init__(self, path: str | Path) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.about = {key: json.loads(value) for key, value in metadata.items()}
        if (task := self.about.get("task", "classification")) != "classification":
            raise ValueError(f"{path} is a network for {task}; this server takes classifiers")
        self.classes: list[str] = self.about["classes"]

    def read(self, content: bytes) -> Image.Image:
        """Return an image file as RGB; its EXIF orientation is applied if it was in training (DATA.EXIF)."""
        image = Image.open(io.BytesIO(content))
        if self.about.get("exif") == "apply":
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip
            image = Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8))
        return image.convert("RGB")

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Return an image as the network's input ``[1, 3, H, W]``, resized and normalised as in evaluation."""
        about = self.about
        height, width = about["size"]
        rows, columns = (int(side / about["crop_ratio"]) for side in (height, width))
        if about["resize"] == "shorter":
            scale = max(rows / image.height, columns / image.width)
            rows, columns = max(rows, round(image.height * scale)), max(columns, round(image.width * scale))
        image = image.resize((columns, rows), Image.Resampling[about["interpolation"].upper()])
        top, left = round((rows - height) / 2), round((columns - width) / 2)
        pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
        normalised = (pixels - np.float32(about["mean"])) / np.float32(about["std"])
        return np.ascontiguousarray(normalised.transpose(2, 0, 1)[None])

    def __call__(self, image: Image.Image, top: int) -> list[dict[str, str | float]]:
        """Return the most probable classes of an RGB image with their probabilities."""
        (logits,) = self.session.run(None, {"images": self.prepare(image)})[0]
        if self.about.get("multi_label"):  # each class has a probability of its own
            shares = np.exp(-np.logaddexp(0, -logits))
        else:
            shares = np.exp(logits - logits.max())
            shares /= shares.sum()
        return [
            {"class": self.classes[label], "probability": float(shares[label])} for label in np.argsort(-shares)[:top]
        ]


def build_app(path: str | Path) -> FastAPI:
    """Return the application that serves an ONNX file of tools/export.py."""
    app, classify = FastAPI(title="Image classification"), Classifier(path)

    @app.get("/health")
    def health() -> dict[str, str | int]:
        return {"status": "ok", "classes": len(classify.classes)}

    @app.post("/predict")
    def predict(image: UploadFile, top: Annotated[int, Query(ge=1)] = 5) -> list[dict[str, str | float]]:
        try:
            picture = classify.read(image.file.read())
        except Exception as error:  # decoders can raise any exception on damaged files
            reason = str(error).partition(" <")[0]  # without the object in memory that Pillow names
            raise HTTPException(415, f"{image.filename} is not a readable image: {reason}") from None
        return classify(picture, top)

    return app


def __getattr__(name: str) -> FastAPI:
    """Build ``app`` when a server imports it, from the file named by the variable MODEL."""
    if name != "app":
        raise AttributeError(name)
    if not Path(path := os.environ.get("MODEL", "")).is_file():
        raise SystemExit(f"serve.py: the variable MODEL must name an ONNX file of tools/export.py, not {path!r}")
    return build_app(path)
