"""ConvNeXt against transformers' torch model of the same small random weights, and what needs no reference."""

import dataclasses
import functools

import convnext_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxsem.backbones.convnext import CONFIGS, ConvNext, ConvNextConfig, param_shapes
from jaxsem.errors import InputError
from jaxsem.weights.convnext import load_convnext

# As transformers computes: 1e-12 for the pooled feature only.
TRUNK = ConvNextConfig((8, 12, 16), (2, 1, 3), pool_epsilon=1e-12)
CONFIG = dataclasses.replace(TRUNK, projection=10, hidden=14)


def lively(config):
    """Seeded parameters that need no torch, under which every block changes its input by its own size."""
    random = np.random.RandomState(3)

    def draw(path, leaf):
        normal = random.standard_normal(leaf.shape)
        if path[-1].key == "kernel":
            return np.asarray(normal / np.sqrt(np.prod(leaf.shape[-4:-1])), np.float32)
        return np.asarray(0.3 * normal + (path[-1].key == "scale"), np.float32)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(ConvNext(config)))


@pytest.fixture(scope="module")
def params():
    return lively(CONFIG)


@pytest.fixture(scope="module")
def states(params):
    """The features of the images before the first stage and after every one."""
    return run("hidden_states", params, reference.images())


def run(method, params, *inputs, config=CONFIG, **static):
    """A method of the module, compiled."""
    return compiled(method, config, **static)(params, *inputs)


@functools.cache
def compiled(method, config, **static):
    return jax.jit(lambda params, *xs: ConvNext(config).apply({"params": params}, *xs, method=method, **static))


# -- parity -----------------------------------------------------------------------------------------------------------


def test_every_stage_and_the_feature_are_those_of_transformers():
    """Of 37x48 pixels some rows are dropped, and no columns."""
    net, images = reference.model(), reference.images(2, 37, 48)
    want, states = reference.outputs(net, images)
    _, params = load_convnext(reference.state_of(net), TRUNK)
    found = run("hidden_states", params, images, config=TRUNK)
    assert len(states) == len(found) == 4
    for i, (ours, theirs) in enumerate(zip(found, states)):
        assert 0.5 < theirs.std() < 30, i  # lively
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * theirs.std(), err_msg=str(i))
    np.testing.assert_allclose(run("image_feature", params, found[-1], config=TRUNK), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("hidden", [False, True])
def test_open_clips_projections_are_computed_as_written(hidden):
    net, images = reference.model(), reference.images()
    state = reference.open_clip_state(net, hidden)
    config = dataclasses.replace(TRUNK, projection=10, hidden=14 if hidden else None)
    _, params = load_convnext(state, config)
    torch, _ = reference.import_reference()
    pooled, states = reference.outputs(net, images)
    y = torch.from_numpy(pooled)
    weight = {key.removeprefix("visual.head."): torch.from_numpy(np.asarray(v)) for key, v in state.items()}
    if hidden:
        y = torch.nn.functional.gelu(y @ weight["mlp.fc1.weight"].T + weight["mlp.fc1.bias"])
    want = y @ weight["mlp.fc2.weight" if hidden else "proj.weight"].T
    np.testing.assert_allclose(run("image_feature", params, states[-1], config=config), want, rtol=0, atol=1e-5)


# -- sizes ------------------------------------------------------------------------------------------------------------


def count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(ConvNext(config))))


@pytest.mark.parametrize(
    ("name", "trunk", "millions"),
    [
        ("convnext_tiny", 27_820_128, 28.61),
        ("convnext_small", 49_454_688, 49.85),
        ("convnext_base", 87_566_464, 88.09),
        ("convnext_base_w", 87_566_464, 88.22),
        ("convnext_large", 196_230_336, 197.41),
        ("convnext_large_d_320", 196_230_336, 199.77),
        ("convnext_xlarge", 348_147_968, 350.25),
        ("convnext_xxlarge", 843_398_016, 846.54),
    ],
)
def test_published_models_have_their_number_of_parameters(name, trunk, millions):
    """Trunks as transformers 5.23.0 counts them on the meta device; millions with the projection as open_clip lists them."""
    assert count(dataclasses.replace(CONFIGS[name], projection=None, hidden=None)) == trunk
    assert round(count(CONFIGS[name]) / 1e6, 2) == millions


def test_blocks_lie_on_the_leading_axis():
    shapes = param_shapes(ConvNext(CONFIG))
    for i, depth in enumerate(CONFIG.depths):
        blocks = flatten_dict(shapes[f"stages_{i}"]["blocks"], sep="/")
        assert {leaf.shape[0] for leaf in blocks.values()} == {depth}
        assert len(blocks) == 9
    assert [sorted(shapes[f"stages_{i}"]) for i in (0, 1)] == [["blocks"], ["blocks", "halve", "norm"]]


def test_strides_are_those_of_the_features(states):
    assert [CONFIG.stride(i) for i in (0, 1, 2, -1)] == [4, 8, 16, 16]
    assert [state.shape[1:3] for state in states[1:]] == [(32 // s, 48 // s) for s in (4, 8, 16)]


# -- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_features_may_enter_before_any_stage(params, states, stage):
    np.testing.assert_allclose(run("run_stages", params, states[stage], first=stage), states[-1], atol=1e-4)


def test_features_may_enter_before_any_block(params, states):
    """What the halving gives may enter before block 0, and what a block gives before the next one."""
    stage = ConvNext(CONFIG).bind({"params": params}).stages[2]
    x = stage.halve(stage.norm(states[2]))
    assert x.shape == (2, 2, 3, 16)
    for i in range(3):
        np.testing.assert_allclose(run("run_stages", params, x, first=2, block=i), states[3], atol=1e-4)
        x = stage.blocks.apply({"params": jax.tree.map(lambda p, i=i: p[i], params["stages_2"]["blocks"])}, x)
    np.testing.assert_allclose(x, states[3], atol=1e-4)


def test_a_block_counts_in_the_first_stage_only(params, states):
    found = run("run_stages", params, states[1], first=-3, last=-1, block=0)
    np.testing.assert_allclose(found, run("run_stages", params, states[1], first=0, last=2), atol=1e-6)


def test_what_is_not_run_needs_no_parameters(params, states):
    part = {"stages_2": params["stages_2"]}
    np.testing.assert_allclose(run("run_stages", part, states[2], first=2), states[3], atol=1e-4)


def test_no_stage_changes_nothing(params):
    x = jnp.ones((1, 2, 2, 5))
    np.testing.assert_array_equal(run("run_stages", params, x, first=2, last=2), x)


def test_features_from_elsewhere_become_a_feature_as_those_of_an_image_do(params, states):
    found = run("image_feature", params, states[-1])
    assert found.shape == (2, 10)
    np.testing.assert_allclose(found, run("encode_image", params, reference.images()), atol=1e-5)


# -- training and types -----------------------------------------------------------------------------------------------


def mean_square(params, config, **fields):
    return jnp.square(ConvNext(config, **fields).apply({"params": params}, reference.images())).mean()


def test_every_parameter_has_a_gradient():
    config = dataclasses.replace(CONFIG, widths=(8, 12), depths=(2, 1))
    gradients = jax.jit(jax.grad(mean_square), static_argnums=1)(lively(config), config)
    for name, gradient in flatten_dict(gradients, sep="/").items():
        assert float(jnp.abs(gradient).max()) > 1e-7, name


def test_remat_keeps_less_for_the_backward_pass(params):
    def kept(remat):
        _, pull = jax.eval_shape(lambda params: jax.vjp(lambda p: mean_square(p, CONFIG, remat=remat), params), params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept(True) < 0.5 * kept(False)


def test_bfloat16_computes_the_same_directions(params):
    images = reference.images()
    exact = run("encode_image", params, images)
    half = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
    module = ConvNext(CONFIG, jnp.bfloat16, jnp.bfloat16)
    states = jax.eval_shape(lambda: module.apply({"params": half}, images, method="hidden_states"))
    assert {state.dtype for state in states} == {jnp.dtype(jnp.bfloat16)}
    rough = jax.jit(module.apply)({"params": half}, images)
    assert rough.dtype == jnp.float32
    cosine = (exact * rough).sum(-1) / np.linalg.norm(exact, axis=-1) / np.linalg.norm(rough, axis=-1)
    assert 0.99 < float(cosine.min()) < 1
    assert {leaf.dtype for leaf in jax.tree.leaves(param_shapes(module))} == {jnp.dtype(jnp.bfloat16)}


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": ()}, r"widths \[\] and depths \[2, 1, 3\]: give one of each for every stage"),
        ({"depths": (2, 1)}, r"depths \[2, 1\]: give one of each"),
        ({"depths": (2, 1, 0)}, "a size of 0 in .*: every size is at least 1"),
        ({"hidden": -3}, "a size of -3"),
        ({"projection": None}, "a hidden layer of 14 without a projection"),
        ({"activation": "swish"}, "no activation 'swish'"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_inputs_that_do_not_fit_are_refused(params):
    net = ConvNext(CONFIG).bind({"params": params})
    with pytest.raises(InputError, match=r"\[batch, height, width, 3\], floats, not uint8 of shape \[1, 64, 64, 3\]"):
        net.encode_image(np.zeros((1, 64, 64, 3), np.uint8))
    with pytest.raises(
        InputError, match="an image of 15x64 is too small for this ConvNeXt: each side takes at least 16"
    ):
        net.encode_image(reference.images(1, 15, 64))
    with pytest.raises(InputError, match=r"stage 2 takes features \[batch, height, width, 12\], not \[1, 4, 4, 16\]"):
        net.run_stages(jnp.zeros((1, 4, 4, 16)), 2)
    with pytest.raises(
        InputError, match=r"block 1 of stage 2 takes features \[batch, height, width, 16\], not \[1, 4, 4, 12\]"
    ):
        net.run_stages(jnp.zeros((1, 4, 4, 12)), 2, block=1)
    with pytest.raises(InputError, match="stage 2 has the blocks 0 to 2, and no block 3"):
        net.run_stages(jnp.zeros((1, 4, 4, 16)), 2, block=3)
