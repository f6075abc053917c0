"""Guidance with scales of every shape, on one doubled batch, and noise given back to a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.diffusion import STABLE_DIFFUSION, classifier_free, guided, levels, renoise, sample
from jaxsem.errors import InputError

RANDOM = np.random.RandomState(0)
C, U = RANDOM.standard_normal((2, 2, 3, 4, 5)).astype(np.float32)
MAP = RANDOM.uniform(1, 3, (2, 3, 4, 1)).astype(np.float32)
CONTEXT, NULL = RANDOM.standard_normal((2, 6)).astype(np.float32), np.zeros((1, 6), np.float32)


def network(z, t, context):
    """Shifts each image by the mean of its context, and by its timestep."""
    return z * 0.5 + jnp.mean(context, -1)[:, None, None, None] + t[:, None, None, None] / 1000


# -- scales -----------------------------------------------------------------------------------------------------------


def test_a_check_value():
    c, u = jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 1.0]])
    np.testing.assert_allclose(guided(c, u, 2.0), [[2.0, 5.0]])
    # Deviations are 1 of c and 1.5 of the mixture, so phi = 0.5 takes it (1 + 1 / 1.5) / 2 times.
    np.testing.assert_allclose(guided(c, u, 2.0, 0.5), np.array([[2.0, 5.0]]) * (1 + 1 / 1.5) / 2, rtol=1e-6)


@pytest.mark.parametrize(("scale", "expected"), [(0.0, U), (1.0, C)])
def test_the_ends_of_the_scale(scale, expected):
    np.testing.assert_allclose(guided(C, U, scale), expected, atol=1e-6)


@pytest.mark.parametrize(
    "scale",
    [2, 2.5, np.float32(3), MAP[0, 0, 0, 0], MAP[:, 0, 0, 0], MAP, MAP[:1], MAP[0], MAP[:, :1, :1], MAP[:, :1]],
    ids=lambda scale: f"{np.shape(scale)}",
)
def test_scales_of_every_shape(scale):
    full = np.reshape(scale, (2, 1, 1, 1)) if np.shape(scale) == (2,) else np.asarray(scale)
    np.testing.assert_allclose(guided(C, U, scale), U + full * (C - U), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [(1,), (3,), (5,), (4, 1), (3, 4), (2, 3, 4), (2, 3, 4, 5), (3, 3, 4, 1), (2, 3, 4, 2), (1, 2, 3, 4, 1)]
)
def test_scales_that_fit_nothing(shape):
    with pytest.raises(InputError, match=r"scale of .* fits no prediction of \[2, 3, 4, 5\]: give one number"):
        guided(C, U, np.ones(shape))


def test_predictions_that_do_not_fit():
    with pytest.raises(InputError, match=r"\[2, 3, 4, 5\] and \[1, 3, 4, 5\] do not fit"):
        guided(C, U[:1], 2.0)


# -- rescaling --------------------------------------------------------------------------------------------------------


def test_a_full_rescale_gives_the_deviation_of_the_conditional_prediction():
    found = guided(C, U, 7.5, 1.0)
    np.testing.assert_allclose(jnp.std(found, axis=(1, 2, 3)), C.std(axis=(1, 2, 3)), rtol=1e-5)


def test_every_image_may_have_its_own_rescale():
    both = guided(C, U, MAP, jnp.array([0.0, 0.7]))
    np.testing.assert_allclose(both[0], guided(C, U, MAP)[0], rtol=1e-6)
    np.testing.assert_allclose(both[1], guided(C, U, MAP, 0.7)[1], rtol=1e-6)


def test_a_constant_prediction_is_not_rescaled_and_has_a_gradient():
    flat = jnp.ones((1, 2, 2, 1))
    np.testing.assert_array_equal(guided(flat, flat, 3.0, 1.0), flat)
    assert np.isfinite(jax.grad(lambda c: guided(c, flat, 3.0, 1.0).sum())(flat)).all()


def test_parity_of_the_rescale_with_diffusers():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    c, u = torch.from_numpy(C), torch.from_numpy(U)
    expected = diffusers.rescale_noise_cfg(u + 7.5 * (c - u), c, guidance_rescale=0.7)
    np.testing.assert_allclose(guided(C, U, 7.5, 0.7), expected, atol=1e-5)


# -- the doubled batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [jnp.array([900, 20]), 300], ids=["each", "one"])
@pytest.mark.parametrize("null", [NULL, np.tile(NULL, (2, 1))], ids=["shared", "each"])
def test_one_call_gives_both_predictions(t, null):
    batches = []

    def counted(z, t, context):
        batches.append((len(z), t.shape, context.shape))
        return network(z, t, context)

    found = classifier_free(counted, CONTEXT, null, MAP)(C, t)
    every = jnp.broadcast_to(t, 2)
    expected = guided(network(C, every, CONTEXT), network(C, every, np.zeros((2, 6))), MAP)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert batches == [(4, (4,), (4, 6))]


def test_a_context_may_be_a_tree():
    def tree_network(z, t, context):
        return network(z, t, context["text"]) + context["pooled"][:, None, None, None]

    context, null = ({"text": text, "pooled": text[:, 0]} for text in (CONTEXT, NULL))
    found = classifier_free(tree_network, context, null, 1.0)(C, jnp.array([5, 6]))
    np.testing.assert_allclose(found, tree_network(C, jnp.array([5, 6]), context), atol=1e-6)


@pytest.mark.parametrize(
    ("context", "null", "message"),
    [
        (CONTEXT, NULL[:, :5], r"a context of \[2, 6\] and a null context of \[1, 5\] do not fit"),
        (np.tile(CONTEXT, (2, 1))[:3], NULL, "fit no batch of 2: give 1 or 2"),
        (CONTEXT, [NULL], "the same arrays of both"),
        (1.0, 2.0, "do not fit"),
    ],
)
def test_contexts_that_do_not_fit(context, null, message):
    with pytest.raises(InputError, match=message):
        classifier_free(network, context, null, 2.0)(C, 5)


def test_other_scales_steps_and_contexts_trace_nothing_again():
    traces = []

    def counted(z, t, context):
        traces.append(z.shape)
        return network(z, t, context)

    @jax.jit
    def run(z, context, scale, rescale, steps):
        denoise = classifier_free(counted, context, NULL, scale, rescale)
        return sample(denoise, STABLE_DIFFUSION, z, steps)

    found = [run(C, s * CONTEXT, s * MAP, s / 4, s) for s in (1, 2, 3)]
    assert run._cache_size() == 1
    assert len(traces) <= 2
    assert not np.allclose(found[0], found[1])


# -- noise given back -------------------------------------------------------------------------------------------------


def test_renoise_is_the_formula():
    s, t = 480, 500
    ratio = float(STABLE_DIFFUSION.alpha_bars[t]) / float(STABLE_DIFFUSION.alpha_bars[s])
    expected = np.sqrt(ratio) * C + np.sqrt(1 - ratio) * U
    np.testing.assert_allclose(renoise(STABLE_DIFFUSION, C, s, t, U), expected, atol=1e-6)
    each = renoise(STABLE_DIFFUSION, C, jnp.array([s, 3]), jnp.array([t, 9]), U)
    np.testing.assert_allclose(each[0], expected[0], atol=1e-6)


@pytest.mark.parametrize("s", [-1, 0, 400])
def test_renoise_leads_to_the_level_of_the_later_timestep(s):
    """Latents of variance abar_s v + (1 - abar_s) become ones of abar_t v + (1 - abar_t)."""
    variance, (a_s, b_s), (a_t, b_t) = 0.3, levels(STABLE_DIFFUSION, s), levels(STABLE_DIFFUSION, 900)
    shape = (1, 8)
    kept, fresh = (
        renoise(STABLE_DIFFUSION, part * jnp.ones(shape), s, 900, (1 - part) * jnp.ones(shape)) for part in (1, 0)
    )
    np.testing.assert_allclose(kept**2 * (a_s * variance + b_s) + fresh**2, a_t * variance + b_t, rtol=1e-5)


def test_renoise_between_equal_levels_changes_nothing():
    # Timestep 0 and the clean level are one here; 1 - ratio must not fall below 0 by rounding.
    step = jax.jit(lambda s, t: renoise(STABLE_DIFFUSION, C, s, t, U))
    for s, t in ((-1, 0), (0, 0), (731, 731)):
        np.testing.assert_array_equal(step(s, t), C)


def test_renoise_to_an_earlier_timestep_is_refused_with_nan():
    assert np.isnan(renoise(STABLE_DIFFUSION, C, 500, 480, U)).all()


def test_renoise_checks_its_noise():
    with pytest.raises(InputError, match="do not fit"):
        renoise(STABLE_DIFFUSION, C, 480, 500, U[0])
