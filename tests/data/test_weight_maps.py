import numpy as np
import pytest

from jaxsem.data.weight_maps import training_map
from jaxsem.errors import InputError


def maps(count=600, labels=None):
    rng = np.random.default_rng(0)
    return [training_map(rng, 8, 12, labels) for _ in range(count)]


def kind_of(found):
    if np.ptp(found) < 1e-6:
        return "uniform"
    if np.allclose(np.diff(found, 2, axis=0), 0, atol=1e-5) and np.allclose(np.diff(found, 2, axis=1), 0, atol=1e-5):
        return "ramp"
    return "other"


def test_maps_are_shares_of_one():
    for found in maps(100):
        assert (found.shape, found.dtype) == ((8, 12), np.float32)
        assert 0 <= found.min() <= found.max() <= 1


def test_the_kinds_come_in_their_shares():
    labels = np.zeros((32, 48), np.uint8)
    labels[:, :24] = 1
    found = [kind_of(each) for each in maps(1000, labels)]
    assert abs(found.count("uniform") - 200) < 40
    assert abs(found.count("ramp") - 200) < 40


def test_without_labels_their_share_is_uniform():
    found = [kind_of(each) for each in maps(1000)]
    assert abs(found.count("uniform") - 400) < 50


def test_an_object_has_one_level():
    labels = np.zeros((32, 48), np.uint8)
    labels[8:16, 12:36] = 3
    seen = 0
    for found in maps(200, labels):
        inside, outside = (
            found[2:4, 3:9],
            np.delete(found.ravel(), np.ravel_multi_index(np.mgrid[2:4, 3:9], (8, 12)).ravel()),
        )
        if np.ptp(inside) < 1e-6 and np.ptp(outside) < 1e-6 and abs(inside[0, 0] - outside[0]) > 1e-3:
            seen += 1
    assert 20 <= seen <= 70


def test_the_seed_decides():
    np.testing.assert_array_equal(maps(20), maps(20))


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="cannot be pooled"):
        maps(50, np.zeros((30, 48), np.uint8))
