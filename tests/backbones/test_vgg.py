"""VGG16's features against a torch network of the same small weights, and what needs no reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import perceptual_reference as reference
import pytest

from jaxsem.backbones.vgg import Vgg, VggConfig, param_shapes
from jaxsem.errors import InputError
from jaxsem.weights.perceptual import load_vgg

CONFIG = VggConfig(reference.VGG_WIDTHS, reference.VGG_DEPTHS)
L2 = dataclasses.replace(CONFIG, pool="l2")
TINY = VggConfig((3, 4), (1, 2))


def images(count=2, height=37, width=50):
    return np.random.RandomState(1).standard_normal((count, height, width, 3)).astype(np.float32)


def drawn(config):
    random = np.random.RandomState(2)
    return jax.tree.map(
        lambda leaf: np.asarray(0.3 * random.standard_normal(leaf.shape), np.float32), param_shapes(Vgg(config))
    )


@pytest.mark.parametrize("config", [CONFIG, L2], ids=["max", "l2"])
def test_every_tap_is_that_of_the_reference(config):
    """Of 37x50 pixels a maximum drops some rows and columns, and the L2 pool keeps them."""
    module, params = load_vgg(reference.state_of(reference.vgg()), config)
    found = jax.jit(module.apply)({"params": params}, images())
    torch = reference.import_torch()
    with torch.no_grad():
        wanted = reference.taps(reference.vgg(), reference.planes(images()), reference.VGG_TAPS, config.pool == "l2")
    assert len(found) == len(wanted) == 5
    for i, (ours, theirs) in enumerate(zip(found, wanted)):
        theirs = np.moveaxis(theirs.numpy(), 1, -1)
        assert 0.05 < theirs.std() < 30, i  # lively
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * theirs.std(), err_msg=str(i))


@pytest.mark.parametrize("pool", ["max", "l2"])
def test_vgg16_has_its_number_of_parameters(pool):
    shapes = param_shapes(Vgg(VggConfig(pool=pool)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 14_714_688
    assert len(shapes) == 13


def test_vgg16_has_its_taps():
    module, x = Vgg(), jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    found = jax.eval_shape(lambda p, x: module.apply({"params": p}, x), param_shapes(module), x)
    widths = (64, 128, 256, 512, 512)
    assert [tap.shape for tap in found] == [(1, 64 >> i, 96 >> i, width) for i, width in enumerate(widths)]


def test_an_l2_pool_of_nothing_has_a_finite_gradient():
    module = Vgg(VggConfig((3, 4), (1, 1), "l2"))
    params = jax.tree.map(jnp.zeros_like, drawn(module.config))
    gradient = jax.grad(lambda p, x: sum(tap.sum() for tap in module.apply({"params": p}, x)))(params, images(1, 8, 8))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_an_l2_pool_of_a_constant_is_the_constant_inside():
    """Windows that reach over the border see zeros there."""
    module = Vgg(VggConfig((1, 1), (1, 1), "l2"))
    kernel = np.zeros((3, 3, 3, 1), np.float32)
    one = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 1, 0], one[1, 1] = 1, 1
    zero = np.zeros(1, np.float32)
    params = {"conv1_1": {"kernel": kernel, "bias": zero}, "conv2_1": {"kernel": one, "bias": zero}}
    _, pooled = module.apply({"params": params}, np.full((1, 6, 6, 3), 3.0, np.float32))
    np.testing.assert_allclose(pooled[0, 1:, 1:, 0], 3, rtol=1e-6)
    np.testing.assert_allclose(pooled[0, 0, 0, 0], 3 * 0.75, rtol=1e-6)


def test_bfloat16_computes_nearly_the_same():
    params = drawn(TINY)
    exact = Vgg(TINY).apply({"params": params}, images())
    rough = Vgg(TINY, jnp.bfloat16).apply({"params": params}, images())
    for ours, theirs in zip(rough, exact):
        assert ours.dtype == jnp.bfloat16
        difference = np.abs(np.float32(ours) - theirs).mean()
        assert 0 < difference < 0.02 * np.abs(theirs).mean()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": ()}, r"widths \[\] and depths \[1, 2\]: give one of each"),
        ({"depths": (1,)}, r"depths \[1\]: give one of each"),
        ({"depths": (1, 0)}, "a size of 0: every size is at least 1"),
        ({"pool": "mean"}, "there is no pool 'mean'"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **fields)


@pytest.mark.parametrize(("config", "smallest"), [(CONFIG, 16), (L2, 1)])
def test_the_smallest_image_has_taps_and_one_below_is_refused(config, smallest):
    module, params = Vgg(config), param_shapes(Vgg(config))

    def taps(height, width):
        return jax.eval_shape(module.apply, {"params": params}, jax.ShapeDtypeStruct((1, height, width, 3), "float32"))

    assert all(tap.size for tap in taps(smallest, smallest + 1))
    if smallest > 1:
        with pytest.raises(
            InputError, match="an image of 99x15 is too small for this VGG: each side takes at least 16"
        ):
            taps(smallest - 1, 99)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((1, 16, 16, 3), np.uint8), r"floats, not uint8 of shape \[1, 16, 16, 3\]"),
        (np.zeros((16, 16, 3), np.float32), r"not float32 of shape \[16, 16, 3\]"),
        (np.zeros((1, 16, 16, 1), np.float32), r"not float32 of shape \[1, 16, 16, 1\]"),
    ],
)
def test_inputs_that_are_no_images_are_refused(array, message):
    with pytest.raises(InputError, match=message):
        Vgg(TINY).apply({"params": drawn(TINY)}, array)
