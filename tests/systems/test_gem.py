"""GEM against its formulas in NumPy float64, and the maps that come of it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_clip import pictures, toy_clip

from jaxsem.backbones.clip import Clip, ClipConfig, VisionConfig, param_shapes
from jaxsem.backbones.clip_config import VIT_B16, VIT_L14
from jaxsem.backbones.clip_inputs import normalize
from jaxsem.errors import InputError
from jaxsem.systems import gem
from jaxsem.systems.gem import GemConfig, gem_tokens, heat_maps, min_max, similarity_maps

SMALL = GemConfig(depth=3, image_size=None)
TOWER = VisionConfig(width=16, layers=4, heads=2, hidden=24, patch=4, image_size=16)


def clip(seed=0, **changes):
    """A CLIP of an image tower alone with lively weights: every layer changes the tokens by about their own size."""
    module, random = Clip(ClipConfig(dataclasses.replace(TOWER, **changes), None, 10)), np.random.RandomState(seed)

    def draw(path, shape):
        name = jax.tree_util.keystr(path)
        normal = random.standard_normal(shape.shape)
        if "scale" in name:
            normal = 1 + 0.2 * normal
        elif "kernel" in name:
            normal = normal / np.sqrt(np.prod(shape.shape[1 if "blocks" in name else 0 : -1]))
        else:
            normal = 0.5 * normal
        return np.asarray(normal, np.float32)

    return module, jax.tree_util.tree_map_with_path(draw, param_shapes(module))


def images(count=2, height=16, width=16):
    return np.random.RandomState(1).standard_normal((count, height, width, 3)).astype(np.float32)


# -- the formulas in float64 ------------------------------------------------------------------------------------------


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def length(x):
    return np.sqrt((x**2).sum(-1, keepdims=True))


def embedded(params, vision, image):
    for layer in range(len(vision.stem)):
        conv, padded = params[f"stem_{layer}"], np.pad(image, ((1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (0, 1))[
            ::2, ::2
        ]  # h, w, channel, row, column
        image = gelu(np.einsum("hwcrs,rsco->hwo", windows, conv["kernel"]) + conv["bias"])
    kernel, (rows, columns) = params["patch_kernel"], vision.grid
    side = len(kernel)
    tokens = [params["class_embedding"]]
    for r in range(rows):
        for c in range(columns):
            tokens.append(np.einsum("rsc,rsco->o", image[r * side :, c * side :][:side, :side], kernel))
    return norm(np.stack(tokens) + params["positions"], params["pre_norm"])


def by_the_formulas(module, params, image, config):
    """GEM's unit features of the patches [n, projection] of one image [h, w, 3]."""
    vision, params = module.config.vision, jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    tower, d = params["vision"], vision.width // vision.heads
    activation = {"quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)), "gelu": gelu}[vision.activation]
    x = g = embedded(tower, vision, image.astype(np.float64))
    for layer in range(vision.layers):
        p = jax.tree.map(lambda leaf: leaf[layer], tower["blocks"])  # noqa: B023
        y = norm(x, p["norm1"])
        q, k, v = (dense(y, p["attention"][name]) for name in ("query", "key", "value"))
        tau = config.temperature or length(y).mean() * d**-0.5
        plain, ours = np.zeros_like(x), np.zeros_like(x)
        for head in range(vision.heads):
            part = slice(head * d, (head + 1) * d)
            plain[:, part] = softmax(q[:, part] @ k[:, part].T / np.sqrt(d)) @ v[:, part]
            for tokens in (q[:, part], k[:, part], v[:, part]):
                for _ in range(config.iterations):
                    tokens = tokens / length(tokens)
                    tokens = softmax(tau * tokens @ tokens.T) @ tokens
                tokens = tokens / length(tokens)
                ours[:, part] += softmax(tau * tokens @ tokens.T) @ v[:, part] / 3
        x = x + dense(plain, p["attention"]["out"])
        x = x + dense(activation(dense(norm(x, p["norm2"]), p["mlp"]["fc1"])), p["mlp"]["fc2"])
        g = g + dense(ours, p["attention"]["out"]) if layer >= vision.layers - (config.depth - 1) else x
    features = norm(g[1:], tower["post_norm"]) @ params["image_projection"]["kernel"]
    return features / length(features)


SETTINGS = {
    "last": GemConfig(2),
    "no iteration": GemConfig(4, 0),
    "all layers": GemConfig(5),
    "fixed temperature": GemConfig(3, 2, 7.5),
}


@pytest.mark.parametrize(
    ("activation", "stem", "setting"),
    [
        *(("quick_gelu", (), setting) for setting in SETTINGS),
        *(("gelu", (6, 8), setting) for setting in SETTINGS),
        ("gelu", (), "all layers"),
        ("quick_gelu", (6, 8), "all layers"),
    ],
)
def test_tokens_are_those_of_the_formulas(activation, stem, setting):
    config = SETTINGS[setting]
    module, params = clip(activation=activation, stem=stem)
    found = gem_tokens(module, params, images(), config)
    assert found.shape == (2, 4, 4, 10)
    for image, tokens in zip(images(), np.asarray(found)):
        want = by_the_formulas(module, params, image, config)
        np.testing.assert_allclose(tokens.reshape(16, 10), want, rtol=0, atol=1e-5)


def test_every_setting_changes_the_tokens():
    module, params = clip()
    found = [np.asarray(gem_tokens(module, params, images(), config)) for config in [*SETTINGS.values(), GemConfig(4)]]
    for i, first in enumerate(found):
        for second in found[:i]:
            assert np.abs(first - second).max() > 1e-3  # a hundred times the tolerance of the formulas


def test_another_temperature_compiles_nothing_new():
    module, params = clip()
    gem_tokens(module, params, images(), GemConfig(3, 2, 7.5))
    before = gem._gem_tokens._cache_size()
    gem_tokens(module, params, images(), GemConfig(3, 2, 9.0))
    assert gem._gem_tokens._cache_size() == before


def test_bfloat16_finds_the_same_directions():
    module, params = clip()
    exact = gem_tokens(module, params, images(), SMALL)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    rough = gem_tokens(module.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), half, images(), SMALL)
    assert rough.dtype == jnp.float32
    assert float((exact * rough).sum(-1).min()) > 0.99


def test_tokens_are_differentiable():
    module, params = clip()
    direction = np.random.RandomState(2).standard_normal(10)
    gradient = jax.grad(lambda x: (gem_tokens(module, params, x, SMALL) @ direction).sum())(jnp.asarray(images()))
    assert np.isfinite(gradient).all()
    assert float(jnp.abs(gradient).max()) > 1e-3


# -- other sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 40), (8, 12)])
def test_positions_of_other_sizes_are_those_of_pytorch_with_antialias(size):
    torch = pytest.importorskip("torch")
    module, params = clip()
    positions = params["vision"]["positions"]
    grid = torch.from_numpy(positions[1:].reshape(1, 4, 4, 16)).permute(0, 3, 1, 2)
    rows, columns = (side // 4 for side in size)
    grid = torch.nn.functional.interpolate(grid, (rows, columns), mode="bicubic", antialias=True)
    resized = np.concatenate([positions[:1], grid.permute(0, 2, 3, 1).reshape(-1, 16).numpy()])
    vision = dataclasses.replace(module.config.vision, image_size=size)
    other = module.clone(config=dataclasses.replace(module.config, vision=vision))
    changed = {**params, "vision": {**params["vision"], "positions": resized}}
    found = gem_tokens(module, params, images(1, *size), SMALL)
    want = gem_tokens(other, changed, images(1, *size), SMALL)
    assert found.shape == (1, rows, columns, 10)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("published", "grid"), [(VIT_B16, (28, 28, 512)), (VIT_L14, (32, 32, 768))], ids=["B", "L"])
def test_published_models_at_their_published_size(published, grid):
    module = Clip(published)
    inputs = jax.ShapeDtypeStruct((2, 448, 448, 3), jnp.float32)
    found = jax.eval_shape(lambda p, x: gem_tokens(module, p, x, GemConfig()), param_shapes(module), inputs)
    assert (found.shape, found.dtype) == ((2, *grid), jnp.float32)


# -- maps -------------------------------------------------------------------------------------------------------------


def test_maps_are_cosines_between_patches_and_prompts():
    model, shots = toy_clip(), pictures(3)
    config = GemConfig(depth=2, image_size=16, template="the {}")
    found = similarity_maps(model, shots, ["red star", "blue ring"], config, (4, 4))
    assert (found.shape, found.dtype) == ((3, 2, 4, 4), np.float32)
    texts = model.encode_texts(["the red star", "the blue ring"])
    for shot, maps in zip(shots, found):
        crop = np.asarray(gem.Image.fromarray(shot).resize((16, 16), gem.Image.Resampling.BICUBIC))
        tokens = gem_tokens(model.module, model.params, normalize(np.float32(crop) / 255)[None], config)[0]
        np.testing.assert_allclose(maps, np.einsum("pqc,tc->tpq", tokens, texts), rtol=0, atol=1e-5)


def test_maps_of_other_sizes_are_bilinear_as_in_pytorch():
    torch = pytest.importorskip("torch")
    model, config = toy_clip(), GemConfig(depth=2, image_size=16, template=None)
    coarse = similarity_maps(model, pictures(2), ["red star"], config, (4, 4))
    for size in [(16, 16), (9, 21), (3, 2)]:
        want = torch.nn.functional.interpolate(torch.from_numpy(coarse), size, mode="bilinear").numpy()
        found = similarity_maps(model, pictures(2), ["red star"], config, size)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


def test_heat_runs_from_0_to_1_in_every_map():
    model, config = toy_clip(), GemConfig(depth=3, image_size=(24, 16), template=None)
    heat = heat_maps(model, pictures(2), ["red star", "blue ring", "green cross"], config)
    assert heat.shape == (2, 3, 24, 16)  # the tower's input
    np.testing.assert_array_equal(heat.min((2, 3)), 0)
    np.testing.assert_array_equal(heat.max((2, 3)), 1)
    np.testing.assert_array_equal(min_max(np.full((1, 2, 2), 0.3)), 0)


def test_without_a_template_the_prompts_of_the_model_are_averaged():
    model, config = toy_clip(), GemConfig(depth=2, image_size=16, template=None)
    found = similarity_maps(model, pictures(1), ["orange star"], config, (4, 4))[0, 0]
    texts = model.encode_texts(["a picture of an orange star", "an image of an orange star"])
    each = [similarity_maps(model, pictures(1), ["orange star"], dataclasses.replace(config, template=t), (4, 4))[0, 0]
            for t in ("a picture of a {}", "an image of a {}")]  # fmt: skip
    mean = texts.mean(0)
    np.testing.assert_allclose(found, sum(each) / 2 / np.linalg.norm(mean), rtol=0, atol=1e-5)


def test_an_article_changes_nothing():
    config = GemConfig(depth=2, template=None, image_size=None)
    bare, said = (similarity_maps(toy_clip(), pictures(1), [phrase], config) for phrase in ("red star", "The red star"))
    np.testing.assert_array_equal(bare, said)


def test_images_do_not_depend_on_their_batch(monkeypatch):
    model, config = toy_clip(), GemConfig(depth=2, image_size=16, template=None)
    shots = [*pictures(2), pictures(1, 9, 31, seed=5)[0]]
    together = heat_maps(model, shots, ["red star"], config)
    monkeypatch.setattr(gem, "default_batch", lambda: 2)
    np.testing.assert_allclose(heat_maps(model, iter(shots), ["red star"], config), together, rtol=0, atol=1e-4)
    np.testing.assert_allclose(heat_maps(model, shots[2:], ["red star"], config)[0], together[2], rtol=0, atol=1e-4)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 1}, "depth=1; it takes an integer of at least 2"),
        ({"depth": 2.5}, "depth=2.5"),
        ({"iterations": -1}, "iterations=-1; it takes an integer of at least 0"),
        ({"temperature": 0.0}, "a number above 0"),
        ({"temperature": math.nan}, "a number above 0"),
        ({"temperature": "warm"}, "a number above 0"),
        ({"template": "a photo"}, "has no place for the phrase"),
        ({"image_size": 0}, "not to 0"),
        ({"image_size": (448, 448, 3)}, "not to "),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        GemConfig(**settings)


def test_a_depth_beyond_the_tower_is_refused_not_cut():
    module, params = clip()
    gem_tokens(module, params, images(), GemConfig(5))
    with pytest.raises(InputError, match=r"the last 5 blocks and this image tower has 4: choose GemConfig\(depth=5\)"):
        gem_tokens(module, params, images(), GemConfig(6))
    with pytest.raises(InputError, match="depth 7 runs through the last 6 blocks and this image tower has 2"):
        heat_maps(toy_clip(), pictures(1), ["red star"])


def test_inputs_that_do_not_fit_are_refused():
    module, params = clip()
    with pytest.raises(InputError, match=r"\[batch, height, width, 3\], not of shape \[16, 16, 3\]"):
        gem_tokens(module, params, images()[0], SMALL)
    with pytest.raises(InputError, match="patches of 4 do not fill an image of 18x16"):
        gem_tokens(module, params, images(1, 18, 16), SMALL)
    with pytest.raises(InputError, match="floats, not uint8"):
        gem_tokens(module, params, np.zeros((1, 16, 16, 3), np.uint8), SMALL)
    text = Clip(ClipConfig(None, toy_clip().module.config.text, 12))
    with pytest.raises(InputError, match="has no image tower"):
        gem_tokens(text, {}, images(), SMALL)


@pytest.mark.parametrize(
    ("shots", "phrases", "size", "message"),
    [
        ([], ["red star"], None, "no image"),
        (1, [], None, "no class"),
        (1, ["red star", " "], None, "none of them empty"),
        (1, "red star", None, "is one text"),
        (1, ["red bicycle"], None, "do not know the word 'bicycle'"),
        (1, ["red star"], (0, 4), "at least 1"),
        (1, ["red star"], (4, 4, 4), "a height and a width"),
    ],
)
def test_maps_of_nothing_are_refused(shots, phrases, size, message):
    config = GemConfig(depth=2, image_size=16, template=None)
    with pytest.raises(InputError, match=message):
        heat_maps(toy_clip(), pictures(shots) if shots else [], phrases, config, size)


def test_a_clip_without_texts_makes_no_maps():
    model = toy_clip()
    alone = model.module.clone(config=dataclasses.replace(model.module.config, text=None))
    with pytest.raises(InputError, match="load a CLIP with both"):
        heat_maps(dataclasses.replace(model, module=alone), pictures(1), ["red star"])


def test_the_mini_finds_the_named_object():
    """Chance is 4 %, and a random CLIP no better."""
    from jaxsem import load
    from jaxsem.data.scenes import SceneConfig, batch, sample_scene

    model, config = load("pqvae-mini").clip, SceneConfig("all")
    records = batch("test", range(8), config, 128, ("image", "masks"))
    names = [[f"{thing.colour} {thing.shape}" for thing in sample_scene("test", i, config).objects] for i in range(8)]
    phrases = sorted({name for row in names for name in row})
    found = similarity_maps(model, records["image"], phrases, gem.MINI, (128, 128))
    hits = [
        records["masks"][i].flat[found[i, phrases.index(name)].argmax()] == number + 1
        for i, row in enumerate(names)
        for number, name in enumerate(row)
    ]
    assert np.mean(hits) > 0.2
