"""Timesteps, single steps, sampling and inversion: check values, identities, traces, and parity with diffusers."""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsem.diffusion import (
    STABLE_DIFFUSION,
    NoiseSchedule,
    check_steps,
    ddim_step,
    invert,
    invert_step,
    levels,
    next_timestep,
    predict_clean,
    predict_noise,
    sample,
    timesteps,
)
from jaxsem.errors import InputError

Z = np.random.RandomState(0).standard_normal((2, 3, 4, 2)).astype(np.float32)
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
STEPS = (1, 2, 7, 48, 50)


def stable(**fields):
    return dataclasses.replace(STABLE_DIFFUSION, **fields)


def network(xp, z, t):
    """A small smooth network, in JAX or torch; t is one number, or one for each image."""
    return 0.6 * xp.tanh(1.3 * z + 0.2) * xp.cos(t / 300.0) - 0.1 * z


def denoise(z, t):
    return network(jnp, z, t.astype(jnp.float32)[:, None, None, None])


@partial(jax.jit, static_argnames=("schedule", "convention"))
def run(schedule, z, steps, eta=0.0, rng=None, convention="diffusers"):
    if rng is None:
        return sample(denoise, schedule, z, steps, convention=convention)
    return sample(denoise, schedule, z, steps, eta=eta, rng=rng, convention=convention)


@partial(jax.jit, static_argnames=("schedule", "convention"))
def path_of(schedule, z, steps, convention="diffusers"):
    return invert(denoise, schedule, z, steps, 50, convention=convention)


# -- timesteps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spacing", "steps", "expected"),
    [
        # DDIMScheduler.timesteps of diffusers 0.42.1, with an offset of 1.
        ("leading", 3, [667, 334, 1]),
        ("leading", 7, [853, 711, 569, 427, 285, 143, 1]),
        ("trailing", 1, [999]),
        ("trailing", 3, [999, 666, 332]),
        ("trailing", 16, [999, 937, 874, 811, 749, 687]),
        ("trailing", 48, [999, 978, 957, 936, 916, 895]),
        ("linspace", 1, [0]),
        ("linspace", 3, [999, 500, 0]),
        ("linspace", 7, [999, 832, 666, 500, 333, 166, 0]),
    ],
)
def test_golden_timesteps(spacing, steps, expected):
    found = timesteps(stable(timestep_spacing=spacing), steps, jnp.arange(len(expected)))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


@lru_cache
def all_timesteps(spacing, count, offset):
    """[steps, index] from one traced program; row 0 is of no steps."""
    schedule = NoiseSchedule(count, timestep_spacing=spacing, steps_offset=offset)
    one = jax.jit(lambda steps: timesteps(schedule, steps, jnp.arange(count)))
    return np.stack([np.asarray(one(steps)) for steps in range(count + 1)])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("count", [1000, 97, 1])
def test_every_number_of_steps_is_spaced_as_numpy_rounds_in_float64(spacing, count):
    found = all_timesteps(spacing, count, 0)
    for steps in range(1, count + 1):
        if spacing == "leading":
            expected = np.arange(steps)[::-1] * (count // steps)
        elif spacing == "trailing":
            expected = np.round(np.arange(count, 0, -count / steps))[:steps] - 1
        else:
            expected = np.linspace(0, count - 1, steps).round()[::-1]
        np.testing.assert_array_equal(found[steps, :steps], expected)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_parity_of_timesteps_with_diffusers(spacing):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    offset = 1 if spacing == "leading" else 0
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    found = all_timesteps(spacing, 1000, offset)
    for steps in (1, 2, 3, 10, 48, 50, 61, 96, 128, 250, 500, 999, 1000):
        theirs.set_timesteps(steps)
        np.testing.assert_array_equal(found[steps, :steps], theirs.timesteps[:steps])


def test_the_two_conventions():
    schedule = stable(timestep_spacing="trailing")
    index = jnp.arange(3)
    assert timesteps(schedule, 3, index).tolist() == [999, 666, 332]
    assert next_timestep(schedule, 3, index).tolist() == [666, 333, -1]
    assert next_timestep(schedule, 3, index, "matched").tolist() == [666, 332, -1]
    leading = next_timestep(STABLE_DIFFUSION, 50, jnp.arange(50))
    assert leading.tolist()[:3] == [961, 941, 921]
    np.testing.assert_array_equal(
        jnp.maximum(leading, -1), next_timestep(STABLE_DIFFUSION, 50, jnp.arange(50), "matched")
    )


# -- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "step", "clean", "noisy"),
    [
        # DDIMScheduler.step of diffusers 0.42.1 at timestep 481 of 50 steps; the last with eta 0.5.
        ("epsilon", [0.5091, -1.0741, 2.1342], [0.5296, -2.5784, 4.7770], [0.6498, -1.3681, 2.2157]),
        ("sample", [0.4988, -0.9610, 1.9311], [0.25, 0.5, -0.75], [0.6372, -1.2292, 1.9662]),
        ("v_prediction", [0.4921, -1.0149, 2.0221], [0.0661, -0.9675, 1.7261], [0.6289, -1.2954, 2.0780]),
    ],
)
def test_golden_step(kind, step, clean, noisy):
    schedule = stable(prediction_type=kind)
    z, prediction, noise = jnp.array([[[0.5, -1.0, 2.0]], [[0.25, 0.5, -0.75]], [[1.0, -2.0, 0.5]]])
    np.testing.assert_allclose(predict_clean(schedule, prediction, z, 481), [clean], atol=6e-5)
    np.testing.assert_allclose(ddim_step(schedule, prediction, z, 481, 461), [step], atol=6e-5)
    np.testing.assert_allclose(ddim_step(schedule, prediction, z, 481, 461, 0.5, noise), [noisy], atol=6e-5)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_clean_latents_and_the_noise_make_up_the_latents(kind):
    schedule = stable(prediction_type=kind)
    prediction = 0.3 * np.cos(Z)
    clean, noise = (predict(schedule, prediction, Z, 300) for predict in (predict_clean, predict_noise))
    alpha, beta = levels(schedule, 300)
    np.testing.assert_allclose(jnp.sqrt(alpha) * clean + jnp.sqrt(beta) * noise, Z, atol=1e-5)


def test_every_image_may_have_its_own_timestep():
    both = ddim_step(STABLE_DIFFUSION, 0.1 * Z, Z, jnp.array([900, 40]), jnp.array([880, -1]), 0.3, -Z)
    for row, (t, t_next) in enumerate([(900, 880), (40, -1)]):
        one = slice(row, row + 1)
        alone = ddim_step(STABLE_DIFFUSION, 0.1 * Z[one], Z[one], t, t_next, 0.3, -Z[one])
        np.testing.assert_allclose(both[one], alone, rtol=1e-6)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_step_back_undoes_a_step(kind):
    schedule = stable(prediction_type=kind)
    clean, noise = 0.2 * Z, 0.5 + Z[:, ::-1]

    def seen(t):  # what a perfect network gives
        alpha, beta = levels(schedule, t)
        z = jnp.sqrt(alpha) * clean + jnp.sqrt(beta) * noise
        v = jnp.sqrt(alpha) * noise - jnp.sqrt(beta) * clean
        return z, {"epsilon": noise, "sample": clean, "v_prediction": v}[kind]

    (z, prediction), (cleaner, prediction_there) = seen(600), seen(580)
    np.testing.assert_allclose(ddim_step(schedule, prediction, z, 600, 580), cleaner, atol=1e-5)
    np.testing.assert_allclose(invert_step(schedule, prediction_there, cleaner, 580, 600), z, atol=1e-5)


def test_predictions_in_bfloat16_give_latents_in_float32():
    step = ddim_step(STABLE_DIFFUSION, jnp.asarray(Z, jnp.bfloat16), jnp.asarray(Z, jnp.bfloat16), 500, 480)
    assert step.dtype == jnp.float32


def test_clipping_bounds_the_clean_latents_alone():
    schedule = stable(clip_sample=True, clip_sample_range=0.5)
    free, clipped = (predict_clean(s, 0 * Z, Z, 900) for s in (STABLE_DIFFUSION, schedule))
    np.testing.assert_array_equal(clipped, np.clip(free, -0.5, 0.5))
    assert float(jnp.abs(free).max()) > 0.5
    np.testing.assert_array_equal(predict_noise(schedule, 0 * Z, Z, 900), 0 * Z)


@pytest.mark.parametrize(("kind", "clip"), [("v_prediction", False), ("sample", True)])
def test_the_step_from_pure_noise_is_finite(kind, clip):
    schedule = stable(rescale_betas_zero_snr=True, prediction_type=kind, clip_sample=clip)
    for eta in (0.0, 1.0):
        step, gradient = jax.value_and_grad(
            lambda z: ddim_step(schedule, 0.1 * z, z, 999, 979, eta, Z).sum()  # noqa: B023
        )(jnp.asarray(Z))
        assert np.isfinite(step)
        assert np.isfinite(gradient).all()


def test_what_no_prediction_says_is_not_made_up():
    zero = stable(rescale_betas_zero_snr=True, clip_sample=True)
    assert np.isnan(predict_clean(zero, 0 * Z, Z, 999)).all()  # clipping would hide an infinity
    clean = stable(prediction_type="sample", set_alpha_to_one=True)
    assert np.isnan(predict_noise(clean, 0 * Z, Z, -1)).all()


def test_eta_1_draws_from_the_posterior_of_the_training_process():
    """With the clean latents known, mean and variance are those of q(z_s | z_t, z_0) (Ho et al., equations 6 and 7)."""
    schedule, t, s = stable(prediction_type="sample"), 600, 580
    a_t, a_s = (float(schedule.alpha_bars[i]) for i in (t, s))
    mean = np.sqrt(a_s) * (1 - a_t / a_s) / (1 - a_t) * Z[:, ::-1] + np.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t) * Z
    deviation = np.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
    found = [ddim_step(schedule, Z[:, ::-1], Z, t, s, 1.0, np.full_like(Z, noise)) for noise in (0, 1)]
    np.testing.assert_allclose(found[0], mean, atol=1e-5)
    np.testing.assert_allclose(found[1] - found[0], np.full_like(Z, deviation), atol=1e-5)


def test_gradients_flow_through_a_step_to_latents_and_network():
    def loss(z, weight):
        return jnp.square(ddim_step(STABLE_DIFFUSION, weight * jnp.tanh(z), z, 500, 480)).sum()

    check_grads(loss, (jnp.asarray(Z), 0.5), order=1, modes=["rev"], rtol=1e-2)


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
def test_matched_steps_with_a_perfect_network_end_at_the_clean_latents(spacing):
    schedule = stable(timestep_spacing=spacing, set_alpha_to_one=True)
    clean, noise = 0.3 * Z, Z[:, ::-1]
    alpha, beta = levels(schedule, timesteps(schedule, 7, 0))
    z = jnp.sqrt(alpha) * clean + jnp.sqrt(beta) * noise
    found = jax.jit(lambda z: sample(lambda z, t: noise, schedule, z, 7, convention="matched"))(z)
    np.testing.assert_allclose(found, clean, atol=1e-5)


@pytest.mark.parametrize("max_steps", [5, 9])
def test_a_scan_of_at_most_so_many_steps_is_the_loop(max_steps):
    scan = jax.jit(lambda z, steps: sample(denoise, STABLE_DIFFUSION, z, steps, max_steps=max_steps))
    np.testing.assert_allclose(scan(Z, 5), run(STABLE_DIFFUSION, Z, 5), rtol=1e-6)
    assert np.isnan(scan(Z, max_steps + 1)).all()


def test_gradients_flow_through_the_scan():
    loss = jax.jit(
        lambda z, steps: jnp.square(sample(denoise, STABLE_DIFFUSION, z, steps, max_steps=4)).sum(),
    )
    gradient = jax.grad(loss)(jnp.asarray(Z), 3)
    ahead, behind = (float(loss(Z + 1e-2 * sign * Z, 3)) for sign in (1, -1))
    assert float((gradient * Z).sum()) == pytest.approx((ahead - behind) / 2e-2, rel=1e-3)


def test_noise_of_an_image_does_not_depend_on_the_others():
    keys = jax.random.split(jax.random.key(3), 2)
    both = run(STABLE_DIFFUSION, Z, 4, 1.0, keys)
    np.testing.assert_allclose(run(STABLE_DIFFUSION, Z[1:], 4, 1.0, keys[1:]), both[1:], atol=1e-5)
    np.testing.assert_allclose(run(STABLE_DIFFUSION, Z, 4, 1.0, jax.random.key(3)), both, atol=1e-5)
    assert not np.allclose(run(STABLE_DIFFUSION, Z, 4, 1.0, jax.random.key(4)), both, atol=0.1)


def test_other_steps_seeds_and_etas_trace_nothing_again():
    traces = []

    def counted(z, t):
        traces.append(t.shape)
        return denoise(z, t)

    schedule = stable(timestep_spacing="trailing")
    sampled = jax.jit(lambda z, steps, eta, rng: sample(counted, schedule, z, steps, eta=eta, rng=rng))
    inverted = jax.jit(lambda z, steps: invert(counted, schedule, z, steps, 20))
    for steps in (1, 7, 20):
        sampled(Z, steps, steps / 20, jax.random.key(steps))
        inverted(Z, steps)
    # A loop traces its body once or twice for one program, and each call sees the whole batch.
    assert sampled._cache_size() == inverted._cache_size() == 1
    assert len(traces) <= 4
    assert set(traces) == {(2,)}


# -- inversion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
def test_noise_that_does_not_depend_on_the_latents_is_inverted_exactly(spacing):
    schedule = stable(timestep_spacing=spacing)

    def affine(z, t):
        return jnp.cos(t / 100.0)[:, None, None, None] * Z[:, ::-1] + 0.1

    there = jax.jit(lambda z, steps: invert(affine, schedule, z, steps, 50, convention="matched"))
    back = jax.jit(lambda z, steps: sample(affine, schedule, z, steps, convention="matched"))
    for steps in (1, 10, 50):
        path = there(Z, steps)
        np.testing.assert_allclose(back(path[steps], steps), Z, atol=1e-4)


def test_a_linear_network_is_inverted_the_better_the_more_steps():
    """The best network for Gaussian data of deviation 0.5 is linear in the latents."""

    def best(z, t):
        alpha, beta = (part[:, None, None, None] for part in levels(STABLE_DIFFUSION, t))
        return jnp.sqrt(beta) * z / (0.25 * alpha + beta)

    def error(steps):
        path = invert(best, STABLE_DIFFUSION, 0.5 * Z, steps, 500)
        return jnp.abs(sample(best, STABLE_DIFFUSION, path[steps], steps) - 0.5 * Z).max()

    errors = [float(jax.jit(error)(steps)) for steps in (10, 50, 500)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.01


def test_the_path_lies_at_the_levels_of_the_sampler():
    """Told the true noise, the path is the forward process at each level, and sampler step i starts from path[steps - i]."""
    schedule = stable(timestep_spacing="trailing", set_alpha_to_one=True)
    noise, steps = Z[:, ::-1], 7
    visited = []
    path = invert(
        lambda z, t: (jax.debug.callback(lambda t: visited.append(int(t[0])), t), noise)[1],
        *(schedule, Z, steps, 9),
        convention="matched",
    )
    assert path.shape == (10, *Z.shape)
    np.testing.assert_array_equal(path[0], Z)
    for index in range(steps):
        alpha, beta = levels(schedule, timesteps(schedule, steps, index))
        expected = jnp.sqrt(alpha) * Z + jnp.sqrt(beta) * noise
        np.testing.assert_allclose(path[steps - index], expected, atol=1e-5)
    np.testing.assert_array_equal(path[steps:], np.stack([path[steps]] * 3))
    jax.effects_barrier()
    assert sorted(visited) == sorted(timesteps(schedule, steps, jnp.arange(steps)).tolist())


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "steps", "message"),
    [
        ({}, 0, "0 steps of a model trained on 1000 timesteps: take from 1 to 1000"),
        ({}, -3, "-3 steps"),
        ({}, 1001, "1001 steps"),
        ({}, 2.5, "steps is one integer, not 2.5"),
        ({}, 1000, "start at timestep 1000, beyond the last, 999"),
        ({"steps_offset": 30}, 50, "start at timestep 1010"),
        ({}, 60, "60 steps do not fit max_steps=50"),
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 5, r"start at pure noise \(timestep 999\)"),
    ],
)
def test_steps_that_cannot_be(fields, steps, message):
    schedule = stable(**fields)
    with pytest.raises(InputError, match=message):
        check_steps(schedule, steps, 50 if steps == 60 else None)
    with pytest.raises(InputError, match=message):
        invert(denoise, schedule, Z, steps, 50 if steps == 60 else 1000)
    if steps == 60:
        return
    with pytest.raises(InputError, match=message):
        sample(denoise, schedule, Z, steps)
    if isinstance(steps, int):
        assert np.isnan(run(schedule, Z, steps)).all()
        assert np.isnan(path_of(schedule, Z, steps)).all()


def test_steps_that_can_be():
    check_steps(STABLE_DIFFUSION, 1)
    check_steps(stable(steps_offset=0), 1000, 1000)
    check_steps(stable(timestep_spacing="linspace", rescale_betas_zero_snr=True), np.int64(1))
    check_steps(stable(timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction"), 1000)
    check_steps(stable(rescale_betas_zero_snr=True), jnp.int32(50))


def test_arguments_that_do_not_fit():
    for eta in (0.5, jnp.float32(1)):
        with pytest.raises(InputError, match="give the noise, or the key"):
            ddim_step(STABLE_DIFFUSION, Z, Z, 500, 480, eta)
    with pytest.raises(InputError, match="give the noise, or the key"):
        jax.jit(lambda eta: sample(denoise, STABLE_DIFFUSION, Z, 5, eta=eta))(0.5)
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="eta is from 0 to 1"):
            ddim_step(STABLE_DIFFUSION, Z, Z, 500, 480, eta, Z)
    with pytest.raises(InputError, match=r"\[2, 3, 4, 4\] and \[2, 3, 4, 2\] do not fit"):
        sample(lambda z, t: jnp.concatenate([z, z], -1), STABLE_DIFFUSION, Z, 5)
    with pytest.raises(InputError, match=r"one timestep, or 2 for latents of \[2, 3, 4, 2\], not \[3\]"):
        ddim_step(STABLE_DIFFUSION, Z, Z, jnp.array([1, 2, 3]), 0)
    with pytest.raises(InputError, match="rng is one key"):
        sample(denoise, STABLE_DIFFUSION, Z, 5, eta=1.0, rng=jax.random.PRNGKey(0))
    with pytest.raises(InputError, match="one for each of 2 images"):
        sample(denoise, STABLE_DIFFUSION, Z, 5, eta=1.0, rng=jax.random.split(jax.random.key(0), 3))
    with pytest.raises(InputError, match="one integer for the whole batch"):
        jax.jit(lambda steps: sample(denoise, STABLE_DIFFUSION, Z, steps))(np.array([3, 4]))
    with pytest.raises(InputError, match="no convention 'mine'"):
        sample(denoise, STABLE_DIFFUSION, Z, 5, convention="mine")


def test_inversions_that_cannot_be():
    with pytest.raises(InputError, match="take the convention 'matched'"):
        invert(denoise, stable(timestep_spacing="linspace"), Z, 5, 5)
    with pytest.raises(InputError, match="set_alpha_to_one=False"):
        invert(denoise, stable(prediction_type="sample", set_alpha_to_one=True), Z, 5, 5)
    with pytest.raises(InputError, match="max_steps=0 leaves no step"):
        invert(denoise, STABLE_DIFFUSION, Z, 5, 0)


# -- diffusers --------------------------------------------------------------------------------------------------------


def reference(name, schedule, steps):
    """diffusers' scheduler of that name, with its timesteps set."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = getattr(diffusers, name)(**dataclasses.asdict(schedule))
    theirs.set_timesteps(steps)
    if schedule.prediction_type == "sample":
        # Near the clean level its float32 leaves 1 - alpha-bar with four digits, by whose root it divides; ours has seven.
        theirs.alphas_cumprod = (1 - theirs.betas.double()).cumprod(0)
        theirs.final_alpha_cumprod = theirs.initial_alpha_cumprod = theirs.alphas_cumprod[0]
    return theirs


def close(ours, theirs):
    """1e-5 of the largest latent: an untrained network's are not near 1."""
    ours, theirs = np.asarray(ours), theirs.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1.0, np.abs(theirs).max()))


SCHEDULES = [
    *(stable(prediction_type=kind, timestep_spacing=spacing) for kind in PREDICTIONS for spacing in SPACINGS),
    stable(prediction_type="epsilon", set_alpha_to_one=True, clip_sample=True, clip_sample_range=1.5),
    stable(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    NoiseSchedule(600, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False),
    NoiseSchedule(),
]


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.prediction_type}-{s.timestep_spacing}")
def test_parity_of_sampling_with_diffusers(schedule, eta):
    torch = pytest.importorskip("torch")
    rng = jax.random.split(jax.random.key(1), len(Z))
    for steps in STEPS:
        theirs, z = reference("DDIMScheduler", schedule, steps), torch.from_numpy(Z)
        for index, t in enumerate(theirs.timesteps):
            drawn = (
                [jax.random.normal(jax.random.fold_in(key, index), Z.shape[1:], Z.dtype) for key in rng] if eta else [Z]
            )
            noise = torch.from_numpy(np.stack(drawn)) if eta else None
            z = theirs.step(network(torch, z, t), t, z, eta=eta, variance_noise=noise).prev_sample
        close(run(schedule, Z, steps, eta, rng) if eta else run(schedule, Z, steps), z)


@pytest.mark.parametrize(
    "schedule",
    [s for s in SCHEDULES if s.timestep_spacing != "linspace"],
    ids=lambda s: f"{s.prediction_type}-{s.timestep_spacing}",
)
def test_parity_of_inversion_with_diffusers(schedule):
    torch = pytest.importorskip("torch")
    for steps in STEPS:
        theirs, z = reference("DDIMInverseScheduler", schedule, steps), torch.from_numpy(Z)
        expected = [z]
        for t in theirs.timesteps:
            z = theirs.step(network(torch, z, t), t, z).prev_sample
            expected.append(z)
        close(path_of(schedule, Z, steps)[: steps + 1], torch.stack(expected))
