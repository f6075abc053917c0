"""The U-Net against diffusers' with the same small random weights, and what needs no reference."""

import dataclasses
import functools

import diffusion_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_reference import close, first, last, some
from flax.traverse_util import flatten_dict

from jaxsem.backbones.unet_2d_condition import (
    CONFIGS,
    SD15,
    SD21,
    UnetCondition,
    UnetConditionConfig,
    UnetEncoder,
    UnetStates,
    param_shapes,
)
from jaxsem.errors import InputError
from jaxsem.weights.diffusion import load_unet_condition

TINY = UnetConditionConfig(
    widths=(16, 32), layers=1, down_attention=(True, False), up_attention=(False, True), heads=(2, 4), depths=(1, 2),
    context_width=12, groups=8,
)  # fmt: skip


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def pair(request):
    """A network of diffusers, and ours with its parameters."""
    net = reference.model(request.param)
    config = UnetConditionConfig.from_json(reference.config(request.param))
    return net, *load_unet_condition(reference.state_of(net), config)


@pytest.fixture(scope="module")
def params():
    """Seeded parameters of `TINY` that need no torch."""
    random = np.random.RandomState(3)

    def draw(path, leaf):
        normal = random.standard_normal(leaf.shape)
        stacked = any(key.key == "blocks" for key in path)
        spread = np.prod(leaf.shape[stacked:-1]) ** -0.5 if path[-1].key == "kernel" else 0.2
        return np.asarray(spread * normal + (path[-1].key == "scale"), np.float32)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(UnetCondition(TINY)))


def inputs(config, height=8, width=12):
    """A sample, timesteps and a context."""
    sample = some(2, height, width, config.in_channels)
    return sample, np.array([3, 981]), some(2, 7, config.context_width, seed=1)


def tensors(sample, times, context):
    return first(sample), first(times), first(context)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def run(module, params, *args, method="__call__"):
    return module.apply({"params": params}, *args, method=method)


# -- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "times"),
    [((8, 12), [3, 981]), ((5, 3), [0.5, 700.25])],
    ids=["even size, steps", "odd size, between steps"],
)
def test_it_predicts_what_diffusers_does(pair, size, times):
    net, module, params = pair
    sample, _, context = inputs(module.config, *size)
    given = sample, np.array(times), context
    close(run(module, params, *given), net(*tensors(*given)).sample, atol=1e-4)


def test_residuals_are_added_as_in_diffusers(pair):
    net, module, params = pair
    given = inputs(module.config)
    states = run(module, params, *given, method="encode")
    skips = [some(*skip.shape, seed=i + 2) for i, skip in enumerate(states.skips)]
    middle = some(*states.middle.shape, seed=99)
    want = net(
        *tensors(*given),
        down_block_additional_residuals=tuple(map(first, skips)),
        mid_block_additional_residual=first(middle),
    ).sample
    found = run(module, params, states.add(skips, middle), given[2], method="decode")
    close(found, want, atol=1e-4)
    assert np.abs(found - last(net(*tensors(*given)).sample)).max() > 0.1


def test_the_encoder_alone_is_the_trunk_of_a_controlnet():
    """Without their zeros, the last convolutions of a ControlNet show the states that it begins with."""
    torch, diffusers = reference.import_reference()
    net = reference.model("sd1")
    config = UnetConditionConfig.from_json(reference.config("sd1"))
    params = load_unet_condition(reference.state_of(net), config)[1]
    control = diffusers.ControlNetModel.from_unet(net, conditioning_embedding_out_channels=(8, 16)).eval()
    control.requires_grad_(False)
    for conv in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        conv.weight.copy_(torch.eye(len(conv.bias))[:, :, None, None])
    torch.manual_seed(3)
    torch.nn.init.normal_(control.controlnet_cond_embedding.conv_out.weight)
    given, picture = inputs(config), first(some(2, 16, 24, 3))
    skips, middle = control(*tensors(*given), picture, return_dict=False)
    hint = last(control.controlnet_cond_embedding(picture))
    assert hint.std() > 0.1
    found = run(UnetEncoder(config), params["encoder"], *given, hint)
    assert len(found.skips) == len(skips)
    for ours, theirs in zip((*found.skips, found.middle), (*skips, middle)):
        close(ours, theirs, atol=1e-4)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameters"), [("sd15", 859_520_964), ("sd21", 865_910_724)])
def test_published_ones_have_as_many_parameters_as_in_diffusers(name, parameters):
    shapes = param_shapes(UnetCondition(CONFIGS[name], param_dtype=jnp.bfloat16))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}


def test_the_states_are_twelve_skips_and_a_middle():
    module = UnetEncoder(SD15)
    given = jax.eval_shape(lambda: tuple(map(jnp.asarray, inputs(SD15, 64, 64))))
    states = jax.eval_shape(lambda *args: module.init_with_output(jax.random.key(0), *args)[0], *given)
    want = [(64, 320)] * 3 + [(32, 320)] + [(32, 640)] * 2 + [(16, 640)] + [(16, 1280)] * 2 + [(8, 1280)] * 3
    assert [(skip.shape[1], skip.shape[3]) for skip in states.skips] == want
    assert states.middle.shape == (2, 8, 8, 1280)
    assert states.time.shape == (2, 1280)


# -- without a reference ----------------------------------------------------------------------------------------------


def test_the_two_halves_are_the_whole(params):
    module, given = UnetCondition(TINY), inputs(TINY)
    states = run(module, params, *given, method="encode")
    skips, middle = [some(*skip.shape, seed=4) for skip in states.skips], some(*states.middle.shape, seed=5)
    for residuals in ((), (skips, middle), (None, middle)):
        found = run(module, params, states.add(*residuals), given[2], method="decode")
        np.testing.assert_allclose(found, run(module, params, *given, *residuals), atol=1e-5)


def test_each_sample_has_its_own_time_and_context(params):
    module, (sample, times, context) = UnetCondition(TINY), inputs(TINY)
    both = run(module, params, sample, times, context)
    programs = run._cache_size()
    for changed in (
        (sample, times + np.array([0, 400]), context),
        (sample, times, context * np.float32([[[1]], [[2]]])),
    ):
        found = run(module, params, *changed)
        np.testing.assert_array_equal(found[0], both[0])
        assert np.abs(found[1] - both[1]).max() > 0.1
    assert run._cache_size() == programs  # no time and no text compiles anything again


def loss(params, remat=False):
    return jnp.square(UnetCondition(TINY, remat=remat).apply({"params": params}, *inputs(TINY))).mean()


def test_every_parameter_has_a_gradient(params):
    for name, gradient in flatten_dict(jax.jit(jax.grad(loss))(params), sep="/").items():
        assert float(jnp.abs(gradient).max()) > 1e-6, name


def test_remat_keeps_less_for_the_backward_pass(params):
    def kept(remat):
        _, pull = jax.eval_shape(lambda params: jax.vjp(lambda p: loss(p, remat), params), params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept(True) < 0.6 * kept(False)


def test_bfloat16_computes_about_the_same(params):
    exact = run(UnetCondition(TINY), params, *inputs(TINY))
    rough = run(UnetCondition(TINY, jnp.bfloat16), params, *inputs(TINY))
    assert rough.dtype == jnp.float32
    assert 0 < np.abs(rough - exact).mean() < 0.05 * np.abs(exact).mean()
    states = jax.eval_shape(
        lambda p: UnetCondition(TINY, jnp.bfloat16).apply({"params": p}, *inputs(TINY), method="encode"), params
    )
    assert {state.dtype for state in jax.tree.leaves(states)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            0,
            np.zeros((2, 8, 8, 3), np.float32),
            r"a sample \[batch, h, w, 4\], .* not float32 \[2, 8, 8, 3\], int64 \[2\]",
        ),
        (0, np.zeros((2, 8, 8, 4), np.int32), r"of floats, not int32 \[2, 8, 8, 4\]"),
        (1, np.array(3), r"timesteps \[batch\] .* not float32 \[2, 8, 12, 4\], int64 \[\]"),
        (1, np.array([3]), r"int64 \[1\]"),
        (2, np.zeros((2, 7, 11), np.float32), r"a context \[batch, n, 12\], .* float32 \[2, 7, 11\]"),
        (2, np.zeros((1, 7, 12), np.float32), r"float32 \[1, 7, 12\]"),
        (2, np.zeros((2, 0, 12), np.float32), r"float32 \[2, 0, 12\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(params, place, value, message):
    given = list(inputs(TINY))
    given[place] = value
    with pytest.raises(InputError, match=message):
        UnetCondition(TINY).apply({"params": params}, *given)


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda skips: (skips[:3],), "3 residuals for the 4 skips of this U-Net"),
        (lambda skips: (skips[::-1],), r"a residual of shape \[2, 4, 6, 32\] for a state of \[2, 8, 12, 16\]"),
        (lambda skips: (None, skips[0]), r"a residual of shape \[2, 8, 12, 16\] for a state of \[2, 4, 6, 32\]"),
    ],
    ids=["too few", "in another order", "of another size"],
)
def test_residuals_that_do_not_fit_are_refused(choose, message):
    skips = tuple(np.zeros((2, *shape), np.float32) for shape in ((8, 12, 16), (8, 12, 16), (4, 6, 16), (4, 6, 32)))
    states = UnetStates(np.zeros((2, 64), np.float32), skips, skips[-1])
    with pytest.raises(InputError, match=message):
        states.add(*choose(skips))


def test_a_hint_that_does_not_fit_is_refused(params):
    with pytest.raises(InputError, match=r"a residual of shape \[1, 8, 12, 16\] for a state of \[2, 8, 12, 16\]"):
        UnetEncoder(TINY).apply({"params": params["encoder"]}, *inputs(TINY), some(1, 8, 12, 16))


# -- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": ()}, "no level or a size below 1 in .*: every size is at least 1"),
        ({"context_width": 0}, "a size below 1"),
        ({"heads": (8, 8, 8)}, r"heads=\[8, 8, 8\] for 4 widths: give one for each level"),
        ({"up_attention": (True,)}, r"up_attention=\[True\] for 4 widths"),
        ({"groups": 48}, r"widths of \[320, 640, 1280, 1280\] cannot be split into 48 groups"),
        ({"heads": (7, 8, 8, 8)}, "width of 320 cannot be split into 7 attention heads"),
        ({"heads": (8, 8, 8, 7)}, "width of 1280 cannot be split into 7"),  # of the middle
        ({"epsilon": 0.0}, "an epsilon of 0.0: it takes a small positive number"),
        ({"frequency_shift": 160.0}, "a first width of 320 with a frequency_shift of 160.0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SD15, **fields)


def test_the_configs_of_published_ones_are_read():
    """Fields of stable-diffusion-v1-5 and of stable-diffusion-2-1."""
    fields = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
              "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False,
              "cross_attention_dim": 768, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
              "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "in_channels": 4,
              "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32,
              "out_channels": 4, "sample_size": 64,
              "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}  # fmt: skip
    assert UnetConditionConfig.from_json(fields) == SD15
    newer = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False,
             "num_class_embeds": None, "only_cross_attention": False, "use_linear_projection": True,
             "upcast_attention": True, "sample_size": 96}  # fmt: skip
    assert UnetConditionConfig.from_json(fields | newer) == SD21


def test_absent_fields_have_the_defaults_of_diffusers():
    torch, diffusers = reference.import_reference()
    with torch.device("meta"):
        full = dict(diffusers.UNet2DConditionModel().config)
    found = UnetConditionConfig.from_json({"_class_name": "UNet2DConditionModel"})
    assert found == UnetConditionConfig.from_json(full | {"_class_name": "UNet2DConditionModel"})
    assert found == dataclasses.replace(SD15, context_width=1280)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet3DConditionModel"}, "one of 'UNet3DConditionModel', not of 'UNet2DConditionModel'"),
        ({"_class_name": None}, "one of None, not of"),
        (
            {"addition_embed_type": "text_time"},
            "addition_embed_type='text_time', and only None is known: this U-Net is that of",
        ),
        ({"class_embed_type": "projection"}, "class_embed_type='projection', and only None"),
        ({"num_class_embeds": 1000}, "num_class_embeds=1000, and only None"),
        ({"num_attention_heads": 8}, "num_attention_heads=8, and only None"),
        ({"only_cross_attention": [True] * 4}, "only_cross_attention=.*, and only False"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier', and only 'positional'"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type='UNetMidBlock2D', and only"),
        ({"down_block_types": ["KDownBlock2D"] * 4}, "a list of CrossAttnDownBlock2D or DownBlock2D is wanted"),
        ({"up_block_types": [{}] * 4}, "a list of CrossAttnUpBlock2D or UpBlock2D is wanted"),
        ({"down_block_types": ["DownBlock2D"]}, "it has 1 down_block_types and 4 block_out_channels"),
        ({"attention_head_dim": [5, 10]}, r"attention_head_dim=\[5, 10\] and 4 levels: one number, or one for each"),
        ({"attention_head_dim": [5, 10, 20, "20"]}, "attention_head_dim='20'; a number from 1 to"),
        ({"attention_head_dim": 3}, "width of 320 cannot be split into 3"),
        ({"cross_attention_dim": [1, 2, 3, 4]}, "only the same number at all levels is known"),
        ({"transformer_layers_per_block": 10**6}, "transformer_layers_per_block=1000000; a number from 1 to 64"),
        ({"norm_num_groups": None}, "norm_num_groups=None; a number"),
        ({"norm_eps": "1e-5"}, "norm_eps='1e-5'; a number is wanted"),
        ({"norm_eps": float("inf")}, "norm_eps=inf; a number"),
        ({"freq_shift": 1e5}, "a frequency_shift of 100000.0"),
        ({"use_linear_projection": "yes"}, "use_linear_projection='yes'; true or false"),
    ],
)
def test_configs_of_other_unets_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        UnetConditionConfig.from_json({"_class_name": "UNet2DConditionModel", **change})
