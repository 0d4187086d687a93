"""Archives and their index: truncated, stale and missing files are clear errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from data.formats.tar import open_tar
from data.images import UnreadableImage
from data.listing import Listing
from data.sources import Dataset, Request
from tests.data.formats.writers import add_bytes, write_shards, write_tar
from tests.data.samples import photograph, write_folder

LAYOUT = {"train/cat": 5, "train/dog": 4, "val/cat": 2, "val/dog": 2}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "photos", LAYOUT)


@pytest.fixture
def root(tmp_path: Path, photos: Path) -> Path:
    return write_tar(photos, tmp_path / "tars")


def opened(root: Path, *needs: str, **request: str) -> Dataset:
    return open_tar(Request(path=str(root), needs=needs or ("train", "val"), **request))


def refusal(root: Path, *needs: str, **request: str) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        opened(root, *needs, **request)
    return str(caught.value).replace(str(root), "ROOT")


def jpeg(seed: int, path: Path) -> bytes:
    photograph(seed).save(path)
    return path.read_bytes()


def test_the_index_is_built_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(root)
    assert sorted(path.name for path in root.iterdir()) == ["train.index", "train.tar", "val.index", "val.tar"]
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("read through once more"))
    dataset = opened(root)
    assert [len(dataset.train), len(dataset.held_out)] == [9, 4]


def test_folder_without_write_permission(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("os.access", lambda *_: False)  # root can write everywhere
    assert len(opened(root).train) == 9
    assert sorted(path.name for path in root.iterdir()) == ["train.tar", "val.tar"]
    assert len(list((tmp_path / "cache/dat/tar").iterdir())) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "train.tar"))  # no folder, so nothing can be written there
    assert len(opened(root).train) == 9


@pytest.mark.parametrize("left", [0.1, 0.3, 0.5])
def test_truncated_archive(root: Path, left: float) -> None:
    content = (root / "train.tar").read_bytes()
    (root / "train.tar").write_bytes(content[: int(len(content) * left)])
    assert refusal(root).startswith("archive ROOT/train.tar is truncated or damaged (")
    assert [path.name for path in root.iterdir() if path.suffix == ".index"] == []


def test_archive_truncated_between_two_members(root: Path) -> None:
    with tarfile.open(root / "train.tar") as archive:
        last = archive.getmembers()[-1]
    content = (root / "train.tar").read_bytes()
    (root / "train.tar").write_bytes(content[: last.offset])
    assert refusal(root) == "archive ROOT/train.tar is truncated or damaged (its end is missing); copy it again"


def test_archive_truncated_after_indexing(root: Path) -> None:
    images = opened(root).train
    content = (root / "train.tar").read_bytes()
    (root / "train.tar").write_bytes(content[:2000])
    assert is_stale(refusal(root), f"train.tar had {len(content)} bytes and has 2000")
    with pytest.raises(UnreadableImage, match=r"cannot read image '.*train\.tar/cat/4\.jpg': the archive is truncated"):
        images.get(4)


def is_stale(message: str, what: str) -> bool:
    return message == (
        f"index ROOT/train.index does not match the archives: {what}; if these are correct, delete the index to "
        "rebuild it"
    )


def test_index_of_another_archive(root: Path, photos: Path, tmp_path: Path) -> None:
    opened(root)
    size = (root / "train.tar").stat().st_size
    with tarfile.open(root / "train.tar", "w") as archive:
        archive.add(photos / "train/cat/0.jpg", "cat/0.jpg")
        archive.add(photos / "train/dog/0.jpg", "dog/0.jpg")
    assert f"train.tar had {size} bytes and has" in refusal(root)
    (root / "train.index").unlink()
    assert len(opened(root).train) == 2


def test_index_of_another_archive_of_the_same_size(root: Path) -> None:
    opened(root)
    content = (root / "train.tar").read_bytes()
    (root / "train.tar").write_bytes(bytes(512) + content[:-512])
    assert is_stale(refusal(root), "train.tar does not contain cat/0.jpg at the indexed offset")


def test_index_of_members_of_other_names(tmp_path: Path) -> None:
    for names in (("cat", "dog"), ("dog", "cat")):
        with tarfile.open(tmp_path / "new", "w") as archive:
            for name in names:
                add_bytes(archive, f"{name}/0.jpg", b"as many bytes as the other")
        (tmp_path / "new").replace(tmp_path / "train.tar")
        if names[0] == "cat":
            opened(tmp_path, "train")
    assert is_stale(refusal(tmp_path, "train"), "train.tar does not contain cat/0.jpg at the indexed offset")


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (["3", "7"], ["3", "3"], "train.tar has another label in 1.cls"),
        (["3", "7"], ["3", "70"], "train.tar does not contain 1.cls at the indexed offset"),
    ],
)
def test_labels_that_were_corrected_after_indexing(
    tmp_path: Path, before: list[str], after: list[str], says: str
) -> None:
    write_labels(tmp_path / "train.tar", before)
    for _ in range(2):
        assert opened(tmp_path, "train").train.labels.tolist() == [3, 7]
    size = (tmp_path / "train.tar").stat().st_size
    write_labels(tmp_path / "train.tar", after)
    assert (tmp_path / "train.tar").stat().st_size == size
    assert is_stale(refusal(tmp_path, "train"), says)


def test_index_of_an_older_version_is_built_again(tmp_path: Path) -> None:
    write_labels(tmp_path / "train.tar", ["3", "7"])
    opened(tmp_path, "train")
    current = (tmp_path / "train.index").read_bytes()
    listing = Listing.load(tmp_path / "train.index")
    del listing.about["version"]
    listing.save(tmp_path / "train.index")
    assert opened(tmp_path, "train").train.labels.tolist() == [3, 7]
    assert (tmp_path / "train.index").read_bytes() == current


def test_archive_in_preallocated_space(root: Path) -> None:
    """Programs that copy in pieces give a file its size first; zeros behind the last piece look like an end."""
    with tarfile.open(root / "train.tar") as archive:
        end = archive.getmembers()[4].offset
    content = (root / "train.tar").read_bytes()
    (root / "train.tar").write_bytes(content[:end] + bytes(2**21))
    assert refusal(root) == (
        f"archive ROOT/train.tar is truncated or damaged (it ends after {end} of {end + 2**21} bytes); copy it again"
    )


def test_concatenated_archives(root: Path) -> None:
    (root / "train.tar").write_bytes((root / "train.tar").read_bytes() * 2)
    assert refusal(root) == (
        "archive ROOT/train.tar has data after its end: several archives were joined, or it is damaged; use separate "
        "shards (train-000000.tar, ...), or copy it again"
    )


def test_damaged_index(root: Path) -> None:
    opened(root)
    whole = (root / "train.index").read_bytes()
    for content in (whole[:-300], b"something else", b"", b"dat listing 1\n{}\n", b"dat listing 1\n[]\n"):
        (root / "train.index").write_bytes(content)
        assert refusal(root) == "index ROOT/train.index is damaged or not an index; delete it to rebuild it"


def test_missing_shard(photos: Path, tmp_path: Path) -> None:
    root = write_shards(photos, tmp_path / "shards", size=2)
    (root / "train-000002.tar").unlink()
    assert refusal(root) == (
        "shard 2 missing next to ROOT/train-000000.tar and train-000004.tar; copy again what is missing, or number the "
        "others without gaps"
    )


def test_shard_that_is_missing_after_it_was_indexed(photos: Path, tmp_path: Path) -> None:
    root = write_shards(photos, tmp_path / "shards", size=2)
    opened(root)
    (root / "train-000004.tar").unlink()
    assert "index ROOT/train.index does not match the archives: train-000004.tar is missing" in refusal(root)


def test_shards_with_their_number_in_the_name(photos: Path, tmp_path: Path) -> None:
    root = write_shards(photos, tmp_path / "shards", size=5)
    for number in (0, 1):
        (root / f"train-{number:06}.tar").rename(root / f"train-{number:05}-of-00003.tar")
    assert refusal(root).startswith("shard 2 missing next to")


def test_compressed_archive(root: Path) -> None:
    subprocess.run(["gzip", root / "train.tar"], check=True)
    assert refusal(root) == "train.tar.gz is compressed, so images cannot be read in any order; unpack it to .tar"


def test_no_archive(root: Path, photos: Path) -> None:
    (root / "train.tar").unlink()
    assert refusal(root).startswith("no archive 'train.tar' in data path ROOT: it contains val.tar; the layout is ")
    assert refusal(photos, "val").startswith("no archive 'val.tar' in data path ROOT: it contains train, val; ")


def test_splits_by_pattern(photos: Path, tmp_path: Path) -> None:
    root = write_shards(photos, tmp_path / "shards")
    for path in root.glob("*.tar"):
        path.rename(root / f"pets_{path.name}")
    dataset = opened(root, train="pets_train*.tar", val="pets_val*.tar")
    assert [len(dataset.train), len(dataset.held_out)] == [9, 4]


def test_absolute_path_of_a_split(root: Path, tmp_path: Path) -> None:
    assert len(opened(tmp_path, "val", val=str(root / "val.tar")).held_out) == 4


def test_classes_that_differ(root: Path, photos: Path) -> None:
    with tarfile.open(root / "val.tar", "w") as archive:
        archive.add(photos / "val/cat", "Cat")
        archive.add(photos / "val/dog", "cow")
    assert "ROOT/val.tar has classes that ROOT/train.tar does not have: Cat (train has cat); the layout is" in refusal(
        root
    )


def test_label_beyond_the_list_of_classes(photos: Path, tmp_path: Path) -> None:
    root = write_shards(photos, tmp_path / "shards")
    (root / "classes.txt").write_text("cat\n")
    assert "train-000001.tar, 00000005.jpg: label '1' is out of range; classes.txt has 1 class, labels" in refusal(root)


def test_image_without_label(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        add_bytes(archive, "a.jpg", jpeg(0, tmp_path / "a.jpg"))
        add_bytes(archive, "a.cls", b"0")
        add_bytes(archive, "b.jpg", jpeg(1, tmp_path / "a.jpg"))
    assert "train.tar holds b.jpg without a label; the layout is" in refusal(tmp_path, "train")


def test_image_in_no_class_folder(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        add_bytes(archive, "cat/a.jpg", jpeg(0, tmp_path / "a.jpg"))
        add_bytes(archive, "b.jpg", jpeg(1, tmp_path / "a.jpg"))
    assert "archive member b.jpg is in no class folder and has no label" in refusal(tmp_path, "train")


def test_links_have_no_bytes(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "copy.jpg").hardlink_to(photos / "train/cat/0.jpg")
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(photos / "train/cat/0.jpg", "cat/0.jpg")
        archive.add(tmp_path / "copy.jpg", "cat/1.jpg")
    assert "contains cat/1.jpg as a link or a sparse file" in refusal(tmp_path, "train")


def test_labels_in_json_and_files_of_other_programs(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for number, name in enumerate(("x/a", "x/c", "x/d")):
            add_bytes(archive, f"{name}.jpg", jpeg(number, tmp_path / "a.jpg"))
            add_bytes(archive, f"{name}.json", f'{{"label": {2 - number}, "width": 48}}'.encode())
        add_bytes(archive, "x/._a.b.jpg", b"left behind by macOS")
        add_bytes(archive, "__MACOSX/x/a.jpg", b"left behind by macOS")
        add_bytes(archive, "@eaDir/x/a.jpg", b"a preview of network storage")
    dataset = opened(tmp_path, "train")
    assert dataset.classes == ["0", "1", "2"]
    assert [dataset.train.label(index) for index in range(3)] == [2, 1, 0]


def test_samples_of_several_files(tmp_path: Path) -> None:
    """As in `data/formats/stream.py`, the extension begins at the first dot, and `.cls` has precedence."""
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for number in range(2):
            for ending, content in (
                *(("JPG", b"image"), ("mask.png", b"mask"), ("depth.png", b"depth")),
                *(("cls", f"{number}".encode()), ("json", b'{"label": 5}'), ("seg.cls", b"7")),
            ):
                add_bytes(archive, f"{number:03}.{ending}", content)
    dataset = opened(tmp_path, "train")
    assert [dataset.train.get(index).data for index in range(len(dataset.train))] == [b"image", b"image"]
    assert (dataset.classes, dataset.train.labels.tolist()) == (["0", "1"], [0, 1])
    assert dataset.warnings()[0].endswith("2 .cls, 2 .depth.png, 2 .mask.png")


def test_class_with_the_name_of_a_split(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for name in ("train/cat/0.png", "train/train/1.png", "val/train/2.png", "val/test/3.png", "train/test/4.png"):
            add_bytes(archive, f"cifar100/{name}", name.encode())
    dataset = opened(tmp_path / "all.tar")
    assert dataset.classes == ["cat", "test", "train"]
    for source, names in (
        (dataset.train, ["train/cat/0.png", "train/test/4.png", "train/train/1.png"]),
        (dataset.held_out, ["val/test/3.png", "val/train/2.png"]),
    ):
        assert [source.get(index).data.decode() for index in range(len(source))] == names
        assert [dataset.classes[source.label(index)] for index in range(len(source))] == [
            n.split("/")[1] for n in names
        ]


def names(dataset: Dataset) -> list[str]:
    """Return the images of the held-out split, which contain their names."""
    return [dataset.held_out.get(index).data.decode() for index in range(len(dataset.held_out))]


def write_members(path: Path, *members: str) -> Path:
    """Write an archive of files that contain their names."""
    with tarfile.open(path, "w") as archive:
        for member in members:
            add_bytes(archive, member, member.encode())
    return path


def test_one_folder_of_an_archive_is_a_split(tmp_path: Path) -> None:
    """The first of the usual names that exists, or the one that is given; others are other splits."""
    members = ("train/a/0.png", "test/a/1.png", "validation/a/2.png", "dev/a/3.png")
    archive = write_members(tmp_path / "all.tar", *(f"some/{member}" for member in members))
    for _ in ("indices are built", "indices are read"):
        assert names(opened(archive, "val")) == ["some/validation/a/2.png"]
        assert names(opened(archive, "val", val="test")) == ["some/test/a/1.png"]
        assert names(opened(archive, "val", train="dev", val="dev")) == ["some/dev/a/3.png"]
    assert (tmp_path / "all.val.index").exists()
    says = "archive ROOT has no folder eval: it contains train, test, validation, some; the layout is"
    assert refusal(archive, "val", val="eval").startswith(says)
    assert refusal(archive, "val", val="val").startswith("archive ROOT has no folder val: it contains train, test,")


def test_class_of_a_chosen_folder_with_the_name_of_a_split(tmp_path: Path) -> None:
    archive = write_members(tmp_path / "all.tar", "dev/a/0.png", "dev/a/1.png", "dev/test/2.png", "test/a/3.png")
    dataset = opened(archive, train="dev")
    assert (dataset.classes, len(dataset.train), names(dataset)) == (["a", "test"], 3, ["test/a/3.png"])


def test_usual_folder_without_images_is_not_replaced_by_another(tmp_path: Path) -> None:
    archive = write_members(tmp_path / "all.tar", "train/a/0.png", "val/a/1.heic", "test/a/2.png")
    assert refusal(archive).startswith("no images in ROOT in a folder val, but 1 .heic; ")


def test_chosen_archives_have_indices_of_their_own(tmp_path: Path) -> None:
    for name in ("val", "test"):
        write_members(tmp_path / f"{name}.tar", f"a/{name}.png")
    for _ in ("indices are built", "indices are read"):
        for chosen, found in (("", "val"), ("val.tar", "val"), ("test.tar", "test"), ("*.tar", "val test")):
            expected = sorted(f"a/{name}.png" for name in found.split())
            assert names(opened(tmp_path, "val", val=chosen)) == expected
    assert len(list(tmp_path.glob("val*.index"))) == 4


@pytest.mark.parametrize("twice", ["a/0.png", "a/0.cls"])
def test_member_that_is_there_twice(tmp_path: Path, twice: str) -> None:
    write_members(tmp_path / "train.tar", "a/0.png", "a/0.cls", "a/notes.txt", "a/notes.txt", f"./{twice}")
    assert refusal(tmp_path, "train") == f"archive ROOT/train.tar contains {twice} twice; pack it again"


@pytest.mark.parametrize("ending", ["cls", "json"])
def test_labels_in_two_forms_of_unicode_are_one_class(tmp_path: Path, ending: str) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for number, label in enumerate(("\u00e4", "a\u0308", "dog")):
            add_bytes(archive, f"{number}.jpg", jpeg(number, tmp_path / "a.jpg"))
            content = json.dumps({"label": label}) if ending == "json" else label  # JSON escapes the letters
            add_bytes(archive, f"{number}.{ending}", content.encode())
    dataset = opened(tmp_path, "train")
    assert dataset.classes == ["dog", "\u00e4"]
    assert [dataset.train.label(index) for index in range(3)] == [1, 1, 0]


def test_archives_of_whole_paths_may_have_hidden_folders_above(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for number, name in enumerate(("cat/0.jpg", "dog/1.jpg", "dog/.ipynb_checkpoints/2.jpg", "@eaDir/3.jpg/s.jpg")):
            add_bytes(archive, f"home/me/.cache/{name}", jpeg(number, tmp_path / "a.jpg"))
    dataset = opened(tmp_path, "train")
    assert (dataset.classes, len(dataset.train)) == (["cat", "dog"], 2)


def test_files_that_are_skipped_are_counted(root: Path, photos: Path) -> None:
    with tarfile.open(root / "train.tar", "w") as archive:
        for number, ending in enumerate(("jpg", "jfif", "heic", "HEIC", "txt")):
            archive.add(photos / "train/cat/0.jpg", f"cat/{number}.{ending}")
        archive.add(photos / "train/dog/0.jpg", "dog/0.jpg")
    for _ in ("built", "read again"):
        dataset = opened(root)
        assert len(dataset.train) == 3
        skipped = "3 files skipped in ROOT/train.tar, with extensions that Pillow does not read: 2 .heic, 1 .txt"
        assert [line.replace(str(root), "ROOT") for line in dataset.warnings()] == [skipped]
    with tarfile.open(root / "val.tar", "w") as archive:
        archive.add(photos / "train/cat/0.jpg", "cat/0.heic")
    (root / "val.index").unlink()
    assert "no images in ROOT/val.tar, but 1 .heic; the layout is" in refusal(root)


def test_moved_archives(root: Path, tmp_path: Path) -> None:
    opened(root)
    shutil.copytree(root, tmp_path / "elsewhere")
    assert len(opened(tmp_path / "elsewhere").train) == 9


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["0", ""], "train.tar, 1.jpg: the label is empty; give the image a class, or leave it out"),
        (["0", "-1"], "train.tar, 1.jpg: label -1 is out of range; labels count from 0"),
        (["0", "99999999999"], "train.tar, 1.jpg: label 99999999999 is out of range"),
    ],
)
def test_labels_out_of_range(tmp_path: Path, labels: list[str], says: str) -> None:
    write_labels(tmp_path / "train.tar", labels)
    assert says in refusal(tmp_path, "train")


def test_numbers_with_leading_zeros_are_names(tmp_path: Path) -> None:
    write_labels(tmp_path / "train.tar", ["00", "07"])
    assert opened(tmp_path, "train").classes == ["00", "07"]


def test_number_that_is_both_a_name_and_a_position(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("0\n1\n10\n2\n")
    write_labels(tmp_path / "train.tar", ["10", "1", "3"])
    dataset = opened(tmp_path, "train")
    assert (dataset.classes, dataset.train.labels.tolist()) == (["0", "1", "10", "2"], [2, 1, 3])
    write_labels(tmp_path / "val.tar", ["1", "2"])
    assert refusal(tmp_path, "val") == (
        "ROOT/val.tar, 1.jpg: label '2' is the name of a class and the position of another one in classes.txt, '10'; "
        "rename the classes, or list each at the position that is its name"
    )
    (tmp_path / "shards.json").write_text('{"shards": []}')  # of tools/make_shards.py, which writes positions
    assert opened(tmp_path, "val").held_out.labels.tolist() == [1, 2]
    assert "train.tar, 0.jpg: label '10' is out of range; classes.txt has 4 classes, labels are 0 to 3" in refusal(
        tmp_path, "train"
    )


def test_list_of_classes_orders_written_names(tmp_path: Path) -> None:
    """As in a table and in a stream."""
    (tmp_path / "classes.txt").write_text("emu\ndog\ncat\n")
    write_labels(tmp_path / "train.tar", ["cat", "emu", "1"])
    dataset = opened(tmp_path, "train")
    assert (dataset.classes, dataset.train.labels.tolist()) == (["emu", "dog", "cat"], [2, 0, 1])


def write_labels(path: Path, labels: list[str]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, label in enumerate(labels):
            add_bytes(archive, f"{number}.jpg", jpeg(number, path.with_name("a.jpg")))
            add_bytes(archive, f"{number}.cls", label.encode())


def test_shards_numbered_from_1(photos: Path, tmp_path: Path) -> None:
    root = write_shards(photos, tmp_path / "shards", size=2)
    (root / "train-000000.tar").unlink()
    first = root / "train-000001.tar"
    assert opened(root).warnings() == [f"the first shard is {first}; if they are numbered from 0, one is missing"]


@pytest.mark.parametrize("content", ['{"shards": 5}', '{"shards": {', "{}", "[]"])
def test_damaged_list_of_shards(photos: Path, tmp_path: Path, content: str) -> None:
    root = write_shards(photos, tmp_path / "shards")
    (root / "shards.json").write_text(content)
    assert refusal(root) == "ROOT/shards.json is damaged or of another program; copy it again, or remove it"
