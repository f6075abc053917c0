"""Features of a data set as a file: what is in it, flat memory, eight devices, bad images, interruptions, hostile files."""

import dataclasses
import json
import tracemalloc
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_clip import SIZE, WIDTH, pictures, toy_clip

from jaxsem.data.images import write_image
from jaxsem.data.scenes import CLASSES
from jaxsem.data.sources import open_source
from jaxsem.errors import FormatError, InputError, OutputError, WeightsError
from jaxsem.systems import clip_model
from jaxsem.systems.extraction import extract, read_array, read_features
from jaxsem.systems.feature_arrays import FeatureWriter, record_path
from jaxsem.training.sharding import make_mesh


class Images:
    """A source of pictures, with labels if wanted, that counts those which are alive."""

    def __init__(self, count, labels=None, side=SIZE):
        self.count, self.labels, self.side = count, labels, side
        self.alive = self.most = 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.full((self.side, self.side, 3), index % 251, np.uint8)
        image[index % self.side] = 255
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(image, self._died)
        return {"image": image} if self.labels is None else {"image": image, "label": self.labels[index]}

    def _died(self):
        self.alive -= 1


@pytest.fixture
def clip():
    return toy_clip()


@pytest.fixture
def folder(tmp_path):
    """Four photos in two sub-folders, one beside them."""
    places = ["cat/a.png", "cat/b.png", "dog/deep/c.png", "dog/d.png", "e.png"]
    for place, picture in zip(places, pictures(5)):
        path = tmp_path / "photos" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, picture)
    return tmp_path / "photos"


def files_of(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# -- what is written --------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_model(clip, tmp_path):
    source, told = Images(11), []
    path = extract(clip, source, tmp_path / "f.npy", 4, on_batch=told.append, data="a test")
    features, record = read_features(path)
    np.testing.assert_allclose(features, clip.encode_images([source[i]["image"] for i in range(11)], 4), atol=1e-6)
    np.testing.assert_array_equal(np.load(path), features)
    assert features.dtype == np.float32
    assert told == [4, 4, 3]
    assert record == {
        "kind": "jaxsem-features",
        "version": 1,
        "jaxsem": record["jaxsem"],
        "model": "toy",
        "image_size": SIZE,
        "width": WIDTH,
        "data": "a test",
        "count": 11,
        "dtype": "float32",
        "crc32": record["crc32"],
    }


def test_half_precision(clip, tmp_path):
    whole, _ = read_features(extract(clip, Images(5), tmp_path / "f.npy"))
    half, record = read_features(extract(clip, Images(5), tmp_path / "h.npy", half=True))
    assert (half.dtype, record["dtype"]) == (np.float16, "float16")
    np.testing.assert_array_equal(half, whole.astype(np.float16))


def test_a_folder_has_names_and_its_sub_folders_are_classes(clip, folder, tmp_path):
    _, record = read_features(extract(clip, open_source(str(folder)), tmp_path / "f.npy", 2))
    assert record["names"] == ["cat/a.png", "cat/b.png", "dog/d.png", "dog/deep/c.png", "e.png"]
    assert record["labels"] == [0, 0, 1, 1, -1]
    assert record["class_names"] == ["cat", "dog"]


def test_the_first_images_keep_the_numbers_of_their_classes(clip, folder, tmp_path):
    (folder / "e.png").unlink()
    features, record = read_features(extract(clip, open_source(str(folder)), tmp_path / "f.npy", limit=3))
    assert len(features) == record["count"] == 3
    assert (record["labels"], record["class_names"]) == ([0, 0, 1], ["cat", "dog"])


def test_a_flat_folder_has_no_labels(clip, folder, tmp_path):
    _, record = read_features(extract(clip, open_source(str(folder / "cat")), tmp_path / "f.npy"))
    assert record["names"] == ["a.png", "b.png"]
    assert not {"labels", "classes", "class_names"} & set(record)


def test_labels_of_records(clip, tmp_path):
    source = Images(5, np.array([2, 0, 1, 1, 2]))
    source.class_names = ["x", "y", "z"]
    _, record = read_features(extract(clip, source, tmp_path / "f.npy", 2))
    assert (record["labels"], record["class_names"]) == ([2, 0, 1, 1, 2], ["x", "y", "z"])
    _, record = read_features(extract(clip, Images(2, ["no", "number"]), tmp_path / "g.npy"))
    assert "labels" not in record


def test_scenes_have_the_classes_of_their_objects(clip, tmp_path):
    source = open_source("scenes/32:test[5:12]")
    features, record = read_features(extract(clip, source, tmp_path / "f.npy", 4))
    for i, classes in enumerate(record["classes"]):
        wanted = source[i]["classes"]
        assert classes == wanted[wanted >= 0].tolist()
    assert record["class_names"] == list(CLASSES)
    assert "labels" not in record
    np.testing.assert_allclose(features, clip.encode_images([source[i]["image"] for i in range(7)], 4), atol=1e-6)
    assert source.fields[-1] == "phrases"  # the caller's source still has all its fields


def test_scenes_of_one_object_have_labels(clip, tmp_path):
    _, record = read_features(extract(clip, open_source("scenes/32/objects=1:test[:6]"), tmp_path / "f.npy"))
    assert [[label] for label in record["labels"]] == record["classes"]


# -- how it runs ------------------------------------------------------------------------------------------------------


def test_eight_devices_give_the_same_features(clip, tmp_path):
    one, _ = read_features(extract(clip, Images(37), tmp_path / "one.npy", 16))
    eight, _ = read_features(extract(clip, Images(37), tmp_path / "eight.npy", 16, make_mesh()))
    assert jax.device_count() == 8
    np.testing.assert_allclose(eight, one, atol=1e-6)


def test_a_batch_that_the_devices_cannot_share(clip, tmp_path):
    with pytest.raises(InputError, match="a batch of 9 cannot be split evenly over 8 devices"):
        extract(clip, Images(3), tmp_path / "f.npy", 9, make_mesh())


def test_few_images_are_alive_however_many_there_are(clip, tmp_path):
    source = Images(400, side=64)
    extract(clip, source, tmp_path / "f.npy", 8)
    assert source.most <= clip_model.READERS + 1
    assert source.alive == 0


def test_memory_does_not_grow_with_the_number_of_images(clip, tmp_path):
    def peak(count):
        tracemalloc.start()
        extract(clip, Images(count), tmp_path / "f.npy", 16, force=True)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(64)  # compiles
    few, many = peak(128), peak(1024)
    crops = (1024 - 128) * SIZE * SIZE * 3  # what would be held otherwise
    assert many - few < 0.3 * crops, (few, many)


def test_the_next_batch_is_on_its_way_before_the_last_one_is_waited_for(clip, tmp_path, monkeypatch):
    events, real = [], clip_model.encode_crops

    class Waited:
        def __init__(self, number, array):
            self.number, self.array = number, array

        def __array__(self, dtype=None, copy=None):
            events.append(f"wait {self.number}")
            return np.asarray(self.array)

    def begin(module, params, crops):
        number = len([event for event in events if event.startswith("begin")])
        events.append(f"begin {number}")
        return Waited(number, real(module, params, crops))

    monkeypatch.setattr(clip_model, "encode_crops", begin)
    extract(clip, Images(12), tmp_path / "f.npy", 4)
    assert events == ["begin 0", "begin 1", "wait 0", "begin 2", "wait 1", "wait 2"]


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_read_stops_the_run_and_leaves_nothing(clip, folder, tmp_path):
    (folder / "cat" / "b.png").write_bytes(b"hello")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match=r"b\.png is no image"):
        extract(clip, open_source(str(folder)), out / "f.npy", 2)
    assert files_of(out) == []


def test_an_image_that_cannot_be_read_may_be_left_out(clip, folder, tmp_path):
    whole, _ = read_features(extract(clip, open_source(str(folder)), tmp_path / "whole.npy", 2))
    (folder / "cat" / "b.png").write_bytes(b"hello")
    told = []
    path = extract(clip, open_source(str(folder)), tmp_path / "f.npy", 2, on_failure=lambda *pair: told.append(pair))
    features, record = read_features(path)
    np.testing.assert_allclose(features, whole[[0, 2, 3, 4]], atol=1e-6)
    assert record["names"] == ["cat/a.png", "dog/d.png", "dog/deep/c.png", "e.png"]
    assert record["labels"] == [0, 1, 1, -1]
    [(name, error)] = told
    assert name == "cat/b.png"
    assert isinstance(error, InputError)


def test_no_image_that_can_be_read(clip, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in "ab":
        (tmp_path / "photos" / f"{name}.png").write_bytes(b"hello")
    with pytest.raises(InputError, match="none of the 2 images could be read"):
        extract(clip, open_source(str(tmp_path / "photos")), tmp_path / "f.npy", on_failure=lambda *_: None)
    assert files_of(tmp_path) == ["photos"]


def test_an_interrupted_run_leaves_what_was_there(clip, tmp_path):
    extract(clip, Images(6), tmp_path / "f.npy", 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(clip, Images(600), tmp_path / "f.npy", 2, force=True, on_batch=interrupt)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_is_one_sentence_and_leaves_nothing(clip, tmp_path, monkeypatch):
    def full(self, rows):
        with self._writing():
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(FeatureWriter, "write", full)
    with pytest.raises(OutputError, match=r"f\.npy could not be written \(No space left on device\)"):
        extract(clip, Images(3), tmp_path / "f.npy")
    assert files_of(tmp_path) == []


@pytest.mark.parametrize("existing", ["f.npy", "f.json"])
def test_nothing_is_replaced_unasked(clip, tmp_path, existing):
    (tmp_path / existing).write_text("mine")
    source = Images(3)
    with pytest.raises(OutputError, match="exists already"):
        extract(clip, source, tmp_path / "f.npy")
    assert source.most == 0
    extract(clip, source, tmp_path / "f.npy", force=True)
    assert read_features(tmp_path / "f.npy")[1]["count"] == 3


def test_other_names_than_npy_are_refused(clip, tmp_path):
    with pytest.raises(InputError, match=r"features go to a \.npy file"):
        extract(clip, Images(3), tmp_path / "f.txt")


def test_an_empty_source_and_a_limit_of_none(clip, tmp_path):
    with pytest.raises(InputError, match="the data set is empty"):
        extract(clip, Images(0), tmp_path / "f.npy")
    with pytest.raises(InputError, match="at least 1 image, not 0"):
        extract(clip, Images(3), tmp_path / "f.npy", limit=0)


def test_a_model_that_gives_nan_is_named_with_the_image(clip, folder, tmp_path):
    params = jax.tree.map(np.copy, clip.params)
    params["image_projection"]["kernel"][:] = np.nan
    broken = dataclasses.replace(clip, params=params)
    with pytest.raises(WeightsError, match=r"toy gives no direction for cat/a\.png, but NaN"):
        extract(broken, open_source(str(folder)), tmp_path / "f.npy")
    assert files_of(tmp_path) == ["photos"]


def test_devices_of_another_process(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(InputError, match="extracted by one process"):
        extract(clip, Images(3), tmp_path / "f.npy", mesh=make_mesh())


# -- hostile files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def written(clip, tmp_path):
    """A good pair of files."""
    return extract(clip, Images(6, [0, 1, 2, 0, 1, 2]), tmp_path / "f.npy")


def edited(path, **fields):
    record = json.loads(record_path(path).read_text())
    record_path(path).write_text(json.dumps({**record, **fields}))


def test_missing_files(tmp_path, written):
    with pytest.raises(InputError, match="does not exist"):
        read_features(tmp_path / "none.npy")
    with pytest.raises(InputError, match="is a folder"):
        read_array(tmp_path)
    record_path(written).unlink()
    with pytest.raises(InputError, match=r"f\.json does not exist"):
        read_features(written)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5, np.float32), r"shape \(5,\)"),
        (np.zeros((0, 5), np.float32), r"shape \(0, 5\)"),
        (np.zeros((2, 5), np.int32), "it holds int32"),
        (np.zeros((2, 5), np.complex64), "it holds complex64"),
        (np.array([["a"]]), "it holds <U1"),
        (np.zeros((2, 5), "f4,f4"), "it holds"),
    ],
)
def test_arrays_that_are_no_features(tmp_path, array, message):
    np.save(tmp_path / "f.npy", array)
    with pytest.raises(FormatError, match=message):
        read_array(tmp_path / "f.npy")


def test_pickles_are_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    np.save(tmp_path / "f.npy", np.array([[Bomb()]]), allow_pickle=True)
    with pytest.raises(FormatError, match="it holds object"):
        read_array(tmp_path / "f.npy")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04", b"\x93NUMPY", b"\x93NUMPY\x09\x00\x10\x00"])
def test_files_that_are_no_arrays(tmp_path, data):
    (tmp_path / "f.npy").write_bytes(data)
    with pytest.raises(FormatError, match=r"is not a \.npy file of features"):
        read_array(tmp_path / "f.npy")


@pytest.mark.parametrize("shape", ["(-1, 4)", "(10**30, 4)", "(2**62, 4)", "((((", "{}", "__import__('os')", "'x'"])
def test_headers_that_claim_nonsense(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    (tmp_path / "f.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64))
    with pytest.raises(FormatError):
        read_array(tmp_path / "f.npy")


def test_any_damaged_byte_is_found(written):
    good = written.read_bytes()
    for place in (*range(0, 128), len(good) - 1, len(good) // 2):
        for change in (0x01, 0x80):
            data = bytearray(good)
            data[place] ^= change
            written.write_bytes(data)
            try:
                found, _ = read_features(written)
            except FormatError:
                continue
            np.testing.assert_array_equal(found, np.frombuffer(good[128:], np.float32).reshape(6, WIDTH))  # white space
    written.write_bytes(good)
    assert len(read_features(written)[0]) == 6


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: data[:130]])
def test_a_file_of_another_length(written, change):
    written.write_bytes(change(written.read_bytes()))
    with pytest.raises(FormatError, match=r"is damaged: it has .* bytes"):
        read_features(written)


def test_a_record_of_another_array(clip, written):
    other = extract(clip, Images(6, side=20), written.with_name("g.npy"))
    record_path(other).replace(record_path(written))
    with pytest.raises(FormatError, match="one of the two files is damaged or of another run"):
        read_features(written)
    extract(clip, Images(7), written.with_name("g.npy"), force=True)
    record_path(other).replace(record_path(written))
    with pytest.raises(FormatError, match="do not belong together"):
        read_features(written)


def test_nan_in_an_array_whose_record_knows(written):
    array = np.full((6, WIDTH), np.nan, np.float32)
    np.save(written, array)
    with pytest.raises(FormatError, match="NaN or infinity"):
        read_features(written)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "else"}, "is no jaxsem-features"),
        ({"version": 2}, "has version 2, and 1 is known"),
        ({"count": "6"}, "its count is '6'"),
        ({"count": True}, "its count is True"),
        ({"crc32": 5}, "its crc32 is 5"),
        ({"dtype": "object"}, "its dtype is 'object'"),
        ({"labels": [0, 1]}, "it has 2 labels for 6 features"),
        ({"labels": [0, 1, 2, 3, 4, -2]}, "a label is not a whole number"),
        ({"labels": [0.5] * 6}, "a label is not a whole number"),
        ({"class_names": ["a", "b"]}, "of its 2 classes"),
        ({"class_names": "abc"}, "its class_names are no list"),
        ({"names": [1] * 6}, "a name is no text"),
        ({"classes": [1] * 6}, "the classes of an image are no list"),
        ({"classes": [[[]]] * 6}, "a label is not a whole number"),
    ],
)
def test_records_that_make_no_sense(written, fields, message):
    edited(written, **fields)
    with pytest.raises(FormatError, match=message):
        read_features(written)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_records_that_are_none(written, data):
    record_path(written).write_bytes(data)
    with pytest.raises(FormatError, match="is not the record of features"):
        read_features(written)


def test_what_is_read_cannot_be_changed(written):
    features, _ = read_features(written)
    with pytest.raises(ValueError, match="read-only"):
        features[0, 0] = 1


def test_arrays_of_others_are_read_as_they_are(tmp_path):
    for array in (
        np.ones((2, 3)),
        np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
        np.ones((2, 3), ">f4"),
    ):
        np.save(tmp_path / "f.npy", array)
        np.testing.assert_array_equal(read_array(tmp_path / "f.npy"), array)
