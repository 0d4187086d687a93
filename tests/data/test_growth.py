"""Memory of a loader over ten thousand images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.data.formats.writers import WRITERS
from tests.data.samples import build_train_loader, small_config, write_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of processes in /proc"),
]
IMAGES, EPOCHS = 500, 21  # the first epoch warms up


def private_bytes() -> int:
    """Return the resident memory of this process that it shares with no file."""
    _, resident, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kind", ["folders", "shards"])
def test_ten_thousand_images_leave_no_more_memory_than_five_hundred(kind: str, tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos", {"train/cat": IMAGES // 2, "train/dog": IMAGES // 2, "val/cat": 1})
    name, root = "imagenet", photos
    if kind != "folders":
        name, write = WRITERS[kind]
        root = write(photos, tmp_path / kind)
    config = small_config(root, DATASET=name, BATCH_SIZE=50)
    loader = build_train_loader(config, rank=0, world_size=1)
    held = []
    for epoch in range(EPOCHS):
        loader.sampler.set_position(epoch)
        assert sum(len(batch.images) for batch in loader) == IMAGES
        held.append(private_bytes())
    assert held[-1] - held[0] < 16 * 2**20, [round(value / 2**20) for value in held]
