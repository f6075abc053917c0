"""Every block of latent diffusion against the module of diffusers that it stands for."""

import functools

import diffusion_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_reference import close, first, some

from jaxsem.backbones.autoencoder_kl import AutoencoderKlConfig
from jaxsem.backbones.unet_2d_condition import UnetConditionConfig
from jaxsem.errors import InputError
from jaxsem.nn import diffusion
from jaxsem.weights.diffusion import load_autoencoder_kl, load_unet_condition

CONTEXT = {"sd1": 24, "sd2": 20}


@pytest.fixture(scope="module")
def params():
    """Parameters of the reference's networks by name."""
    vae = AutoencoderKlConfig.from_json(reference.config("vae"))
    found = {"vae": load_autoencoder_kl(reference.state_of(reference.model("vae")), vae)[1]}
    for name in CONTEXT:
        config = UnetConditionConfig.from_json(reference.config(name))
        found[name] = load_unet_condition(reference.state_of(reference.model(name)), config)[1]
    return found


@functools.partial(jax.jit, static_argnums=0, static_argnames="size")
def run(module, params, *inputs, **named):
    return module.apply({"params": params}, *inputs, **named)


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cosine_first", "shift"), [(True, 0), (False, 1), (True, 0.5)])
@pytest.mark.parametrize("times", [np.arange(1000), np.float32([0.25, 3.5, 998.75])], ids=["steps", "between"])
def test_waves_are_those_of_diffusers(times, cosine_first, shift):
    torch, _ = reference.import_reference()
    from diffusers.models.embeddings import Timesteps

    want = Timesteps(320, cosine_first, shift)(torch.from_numpy(times)).numpy()
    found = diffusion.timestep_embedding(times, 320, cosine_first, shift)
    assert found.dtype == jnp.float32
    # torch's exp misses a few frequencies by their last bit, and the angle's rounding may add one.
    frequencies = np.tile(1e4 ** -(np.arange(160) / (160 - shift)), 2)
    gap = np.abs(found - want)
    assert (gap <= 1e-6 + 2.0**-22 * times[:, None] * frequencies).all()
    assert (gap > 1e-6).mean() < 0.02


@pytest.mark.parametrize(("shape", "width", "shift"), [((), 8, 0), ((2, 1), 8, 0), ((2,), 7, 0), ((2,), 8, 4)])
def test_waves_that_cannot_be_are_refused(shape, width, shift):
    with pytest.raises(InputError, match=rf"in {width} channels with a frequency shift of {shift}: give \[batch\]"):
        diffusion.timestep_embedding(np.zeros(shape), width, True, shift)


def test_the_mlp_of_the_time_is_that_of_diffusers(params):
    x = some(3, 32)
    module = diffusion.TimeEmbedding(128)
    found = run(module, params["sd1"]["encoder"]["time"], x)
    close(found, reference.model("sd1").time_embedding(first(x)))


# -- convolutions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "width", "inputs"), [(0, 64, 32), (1, 64, 64)], ids=["shortcut", "identity"])
@pytest.mark.parametrize("scale", [1.0, 0.01], ids=["plain", "epsilon matters"])
def test_a_resnet_block_with_time_is_that_of_diffusers(params, index, width, inputs, scale):
    x, time = some(2, 4, 6, inputs, scale=scale), some(2, 128, seed=1)
    module = diffusion.ResnetBlock(width, 8, 1e-5)
    found = run(module, params["sd1"]["encoder"]["down_1"][f"resnet_{index}"], x, time)
    close(found, reference.model("sd1").down_blocks[1].resnets[index](first(x), first(time)))


def test_a_resnet_block_without_time_is_that_of_diffusers(params):
    x = some(2, 4, 6, 16, scale=0.003)
    module = diffusion.ResnetBlock(32, 8)
    found = run(module, params["vae"]["encoder"]["down_1"]["resnet_0"], x)
    close(found, reference.model("vae").encoder.down_blocks[1].resnets[0](first(x), None))


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 2)])
def test_both_ways_to_halve_a_grid_are_those_of_diffusers(params, size):
    x = some(2, *size, 32)
    found = run(diffusion.Downsample(), params["sd1"]["encoder"]["down_0"]["downsample"], x)
    close(found, reference.model("sd1").down_blocks[0].downsamplers[0](first(x)))
    if min(size) > 1:
        found = run(diffusion.Downsample((0, 1)), params["vae"]["encoder"]["down_1"]["downsample"], x)
        close(found, reference.model("vae").encoder.down_blocks[1].downsamplers[0](first(x)))


@pytest.mark.parametrize("size", [None, (6, 10), (5, 10), (6, 9), (5, 9)])
def test_doubling_a_grid_is_that_of_diffusers(params, size):
    x = some(2, 3, 5, 64)
    found = run(diffusion.Upsample(), params["sd1"]["decoder"]["up_0"]["upsample"], x, size=size)
    close(found, reference.model("sd1").up_blocks[0].upsamplers[0](first(x), size))


# -- transformers -----------------------------------------------------------------------------------------------------


def block_of(params, index):
    """One block of a stack."""
    return jax.tree.map(lambda leaf: leaf[index], params["blocks"])


def test_attention_to_itself_and_to_a_context_is_that_of_diffusers(params):
    torch_block = reference.model("sd1").down_blocks[0].attentions[0].transformer_blocks[0]
    ours = block_of(params["sd1"]["encoder"]["down_0"]["transformer_0"], 0)
    x, context = some(2, 7, 32), some(2, 5, 24, seed=1)
    module = diffusion.ContextAttention(4)
    close(run(module, ours["self_attention"], x), torch_block.attn1(first(x)))
    close(run(module, ours["cross_attention"], x, context), torch_block.attn2(first(x), first(context)))


def test_the_gated_mlp_is_that_of_diffusers(params):
    x = some(2, 7, 32)
    ours = block_of(params["sd1"]["encoder"]["down_0"]["transformer_0"], 0)["mlp"]
    torch_block = reference.model("sd1").down_blocks[0].attentions[0].transformer_blocks[0]
    close(run(diffusion.GatedMlp(), ours, x), torch_block.ff(first(x)))


@pytest.mark.parametrize("index", [0, 1])
def test_each_block_of_a_stack_is_that_of_diffusers(params, index):
    x, context = some(2, 7, 64), some(2, 5, 20, seed=1)
    ours = block_of(params["sd2"]["encoder"]["down_1"]["transformer_0"], index)
    torch_block = reference.model("sd2").down_blocks[1].attentions[0].transformer_blocks[index]
    found = run(diffusion.TransformerBlock(2), ours, x, context)
    close(found, torch_block(first(x), encoder_hidden_states=first(context)))


@pytest.mark.parametrize(
    ("name", "level", "width", "heads", "depth"), [("sd1", 0, 32, 4, 1), ("sd2", 1, 64, 2, 2), ("sd2", 2, 64, 4, 2)]
)
def test_transformers_with_both_kinds_of_projection_are_those_of_diffusers(params, name, level, width, heads, depth):
    x, context = some(2, 3, 4, width), some(2, 5, CONTEXT[name], seed=1)
    module = diffusion.SpatialTransformer(heads, depth, 8)
    found = run(module, params[name]["encoder"][f"down_{level}"]["transformer_0"], x, context)
    want = reference.model(name).down_blocks[level].attentions[0](first(x), first(context), return_dict=False)
    close(found, want[0])


def test_attention_in_float32_loses_less_than_in_bfloat16():
    x = some(2, 50, 32)

    def attend(**fields):
        module = diffusion.ContextAttention(2, **fields)
        variables = module.init(jax.random.key(0), x)
        out = {"kernel": np.eye(32, dtype=np.float32), "bias": np.zeros(32, np.float32)}
        sharp = {name: {"kernel": 4 * layer["kernel"]} for name, layer in variables["params"].items() if name != "out"}
        return np.asarray(module.apply({"params": {**sharp, "out": out}}, x), np.float32)

    exact, rough, upcast = attend(), attend(dtype=jnp.bfloat16), attend(dtype=jnp.bfloat16, upcast=True)
    assert 0 < np.abs(upcast - exact).mean() < np.abs(rough - exact).mean() < 0.05


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(InputError, match="width of 32 cannot be split into 5 attention heads"):
        diffusion.ContextAttention(5).init(jax.random.key(0), some(1, 2, 32))


# -- stages -----------------------------------------------------------------------------------------------------------


def test_a_stage_down_gives_the_states_of_diffusers(params):
    x, time, context = some(2, 5, 6, 32), some(2, 128, seed=1), some(2, 5, 24, seed=2)
    stage = diffusion.DownStage(width=32, heads=4, groups=8, epsilon=1e-5, downsample=(1, 1))
    found = run(stage, params["sd1"]["encoder"]["down_0"], x, time, context)
    want, states = reference.model("sd1").down_blocks[0](first(x), first(time), first(context))
    assert len(found) == len(states) == 3
    for ours, theirs in zip(found, states):
        close(ours, theirs)
    close(found[-1], want)


def test_a_stage_in_the_middle_is_that_of_diffusers(params):
    x, time, context = some(2, 3, 4, 64), some(2, 128, seed=1), some(2, 5, 20, seed=2)
    stage = diffusion.MiddleStage(width=64, heads=4, depth=2, groups=8, epsilon=1e-5)
    found = run(stage, params["sd2"]["encoder"]["middle"], x, time, context)
    close(found, reference.model("sd2").mid_block(first(x), first(time), encoder_hidden_states=first(context)))


def test_a_stage_up_joins_its_last_skip_first(params):
    x, time, context = some(2, 3, 4, 64), some(2, 128, seed=1), some(2, 5, 20, seed=2)
    skips = some(2, 3, 4, 64, seed=3), some(2, 3, 4, 64, seed=4)
    stage = diffusion.UpStage(width=64, heads=4, depth=2, groups=8, epsilon=1e-5, upsample=True)
    found = run(stage, params["sd2"]["decoder"]["up_0"], x, time, context, skips)
    want = reference.model("sd2").up_blocks[0](
        first(x), tuple(map(first, skips)), first(time), encoder_hidden_states=first(context)
    )
    close(found, want)


def test_remat_changes_no_gradient(params):
    x, time, context = some(2, 3, 4, 32), some(2, 128, seed=1), some(2, 5, 24, seed=2)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, remat):
        stage = diffusion.DownStage(width=32, layers=1, heads=4, groups=8, remat=remat)
        return jax.grad(lambda params: jnp.square(stage.apply({"params": params}, x, time, context)[-1]).mean())(params)

    stage = params["sd1"]["encoder"]["down_0"]
    stage = {name: stage[name] for name in ("resnet_0", "transformer_0")}
    plain, again = (gradient(stage, remat) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, again)
