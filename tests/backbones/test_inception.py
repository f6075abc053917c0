"""FID's Inception against a torch network of the same small weights, and what needs no reference."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import perceptual_reference as reference
import pytest
from flax.traverse_util import flatten_dict

from jaxsem.backbones.inception import Block, Inception, InceptionConfig, Mixed, param_shapes
from jaxsem.errors import InputError
from jaxsem.weights.perceptual import load_inception

CONFIG = InceptionConfig(narrow=reference.NARROW)


def images(count=2, height=75, width=107):
    return np.random.RandomState(1).uniform(-1, 1, (count, height, width, 3)).astype(np.float32)


def test_the_features_are_those_of_the_reference():
    """107 columns leave three positions before the mean: padding of every pool, inside and outside, is seen."""
    net, torch = reference.inception(), reference.import_torch()
    module, params = load_inception(reference.state_of(net), CONFIG)
    found = jax.jit(module.apply)({"params": params}, images())
    with torch.no_grad():
        wanted = copy.deepcopy(net).double()(reference.planes(images())).numpy()
    assert found.shape == (2, 128)
    assert found.dtype == jnp.float32
    assert 0.05 < wanted.std() < 30  # lively
    assert np.abs(wanted[0] - wanted[1]).max() > 0.1 * wanted.std()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * wanted.std())


@pytest.mark.parametrize(("pool", "wanted"), [("average", 2), ("max", 1)])
def test_a_pool_leaves_out_what_lies_outside(pool, wanted):
    """The corner sees -1, -2, -2 and -3; zeros around them would make the average smaller and the maximum 0."""
    x = -np.float32([[1, 2, 9], [2, 3, 9], [9, 9, 9]]).reshape(1, 3, 3, 1)
    module = Mixed(Block({"branch_pool": ((1, 1, 1),)}, pool), 1, {})
    params = module.init(jax.random.key(0), x)["params"]
    params["branch_pool"]["conv"]["kernel"] = -jnp.ones((1, 1, 1, 1))
    found = module.apply({"params": params}, x)[0, 0, 0, 0]
    np.testing.assert_allclose(found, wanted / np.sqrt(1.001), rtol=1e-6)


def test_the_published_network_has_its_number_of_parameters():
    """21,785,568 are learned, as torchvision's InceptionV3 without classifiers has; the statistics come beside them."""
    shapes = flatten_dict(param_shapes(Inception()), sep="/")
    statistics = sum(leaf.size for name, leaf in shapes.items() if name.endswith(("mean", "variance")))
    assert sum(leaf.size for leaf in shapes.values()) - statistics == 21_785_568
    assert statistics == 2 * 17_216


def test_the_published_network_has_the_shapes_of_the_reference():
    torch = reference.import_torch()
    with torch.device("meta"):
        net = reference.inception_module(narrow=1)
    kernels = {
        key: (*value.shape[2:], value.shape[1], value.shape[0])
        for key, value in net.state_dict().items()
        if "conv" in key
    }
    names = {
        key.replace("Conv2d", "stem").replace("Mixed", "mixed").replace(".", "/").replace("weight", "kernel"): shape
        for key, shape in kernels.items()
    }
    shapes = flatten_dict(param_shapes(Inception()), sep="/")
    assert {name: leaf.shape for name, leaf in shapes.items() if "conv" in name} == names
    assert len(names) == 94


@pytest.mark.parametrize(("narrow", "features"), [(1, 2048), (4, 512), (16, 128)])
def test_widths_are_divided(narrow, features):
    module = Inception(InceptionConfig(narrow))
    x = jax.ShapeDtypeStruct((3, 299, 299, 3), jnp.float32)
    found = jax.eval_shape(lambda p, x: module.apply({"params": p}, x), param_shapes(module), x)
    assert found.shape == (3, features)
    assert module.config.features == features


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"narrow": 0}, "narrowed by 0: give a divisor of 16"),
        ({"narrow": 3}, "narrowed by 3: give a divisor of 16"),
        ({"image_size": 74}, "images of 74 pixels: give at least 75"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        InceptionConfig(**fields)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(
        InputError, match="an image of 80x74 is too small for this Inception: each side takes at least 75"
    ):
        Inception(CONFIG).apply({"params": {}}, np.zeros((1, 74, 80, 3), np.float32))
    with pytest.raises(InputError, match="floats, not uint8"):
        Inception(CONFIG).apply({"params": {}}, np.zeros((1, 75, 75, 3), np.uint8))
