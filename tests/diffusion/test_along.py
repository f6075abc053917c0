"""Sampling that is pulled towards a path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.diffusion import STABLE_DIFFUSION, invert, sample
from jaxsem.diffusion.along import sample_along
from jaxsem.errors import InputError

SHAPE = (2, 4, 4, 3)
KEY = jax.random.key(0)


def denoise(z, t):
    """A network that believes in other images than the reference."""
    return 0.8 * z - 0.3 * jnp.cos(t)[:, None, None, None] - 0.2


def distance(z, reference):
    return 0.5 * jnp.square(z - reference).sum(axis=(1, 2, 3))


@pytest.fixture(scope="module")
def path():
    z_0 = jax.random.normal(jax.random.key(1), SHAPE)
    # Of another network than samples: without a pull the way back leads elsewhere.
    return invert(lambda z, t: 0.9 * z, STABLE_DIFFUSION, z_0, 10, 12, convention="matched")


def run(path, **changes):
    options = {"steps": 10, "recurrences": 2, "pull": 0.2, "rng": KEY, **changes}
    return sample_along(denoise, distance, STABLE_DIFFUSION, path, **options)


def test_without_a_pull_it_is_ddim(path):
    found = run(path, recurrences=1, pull=0.0)
    np.testing.assert_allclose(found, sample(denoise, STABLE_DIFFUSION, path[10], 10, convention="matched"), atol=1e-4)


def test_the_pull_leads_to_the_reference(path):
    far = [float(jnp.abs(run(path, pull=pull, recurrences=4) - path[0]).mean()) for pull in (0.0, 0.1, 0.3)]
    assert far[0] > 1.3 * far[1] > 1.3 * far[2]


def test_the_step_is_that_of_the_formula(path):
    def even(z, reference):
        return (z - reference).sum(axis=(1, 2, 3))  # whose gradient is 1

    found = sample_along(denoise, even, STABLE_DIFFUSION, path, steps=1, recurrences=1, pull=0.3, rng=KEY)
    clean, alpha = (float(each) for each in STABLE_DIFFUSION.alpha_bars[:2])
    z = np.asarray(path[1], np.float64)
    noise = np.asarray(denoise(jnp.asarray(z), jnp.array([1, 1])), np.float64)
    expected = np.sqrt(clean) * (z - np.sqrt(1 - alpha) * noise) / np.sqrt(alpha) + np.sqrt(1 - clean) * noise
    np.testing.assert_allclose(found, expected - 0.3 * np.sqrt(clean / alpha), atol=1e-4)


def test_recurrences_draw_other_noise_for_another_seed_and_repeat_for_the_same(path):
    one, again, other = run(path), run(path), run(path, rng=jax.random.key(7))
    np.testing.assert_array_equal(one, again)
    assert jnp.abs(one - other).max() > 1e-3


def test_an_image_does_not_depend_on_its_place(path):
    whole, alone = run(path), run(path[:, 1:])
    np.testing.assert_allclose(whole[1:], alone, atol=1e-5)


def test_numbers_compile_nothing_anew(path):
    traced = []

    @jax.jit
    def program(path, steps, recurrences, pull, rng):
        traced.append(1)
        return sample_along(denoise, distance, STABLE_DIFFUSION, path, steps, recurrences, pull, rng)

    found = [program(path, steps, r, pull, jax.random.key(steps)) for steps, r, pull in ((3, 1, 0.1), (10, 8, 0.2))]
    assert len(traced) == 1
    np.testing.assert_allclose(found[1], run(path, recurrences=8, rng=jax.random.key(10)), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 13}, "at most the path's 12"),
        ({"steps": 0}, "steps=0"),
        ({"recurrences": 0}, "recurrences=0"),
        ({"rng": jax.random.split(KEY, 3)}, r"keys of \[3\] for a batch of 2"),
    ],
)
def test_what_cannot_be_sampled_is_refused(path, changes, message):
    with pytest.raises(InputError, match=message):
        run(path, **changes)
