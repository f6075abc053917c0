import pickle

import jax
import numpy as np
import pytest

from jaxsem.data.batching import DevicePrefetch, training_batches
from jaxsem.data.photos import PhotoFolder, random_crop
from jaxsem.data.sources import open_source
from jaxsem.errors import InputError
from jaxsem.training import batch_sharding, make_mesh


class Levels:
    """Image i has the grey level i everywhere, so a batch shows which records it holds."""

    def __init__(self, count=7):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"image": np.full((12, 10, 3), index, np.uint8)}


def ramp(height, width):
    """An image in which each pixel tells its place: red is the row, green the column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)


def levels(batch):
    return [int(level) for level in batch["image"][:, 0, 0, 0]]


def take(batches, count):
    found = [next(batches)["image"].copy() for _ in range(count)]
    batches.close()
    return np.stack(found)


def test_each_epoch_holds_every_record_once_in_a_new_order():
    batches = training_batches(Levels(8), batch_size=4, size=8, seed=1)
    orders = [levels(next(batches)) + levels(next(batches)) for _ in range(3)]
    batches.close()
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_only_images_go_to_the_device():
    source = open_source("scenes/64:train[:8]")  # records with captions, masks and boxes
    batch = next(training_batches(source, 4, 32))
    assert {name: array.shape for name, array in batch.items()} == {"image": (4, 32, 32, 3)}


def test_same_seed_same_batches_other_seed_others(tmp_path):
    runs = [take(training_batches(Levels(), 4, 8, seed=seed), 3) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()


class Noise(Levels):
    """Photos of noise, drawn from their index: crops and flips show in the pixels."""

    def __getitem__(self, index):
        return {"image": np.random.default_rng(index).integers(0, 256, (12, 10, 3), np.uint8)}


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 3}, {"workers": 2}])
def test_batches_do_not_depend_on_who_reads(options):
    expected = take(training_batches(Noise(), 4, 8), 5)
    np.testing.assert_array_equal(take(training_batches(Noise(), 4, 8, **options), 5), expected)


def test_processes_divide_each_batch(monkeypatch):
    whole = take(training_batches(Noise(), 4, 8), 3)
    shares = []
    for index in range(2):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares.append(take(training_batches(Noise(), 4, 8), 3))
    np.testing.assert_array_equal(shares[0], whole[:, 0::2])
    np.testing.assert_array_equal(shares[1], whole[:, 1::2])


def test_position_is_restored_exactly():
    whole = take(training_batches(Noise(), 4, 8), 6)
    first = training_batches(Noise(), 4, 8)
    for _ in range(2):
        next(first)
    state = first.get_state()
    first.close()
    again = training_batches(Noise(), 4, 8, threads=2)
    again.set_state(state)
    np.testing.assert_array_equal(take(again, 4), whole[2:])


def test_prefetch_gives_the_position_of_the_batch_it_gives():
    mesh = make_mesh()
    with DevicePrefetch(training_batches(Levels(), 8, 8), batch_sharding(mesh), depth=3) as feed:
        positions = []
        for _, (batch, position) in zip(range(4), feed):
            positions.append(position["batches"])
            assert batch["image"].sharding.shard_shape(batch["image"].shape) == (1, 8, 8, 3)
    assert positions == [1, 2, 3, 4]


def test_prefetch_passes_errors_on():
    class Broken:
        def __next__(self):
            raise InputError("photo 3 is damaged")

        def get_state(self):
            return None

    with DevicePrefetch(Broken()) as feed:
        for _ in range(2):
            with pytest.raises(InputError, match="photo 3"):
                next(feed)


def test_crop_is_a_window_of_the_image():
    image = ramp(40, 50)
    for seed in range(20):
        crop = random_crop(image, 16, np.random.default_rng(seed), flip=False)
        top, left = crop[0, 0, :2]
        np.testing.assert_array_equal(crop, image[top : top + 16, left : left + 16])


def test_every_window_is_reached():
    corners = {tuple(random_crop(ramp(5, 6), 4, np.random.default_rng(s), flip=False)[0, 0, :2]) for s in range(200)}
    assert corners == {(top, left) for top in range(2) for left in range(3)}


def test_about_half_of_the_crops_are_mirrored():
    flips = [random_crop(ramp(8, 8), 8, np.random.default_rng(seed))[0, 0, 1] == 7 for seed in range(200)]
    assert 70 < sum(flips) < 130


def test_small_images_are_reflected():
    crop = random_crop(ramp(3, 5), 5, np.random.default_rng(0), flip=False)
    np.testing.assert_array_equal(crop[:, 0, 0], [1, 0, 1, 2, 1])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (4, 40)])
def test_any_size_gives_the_square(height, width):
    assert random_crop(ramp(height, width), 16, np.random.default_rng(0), min_scale=0.5).shape == (16, 16, 3)


def test_down_scaling_shows_more_of_the_image():
    def seen(min_scale):
        crops = [random_crop(ramp(64, 64), 16, np.random.default_rng(s), min_scale=min_scale) for s in range(50)]
        return [int(crop[..., 0].max()) - int(crop[..., 0].min()) for crop in crops]

    assert set(seen(1.0)) == {15}
    assert max(seen(0.5)) > 26  # almost the 31 of a window of 32 pixels
    assert max(seen(0.5)) <= 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0, "size": 8}, "batch_size=0"),
        ({"batch_size": 4, "size": 0}, "size=0"),
        ({"batch_size": 4, "size": 8, "min_scale": 0.0}, r"min_scale=0\.0"),
    ],
)
def test_options_that_make_no_batch_are_errors(options, message):
    with pytest.raises(InputError, match=message):
        training_batches(Levels(), **options)


def test_folder_travels_to_workers_without_its_cache(tmp_path):
    from PIL import Image

    Image.fromarray(ramp(20, 20)).save(tmp_path / "a.png")
    folder = PhotoFolder(tmp_path, cache_bytes=10**6)
    empty = len(pickle.dumps(folder))
    expected = folder[0]["image"]
    again = pickle.loads(pickle.dumps(folder))
    assert len(pickle.dumps(folder)) == empty
    np.testing.assert_array_equal(again[0]["image"], expected)
