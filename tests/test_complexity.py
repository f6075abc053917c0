"""Counts of parameters and multiplications against counts by hand and published ones."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxsem.backbones.clip import VisionTower
from jaxsem.backbones.clip_config import VIT_L14
from jaxsem.backbones.convnext import CONFIGS, ConvNext
from jaxsem.codecs import Elic, ElicConfig
from jaxsem.complexity import Complexity, complexity, kmac_per_pixel, module_complexity
from jaxsem.errors import InputError
from jaxsem.nn.conv import CheckerboardConv, Deconv
from jaxsem.nn.transformer import Block, scan_layers
from jaxsem.nn.unet import Unet, UnetConfig


def shape(*sides, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sides, dtype)


def macs(fn, *arguments, **options):
    """Both counts, which must be equal."""
    found = complexity(fn, *arguments, **options)
    assert found.macs == found.textbook_macs
    return found.macs


def convolve(x, kernel, stride=1, padding="SAME", **options):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layout, **options)


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_a_dense_layer():
    found = module_complexity(nn.Dense(11), shape(5, 7))
    assert found == Complexity(7 * 11 + 11, 5 * 7 * 11, 5 * 7 * 11, 2 * 5 * 7 * 11 + 5 * 11)


def test_a_batched_product_over_two_axes():
    assert macs(lambda a, b: jnp.einsum("bijk,bjkl->bil", a, b), shape(2, 3, 4, 5), shape(2, 4, 5, 6)) == 720


def test_a_convolution():
    assert macs(functools.partial(convolve, stride=2), shape(1, 9, 8, 4), shape(3, 3, 4, 6)) == 5 * 4 * 9 * 4 * 6


def test_the_zeros_around_an_image_count_but_not_for_xla():
    found = complexity(convolve, shape(1, 4, 4, 1), shape(3, 3, 1, 1))
    assert (found.macs, found.textbook_macs, found.flops_xla) == (144, 144, 2 * 100)


def test_a_grouped_convolution():
    grouped = functools.partial(convolve, feature_group_count=2)
    assert macs(grouped, shape(1, 8, 8, 4), shape(3, 3, 2, 6)) == 64 * 9 * 2 * 6


def test_a_dilated_convolution():
    dilated = functools.partial(convolve, padding="VALID", rhs_dilation=(2, 3))
    assert macs(dilated, shape(1, 9, 9, 4), shape(3, 3, 4, 6)) == 5 * 3 * 9 * 4 * 6


def test_a_depthwise_convolution():
    depthwise = functools.partial(convolve, feature_group_count=5)
    assert macs(depthwise, shape(1, 8, 8, 5), shape(7, 7, 1, 5)) == 64 * 49 * 5


def test_attention():
    query = shape(2, 9, 4, 8)  # 4 heads of 8
    assert macs(jax.nn.dot_product_attention, query, query, query) == 2 * 4 * 2 * 9 * 9 * 8


class Stack(nn.Module):
    """Three transformer layers in one scan."""

    remat: bool = False
    last: int | None = None

    @nn.compact
    def __call__(self, x):
        return scan_layers(Block(4, 48, name="blocks"), x, layers=3, last=self.last, remat=self.remat)[0]


LAYER = 9 * (4 * 32 * 32 + 2 * 32 * 48) + 2 * 9 * 9 * 32


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_of_three_layers(remat):
    found = module_complexity(Stack(remat), shape(1, 9, 32))
    assert (found.macs, found.textbook_macs) == (3 * LAYER, 3 * LAYER)
    assert found.parameters == 3 * (4 * (32 * 32 + 32) + 32 * 48 + 48 + 48 * 32 + 32 + 4 * 32)


def test_a_span_of_a_scan():
    assert module_complexity(Stack(last=2), shape(1, 9, 32)).macs == 2 * LAYER


def test_what_is_wrapped_is_counted_once():
    product = lambda a, b: a @ b  # noqa: E731
    custom = jax.custom_vjp(product)
    custom.defvjp(lambda a, b: (a @ b, (a, b)), lambda saved, slope: saved)
    tangent = jax.custom_jvp(product)
    tangent.defjvp(lambda values, slopes: (values[0] @ values[1], slopes[0] @ values[1]))
    for wrapped in (jax.jit(product), jax.checkpoint(product), custom, tangent, jax.jit(jax.jit(product))):
        assert macs(wrapped, shape(3, 4), shape(4, 5)) == 60


def test_a_gradient_takes_two_more_products():
    loss = lambda a, b: (a @ b).sum()  # noqa: E731
    assert macs(jax.grad(lambda a, b: jnp.square(a @ b).sum(), (0, 1)), shape(3, 4), shape(4, 5)) == 3 * 60
    assert macs(jax.grad(loss), shape(3, 4), shape(4, 5)) == 2 * 60


def test_loops_inside_loops_multiply():
    def run(a, x):
        inner = lambda x, _: (x @ a, None)  # noqa: E731
        return lax.fori_loop(0, 5, lambda _, x: lax.scan(inner, x, None, length=3)[0] @ a, x)

    assert macs(run, shape(4, 4), shape(2, 4)) == 5 * 4 * 32


def test_the_longest_branch_counts():
    def run(a, x):
        return lax.switch(x[0, 0].astype(int), [lambda x: x, lambda x: x @ a @ a, lambda x: x @ a], x)

    assert macs(run, shape(4, 4), shape(2, 4)) == 2 * 32


def doubling(a, x):
    return lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ a, x)


def test_a_loop_of_unknown_length_is_asked_for():
    with pytest.raises(InputError, match="give loop_steps, how many to count"):
        complexity(doubling, shape(4, 4), shape(2, 4))
    assert macs(doubling, shape(4, 4), shape(2, 4), loop_steps=7) == 7 * 32


def test_a_loop_that_does_not_multiply_needs_no_length():
    assert macs(lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: 2 * x, x) @ x, shape(4, 4)) == 64


def test_what_cannot_be_seen_into_is_refused():
    with pytest.raises(InputError, match="inside a ragged_dot_general cannot be counted"):
        complexity(lax.ragged_dot, shape(4, 3), shape(2, 3, 5), shape(2, dtype=jnp.int32))


# -- zeros by construction --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 5])
def test_a_transposed_convolution_is_counted_as_done_and_as_written(size):
    x, module = shape(1, 6, 7, 4), Deconv(8, size)
    found = module_complexity(module, x)
    done = {3: 2 * 2, 5: 3 * 3}[size]  # taps of each of the four phases, the longest's
    assert found.textbook_macs == 6 * 7 * size**2 * 4 * 8
    assert found.macs == 6 * 7 * 4 * done * 4 * 8


def test_a_convolution_over_a_spread_input_has_the_same_textbook_count():
    x = shape(1, 6, 7, 4)
    spread = functools.partial(convolve, padding=((2, 3), (2, 3)), lhs_dilation=(2, 2))
    found = complexity(lambda kernel, x: spread(x, kernel), shape(5, 5, 4, 8), x)
    assert found.textbook_macs == module_complexity(Deconv(8), x).textbook_macs
    assert found.macs == 4 * found.textbook_macs
    theirs = module_complexity(nn.ConvTranspose(8, (5, 5), (2, 2)), x)
    assert (theirs.macs, theirs.textbook_macs) == (found.macs, found.textbook_macs)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda fn: jax.jit(jax.checkpoint(fn))])
def test_zeros_are_seen_through_wrappers(wrap):
    module, x = Deconv(8), shape(1, 6, 7, 4)
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    assert complexity(wrap(module.apply), params, x).textbook_macs == 6 * 7 * 25 * 4 * 8


def test_zeros_are_seen_in_loops():
    module, x = Deconv(8), shape(1, 6, 7, 4)
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    stacked = jax.tree.map(lambda leaf: shape(3, *leaf.shape), params)

    def shared(params, x):
        return lax.fori_loop(0, 3, lambda _, y: y + module.apply(params, x).sum(), 0.0)

    def layers(params, x):
        return lax.scan(lambda y, params: (y + module.apply(params, x).sum(), None), 0.0, params)[0]

    for found in (complexity(shared, params, x), complexity(layers, stacked, x)):
        assert found.textbook_macs == 3 * 6 * 7 * 25 * 4 * 8
        assert found.macs == 3 * 6 * 7 * 36 * 4 * 8


def test_zeros_are_seen_in_another_type():
    found = module_complexity(Deconv(8, dtype=jnp.bfloat16), shape(1, 6, 7, 4))
    assert found.textbook_macs == 6 * 7 * 25 * 4 * 8


def test_a_masked_kernel_counts_what_is_not_masked():
    found = module_complexity(CheckerboardConv(8), shape(1, 6, 7, 4))
    assert (found.macs, found.textbook_macs) == (6 * 7 * 25 * 4 * 8, 6 * 7 * 12 * 4 * 8)


@pytest.mark.parametrize(
    "change",
    [
        lambda kernel: jnp.maximum(kernel, 0),
        lambda kernel: kernel * (kernel > 0),
        lambda kernel: jnp.where(kernel > 1, kernel, 0),
        lambda kernel: kernel + jnp.zeros_like(kernel),
        lambda kernel: kernel[jnp.argsort(kernel.sum((1, 2, 3)))],
    ],
)
def test_a_kernel_that_only_happens_to_hold_zeros_counts_in_full(change):
    assert macs(lambda kernel, x: convolve(x, change(kernel)), shape(3, 3, 4, 8), shape(1, 5, 5, 4)) == 25 * 9 * 4 * 8


# -- XLA's count ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unroll", [1, 2, 3, 7, 9])
def test_xla_counts_all_steps_of_a_scan(unroll):
    def run(a, x):
        return lax.scan(lambda x, _: (x @ a, None), x, None, length=7, unroll=unroll)[0]

    found = complexity(run, shape(16, 16), shape(8, 16)).flops_xla
    assert found == pytest.approx(7 * 2 * 8 * 16 * 16, rel=1e-3)  # and a counter


def test_xla_counts_all_steps_of_nested_loops():
    def run(a, x):
        inner = lambda x, _: (x @ a, None)  # noqa: E731
        return lax.scan(lambda x, _: (lax.scan(inner, x, None, length=3)[0], None), x, None, length=4)[0]

    assert complexity(run, shape(16, 16), shape(8, 16)).flops_xla == pytest.approx(12 * 2 * 8 * 16 * 16, rel=1e-3)
    found = complexity(doubling, shape(16, 16), shape(8, 16), loop_steps=5)
    assert found.flops_xla == pytest.approx(5 * (2 * 8 * 16 * 16 + 8 * 16), rel=1e-2)


# -- parameters -------------------------------------------------------------------------------------------------------


def test_only_the_parameters_of_the_variables_count():
    x, norm = shape(2, 5), nn.BatchNorm(use_running_average=True)
    assert module_complexity(norm, x).parameters == 10
    params = jax.eval_shape(norm.init, jax.random.key(0), x)
    assert complexity(norm.apply, params, x).parameters == 10
    assert complexity(lambda params, x: x, [shape(3), {"a": shape(2, 2)}], x).parameters == 7
    assert module_complexity(nn.Dropout(0.5, deterministic=True), x).parameters == 0


def test_sizes_that_no_memory_holds_are_counted():
    side = 1 << 22
    found = module_complexity(nn.Dense(side, use_bias=False), shape(1, side))
    assert (found.parameters, found.macs) == (1 << 44, 1 << 44)


def test_thousands_to_a_pixel():
    assert kmac_per_pixel(16_709_582_848, 256, 256) == 254.968
    with pytest.raises(InputError, match="an image of 0x4 has no pixels"):
        kmac_per_pixel(1, 0, 4)


# -- published models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "inputs", "parameters", "as_done"),
    [("synthesize", (1, 16, 16, 320), 7_337_475, 290.872), ("analysis", (1, 256, 256, 3), 7_337_792, 254.968)],
)
def test_elics_transforms(method, inputs, parameters, as_done):
    """254.97 kMAC a pixel each, from the published layer list."""
    found = module_complexity(Elic(ElicConfig()), shape(*inputs), shape(1), method=method)
    assert found.parameters == parameters
    assert kmac_per_pixel(found.textbook_macs, 256, 256) == 254.968
    assert kmac_per_pixel(found.macs, 256, 256) == as_done


def test_the_u_net():
    """48.18 GMAC, counting its transposed convolutions by their inputs."""
    found = module_complexity(Unet(UnetConfig()), shape(1, 256, 256, 3))
    assert found.parameters == 31_037_763
    assert found.macs == found.textbook_macs
    assert round(kmac_per_pixel(found.macs, 256, 256), 1) == 735.1


def test_the_first_two_layers_of_clip():
    """6.892 GMAC at 224x224, to a pixel of 256x256."""
    tower = VisionTower(dataclasses.replace(VIT_L14.vision, layers=2))

    def first_two(tower, images):
        return tower.run_layers(tower.embed(images))

    found = module_complexity(tower, shape(1, 224, 224, 3), method=first_two)
    assert found.parameters == 602_112 + 2 * 12_596_224 + 1024 + 257 * 1024 + 2 * 1024
    assert round(kmac_per_pixel(found.macs, 256, 256), 2) == 105.17
    whole = module_complexity(
        VisionTower(VIT_L14.vision), shape(1, 224, 224, 3), method=lambda t, x: t.run_layers(t.embed(x), 0, 2)
    )
    assert (whole.macs, whole.parameters) == (found.macs, 602_112 + 24 * 12_596_224 + 1024 + 257 * 1024 + 2 * 1024)


def test_convnext():
    """open_clip lists 30.71 GFLOPs, two to a MAC, for the image side of convnext_base."""
    found = module_complexity(ConvNext(CONFIGS["convnext_base"]), shape(1, 224, 224, 3))
    assert round(2 * found.macs / 1e9, 2) == 30.71
