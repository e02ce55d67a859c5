"""A data set is made of any pictures, whole or not at all."""

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import run_config, run_script
from PIL import Image

from alexnet_jax import batches, data, originals, pictures, prepare


def run(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """What the command prints, or says as it gives up."""
    try:
        prepare.main([str(argument) for argument in arguments])
    except SystemExit as error:
        return str(error)
    return capsys.readouterr().out


def load(name: str, folder: Path, size: int, eval_split: str) -> data.DataSet:
    changes = {"name": name, "data_dir": str(folder), "image_size": size, "crop": 23, "eval_split": eval_split}
    return data.load(run_config("cifar10", **{f"data.{key}": value for key, value in changes.items()}).data)


def examples(source: data.Source, size: int) -> list[tuple[bytes, int]]:
    read = batches.read(source, np.arange(len(source)), size)
    return [(image.tobytes(), int(label)) for image, label in zip(read["image"], read["label"], strict=True)]


def copied(photos: Path, target: Path) -> Path:
    """A folder of links, to which a test may add what is bad."""
    for file in photos.rglob("*.jpg"):
        link = target / file.relative_to(photos)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    return target


def test_a_folder_becomes_a_data_set_of_squares(photos: Path, tmp_path: Path, capsys) -> None:
    said = run(capsys, photos, f"--data_dir={tmp_path}", "--size=48")
    assert "train 40, validation 10 images of 2 classes" in said
    assert f"--config.data.name=photos --config.data.eval_split=validation --config.data.data_dir={tmp_path}" in said
    dataset = load("photos", tmp_path, 48, "validation")
    for source, split in ((dataset.train, "train"), (dataset.evaluation, "val")):
        expected = [
            (pictures.decode(pictures.square_jpeg(file.read_bytes(), 48), 3).tobytes(), label)
            for label, name in enumerate(("cat", "dog"))
            for file in (photos / split / name).iterdir()
        ]
        assert sorted(examples(source, 48)) == sorted(expected)


def test_the_stored_order_does_not_depend_on_where_the_pictures_were(photos: Path, tmp_path: Path, capsys) -> None:
    sets = []
    for place in ("here", "there"):
        run(capsys, copied(photos, tmp_path / place / "pets"), f"--data_dir={tmp_path / place}", "--size=16")
        sets.append(
            (tmp_path / place / "pets" / "16px" / "1.0.0" / "pets-train.array_record-00000-of-00001").read_bytes()
        )
    assert sets[0] == sets[1]


def test_a_set_that_is_there_is_left_alone(photos: Path, tmp_path: Path, capsys) -> None:
    first = run(capsys, photos, f"--data_dir={tmp_path}", "--size=16")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(capsys, photos, f"--data_dir={tmp_path}", "--size=16") == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_bad_pictures_are_all_named_and_nothing_is_made(photos: Path, tmp_path: Path, capsys) -> None:
    folder = copied(photos, tmp_path / "pets")
    bad = [folder / "train" / "cat" / "cut.jpg", folder / "val" / "dog" / "notes.txt", folder / "train/dog/gone.jpg"]
    bad[0].write_bytes(next((photos / "train" / "cat").iterdir()).read_bytes()[:-300])
    bad[1].write_text("no picture")
    bad[2].symlink_to(tmp_path / "nowhere")
    (folder / "train" / "cat" / ".DS_Store").write_text("hidden files are no pictures")
    said = run(capsys, folder, f"--data_dir={tmp_path}", "--size=16")
    assert said.startswith("prepare: these 3 cannot be read:\n")
    assert all(f"{path}: " in said for path in bad)
    assert said.endswith("Repair or remove them, or give --skip_bad\nNothing was made")
    assert not list((tmp_path / "pets" / "16px").iterdir())

    said = run(capsys, folder, f"--data_dir={tmp_path}", "--size=16", "--skip_bad")
    assert "train 40, validation 10 images of 2 classes; 3 pictures could not be read and are left out" in said
    assert prepare.tfds.builder_from_directory(tmp_path / "pets" / "16px" / "1.0.0").info.metadata == {
        "bad_pictures": 3
    }


def test_a_class_of_which_nothing_is_left_is_an_error(photos: Path, tmp_path: Path, capsys) -> None:
    folder = copied(photos, tmp_path / "pets")
    for file in (folder / "val" / "dog").iterdir():
        file.unlink()
    (folder / "val" / "dog" / "bad.jpg").write_text("no picture")
    said = run(capsys, folder, f"--data_dir={tmp_path}", "--size=16", "--skip_bad")
    assert "pets: validation has no picture that can be read of dog" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "val").rename(folder / "held_out"),
            "has held_out, train; pictures to train on go into",
        ),
        (lambda folder: (folder / "train").rename(folder / "val" / "x"), "has val; pictures to train on go into"),
        (lambda folder: (folder / "train" / "eel").symlink_to(folder / "train" / "cat"), "'eel' has none in .*/val "),
        (lambda folder: (folder / "val" / "eel").mkdir(), "'eel' has none in .*/train "),
        (lambda folder: [(folder / s / "eel").mkdir() for s in ("train", "val")], "train/eel: is empty; put pictures"),
        (lambda folder: (folder / "train" / "a.jpg").touch(), "train/a.jpg: cannot be read .*; it should be a folder"),
        (lambda folder: (folder / "valid").symlink_to(folder / "val"), "valid is a second folder for validation"),
    ],
)
def test_a_folder_that_is_no_data_set_is_answered_with_the_rule(photos, tmp_path, capsys, change, message) -> None:
    folder = copied(photos, tmp_path / "pets")
    change(folder)
    said = run(capsys, folder, f"--data_dir={tmp_path / 'out'}")
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_read_is_named(photos: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    listed = Path.iterdir

    def refuse(self: Path):
        if self.name == "dog":
            raise PermissionError(13, "Permission denied")
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", refuse)
    said = run(capsys, photos, f"--data_dir={tmp_path / 'out'}")
    assert "train/dog: cannot be read (Permission denied); it should be a folder" in said


# No file may be larger than 30 kB, which a full disk looks like.
FULL = """
import os, resource, signal
from alexnet_jax import prepare
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
prepare.main([os.environ["PHOTOS"], "--size=64", "--data_dir=" + os.environ["DATA"]])
"""


def test_a_full_disk_leaves_nothing_half_written(photos: Path, tmp_path: Path, capsys) -> None:
    done = run_script(FULL, PHOTOS=str(photos), DATA=str(tmp_path))
    assert done.returncode == 1
    assert f"Is there room in {tmp_path}? Make some, or name another --data_dir\nNothing was made" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "photos" / "64px").iterdir())
    assert "train 40" in run(capsys, photos, f"--data_dir={tmp_path}", "--size=64")


def test_what_a_killed_preparation_left_is_cleared_away(photos: Path, tmp_path: Path, capsys) -> None:
    left = tmp_path / "photos" / "16px" / "incomplete.ABCDEF_1.0.0"
    left.mkdir(parents=True)
    (left / "photos-train.array_record-00000-of-00001").write_text("half")
    assert "train 40" in run(capsys, photos, f"--data_dir={tmp_path}", "--size=16")
    assert [path.name for path in left.parent.iterdir()] == ["1.0.0"]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_read_from_its_archive_pixel_by_pixel(classes: int, tmp_path: Path, monkeypatch, capsys) -> None:
    counts = {"train": 20, "test": 6}
    monkeypatch.setattr(originals, "CIFAR_COUNTS", counts)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (26, 32, 32, 3)).astype(np.uint8)
    labels = np.concatenate([np.resize(np.arange(3), 20), np.resize(np.arange(3), 6)]).astype(np.uint8)
    names = ["ape", "bee", "cow"]
    rows = [
        (b"\x07" if classes == 100 else b"") + bytes([label]) + image.transpose(2, 0, 1).tobytes()
        for image, label in zip(images, labels, strict=True)
    ]
    inside = "cifar-10-batches-bin" if classes == 10 else "cifar-100-binary"
    with tarfile.open(tmp_path / f"cifar-{classes}-binary.tar.gz", "w:gz") as tar:
        if classes == 10:
            add(tar, f"{inside}/batches.meta.txt", "\n".join(names).encode())
            for i in range(5):
                add(tar, f"{inside}/data_batch_{i + 1}.bin", b"".join(rows[4 * i : 4 * i + 4]))
            add(tar, f"{inside}/test_batch.bin", b"".join(rows[20:]))
        else:
            add(tar, f"{inside}/fine_label_names.txt", "\n".join(names).encode())
            add(tar, f"{inside}/train.bin", b"".join(rows[:20]))
            add(tar, f"{inside}/test.bin", b"".join(rows[20:]))
    said = run(capsys, f"cifar{classes}", f"--manual_dir={tmp_path}", f"--data_dir={tmp_path / 'sets'}")
    assert "train 20, test 6 images of 3 classes" in said
    dataset = load(f"cifar{classes}", tmp_path / "sets", 32, "test")
    expected = [(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]
    assert sorted(examples(dataset.train, 32)) == sorted(expected[:20])
    assert sorted(examples(dataset.evaluation, 32)) == sorted(expected[20:])
    assert list(dataset.class_names) == names

    monkeypatch.setattr(originals, "CIFAR_COUNTS", counts | {"test": 7})
    said = run(capsys, f"cifar{classes}", f"--manual_dir={tmp_path}", f"--data_dir={tmp_path / 'more'}")
    assert "has 6 pictures for test, and should have 7; download it again" in said


def jpeg(colour: tuple[int, int, int], mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (50, 40), colour).convert(mode).save(content, "JPEG")
    return content.getvalue()


def test_imagenets_lists_are_whole() -> None:
    lists = tfds.core.tfds_path("datasets/imagenet2012")
    classes, held_out = ((lists / name).read_text().split() for name in ("labels.txt", "validation_labels.txt"))
    assert len(set(classes)) == 1000
    assert len(held_out) == 50_000
    assert set(held_out) == set(classes)


def test_imagenet_is_read_from_its_two_archives(tmp_path: Path, monkeypatch, capsys) -> None:
    """Train: an archive of each class in one; val: labels are those of the names' order, whatever the archive's."""
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    said = run(capsys, "imagenet2012", f"--data_dir={tmp_path}")
    assert f"{manual / 'ILSVRC2012_img_train.tar'}: is not there; put the archive" in said
    assert "register on image-net.org" in said

    (tmp_path / "labels.txt").write_text("n01\nn02\nn03\n")
    (tmp_path / "validation_labels.txt").write_text("n03\nn01\nn02\n")
    monkeypatch.setattr(tfds.core, "tfds_path", lambda path: tmp_path)
    monkeypatch.setattr(originals, "IMAGENET_COUNTS", {"train": 3, "validation": 3})
    with tarfile.open(manual / "ILSVRC2012_img_train.tar", "w") as outer:
        for label in (1, 2, 0):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                add(tar, f"n0{label + 1}_5.JPEG", jpeg((label * 100, 0, 99), "CMYK" if label == 1 else "RGB"))
            add(outer, f"n0{label + 1}.tar", inner.getvalue())
    with tarfile.open(manual / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (2, 0, 1):
            add(tar, f"ILSVRC2012_val_{number + 1:08d}.JPEG", jpeg((number * 100, 99, 0)))
    said = run(capsys, "imagenet2012", f"--data_dir={tmp_path}", "--size=32")
    assert "train 3, validation 3 images of 3 classes" in said
    dataset = load("imagenet2012", tmp_path, 32, "validation")

    def reds(source: data.Source) -> dict[int, int]:
        read = batches.read(source, np.arange(len(source)), 32)
        return {int(label): round(image[16, 16, 0] / 100) for image, label in zip(*read.values(), strict=True)}

    assert reds(dataset.train) == {0: 0, 1: 1, 2: 2}
    assert reds(dataset.evaluation) == {2: 0, 0: 1, 1: 2}

    whole = (manual / "ILSVRC2012_img_val.tar").read_bytes()
    (manual / "ILSVRC2012_img_val.tar").write_bytes(whole[:700])
    said = run(capsys, "imagenet2012", f"--data_dir={tmp_path}", "--size=16")
    assert "ILSVRC2012_img_val.tar: is damaged or not whole" in said


def test_a_stock_set_that_needs_tensorflow_says_so(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(originals.importlib.util, "find_spec", lambda name: None)
    said = run(capsys, "fashion_mnist", f"--data_dir={tmp_path}")
    assert "fashion_mnist: TFDS prepares it with TensorFlow, which is not installed" in said
    assert "pip install tensorflow-cpu" in said
    assert "no such data set" in run(capsys, "fashion_mnits", f"--data_dir={tmp_path}")


class Stock(tfds.core.GeneratorBasedBuilder):
    """As TFDS has imagenette: JPEGs of any size."""

    name = "stock"
    VERSION = tfds.core.Version("1.0.0")
    files: Path

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(self.files / split) for split in ("train", "val")}

    def _generate_examples(self, folder):
        for file in folder.rglob("*.jpg"):
            yield str(file), {"image": file, "label": int(file.parent.name == "dog")}


def test_a_set_of_photos_in_the_catalogue_is_stored_again_as_squares(photos, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Stock, "files", photos, raising=False)
    assert "stock: TFDS prepares it with TensorFlow" in run(capsys, "stock", f"--data_dir={tmp_path}")
    monkeypatch.setattr(originals.importlib.util, "find_spec", lambda name: True)
    said = run(capsys, "stock", f"--data_dir={tmp_path}", "--size=48")
    assert "train 40, val 10 images of 2 classes" in said
    squares, as_it_is = (load(name, tmp_path, 48, "val") for name in ("stock", "stock:1.0.0"))
    assert squares.folder == tmp_path / "stock" / "48px" / "1.0.0"
    labels = [[int(source[i]["label"]) for i in range(40)] for source in (as_it_is.train, squares.train)]
    assert sorted(labels[0]) == sorted(labels[1])
    shapes = [
        {pictures.decode(source[i]["image"], 3).shape for i in range(40)} for source in (as_it_is.train, squares.train)
    ]
    assert shapes[1] == {(48, 48, 3)}
    assert not shapes[0] & shapes[1]
