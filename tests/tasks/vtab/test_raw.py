"""The five sets of VTAB without a server: prepared from folders as they are published, fabricated here."""

import gzip
import io
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image

from flora.errors import DataError
from flora.tasks import Vtab, manifest
from flora.tasks.prepare.folder import prepare
from flora.tasks.prepare.items import catalogue, find
from flora.tasks.vtab import download, raw, retina
from flora.tasks.vtab.datasets import DATASETS
from flora.tasks.vtab.rendered import RENDERED
from tests.tasks.conftest import numbers, png


def jpeg(level: int, size: tuple[int, int] = (16, 16)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def splits_of(dataset, data):
    return Vtab(name="vtab", dataset=dataset, epochs=1).load(image_size=8, data_dir=data)


def test_every_set_of_vtab_has_a_source():
    real = {name for name, info in DATASETS.items() if info.stands_for is None}
    assert (
        real - set(download.SOURCES) - set(RENDERED)
        == set(raw._READERS)
        == {
            *("resisc45", "diabetic_retinopathy", "dmlab", "smallnorb_azimuth", "smallnorb_elevation"),
        }
    )


def test_the_official_counts_are_those_of_tensorflow_datasets():
    assert raw.COUNTS == {
        "kitti": {"train": 6347, "validation": 423, "test": 711},
        "resisc45": {"train": 31500},
        "diabetic_retinopathy": {"train": 35126, "validation": 10906, "test": 42670},
        "dmlab": {"train": 65550, "validation": 22628, "test": 22735},
        "smallnorb_azimuth": {"train": 24300, "validation": 12150, "test": 12150},
        "smallnorb_elevation": {"train": 24300, "validation": 12150, "test": 12150},
    }
    tests = {name: parts["test"] for name, parts in raw.COUNTS.items() if "test" in parts}
    assert {name: catalogue()[name].rows["test"] for name in tests} == tests
    # RESISC45's and SUN397's tests are a fifth of all, rounded down.
    for name, images in (("resisc45", 31500), ("sun397", 108754), ("eurosat", 27000)):
        rows, _, _ = Vtab(name="vtab", dataset=name, epochs=1).choose({"train": np.zeros(images)})
        assert len(rows["test"]) == find(name).rows["test"]


def test_resisc45_is_a_folder_for_each_class(tmp_path):
    for c in range(45):
        folder = tmp_path / "from" / "resisc45" / "NWPU-RESISC45" / f"class_{c:02d}"
        folder.mkdir(parents=True)
        for i in range(2):
            (folder / f"{i}.jpg").write_bytes(jpeg(5 * c + i))
    described = prepare(find("resisc45"), tmp_path / "data", tmp_path / "from")
    assert described["source"] == "made of the files as published"
    assert described["warnings"][0] == "train: 90 images, officially 31500"
    assert described["rows"] == {"train": 58, "validation": 14, "test": 18}
    splits = splits_of("resisc45", tmp_path / "data")
    assert splits.class_names[44] == "class_44"
    for part in (splits.train, splits.validation, splits.test):
        shown = part.images[:, 0, 4, 4].numpy().astype(int)
        assert np.abs(shown - 5 * part.labels.numpy()).max() <= 3
    assert pq.read_table(tmp_path / "data/resisc45/test.parquet")["image"][0]["bytes"].as_py().startswith(b"\xff\xd8")
    (tmp_path / "from" / "resisc45" / "NWPU-RESISC45" / "class_00").rename(tmp_path / "gone")
    with pytest.raises(DataError, match="44 folders of images, RESISC45 has 45 classes"):
        raw.read("resisc45", tmp_path / "from" / "resisc45")


def eye(radius: int) -> Image.Image:
    rows, columns = np.ogrid[:400, :500]
    inside = (rows - 200) ** 2 + (columns - 250) ** 2 <= radius**2
    return Image.fromarray(np.where(inside[..., None], np.uint8([180, 90, 40]), 0).astype(np.uint8))


def test_diabetic_retinopathy_is_kaggles_and_public_is_validation(tmp_path):
    place = tmp_path / "from" / "diabetic_retinopathy"
    rated = {"train": [("1_left", 0, None), ("1_right", 4, None), ("2_left", 2, None)]}
    rated["test"] = [("3_left", 1, "Public"), ("3_right", 3, "Private"), ("4_left", 0, "Private")]
    for split, rows in rated.items():
        (place / split).mkdir(parents=True)
        for name, _, _ in rows:
            eye(180).save(place / split / f"{name}.jpeg")
    lines = [f"{name},{level}" for name, level, _ in rated["train"]]
    (place / "trainLabels.csv").write_text("image,level\n" + "\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"no retinopathy_solution\.csv beside trainLabels\.csv"):
        raw.read("diabetic_retinopathy", place)
    lines = [f"{name},{level},{usage}" for name, level, usage in rated["test"]]
    (place / "retinopathy_solution.csv").write_text("image,level,Usage\n" + "\n".join(lines) + "\n")
    described = prepare(find("diabetic_retinopathy"), tmp_path / "data", tmp_path / "from")
    assert described["rows"] == {"train": 3, "validation": 1, "test": 2}
    assert described["warnings"][:3] == [
        "train: 3 images, officially 35126",
        "validation: 1 images, officially 10906",
        "test: 2 images, officially 42670",
    ]
    splits = splits_of("diabetic_retinopathy", tmp_path / "data")
    assert sorted(splits.train.labels.tolist()) == [0, 2, 4]
    assert sorted(splits.test.labels.tolist()) == [0, 3]
    (place / "test" / "3_right.jpeg").unlink()
    with pytest.raises(DataError, match=r"there is no test/3_right\.jpeg, which the labels name"):
        raw.read("diabetic_retinopathy", place)


@pytest.mark.parametrize("radius", [120, 180])
def test_an_eye_gets_one_size_and_loses_its_local_average(radius):
    shown = retina.processed(eye(radius))
    assert shown.format == "JPEG"
    assert shown.size == (540, 540)  # 0.9 of twice the radius of 300
    pixels = np.asarray(shown).astype(int)
    assert np.abs(pixels[255:285, 255:285] - 128).max() <= 3, "an even patch is grey"
    assert np.abs(pixels[:20, :20] - 128).max() <= 3, "outside is grey"


def example(**features) -> bytes:
    """A tf.train.Example, written by the protobuf library from the published schema."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tf", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    repeated, single = kinds.LABEL_REPEATED, kinds.LABEL_OPTIONAL
    for name, fields in {
        "BytesList": [("value", 1, kinds.TYPE_BYTES, repeated, None)],
        "Int64List": [("value", 1, kinds.TYPE_INT64, repeated, None)],
        "Feature": [
            ("bytes_list", 1, kinds.TYPE_MESSAGE, single, ".tf.BytesList"),
            ("int64_list", 3, kinds.TYPE_MESSAGE, single, ".tf.Int64List"),
        ],
        "Entry": [
            ("key", 1, kinds.TYPE_STRING, single, None),
            ("value", 2, kinds.TYPE_MESSAGE, single, ".tf.Feature"),
        ],
        "Features": [("feature", 1, kinds.TYPE_MESSAGE, repeated, ".tf.Entry")],
        "Example": [("features", 1, kinds.TYPE_MESSAGE, single, ".tf.Features")],
    }.items():
        message = file.message_type.add(name=name)
        for field, number, kind, label, of in fields:
            message.field.add(name=field, number=number, type=kind, label=label, type_name=of)
    built = descriptor_pool.DescriptorPool()
    built.Add(file)
    made = message_factory.GetMessageClass(built.FindMessageTypeByName("tf.Example"))()
    for name, value in features.items():
        entry = made.features.feature.add(key=name)
        (entry.value.int64_list if isinstance(value, int) else entry.value.bytes_list).value.append(value)
    return made.SerializeToString()


def write_records(path, examples) -> None:
    with path.open("wb") as stream:
        for content in examples:
            stream.write(len(content).to_bytes(8, "little") + b"....") and stream.write(content + b"....")


def test_dmlab_is_vtabs_tfrecords(tmp_path):
    place = tmp_path / "from" / "dmlab"
    place.mkdir(parents=True)
    for start, split in enumerate(("train", "validation", "test")):
        for part in range(2):
            rows = [100 * start + 10 * part + i for i in range(3)]
            examples = [example(image=png(n), filename=f"{n}.png".encode(), label=n % 6) for n in rows]
            write_records(place / f"dmlab-{split}.tfrecord-{part:05d}-of-00002", examples)
    described = prepare(find("dmlab"), tmp_path / "data", tmp_path / "from")
    assert described["rows"] == {"train": 6, "validation": 6, "test": 6}
    assert described["warnings"][0] == "train: 6 images, officially 65550"
    splits = splits_of("dmlab", tmp_path / "data")
    assert numbers(splits.test.images.numpy()) == [200, 201, 202, 210, 211, 212]
    assert splits.test.labels.tolist() == [n % 6 for n in (200, 201, 202, 210, 211, 212)]
    broken = place / "dmlab-test.tfrecord-00001-of-00002"
    os.truncate(broken, broken.stat().st_size - 9)
    with pytest.raises(DataError, match=r"dmlab-test\.tfrecord-00001-of-00002 breaks off: fetch it again"):
        raw.read("dmlab", place)
    for path in place.glob("dmlab-test*"):
        path.unlink()
    with pytest.raises(DataError, match=r"no dmlab-test\.tfrecord\* beside the others"):
        raw.read("dmlab", place)


def matrix(kind: int, values: np.ndarray) -> bytes:
    sizes = (*values.shape, *[1] * (3 - values.ndim))
    return np.array([kind, values.ndim, *sizes], "<i4").tobytes() + values.tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_smallnorb_is_its_matrices_and_half_of_its_test_is_validation(tmp_path, suffix):
    place = tmp_path / "from" / "smallnorb"
    place.mkdir(parents=True)
    for part, digits, count in (("training", "46789", 10), ("testing", "01235", 12)):
        levels = np.arange(count, dtype=np.uint8) * 3 + (100 if part == "testing" else 0)
        images = np.stack([np.full((count, 8, 8), levels[:, None, None]), np.full((count, 8, 8), 255)], 1)
        # instance, elevation 0..8, azimuth 0, 2, ..., 34, lighting
        info = np.stack([np.full(count, 4), levels % 9, 2 * (levels % 18), np.full(count, 1)], 1).astype("<i4")
        for name, content in (
            (f"smallnorb-5x{digits}x9x18x6x2x96x96-{part}-dat.mat", matrix(0x1E3D4C55, images.astype(np.uint8))),
            (f"smallnorb-5x{digits}x9x18x6x2x96x96-{part}-info.mat", matrix(0x1E3D4C54, info)),
        ):
            (place / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    for dataset, classes in (("smallnorb_azimuth", 18), ("smallnorb_elevation", 9)):
        described = prepare(find(dataset), tmp_path / "data", tmp_path / "from")
        assert described["rows"] == {"train": 10, "validation": 6, "test": 6}
        assert described["warnings"][:2] == [
            "train: 10 images, officially 24300",
            "validation: 6 images, officially 12150",
        ]
        splits = splits_of(dataset, tmp_path / "data")
        shown = [part.images[:, 0, 0, 0].tolist() for part in (splits.train, splits.validation, splits.test)]
        assert [label for s in (splits.train, splits.test) for label in s.labels.tolist()] == [
            level % classes for level in shown[0] + shown[2]
        ]
        assert sorted(shown[1] + shown[2]) == [100 + 3 * i for i in range(12)], "the left camera's, each once"
    first = next(place.glob("*training-dat*"))
    first.write_bytes(gzip.compress(b"\0" * 40) if suffix else b"\0" * 40)
    with pytest.raises(DataError, match="is not the matrix of smallNORB that its name says"):
        raw.read("smallnorb_azimuth", place)


def test_a_folder_in_the_parquet_layout_is_copied_as_before(tmp_path, write_split):
    for split in ("train", "validation", "test"):
        write_split(split, 12, classes=6, folder="dmlab")
    described = prepare(find("dmlab"), tmp_path / "data", tmp_path)
    assert described["source"] == "copied"
    assert manifest.read(tmp_path / "data" / "dmlab")["rows"] == {"train": 12, "validation": 12, "test": 12}
    assert described["shared_images"]["train, test"] == {"exact": 12, "near": 0}
