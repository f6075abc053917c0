import numpy as np
import pytest

from jaxsem import shapes


@pytest.mark.parametrize(
    ("side", "padded"),
    [
        (1, 64),
        (64, 64),
        (65, 128),
        (480, 512),
        (512, 512),
        (513, 640),
        (1000, 1024),
        (1025, 1280),
        (2049, 2560),
        (4000, 4096),
    ],
)
def test_buckets_are_part_of_the_format(side, padded):
    assert shapes.bucket_side(side) == padded


def test_every_side_fits_its_bucket_and_buckets_are_few():
    buckets = {shapes.bucket_side(side) for side in range(1, 2049)}
    assert all(shapes.bucket_side(s) >= s and shapes.bucket_side(s) % 64 == 0 for s in range(1, 5000))
    assert len(buckets) == 16


def test_padding_repeats_the_edge():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    padded = shapes.pad(image)
    assert padded.shape == (64, 64, 3)
    assert (padded[:2, :3] == image).all()
    assert (padded[2:, :3] == image[1]).all()
    assert (padded[:2, 3:] == image[:, 2:]).all()


@pytest.mark.parametrize("length", [10, 100, 101, 150, 299, 300, 1000])
def test_spans_cover_a_side_once_and_keep_their_margins(length):
    found = shapes.spans(length, window=100, margin=20)
    assert [span.low for span in found] == [0, *(span.high for span in found[:-1])]
    assert found[-1].high == length
    assert len({span.stop - span.start for span in found}) == 1
    for span in found:
        assert span.start >= 0
        assert span.stop <= length
        assert span.low - span.start >= 20 or span.start == 0
        assert span.stop - span.high >= 20 or span.stop == length
