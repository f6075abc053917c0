import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxsem.data.photos import PhotoFolder
from jaxsem.data.sources import TfdsSource, open_source
from jaxsem.errors import InputError


@pytest.fixture
def photos(tmp_path):
    """Three photos of different sizes, each of one grey level."""
    for index in range(3):
        Image.fromarray(np.full((20 + index, 30, 3), 50 * index, np.uint8)).save(tmp_path / f"{index}.png")
    return tmp_path


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A prepared TFDS data set `tiny`: grey images with values 0, 10, 20, ... in `train` (6) and `valid` (2)."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        pkg_dir_path = Path(__file__).parent  # TFDS looks for metadata beside the code
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(None, None, 1)),
                        "label": tfds.features.ClassLabel(names=["even", "odd"]),
                    }
                )
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples(6), "valid": self._generate_examples(2)}

        def _generate_examples(self, count):
            for index in range(count):
                image = Image.fromarray(np.full((8 + index, 10), 10 * index, np.uint8))
                yield index, {"image": image, "label": ("even", "odd")[index % 2]}

    folder = tmp_path_factory.mktemp("tfds")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_folder_gives_its_photos_in_order(photos):
    source = open_source(str(photos))
    assert len(source) == 3
    for index in range(3):
        image = source[index]["image"]
        assert image.shape == (20 + index, 30, 3)
        assert image.dtype == np.uint8
        assert np.unique(image) == [50 * index]


def test_cache_keeps_what_fits_and_no_more(photos):
    source = PhotoFolder(photos, cache_bytes=20 * 30 * 3 + 21 * 30 * 3)
    before = [source[index]["image"].copy() for index in range(3)]
    for path in photos.iterdir():
        path.write_bytes(b"")
    for index in range(2):
        np.testing.assert_array_equal(source[index]["image"], before[index])
    with pytest.raises(InputError):
        source[2]


def test_tfds_labels_come_with_their_names(tfds_dir):
    source = open_source("tfds:tiny/train", data_dir=tfds_dir)
    assert source.class_names == ("even", "odd")
    values = [int(source[index]["image"][0, 0, 0]) // 10 for index in range(6)]
    assert [source[index]["label"] for index in range(6)] == [value % 2 for value in values]
    assert sorted(values) == list(range(6))


def test_tfds_images_become_rgb(tfds_dir):
    source = open_source("tfds:tiny/train", data_dir=tfds_dir)
    images = [source[index]["image"] for index in range(len(source))]
    assert sorted(image.shape for image in images) == [(8 + index, 10, 3) for index in range(6)]
    assert sorted(int(np.unique(image)[0]) for image in images) == [0, 10, 20, 30, 40, 50]


def test_tfds_split_can_be_sliced(tfds_dir):
    assert len(open_source("tfds:tiny/train[:50%]", data_dir=tfds_dir)) == 3


def test_tfds_is_read_without_tensorflow(tfds_dir):
    program = (
        "import sys; from jaxsem.data.sources import open_source; "
        f"source = open_source('tfds:tiny/valid', data_dir={str(tfds_dir)!r}); "
        "print(len(source), source[0]['image'].shape[2], 'tensorflow' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=_ROOT)
    assert result.stdout.split() == ["2", "3", "False"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:tiny/trian", r"no split 'trian' \(did you mean 'train'\?\); there are train, valid"),
        ("tfds:tinny/train", r"no data set 'tinny' .* \(did you mean 'tiny'\?\)"),
        ("tfds:tiny", "names no split"),
        ("tfds:tiny/", "names no split"),
        ("tfds:/train", "names no split"),
        ("tfds:tiny/train[:50", "tiny/train.* cannot be read"),
    ],
)
def test_tfds_mistakes_say_what_is_there(tfds_dir, spec, message):
    with pytest.raises(InputError, match=message):
        open_source(spec, data_dir=tfds_dir)


def test_missing_tfds_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'jaxsem\[tfds\]'"):
        TfdsSource("tiny/train")


def test_unprepared_tfds_set_says_how_to_prepare_it(tfds_dir):
    with pytest.raises(InputError, match=r"mnist is not prepared in .*: name another data_dir, .*download_and_prepare"):
        open_source("tfds:mnist/train", data_dir=tfds_dir)


def test_folder_mistakes_say_what_is_there(photos):
    with pytest.raises(InputError, match=rf"does not exist \(did you mean {photos.name!r}\?\)"):
        open_source(str(photos)[:-1])
    with pytest.raises(InputError, match="is a file"):
        open_source(str(photos / "0.png"))
    with pytest.raises(InputError, match=r"no data source 'tdfs' \(did you mean 'tfds'\?\)"):
        open_source("tdfs:mnist/train")


def test_shared_photos_open(shared_data):
    source = open_source(str(shared_data / "photos" / "valid"))
    assert len(source) > 10
    assert source[0]["image"].ndim == 3


_ROOT = Path(__file__).resolve().parents[2]
