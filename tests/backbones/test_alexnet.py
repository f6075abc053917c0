"""AlexNet's features against a torch network of the same small weights, and what needs no reference."""

import jax
import numpy as np
import perceptual_reference as reference
import pytest

from jaxsem.backbones.alexnet import AlexNet, AlexNetConfig, param_shapes
from jaxsem.errors import InputError
from jaxsem.weights.perceptual import load_alexnet

CONFIG = AlexNetConfig(reference.ALEX_WIDTHS)


@pytest.mark.parametrize(("height", "width"), [(31, 64), (70, 47)])
def test_every_tap_is_that_of_the_reference(height, width):
    images = np.random.RandomState(1).standard_normal((2, height, width, 3)).astype(np.float32)
    module, params = load_alexnet(reference.state_of(reference.alexnet()), CONFIG)
    found = jax.jit(module.apply)({"params": params}, images)
    torch = reference.import_torch()
    with torch.no_grad():
        wanted = reference.taps(reference.alexnet(), reference.planes(images), reference.ALEX_TAPS)
    assert len(found) == len(wanted) == 5
    for i, (ours, theirs) in enumerate(zip(found, wanted)):
        theirs = np.moveaxis(theirs.numpy(), 1, -1)
        assert 0.05 < theirs.std() < 30, i  # lively
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * theirs.std(), err_msg=str(i))


def test_alexnet_has_its_number_of_parameters():
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(AlexNet()))) == 2_469_696


@pytest.mark.parametrize("widths", [(1, 2, 3, 4), (1, 2, 3, 4, 0)])
def test_sizes_that_cannot_be_are_refused(widths):
    with pytest.raises(InputError, match="give five, each at least 1"):
        AlexNetConfig(widths)


def test_images_that_are_too_small_are_refused():
    module = AlexNet(CONFIG)
    with pytest.raises(
        InputError, match="an image of 40x30 is too small for this AlexNet: each side takes at least 31"
    ):
        module.apply({"params": {}}, np.zeros((1, 30, 40, 3), np.float32))
