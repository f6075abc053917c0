"""The transform-neck: sizes, the authors' layout, where it connects, and what it refuses."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem import presets
from jaxsem.backbones.clip import Clip
from jaxsem.backbones.clip_config import VIT_L14, ClipConfig, VisionConfig
from jaxsem.backbones.convnext import CONFIGS as CONVNEXTS
from jaxsem.backbones.convnext import ConvNext, ConvNextConfig
from jaxsem.codecs import Elic, ElicConfig, init_params
from jaxsem.errors import InputError, WeightsError
from jaxsem.nn.transformer import Block
from jaxsem.systems.transform_neck import (
    MapNeck,
    MapNeckConfig,
    NeckCodecConfig,
    NeckConfig,
    TransformNeck,
    check_latent,
    check_tower,
    image_tokens,
    keep_layers,
    map_features,
    neck_tokens,
    param_shapes,
    rest_of,
)
from jaxsem.weights.compressai import to_compressai
from jaxsem.weights.transform_neck import load_neck

VISION = VisionConfig(width=16, layers=4, heads=2, hidden=32, patch=8, image_size=32)
CONFIG = NeckConfig(6, VISION)
CLIP = Clip(ClipConfig(VISION, None, 8))


@pytest.fixture(scope="module")
def neck():
    module = TransformNeck(CONFIG)
    return module, module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 6)))["params"]


@pytest.fixture(scope="module")
def clip_params():
    return CLIP.init(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))["params"]


def latents(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# -- sizes ----------------------------------------------------------------------------------------------------------------


def test_the_paper_s_neck_has_the_published_count():
    shapes = param_shapes(TransformNeck(NeckConfig(320, VIT_L14.vision, (16, 16))))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 13_191_168


@pytest.mark.parametrize("bypassed", [0, 1, 2, 4, 8])
def test_any_number_of_layers_of_the_full_tower_can_be_bypassed(bypassed):
    config = NeckConfig(320, VIT_L14.vision, (16, 16), bypassed)
    clip = Clip(dataclasses.replace(VIT_L14, text=None))
    neck = TransformNeck(config)
    params = jax.eval_shape(clip.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))["params"]
    y_hat = jax.ShapeDtypeStruct((2, 16, 16, 320), jnp.float32)
    found = jax.eval_shape(lambda n, p, y: neck_tokens(neck, n, clip, p, y), param_shapes(neck), params, y_hat)
    assert found.shape == (2, 257, 1024)


# -- what it computes -----------------------------------------------------------------------------------------------------


def test_the_authors_layout_and_torch_give_the_same_tokens():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    width, block = VISION.width, torch.nn.Module()
    block.attn = torch.nn.MultiheadAttention(width, VISION.heads, batch_first=True)
    block.ln_1, block.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
    block.mlp = torch.nn.Module()
    block.mlp.c_fc, block.mlp.c_proj = torch.nn.Linear(width, 32), torch.nn.Linear(32, width)
    theirs = torch.nn.Module()
    theirs.trans_latent_dim = torch.nn.Linear(6, width)
    theirs.class_embedding = torch.nn.Parameter(torch.randn(width))
    theirs.positional_embedding = torch.nn.Parameter(torch.randn(17, width))
    theirs.ln_pre = torch.nn.LayerNorm(width)
    theirs.transformer = torch.nn.Module()
    theirs.transformer.resblocks = torch.nn.ModuleList([block])
    y_hat = latents(2, 4, 4, 6)
    with torch.no_grad():
        x = theirs.trans_latent_dim(torch.from_numpy(y_hat).reshape(2, 16, 6))
        x = torch.cat([theirs.class_embedding.expand(2, 1, -1), x], 1) + theirs.positional_embedding
        x = theirs.ln_pre(x)
        y = block.ln_1(x)
        x = x + block.attn(y, y, y, need_weights=False)[0]
        y = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(y * torch.sigmoid(1.702 * y))
    module, params = load_neck({name: value.numpy() for name, value in theirs.state_dict().items()}, CONFIG)
    np.testing.assert_allclose(module.apply({"params": params}, y_hat), x, atol=1e-5)


def test_the_tower_goes_on_from_the_neck_s_tokens(neck, clip_params):
    module, params = neck
    y_hat = latents(2, 4, 4, 6)
    found = neck_tokens(module, params, CLIP, clip_params, y_hat)
    tokens = module.apply({"params": params}, y_hat)
    for layer in (2, 3):
        last = layer + 1
        tokens = CLIP.apply(
            {"params": clip_params}, tokens, method=lambda c, x, a=layer, b=last: c.vision.run_layers(x, a, b)
        )
    np.testing.assert_allclose(found, tokens, atol=1e-5)


def test_bypassed_layers_may_be_left_off_the_device(neck, clip_params):
    module, params = neck
    y_hat = latents(2, 4, 4, 6)
    small = Clip(ClipConfig(rest_of(VISION, 2), None, 8))
    tokens = module.apply({"params": params}, y_hat)
    rest = small.apply({"params": keep_layers(clip_params, 2)}, tokens, method=lambda c, x: c.vision.run_layers(x))
    np.testing.assert_allclose(rest, neck_tokens(module, params, CLIP, clip_params, y_hat), atol=1e-6)


def test_the_image_path_is_clip_s_own(clip_params):
    images = latents(2, 32, 32, 3)
    expected = CLIP.apply({"params": clip_params}, images, method="image_tokens")
    np.testing.assert_array_equal(image_tokens(CLIP, clip_params, images), expected)


def test_more_blocks_go_on_from_the_first():
    deeper = TransformNeck(dataclasses.replace(CONFIG, blocks=2))
    y_hat = jax.random.normal(jax.random.key(1), (1, *CONFIG.grid, CONFIG.latent))
    params = deeper.init(jax.random.key(0), y_hat)["params"]
    first = {name: value for name, value in params.items() if name != "more_0"}
    middle = TransformNeck(CONFIG).apply({"params": first}, y_hat)
    block = Block(VISION.heads, VISION.hidden, VISION.activation, epsilon=VISION.epsilon)
    expected = block.apply({"params": params["more_0"]}, middle)
    np.testing.assert_allclose(deeper.apply({"params": params}, y_hat), expected, atol=1e-5)


def test_another_grid_interpolates_the_positions(neck):
    module, params = neck
    y_hat = latents(1, 6, 3, 6)
    tokens = module.apply({"params": params}, y_hat)
    assert tokens.shape == (1, 19, 16)
    same = module.apply({"params": params}, latents(1, 4, 4, 6))
    assert same.shape == (1, 17, 16)
    assert np.isfinite(tokens).all()


def test_a_neck_enters_a_convnext_at_the_stage_of_its_stride():
    encoder = ConvNext(ConvNextConfig((8, 12, 16), (1, 1, 2)))
    params = encoder.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    neck = MapNeck(MapNeckConfig(6, encoder.config, (4, 4), 2, 8))
    neck_params = neck.init(jax.random.key(1), jnp.zeros((1, 4, 4, 6)))["params"]
    y_hat = latents(2, 4, 4, 6)
    found = map_features(neck, neck_params, encoder, params, y_hat)
    x = neck.apply({"params": neck_params}, y_hat)
    assert x.shape == found.shape == (2, 4, 4, 16)
    np.testing.assert_array_equal(encoder.apply({"params": params}, x, 2, block=0, method="run_stages"), found)
    assert map_features(neck, neck_params, encoder, params, latents(1, 5, 3, 6)).shape == (1, 5, 3, 16)


def test_the_neck_into_clip_convnext_has_the_size_of_one_block_and_a_projection():
    shapes = param_shapes(MapNeck(MapNeckConfig(320, CONVNEXTS["convnext_base"])))
    width = 512
    block = 4 * width * width + 4 * width + 8 * width * width + 5 * width + 4 * width
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == (
        320 * width + width + 256 * width + 2 * width + block
    )


@pytest.mark.parametrize(
    ("fields", "seen"), [({"stage": 3}, "stage=3 of an encoder of 3"), ({"head_width": 5}, "do not divide the 16")]
)
def test_impossible_places_in_a_convnext_are_refused(fields, seen):
    with pytest.raises(InputError, match=seen):
        MapNeckConfig(6, ConvNextConfig((8, 12, 16), (1, 1, 2)), **{"head_width": 8, **fields})


# -- what it refuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "seen"),
    [
        ((4, 4, 7), "6 channels, and this latent has 7"),
        ((9, 4, 6), "144x64 pixels, too far from the 64x64"),
        ((4, 1, 6), "64x16 pixels"),
    ],
)
def test_latents_of_another_codec_or_size_are_refused(shape, seen):
    with pytest.raises(InputError, match=seen):
        check_latent(CONFIG, shape)


@pytest.mark.parametrize(
    ("fields", "seen"),
    [({"latent": 0}, "0 channels"), ({"bypassed": 5}, "5 layers of a tower of 4"), ({"grid": (0, 4)}, "grid")],
)
def test_impossible_sizes_are_refused(fields, seen):
    with pytest.raises(InputError, match=seen):
        dataclasses.replace(CONFIG, **fields)


def test_another_tower_is_refused():
    with pytest.raises(InputError, match=r"another image tower .* layers 4 \(the model has 5\)"):
        check_tower(CONFIG, dataclasses.replace(VISION, layers=5))
    check_tower(CONFIG, VISION)


def test_nothing_left_of_a_tower_is_refused():
    with pytest.raises(InputError, match="leave no tower"):
        rest_of(VISION, 4)


def test_a_file_without_an_adapter_and_surplus_keys_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "codec.pth.tar"
    torch.save({"state_dict": {"g_a.0.weight": torch.zeros(2, 2)}}, path)
    with pytest.raises(WeightsError, match="no adapter"):
        load_neck(path, CONFIG)
    with pytest.raises(WeightsError, match=r"surplus.*unknown"):
        load_neck({"unknown": np.zeros(2, np.float32)}, CONFIG)


def test_a_file_of_the_authors_loads_as_a_codec_with_a_neck(tmp_path, monkeypatch):
    """Codec and adapter in one file, as `d1_1` has them: keys of the ELIC re-implementation and of the neck."""
    torch = pytest.importorskip("torch")
    config = ElicConfig((8, 8, 8), 16, 8, (4, 12), (8, 8))
    module = Elic(config)
    state = to_compressai(module, init_params(module, 0), "elicre")
    neck = TransformNeck(dataclasses.replace(CONFIG, latent=16))
    params = neck.init(jax.random.key(0), jnp.zeros((1, 4, 4, 16)))["params"]
    adapter = _as_the_authors(params)
    path = tmp_path / "d1_1.pth.tar"
    torch.save(
        {
            "state_dict": {f"module.{name}": torch.from_numpy(np.array(value)) for name, value in state.items()},
            "adapter": {f"module.{name}": torch.from_numpy(np.array(value)) for name, value in adapter.items()},
        },
        path,
    )
    record = NeckCodecConfig("elic", config, neck.config)
    preset = presets.Preset("toy-neck", "transform-neck", record, "toy")
    monkeypatch.setattr(presets, "PRESETS", {"toy-neck": preset})
    codec = presets.load("toy-neck", weights=path, arithmetic="float")
    jax.tree.map(np.testing.assert_array_equal, dict(codec.neck_params), dict(params))
    assert codec.module.config == config
    assert codec.scenario == "d1"


def _as_the_authors(params):
    """A neck's parameters under the authors' keys."""
    attention, block = params["block"]["attention"], params["block"]
    parts = ("query", "key", "value")
    layer = "transformer.resblocks.0"
    state = {
        "trans_latent_dim.weight": params["projection"]["kernel"].T,
        "trans_latent_dim.bias": params["projection"]["bias"],
        "class_embedding": params["class_embedding"],
        "positional_embedding": params["positions"],
        f"{layer}.attn.in_proj_weight": np.concatenate([attention[part]["kernel"].T for part in parts]),
        f"{layer}.attn.in_proj_bias": np.concatenate([attention[part]["bias"] for part in parts]),
        f"{layer}.attn.out_proj.weight": attention["out"]["kernel"].T,
        f"{layer}.attn.out_proj.bias": attention["out"]["bias"],
        f"{layer}.mlp.c_fc.weight": block["mlp"]["fc1"]["kernel"].T,
        f"{layer}.mlp.c_fc.bias": block["mlp"]["fc1"]["bias"],
        f"{layer}.mlp.c_proj.weight": block["mlp"]["fc2"]["kernel"].T,
        f"{layer}.mlp.c_proj.bias": block["mlp"]["fc2"]["bias"],
    }
    norms = {"ln_pre": params["pre_norm"], f"{layer}.ln_1": block["norm1"], f"{layer}.ln_2": block["norm2"]}
    for name, norm in norms.items():
        state |= {f"{name}.weight": norm["scale"], f"{name}.bias": norm["bias"]}
    return state
