"""Tests of the preparation of datasets: from folders, archives and the TFDS catalogue, completely or not at all."""

import argparse
import hashlib
import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, PngImagePlugin

from alexnet_jax.data import datasets, image_io, loader, prepare, sources
from support import run_config, run_script

Command = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Return the command as a function, which returns its output or the message of its error."""

    def run_command(*arguments: object) -> str:
        parser = argparse.ArgumentParser()
        prepare.add_arguments(parser)
        try:
            prepare.main(parser.parse_args([str(argument) for argument in arguments]))
        except (ValueError, OSError) as error:
            return str(error)
        return capsys.readouterr().out

    return run_command


def load(name: str, folder: Path, size: int, eval_split: str) -> datasets.Dataset:
    changes: dict[str, Any] = {
        "data.name": name,
        "data.data_dir": str(folder),
        "data.image_size": size,
        "data.crop": 23,
        "data.eval_split": eval_split,
    }
    return datasets.load(run_config("cifar10", **changes).data)


def examples(source: datasets.Source, size: int) -> list[tuple[bytes, int]]:
    batch = loader.read(source, np.arange(len(source)), size)
    return [(image.tobytes(), int(label)) for image, label in zip(batch["image"], batch["label"], strict=True)]


def link_photos(photos: Path, target: Path) -> Path:
    """Make a folder of links, to which a test may add bad files."""
    for file in photos.rglob("*.jpg"):
        link = target / file.relative_to(photos)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    return target


def test_folder_is_stored_resized_and_cropped(photos: Path, tmp_path: Path, run: Command) -> None:
    output = run(photos, f"--data_dir={tmp_path}", "--size=48")
    assert "train 40, validation 10 images of 2 classes" in output
    assert f"--config.data.name=photos --config.data.eval_split=validation --config.data.data_dir={tmp_path}" in output
    dataset = load("photos", tmp_path, 48, "validation")
    for source, split in ((dataset.train, "train"), (dataset.evaluation, "val")):
        expected = [
            (image_io.decode(image_io.encode_jpeg(file.read_bytes(), 48), 3).tobytes(), label)
            for label, name in enumerate(("cat", "dog"))
            for file in (photos / split / name).iterdir()
        ]
        assert sorted(examples(source, 48)) == sorted(expected)


def test_stored_order_does_not_depend_on_folder(photos: Path, tmp_path: Path, run: Command) -> None:
    stored = []
    for place in ("here", "there"):
        run(link_photos(photos, tmp_path / place / "pets"), f"--data_dir={tmp_path / place}", "--size=16")
        folder = tmp_path / place / "pets" / "16px" / "1.0.0"
        stored.append((folder / "pets-train.array_record-00000-of-00001").read_bytes())
    assert stored[0] == stored[1]


def test_existing_dataset_is_left_unchanged(photos: Path, tmp_path: Path, run: Command) -> None:
    first = run(photos, f"--data_dir={tmp_path}", "--size=16")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(photos, f"--data_dir={tmp_path}", "--size=16") == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_dataset_that_another_process_prepares_is_left_to_it(photos: Path, tmp_path: Path, run: Command) -> None:
    unfinished = tmp_path / "photos" / "16px" / "1.0.0.incomplete"
    unfinished.mkdir(parents=True)
    with filelock.FileLock(tmp_path / "photos" / ".16px.lock"):
        assert "is being prepared by another process" in run(photos, f"--data_dir={tmp_path}", "--size=16")
    assert unfinished.exists()
    assert "train 40" in run(photos, f"--data_dir={tmp_path}", "--size=16")
    assert not unfinished.exists()


def test_size_below_1_raises(photos: Path, tmp_path: Path, run: Command) -> None:
    assert "--size=0: must be at least 1" in run(photos, f"--data_dir={tmp_path}", "--size=0")


def test_all_bad_images_are_named_and_nothing_is_made(photos: Path, tmp_path: Path, run: Command) -> None:
    folder = link_photos(photos, tmp_path / "pets")
    bad = [folder / "train" / "cat" / "cut.jpg", folder / "val" / "dog" / "notes.txt", folder / "train/dog/gone.jpg"]
    bad[0].write_bytes(next((photos / "train" / "cat").iterdir()).read_bytes()[:-300])
    bad[1].write_text("no image")
    bad[2].symlink_to(tmp_path / "nowhere")
    (folder / "train" / "cat" / ".DS_Store").write_text("hidden files are no images")
    message = run(folder, f"--data_dir={tmp_path}", "--size=16")
    assert message.startswith("pets: every file must be an image, but 3 cannot be read; repair or remove them, or give")
    assert all(f"\n{path}: " in message for path in bad)
    assert message.endswith("\nNothing was made")
    assert not list((tmp_path / "pets" / "16px").iterdir())

    output = run(folder, f"--data_dir={tmp_path}", "--size=16", "--skip_bad")
    assert "train 40, validation 10 images of 2 classes; 3 images cannot be read and are left out" in output
    info = tfds.builder_from_directory(tmp_path / "pets" / "16px" / "1.0.0").info
    assert info.metadata["bad_images"] == 3


def test_class_without_readable_images_raises(photos: Path, tmp_path: Path, run: Command) -> None:
    folder = link_photos(photos, tmp_path / "pets")
    for file in (folder / "val" / "dog").iterdir():
        file.unlink()
    (folder / "val" / "dog" / "bad.jpg").write_text("no image")
    message = run(folder, f"--data_dir={tmp_path}", "--size=16", "--skip_bad")
    assert "every class must have a readable image in every split, but validation has none of dog; add" in message


def add_empty_class(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "eel").mkdir()


def one_level_deeper(folder: Path) -> None:
    for split in ("train", "val"):
        for above, name in (("animals", "cat"), ("plants", "dog")):
            (folder / split / above).mkdir()
            (folder / split / name).rename(folder / split / above / name)


def one_class(folder: Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(folder / split / "dog")


def flatten(folder: Path) -> None:
    """Move the images of all classes of a split into its folder."""
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        file.rename(folder / f"{file.parent.name}_{file.name}")
    for class_folder in [path for path in folder.iterdir() if path.is_dir()]:
        class_folder.rmdir()


def rename_class(folder: Path, name: str) -> None:
    for split in ("train", "val"):
        (folder / split / "cat").rename(folder / split / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "val").rename(folder / "held_out"),
            "pets: must have train/CLASS/IMAGE, and .*, but has held_out, train; move .* or give --hold_out=0.1",
        ),
        (lambda folder: (folder / "train").rename(folder / "val" / "x"), "pets: must have .*, but has val; move"),
        (lambda folder: (folder / "train" / "eel").symlink_to(folder / "train" / "cat"), "'eel' has none in .*/val "),
        (lambda folder: (folder / "val" / "eel").mkdir(), "'eel' has none in .*/train "),
        (add_empty_class, "train/eel: must not be empty; add images, or delete"),
        (
            lambda folder: (folder / "train" / "a.jpg").touch(),
            "train/a.jpg: must be a folder, of the images of a class; move or delete",
        ),
        (
            lambda folder: (folder / "valid").symlink_to(folder / "val"),
            "must have one folder for validation, .* valid, ",
        ),
        (
            lambda folder: (folder / "train" / "cat" / "augmented").mkdir(),
            "train/cat/augmented: must be an image, but is a folder; the layout is .*: move its images up, or",
        ),
        (one_level_deeper, "train/animals/cat: must be an image, but is a folder; the layout is train/CLASS/IMAGE"),
        (one_class, "train: must have the folders of two classes or more, but has 'cat' only; is this the wrong level"),
        (lambda folder: flatten(folder / "val"), "val: must have a folder for each class, not images; move them to C"),
        (lambda folder: flatten(folder / "train"), "train: must have a folder for each class, not images; move them"),
        (
            lambda folder: flatten((folder / "val").rename(folder / "test")),
            "test: must have a folder for each class, not images; move them",
        ),
        (
            lambda folder: rename_class(folder, "a\nb"),
            r"train/'a\\nb': the name of a class must be UTF-8, without line",
        ),
        (lambda folder: rename_class(folder, "a\x85b"), r"train/'a\\x85b': the name of a class must be"),
        (lambda folder: rename_class(folder, "a\u2028b"), r"train/'a\\u2028b': the name of a class must be"),
        (lambda folder: rename_class(folder, "a\x1bb"), r"train/'a\\x1bb': the name of a class must be"),
        (lambda folder: rename_class(folder, " "), "train/' ': the name of a class must be"),
        (lambda folder: rename_class(folder, "cat\u3000"), r"train/'cat\\u3000': the name of a class must be"),
        (lambda folder: rename_class(folder, "caf\udce9"), r"train/'caf\\udce9': the name of a class must be UTF-8"),
    ],
)
def test_folder_with_wrong_layout_raises(
    photos: Path, tmp_path: Path, run: Command, change: Callable[[Path], object], message: str
) -> None:
    folder = link_photos(photos, tmp_path / "pets")
    change(folder)
    output = run(folder, f"--data_dir={tmp_path / 'out'}")
    assert re.search(message, output), output
    assert output.endswith("\nNothing was made")
    assert not (tmp_path / "out").exists()


def test_unreadable_folder_is_named(
    photos: Path, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: Path) -> Any:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(sources.os, "scandir", refuse)
    output = run(photos, f"--data_dir={tmp_path / 'out'}")
    assert "train/dog: must be a readable folder (Permission denied); move or delete it" in output


def test_folder_of_other_images_under_the_same_name_is_refused(photos: Path, tmp_path: Path, run: Command) -> None:
    """The images decide, not their place: names and sizes of files, classes and numbers."""
    first = link_photos(photos, tmp_path / "first" / "pets")
    output = run(first, f"--data_dir={tmp_path}", "--size=16")
    assert run(link_photos(photos, tmp_path / "moved" / "pets"), f"--data_dir={tmp_path}", "--size=16") == output
    other = link_photos(photos, tmp_path / "other" / "pets")
    (other / "train" / "cat" / "0.jpg").unlink()
    (other / "train" / "cat" / "0.jpg").write_bytes(make_jpeg((1, 2, 3)))
    grown = link_photos(photos, tmp_path / "grown" / "pets")
    (grown / "train" / "cat" / "new.jpg").write_bytes(make_jpeg((1, 2, 3)))
    renamed = link_photos(photos, tmp_path / "renamed" / "pets")
    rename_class(renamed, "lynx")
    for folder, count in ((other, 50), (grown, 51), (renamed, 50)):
        message = run(folder, f"--data_dir={tmp_path}", "--size=16")
        assert (
            f"pets/16px/1.0.0: must be of the images of {folder} ({count} of 2 classes), but was made of others "
            f"(50 of 2 classes, of {first}); delete it, or give --name=ANOTHER\nNothing was made"
        ) in message
    assert f"{tmp_path}/lynxes/16px" in run(renamed, f"--data_dir={tmp_path}", "--size=16", "--name=lynxes")
    assert list(load("lynxes", tmp_path, 16, "validation").class_names) == ["dog", "lynx"]


def test_dataset_of_an_earlier_version_is_left_as_it_is(photos: Path, tmp_path: Path, run: Command) -> None:
    """It has no record of its files, but of classes and numbers."""
    output = run(photos, f"--data_dir={tmp_path}", "--size=16")
    (tmp_path / "photos" / "16px" / "1.0.0" / "metadata.json").write_text('{"bad_images": 0}')
    assert run(photos, f"--data_dir={tmp_path}", "--size=16") == output
    (link_photos(photos, tmp_path / "grown" / "photos") / "train" / "cat" / "new.jpg").write_bytes(make_jpeg((1, 2, 3)))
    message = run(tmp_path / "grown" / "photos", f"--data_dir={tmp_path}", "--size=16")
    assert "but was made of others (50 of 2 classes, of an unknown folder)" in message


@pytest.mark.parametrize("damage", [lambda file: file.write_text("{"), lambda file: file.unlink()])
def test_damaged_dataset_is_named(damage: Callable[[Path], object], photos: Path, tmp_path: Path, run: Command) -> None:
    run(photos, f"--data_dir={tmp_path}", "--size=16")
    damage(tmp_path / "photos" / "16px" / "1.0.0" / "dataset_info.json")
    message = run(photos, f"--data_dir={tmp_path}", "--size=16")
    assert "photos/16px/1.0.0: must be a complete dataset, but cannot be read (" in message
    assert message.endswith("); delete it\nNothing was made")


@pytest.mark.parametrize("name", ["mnist5k", "a/b", "", "a b"])
def test_name_that_cannot_be_used_is_refused(name: str, photos: Path, tmp_path: Path, run: Command) -> None:
    """The embedded dataset's name would be trained on instead."""
    assert f"--name={name}: must be letters" in run(photos, f"--data_dir={tmp_path}", f"--name={name}")
    if name == "mnist5k":
        message = run(link_photos(photos, tmp_path / name), f"--data_dir={tmp_path}")
        assert f"--name={name}: must be letters" in message


@pytest.mark.parametrize("inside", [".", "unknown"])
@pytest.mark.parametrize("hold_out", [False, True])
def test_unlabelled_test_folder_is_left_aside(
    hold_out: bool, inside: str, photos: Path, tmp_path: Path, run: Command
) -> None:
    folder = link_photos(photos, tmp_path / "pets")
    shutil.copytree(folder / "val" / "cat", folder / "test" / inside)
    if hold_out:
        shutil.rmtree(folder / "val")
    output = run(folder, f"--data_dir={tmp_path}", "--size=16", *(["--hold_out=0.25"] if hold_out else []))
    assert output.startswith(f"{folder}/test: left aside, as it has no folders of the classes\n")
    assert f"train {30 if hold_out else 40}, validation 10 images of 2 classes" in output


@pytest.mark.parametrize("with_train", [True, False])
def test_share_of_each_class_is_held_out(with_train: bool, photos: Path, tmp_path: Path, run: Command) -> None:
    """Of FOLDER/train/CLASS, or of FOLDER/CLASS; the names decide, so that new images move no other class's."""
    folder, data_dir = tmp_path / "pets", f"--data_dir={tmp_path / 'sets'}"
    shutil.copytree(photos / "train", folder / "train" if with_train else folder)
    assert "give --hold_out=0.1" in run(folder, data_dir, "--size=16")
    output = run(folder, data_dir, "--size=16", "--hold_out=0.1")
    assert "train 36, validation 4 images of 2 classes" in output
    assert "--config.data.eval_split=validation" in output
    info = tfds.builder_from_directory(tmp_path / "sets" / "pets" / "16px" / "1.0.0").info
    assert info.metadata["hold_out"] == "0.1 of each class: the lowest SHA-256 of CLASS/IMAGE"
    assert "but was made of others" in run(folder, data_dir, "--size=16", "--hold_out=0.2")

    def held_out() -> set[str]:
        images = sources.folder(folder, 0.1)
        train, validation = ({image.key for image in images.read(split)} for split in ("train", "validation"))
        assert not train & validation
        return validation

    before = held_out()
    for name in ("cat", "dog"):
        hashes = {hashlib.sha256(f"{name}/{number}.jpg".encode()).digest(): f"{number}.jpg" for number in range(20)}
        lowest = {hashes[digest] for digest in sorted(hashes)[:2]}
        assert {Path(key).name for key in before if name in key} == lowest
    (folder / "train" / "dog" / "new.jpg" if with_train else folder / "dog" / "new.jpg").write_bytes(b"")
    assert {key for key in held_out() if "cat" in key} == {key for key in before if "cat" in key}


def test_share_that_cannot_be_held_out_is_refused(photos: Path, tmp_path: Path, run: Command) -> None:
    for share in (0, 1, -0.1, "nan", "inf"):
        assert f"--hold_out={float(share)}: must be between 0 and 1" in run(photos, f"--hold_out={share}")
    assert "--hold_out=0.1: must be left out, as " in run(photos, "--hold_out=0.1", f"--data_dir={tmp_path}")
    assert "--hold_out=0.1: must be given with a folder" in run("cifar10", "--hold_out=0.1", f"--data_dir={tmp_path}")
    for name in ("cat", "dog"):
        (tmp_path / "few" / name).mkdir(parents=True)
        (tmp_path / "few" / name / "1.jpg").write_bytes(make_jpeg((1, 2, 3)))
    message = run(tmp_path / "few", "--hold_out=0.1", f"--data_dir={tmp_path}")
    assert "--hold_out=0.1: must leave images to train on, but " in message


@pytest.mark.parametrize("skip_bad", [False, True])
def test_split_without_a_readable_image_names_its_files(
    skip_bad: bool, photos: Path, tmp_path: Path, run: Command
) -> None:
    folder = link_photos(photos, tmp_path / "pets")
    for file in (folder / "train").rglob("*.jpg"):
        file.unlink()
        file.with_suffix(".heic").write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic")
    (folder / "val" / "cat" / "bad.jpg").write_text("no image")
    message = run(folder, f"--data_dir={tmp_path}", "--size=16", *(["--skip_bad"] if skip_bad else []))
    named = re.findall(r"^/.*(?:train|val)/(?:cat|dog)/\w+\.(?:heic|jpg): .*$", message, re.MULTILINE)
    assert len(named) == (40 if skip_bad else 41)
    assert "HEIC, which Pillow does not read by itself; pip install pillow-heif, or convert it" in named[0]
    assert not list((tmp_path / "pets" / "16px").iterdir())


def test_what_is_no_regular_file_is_a_bad_image_and_not_read(photos: Path, tmp_path: Path, run: Command) -> None:
    """A FIFO without a writer would be waited for."""
    folder = link_photos(photos, tmp_path / "pets")
    os.mkfifo(folder / "train" / "cat" / "fifo.jpg")
    (folder / "train" / "cat" / "null.jpg").symlink_to("/dev/null")
    (folder / "train" / "cat" / "loop.jpg").symlink_to("loop.jpg")
    message = run(folder, f"--data_dir={tmp_path}", "--size=16")
    for name in ("fifo.jpg", "null.jpg", "loop.jpg"):
        assert f"{folder}/train/cat/{name}: neither a file nor a link to one" in message
    assert "; 3 images cannot be read" in run(folder, f"--data_dir={tmp_path}", "--size=16", "--skip_bad")


def test_image_of_too_many_pixels_is_a_bad_one(photos: Path, tmp_path: Path, run: Command) -> None:
    folder = link_photos(photos, tmp_path / "pets")
    Image.new("RGB", (200, 100)).save(folder / "train" / "cat" / "large.png")
    message = run(folder, f"--data_dir={tmp_path}", "--size=16", "--max_pixels=19999")
    assert "but 1 cannot be read" in message
    assert f"{folder}/train/cat/large.png: 200x100 pixels, more than the limit of 19999" in message
    assert "train 41" in run(folder, f"--data_dir={tmp_path}", "--size=16", "--max_pixels=20000")
    assert "--max_pixels=0: must be at least 1" in run(folder, "--max_pixels=0")


def test_unreadable_metadata_and_names_that_are_not_utf8_are_no_fault(
    photos: Path, tmp_path: Path, run: Command
) -> None:
    folder = link_photos(photos, tmp_path / "pets")
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n      12\n0008000201120003\n", zip=True)
    Image.new("RGB", (40, 36)).save(folder / "train" / "cat" / "exported.png", pnginfo=info)
    (folder / "train" / "cat" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(make_jpeg((1, 2, 3)))
    assert "train 42, validation 10 images of 2 classes" in run(folder, f"--data_dir={tmp_path}", "--size=16")
    (folder / "train" / "cat" / os.fsdecode(b"caf\xe9.gif")).write_text("no image")
    assert f"{folder}/train/cat/caf\udce9.gif: not an image" in run(folder, f"--data_dir={tmp_path}", "--size=8")


def test_system_files_are_no_images_nor_classes(photos: Path, tmp_path: Path, run: Command) -> None:
    folder = link_photos(photos, tmp_path / "pets")
    for place in (folder, folder / "train", folder / "train" / "cat"):
        for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
            (place / name).write_text("no image")
    assert "train 40, validation 10 images of 2 classes" in run(folder, f"--data_dir={tmp_path}", "--size=16")


@pytest.mark.parametrize("source", ["nowhere", "./nowhere", "/nowhere/photos", "nowhere/photos", "mnist/../x", "~/x.d"])
def test_path_that_does_not_exist_is_not_looked_up(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Command
) -> None:
    def refuse(name: str, data_dir: str) -> Any:
        pytest.fail(f"{name} is looked up")

    monkeypatch.setattr(datasets, "tfds_builder", refuse)
    message = run(source, f"--data_dir={tmp_path}")
    assert message.startswith(f"{source}: must be a folder of images, cifar10, cifar100, imagenet2012 or a dataset of")
    assert "there is no such folder or dataset" in message


def test_archive_is_no_folder(photos: Path, tmp_path: Path, run: Command) -> None:
    (tmp_path / "photos.zip").write_bytes(b"PK")
    assert "photos.zip: must be a folder of images, not a file; unpack an archive" in run(tmp_path / "photos.zip")
    for wrong, right in ((photos.parent, photos), (photos / "train", photos)):
        assert f"; give {right}\n" in run(wrong, f"--data_dir={tmp_path}")


# A file size limit of 30 kB acts like a full disk.
FULL_DISK = """
import os, resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
sys.argv[1:] = ["prepare", os.environ["PHOTOS"], "--size=64", "--data_dir=" + os.environ["DATA"]]
runpy.run_module("alexnet_jax", run_name="__main__")
"""


@pytest.mark.slow
def test_full_disk_leaves_nothing_behind(photos: Path, tmp_path: Path, run: Command) -> None:
    # Python would write the cut bytecode of modules where other tests find it.
    process = run_script(FULL_DISK, PHOTOS=str(photos), DATA=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert process.returncode == 1
    remedy = f"If the disk is full, free some space in {tmp_path}, or give another --data_dir\nNothing was made"
    assert remedy in process.stderr
    assert process.stderr.startswith("alexnet-jax prepare: ")
    assert "Traceback" not in process.stderr
    assert not list((tmp_path / "photos" / "64px").iterdir())
    assert "train 40" in run(photos, f"--data_dir={tmp_path}", "--size=64")


def test_killed_preparation_is_cleared_away(photos: Path, tmp_path: Path, run: Command) -> None:
    incomplete = tmp_path / "photos" / "16px" / "incomplete.ABCDEF_1.0.0"
    incomplete.mkdir(parents=True)
    (incomplete / "photos-train.array_record-00000-of-00001").write_text("half")
    assert "train 40" in run(photos, f"--data_dir={tmp_path}", "--size=16")
    assert [path.name for path in incomplete.parent.iterdir()] == ["1.0.0"]


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_archive_is_stored_losslessly(
    classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Command
) -> None:
    counts = {"train": 20, "test": 6}
    monkeypatch.setattr(sources, "CIFAR_COUNTS", counts)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (26, 32, 32, 3)).astype(np.uint8)
    labels = np.concatenate([np.resize(np.arange(3), 20), np.resize(np.arange(3), 6)]).astype(np.uint8)
    names = ["ape", "bee", "cow"]
    coarse_label = b"\x07" if classes == 100 else b""
    rows = [
        coarse_label + bytes([label]) + image.transpose(2, 0, 1).tobytes()
        for image, label in zip(images, labels, strict=True)
    ]
    if classes == 10:
        inner_folder, names_file = "cifar-10-batches-bin", "batches.meta.txt"
        members = {f"data_batch_{i + 1}.bin": rows[4 * i : 4 * i + 4] for i in range(5)} | {"test_batch.bin": rows[20:]}
    else:
        inner_folder, names_file = "cifar-100-binary", "fine_label_names.txt"
        members = {"train.bin": rows[:20], "test.bin": rows[20:]}
    with tarfile.open(tmp_path / f"cifar-{classes}-binary.tar.gz", "w:gz") as tar:
        add_member(tar, f"{inner_folder}/{names_file}", "\n".join(names).encode())
        for name, content in members.items():
            add_member(tar, f"{inner_folder}/{name}", b"".join(content))
    output = run(f"cifar{classes}", f"--manual_dir={tmp_path}", f"--data_dir={tmp_path / 'sets'}")
    assert "train 20, test 6 images of 3 classes" in output
    dataset = load(f"cifar{classes}", tmp_path / "sets", 32, "test")
    expected = [(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]
    assert sorted(examples(dataset.train, 32)) == sorted(expected[:20])
    assert sorted(examples(dataset.evaluation, 32)) == sorted(expected[20:])
    assert list(dataset.class_names) == names

    monkeypatch.setattr(sources, "CIFAR_COUNTS", counts | {"test": 7})
    message = run(f"cifar{classes}", f"--manual_dir={tmp_path}", f"--data_dir={tmp_path / 'more'}")
    assert "must have 7 images for test, but has 6; download it again" in message


def make_jpeg(colour: tuple[int, int, int], mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (50, 40), colour).convert(mode).save(content, "JPEG")
    return content.getvalue()


def test_imagenet_lists_of_tfds_are_complete() -> None:
    lists = tfds.core.tfds_path("datasets/imagenet2012")
    classes, held_out = ((lists / name).read_text().split() for name in ("labels.txt", "validation_labels.txt"))
    assert len(set(classes)) == 1000
    assert len(held_out) == 50_000
    assert set(held_out) == set(classes)


def test_imagenet_is_read_from_its_two_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Command) -> None:
    """Train: an archive per class; val: labels in the order of the names, whatever the archive's order."""
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    message = run("imagenet2012", f"--data_dir={tmp_path}")
    assert f"{manual / 'ILSVRC2012_img_train.tar'}: must be the archive ILSVRC2012_img_train.tar; download" in message
    assert "after registration, from image-net.org" in message

    (tmp_path / "labels.txt").write_text("n01\nn02\nn03\n")
    (tmp_path / "validation_labels.txt").write_text("n03\nn01\nn02\n")
    monkeypatch.setattr(tfds.core, "tfds_path", lambda path: tmp_path)
    monkeypatch.setattr(sources, "IMAGENET_COUNTS", {"train": 3, "validation": 3})
    with tarfile.open(manual / "ILSVRC2012_img_train.tar", "w") as outer:
        for label in (1, 2, 0):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                mode = "CMYK" if label == 1 else "RGB"
                add_member(tar, f"n0{label + 1}_5.JPEG", make_jpeg((label * 100, 0, 99), mode))
            add_member(outer, f"n0{label + 1}.tar", inner.getvalue())
    with tarfile.open(manual / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (2, 0, 1):
            add_member(tar, f"ILSVRC2012_val_{number + 1:08d}.JPEG", make_jpeg((number * 100, 99, 0)))
    output = run("imagenet2012", f"--data_dir={tmp_path}", "--size=32")
    assert "train 3, validation 3 images of 3 classes" in output
    dataset = load("imagenet2012", tmp_path, 32, "validation")

    def red_by_label(source: datasets.Source) -> dict[int, int]:
        batch = loader.read(source, np.arange(len(source)), 32)
        return {int(label): round(image[16, 16, 0] / 100) for image, label in zip(*batch.values(), strict=True)}

    assert red_by_label(dataset.train) == {0: 0, 1: 1, 2: 2}
    assert red_by_label(dataset.evaluation) == {2: 0, 0: 1, 1: 2}

    content = (manual / "ILSVRC2012_img_val.tar").read_bytes()
    (manual / "ILSVRC2012_img_val.tar").write_bytes(content[:700])
    message = run("imagenet2012", f"--data_dir={tmp_path}", "--size=16")
    assert re.search(r"ILSVRC2012_img_val.tar: must be complete, but is damaged \(.*\); download it again", message)


def test_missing_tensorflow_raises_with_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Command) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    message = run("fashion_mnist", f"--data_dir={tmp_path}")
    assert "fashion_mnist: TFDS must have TensorFlow to prepare it" in message
    assert "pip install tensorflow-cpu" in message


class Stock(tfds.core.GeneratorBasedBuilder):
    """A dataset of the TFDS catalogue like imagenette: JPEGs, by default of any size."""

    name = "stock"
    VERSION = tfds.core.Version("1.0.0")
    files: Path
    shape: tuple[int | None, ...] = (None, None, 3)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=self.shape, encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(self.files / split) for split in ("train", "val")}

    def _generate_examples(self, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in folder.rglob("*.jpg"):
            yield str(file), {"image": file, "label": int(file.parent.name == "dog")}


def test_photos_of_tfds_are_stored_again_resized(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Command
) -> None:
    monkeypatch.setattr(Stock, "files", photos, raising=False)
    assert "stock: TFDS must have TensorFlow to prepare it" in run("stock", f"--data_dir={tmp_path}")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: True)
    output = run("stock", f"--data_dir={tmp_path}", "--size=48")
    assert "train 40, val 10 images of 2 classes" in output
    resized, original = (load(name, tmp_path, 48, "val") for name in ("stock", "stock:1.0.0"))
    assert resized.folder == tmp_path / "stock" / "48px" / "1.0.0"
    stored = [[source[i] for i in range(40)] for source in (resized.train, original.train)]
    labels = [sorted(int(example["label"]) for example in of_source) for of_source in stored]
    assert labels[0] == labels[1]
    shapes = [{image_io.decode(example["image"], 3).shape for example in of_source} for of_source in stored]
    assert shapes[0] == {(48, 48, 3)}
    assert not shapes[0] & shapes[1]


def test_whatever_tfds_raises_names_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Command) -> None:
    """Datasets whose files must be downloaded by hand raise AssertionError, for example."""
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(Stock, "MANUAL_DOWNLOAD_INSTRUCTIONS", "download it")
    monkeypatch.setattr(Stock, "_split_generators", lambda self, manager: manager.manual_dir)
    assert "stock: TFDS cannot prepare it (AssertionError: " in run("stock", f"--data_dir={tmp_path}")


def test_tfds_images_of_one_size_stay_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Command) -> None:
    monkeypatch.setattr(Stock, "files", tmp_path / "files", raising=False)
    monkeypatch.setattr(Stock, "shape", (50, 40, 3))
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: True)
    for split in ("train", "val"):
        (tmp_path / "files" / split / "dog").mkdir(parents=True)
        (tmp_path / "files" / split / "dog" / "1.jpg").write_bytes(make_jpeg((9, 9, 9)))
    assert "stock: prepared by TFDS; its images are of one size" in run("stock", f"--data_dir={tmp_path}")
    assert load("stock", tmp_path, 48, "val").train[0]["image"] == make_jpeg((9, 9, 9))
