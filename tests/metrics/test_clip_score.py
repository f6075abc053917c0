import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_clip import pictures, toy_clip

from jaxsem.errors import InputError
from jaxsem.metrics.clip_score import CLIPSCORE, PERCENT, clip_score, pair_scores


class Angles:
    """A model in whose plane images lie at the angles that they are, and texts at the degrees that they end with."""

    def __init__(self):
        self.texts = None

    def encode_images(self, images):
        return self._at(list(images))

    def encode_texts(self, texts):
        self.texts = list(texts)
        return self._at([float(text.split()[-1]) for text in texts])

    @staticmethod
    def _at(degrees):
        angles = np.deg2rad(np.asarray(degrees, np.float32))
        return 3 * np.stack([np.cos(angles), np.sin(angles)], axis=-1)  # not of unit length


def test_percent_is_a_hundred_times_the_cosine():
    model = Angles()
    found = clip_score(model, [0, 60, 180], ["at 0", "at 0", "at 0"])
    np.testing.assert_allclose(found.scores, [100, 50, -100], atol=1e-4)
    assert found.mean == pytest.approx(50 / 3, abs=1e-4)
    assert model.texts == ["at 0"] * 3


def test_percent_counts_a_negative_mean_as_zero():
    found = clip_score(Angles(), [180, 90], ["0", "0"])
    np.testing.assert_allclose(found.scores, [-100, 0], atol=1e-4)
    assert found.mean == 0


def test_clipscore_is_hessels():
    """2.5 times the cosine, each negative one counted as zero, captions after the prefix."""
    model = Angles()
    found = clip_score(model, [0, 60, 180], ["at 0", "at 0", "at 0"], CLIPSCORE)
    np.testing.assert_allclose(found.scores, [2.5, 1.25, 0], atol=1e-6)
    assert found.mean == pytest.approx(3.75 / 3, abs=1e-6)
    assert model.texts == ["A photo depicts at 0"] * 3


def test_a_clip_scores_photos():
    clip, images = toy_clip(), pictures(3)
    captions = ["a red star", "two small rings", "a blue object"]
    found = clip_score(clip, images, captions)
    wanted = 100 * (clip.encode_images(images) * clip.encode_texts(captions)).sum(-1)
    assert np.ptp(wanted) > 1
    np.testing.assert_allclose(found.scores, wanted, atol=1e-3)


def test_pair_scores_are_differentiable_and_know_no_length():
    random = np.random.RandomState(0)
    images, texts = random.standard_normal((2, 4, 6)).astype(np.float32)
    scores = jax.jit(pair_scores, static_argnums=2)(images, texts, PERCENT)
    np.testing.assert_allclose(pair_scores(7 * images, 0.1 * texts), scores, rtol=1e-5)
    gradient = jax.grad(lambda x: pair_scores(x, texts).sum())(jnp.asarray(images))
    np.testing.assert_allclose((gradient * images).sum(-1), 0, atol=1e-4)
    assert np.abs(gradient).max() > 1


def test_zero_features_score_zero():
    np.testing.assert_array_equal(pair_scores(np.zeros((1, 3)), np.ones((1, 3))), [0])


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        ([0], "at 0", "this is the one text 'at 0'"),
        ([], [], "no caption to score"),
        ([0, 1], ["0"], "2 images cannot be scored with 1 captions"),
        ([], ["0"], "0 images cannot be scored with 1 captions"),
        ([0, np.nan], ["0", "0"], "features of 1 of 2 pairs are not finite, the first of them number 2"),
    ],
)
def test_what_cannot_be_scored_is_refused(images, captions, message):
    with pytest.raises(InputError, match=message):
        clip_score(Angles(), images, captions)


@pytest.mark.parametrize("shapes", [((2, 3), (3, 3)), ((2, 3), (2, 4)), ((3,), (3,))])
def test_features_that_are_no_pairs_are_refused(shapes):
    with pytest.raises(InputError, match=r"both \[pairs, width\], but these have"):
        pair_scores(*(np.ones(shape) for shape in shapes))
