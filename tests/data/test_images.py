"""All kinds of image files."""

from __future__ import annotations

import errno
import io
import os
import pickle
import resource
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from data.images import StoredImage, UnreadableImage, read_image
from tests.data.samples import photograph

GREY_16 = np.linspace(0, 65535, 48 * 36).reshape(36, 48).astype(np.uint16)


def png(width: int, height: int, pixels: bytes = b"", bits: int = 8) -> bytes:
    """Return an RGB PNG that claims the size; `pixels` are its rows, each behind a byte 0."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def pixels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_rgb_is_read_as_pillow_reads_it(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.webp", "a.bmp"):
        photograph().save(tmp_path / name)
        with Image.open(tmp_path / name) as expected:
            assert np.array_equal(pixels(tmp_path / name), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P"])
def test_modes_with_the_same_colours(tmp_path: Path, mode: str) -> None:
    image = photograph().convert(mode)
    image.save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


def test_transparent_palette(tmp_path: Path) -> None:
    image = photograph().convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    red, green, blue = pixels(tmp_path / "red.jpg")[4, 4]
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "32bit.tif"])
def test_16_bits_are_scaled(tmp_path: Path, name: str) -> None:
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5\n48 36\n65535\n" + GREY_16.astype(">u2").tobytes())
    else:
        Image.fromarray(GREY_16.astype(np.int32) if name == "32bit.tif" else GREY_16).save(tmp_path / name)
    expected = np.repeat((GREY_16 / 257)[..., None], 3, axis=2)
    assert np.abs(pixels(tmp_path / name) - expected).max() <= 0.5


def test_16_bits_of_colour_are_scaled(tmp_path: Path) -> None:
    rows = np.repeat(GREY_16[..., None], 3, axis=2).astype(">u2").reshape(36, -1)
    (tmp_path / "a.png").write_bytes(png(48, 36, b"".join(b"\0" + row.tobytes() for row in rows), bits=16))
    assert np.abs(pixels(tmp_path / "a.png") - (GREY_16 / 257)[..., None]).max() <= 1


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_animations_show_their_first_frame(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(tmp_path / name) - (255, 0, 0)).max() <= 3


def test_damaged_metadata_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description of some length"
    photograph().save(tmp_path / "a.jpg", exif=exif.tobytes()[:-20])
    with pytest.warns(UserWarning, match="Truncated|EXIF"), Image.open(tmp_path / "a.jpg") as image:
        image.getexif()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(tmp_path / "a.jpg").shape == (36, 48, 3)


def encoded(orientation: int | None, kind: str = "JPEG") -> bytes:
    """Return a photograph of 201 x 133 stored pixels as a file with an EXIF orientation."""
    exif, content = Image.Exif(), io.BytesIO()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    photograph(width=201, height=133).save(content, kind, exif=exif)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [None, *range(10)])
def test_orientation_is_applied_as_pillow_applies_it(kind: str, orientation: int | None) -> None:
    content = encoded(orientation, kind)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    stored = StoredImage(content, "a", exif=True)
    assert np.array_equal(np.asarray(stored.decode()), expected)
    assert stored.size() == expected.shape[:2]
    part = stored.crop(10, 20, 30, 40, at_least=(99, 99))
    assert np.array_equal(part, expected[10:40, 20:60])
    assert np.array_equal(torch.from_numpy(part), part)


@pytest.mark.parametrize("orientation", [None, 1, 6])
def test_orientation_leaves_jpeg_to_the_fast_decoder(monkeypatch: pytest.MonkeyPatch, orientation: int | None) -> None:
    stored = StoredImage(encoded(orientation), "a", exif=True)
    whole = np.asarray(stored.decode().resize([side // 4 for side in stored.decode().size]), dtype=int)
    monkeypatch.setattr(StoredImage, "decode", lambda self: pytest.fail("decoded by Pillow"))
    height, width = stored.size()
    assert (height > width) == (orientation == 6)
    quarter = stored.crop(0, 0, height, width, at_least=(height // 4, width // 4))
    assert quarter.shape[:2] == (-(-height // 4), -(-width // 4))
    assert np.abs(quarter[: height // 4, : width // 4] - whole).mean() < 8


def test_orientation_beside_damaged_metadata() -> None:
    damaged = (0x0112, 3, 1, 6), (0x0100, 2, 2, 0x4142)  # turned, and a width that is text
    entries = b"".join(struct.pack("<HHII", *entry) for entry in damaged)
    content = io.BytesIO()
    photograph().save(content, "JPEG", exif=b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4))
    assert StoredImage(content.getvalue(), "a", exif=True).decode().size == (36, 48)


def write_bad(folder: Path, kind: str) -> Path:
    """Write an unreadable file of a kind, with its reason below in `REASONS`, and return its path."""
    path = folder / "bad.jpg"
    for suffix in ("jpg", "png"):
        photograph().save(folder / f"good.{suffix}")
    jpeg, whole_png = ((folder / f"good.{suffix}").read_bytes() for suffix in ("jpg", "png"))
    if kind == "dangling link":
        path.symlink_to(folder / "nowhere.jpg")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("float", "32 bits"):
        Image.fromarray(GREY_16.astype(np.float32) if kind == "float" else GREY_16 * np.int32(9)).save(path, "TIFF")
    elif kind != "vanished":
        path.write_bytes(
            {
                "empty": b"",
                "text": b"<html>404 not found</html>",
                "truncated jpeg": jpeg[:-50],
                "truncated png": whole_png[: len(whole_png) // 2],
                "header only": jpeg[:100],
                "no pixels": png(48, 36),
                "bomb": png(20000, 20000),
                "zero-sized": png(0, 36),
                "zero-sized ppm": b"P6\n0 5\n255\n",
            }[kind]
        )
    return path


REASONS = {
    "empty": "cannot identify image file",
    "text": "cannot identify image file",
    "truncated jpeg": "truncated",
    "truncated png": "truncated",
    "header only": "",
    "no pixels": "truncated",
    "bomb": "decompression bomb",
    "zero-sized": "cannot identify image file",
    "zero-sized ppm": "cannot identify image file",
    "float": "floating-point pixels have no known range",
    "32 bits": "grey values from 0 to 589815 do not fit 16 bits",
    "dangling link": "No such file or directory",
    "link to itself": "Too many levels of symbolic links",
    "vanished": "No such file or directory",
    "folder": "Is a directory",
}


@pytest.mark.parametrize("kind", REASONS)
def test_unreadable_files_are_named_in_one_line(tmp_path: Path, kind: str) -> None:
    path = write_bad(tmp_path, kind)
    with pytest.raises(UnreadableImage) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"cannot read image '{path}': ")
    assert REASONS[kind] in message
    assert message.count(str(path)) == 1
    assert "\n" not in message
    assert caught.value.path == str(path)


def test_forbidden_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root, as in containers, can read every file
    with pytest.raises(UnreadableImage, match=r"^cannot read image 'a\.jpg': Permission denied$"):
        read_image("a.jpg")


@pytest.mark.parametrize("name", ["EMFILE", "ENFILE", "ENOMEM", "EIO", "ESTALE", "ETIMEDOUT"])
def test_machine_errors_are_not_blamed_on_the_file(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    number = getattr(errno, name)

    def fail(path: str) -> None:
        raise OSError(number, os.strerror(number))  # as reading says it; opening would name the file

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match=rf"^\[Errno {number}\] {os.strerror(number)}: 'a\.jpg'$") as caught:
        read_image("a.jpg")
    assert caught.value.errno == number


def test_no_descriptors_left(tmp_path: Path) -> None:
    photograph().save(tmp_path / "a.jpg")
    read_image(tmp_path / "a.jpg")  # Pillow imports its decoders when it first reads
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match=f"Too many open files: '{tmp_path / 'a.jpg'}'"):
            read_image(tmp_path / "a.jpg")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_memory_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise MemoryError

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(MemoryError, match=r"^no memory left to read image 'a\.jpg'$"):
        read_image("a.jpg")


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("cannot read image 'a.jpg': truncated", "a.jpg")))
    assert (str(error), error.path) == ("cannot read image 'a.jpg': truncated", "a.jpg")
