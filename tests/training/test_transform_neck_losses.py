"""The surrogate loss and the scenarios of the transform-neck, term by term."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.errors import InputError
from jaxsem.training.transform_neck import (
    RELEASED,
    Surrogate,
    class_logits,
    cross_entropy,
    distance_of,
    distillation,
    joint_loss,
    surrogate_loss,
)

FOUND = {
    "tokens": jax.random.normal(jax.random.key(0), (2, 5, 4)),
    "feature": jax.random.normal(jax.random.key(1), (2, 3)),
}
TEACHER = {name: value + 0.5 for name, value in FOUND.items()}
TEXTS = jnp.eye(3)
SHARES = jnp.array([[1, 0, 0], [0, 0.5, 0.5]])


@pytest.mark.parametrize(
    ("progress", "weights"),
    [(0.0, (1, 0)), (0.33, (1, 0)), (0.34, (1, 100)), (0.66, (1, 100)), (0.67, (0, 100)), (1.0, (0, 100))],
)
def test_the_three_phases_weigh_as_in_equation_4(progress, weights):
    assert tuple(map(float, Surrogate().weights(jnp.float32(progress)))) == weights


def test_one_program_serves_all_phases():
    run = jax.jit(lambda at: Surrogate().weights(at))
    for progress in (0.1, 0.5, 0.9):
        run(progress)
    assert run._cache_size() == 1


def test_distillation_is_the_mean_squared_error_and_moves_the_student_only():
    loss, (student, teacher) = jax.value_and_grad(distillation, argnums=(0, 1))(FOUND["tokens"], TEACHER["tokens"])
    assert float(loss) == pytest.approx(0.25)
    np.testing.assert_allclose(student, -1.0 / 40, rtol=1e-5)
    assert not np.any(teacher)


@pytest.mark.parametrize(("kind", "expected"), [("tokens", 0.25), ("patches", 0.25), ("feature", 0.25)])
def test_what_is_distilled_is_chosen(kind, expected):
    teacher = {**TEACHER, "tokens": TEACHER["tokens"].at[:, 0].add(1.0)}  # the class token is further away
    wanted = {"tokens": 0.25 + (1.5**2 - 0.25) / 5, "patches": 0.25, "feature": 0.25}[kind]
    assert float(distance_of(FOUND, teacher, kind)) == pytest.approx(wanted, rel=1e-5)
    assert expected <= wanted


def test_cosine_logits_do_not_depend_on_the_length_and_released_ones_do():
    for kind, changes in (("cosine", False), ("released", True)):
        one, twice = (class_logits(k * FOUND["feature"], TEXTS, 20.0, kind) for k in (1, 2))
        assert np.allclose(one, twice, atol=1e-4) != changes
    cosines = class_logits(FOUND["feature"], TEXTS, 1.0, "cosine")
    np.testing.assert_allclose(np.square(cosines).sum(axis=1), 1.0, rtol=1e-5)


def test_classes_that_share_an_image_share_the_cross_entropy():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]]))
    expected = -(np.log(0.5) + np.log(0.4)) / 2
    assert float(cross_entropy(logits, SHARES)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [Surrogate(), RELEASED])
def test_the_surrogate_loss_is_the_weighted_sum_of_its_parts(options):
    loss, parts = surrogate_loss(FOUND, TEACHER, SHARES, TEXTS, 20.0, options, 0.5)
    assert float(loss) == pytest.approx(float(parts["cross_entropy"] + 100 * parts["distillation"]), rel=1e-5)
    early, _ = surrogate_loss(FOUND, TEACHER, SHARES, TEXTS, 20.0, options, 0.0)
    assert float(early) == pytest.approx(float(parts["cross_entropy"]), rel=1e-5)


def test_d2_is_d3_and_the_image_s_distortion():
    x = jnp.full((2, 8, 8, 3), 0.5)
    outputs = {"x_hat": x + 0.1, "bits_y": jnp.array([64.0, 128.0]), "bits_z": jnp.array([0.0, 64.0])}
    distance, weight = jnp.array([0.3, 0.6]), jnp.array([0.001, 0.01])
    d2, metrics = joint_loss(x, outputs, distance, weight, "d2")
    d3, _ = joint_loss(x, outputs, distance, weight, "d3")
    assert float(metrics["bpp"]) == pytest.approx(2.0)
    assert float(metrics["psnr"]) == pytest.approx(20.0, rel=1e-4)
    assert float(d2 - d3) == pytest.approx(float((weight * 255**2 * 0.01).mean()), rel=1e-4)
    # gamma : delta = 60 : 1, for images in [0, 1].
    assert float(d3) == pytest.approx(2.0 + float((weight * 255**2 / 60 * distance).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "seen"),
    [
        ({"distill": "pixels"}, "distill='pixels' is not one of tokens"),
        ({"logits": "euclid"}, "logits='euclid'"),
        ({"cross_entropy": -1.0}, "weights of -1.0"),
        ({"cross_entropy": 0.0, "distillation": 0.0}, "one above it"),
        ({"phases": (0.7, 0.3)}, "rising"),
    ],
)
def test_impossible_options_are_refused(fields, seen):
    with pytest.raises(InputError, match=seen):
        Surrogate(**fields)
