"""LLaVA 1.5 and 1.6 against transformers' torch models of the same small random weights; images, latents and texts together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llava_reference import IMAGE, POINTS, SIDE, channels_first, reference, state_of

from jaxsem.backbones.clip_config import VisionConfig
from jaxsem.backbones.llama import LlamaConfig, quantise_weights
from jaxsem.backbones.llava import CONFIGS, Llava, LlavaConfig, language_model, param_shapes, partition_rules
from jaxsem.backbones.llava_inputs import NEWLINE, best_pinpoint, tile_order
from jaxsem.errors import InputError
from jaxsem.generation import greedy
from jaxsem.systems.transform_neck import keep_layers, rest_of
from jaxsem.training.sharding import make_mesh, tree_shardings
from jaxsem.weights.llava import load_llava

CONFIG = LlavaConfig(
    VisionConfig(16, 3, 2, 24, 14, SIDE),
    LlamaConfig(32, 2, 4, 2, 48, 64, 96),
    IMAGE,
    grid_pinpoints=tuple(map(tuple, POINTS)),
)
MODULE = Llava(CONFIG)
VARIANTS = {
    "as published": {},
    "last layer": {"vision_feature_layer": -1},
    "first layer, class token, no bias": {
        "vision_feature_layer": 1,
        "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "relu",
    },
}


def images(count, seed=0):
    """Normalised squares."""
    return np.random.RandomState(seed).standard_normal((count, SIDE, SIDE, 3)).astype(np.float32)


def prompts(counts, length=7, left=False):
    """Ids [b, n] with some words, image tokens and further words, and their mask; rows are padded at one end."""
    random = np.random.RandomState(9)
    rows = [
        [1, *random.randint(3, 60, 2), *[IMAGE] * n, *random.randint(3, 60, length - i)] for i, n in enumerate(counts)
    ]
    longest = max(map(len, rows))
    ids, mask = np.zeros((len(rows), longest), np.int32), np.zeros((len(rows), longest), bool)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(len(row))
        ids[i, place], mask[i, place] = row, True
    return ids, mask


@functools.partial(jax.jit, static_argnames=("module", "method", "static"))
def run(params, *inputs, method="__call__", module=MODULE, static=()):
    return module.apply({"params": params}, *inputs, *static, method=method)


def seen(params, pixels, module=MODULE):
    return run(params, run(params, pixels, method="visual_tokens", module=module), method="project", module=module)


@pytest.fixture(scope="module")
def params():
    """Seeded parameters that need no torch."""
    random = np.random.RandomState(3)

    def draw(path, leaf):
        scale = path[-1].key == "scale"
        return jnp.asarray(0.2 * random.standard_normal(leaf.shape) + scale, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(MODULE))


# -- LLaVA 1.5 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_and_logits_are_those_of_transformers(variant):
    torch = pytest.importorskip("torch")
    net, config = reference(**VARIANTS[variant])
    module, params = load_llava(state_of(net), config)
    pixels, (ids, mask) = images(2), prompts([config.square_tokens] * 2)
    given = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()}
    with torch.no_grad():
        features = net.get_image_features(channels_first(pixels)).pooler_output
        want = net(**given, pixel_values=channels_first(pixels)).logits.numpy()
    visual = seen(params, pixels, module)
    np.testing.assert_allclose(visual, np.stack(features), atol=1e-5)
    assert want.std() > 0.5  # lively
    logits = run(params, ids, visual, mask, module=module)
    np.testing.assert_allclose(logits[mask], want[mask], atol=1e-4)


def test_greedy_texts_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    net, config = reference()
    module, params = load_llava(state_of(net), config)
    pixels, (ids, mask) = images(2, 4), prompts([4, 4], left=True)
    given = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()}
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        want = net.generate(**given, pixel_values=channels_first(pixels), **options)[:, ids.shape[1] :].numpy()
    prompt = run(params, ids, seen(params, pixels, module), method="embed", module=module)
    found = greedy(language_model(module), params["language"], prompt, max_new_tokens=9, prompt_mask=mask)
    np.testing.assert_array_equal(found.tokens, want)


# -- LLaVA 1.6 --------------------------------------------------------------------------------------------------------


def test_tiles_and_logits_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    net, config = reference("LlavaNext")
    module, params = load_llava(state_of(net), config)
    sizes = [(57, 55), (25, 84)]
    counts = [1 + int(np.prod(best_pinpoint(size, config.grid_pinpoints))) // SIDE**2 for size in sizes]
    assert counts == [5, 4]
    pixels = [images(count, seed) for seed, count in enumerate(counts)]
    stacked = np.stack([np.pad(part, ((0, 5 - len(part)), (0, 0), (0, 0), (0, 0))) for part in pixels])
    orders = [tile_order(size, config) for size in sizes]
    ids, mask = prompts(map(len, orders))
    given = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()}
    given |= {"pixel_values": channels_first(stacked), "image_sizes": torch.tensor(sizes)}
    with torch.no_grad():
        packed = net.get_image_features(given["pixel_values"], given["image_sizes"]).pooler_output
        want = net(**given).logits.numpy()
    arranged = []
    for part, size, theirs in zip(pixels, sizes, packed):
        features = seen(params, np.concatenate([part, part])[:5], module)[: len(part)]  # one shape to compile
        arranged.append(module.apply({"params": params}, features, size, method="arrange"))
        np.testing.assert_allclose(arranged[-1], theirs, atol=1e-5)
    longest = max(map(len, arranged))
    visual = jnp.stack([jnp.pad(part, ((0, longest - len(part)), (0, 0))) for part in arranged])
    np.testing.assert_allclose(run(params, ids, visual, mask, module=module)[mask], want[mask], atol=1e-4)


def test_the_newline_is_a_parameter_of_its_own(params):
    table = jnp.arange(64.0).reshape(2, 32)
    found = run(params, table, np.array([[1, NEWLINE], [5, 0]]), method="pick")
    np.testing.assert_array_equal(found[0], np.stack([table[1], params["image_newline"]]))
    assert np.isnan(found[1, 0]).all()
    np.testing.assert_array_equal(found[1, 1], table[0])


@pytest.mark.parametrize("shape", [(4, 4, 32), (5, 3, 32), (20, 32)], ids=str)
def test_features_of_another_image_are_refused(params, shape):
    with pytest.raises(InputError, match="an image of 56x56 pixels has more squares, or of other tokens than 4"):
        MODULE.apply({"params": params}, jnp.zeros(shape), (56, 56), method="arrange")


# -- latents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 2])
def test_tokens_that_enter_at_a_layer_end_as_those_of_the_image(params, first):
    def halfway(model, pixels):
        return model.vision.run_layers(model.vision.embed(pixels), 0, first)

    inside = MODULE.apply({"params": params}, images(2), method=halfway)
    found = run(params, inside, method="tokens_after", static=(first,))
    np.testing.assert_allclose(found, run(params, images(2), method="visual_tokens"), atol=1e-5)


def test_bypassed_layers_may_be_left_out(params):
    inside = np.random.RandomState(1).standard_normal((1, 5, 16)).astype(np.float32)
    short = Llava(dataclasses.replace(CONFIG, vision=rest_of(CONFIG.vision, 1)))
    found = run(keep_layers(params, 1), inside, method="tokens_after", module=short)
    np.testing.assert_allclose(found, run(params, inside, method="tokens_after", static=(1,)), atol=1e-5)


def test_a_neck_beyond_the_layers_that_run_is_refused(params):
    with pytest.raises(InputError, match="runs 2 layers of its tower, and it cannot begin after 3"):
        run(params, np.zeros((1, 5, 16), np.float32), method="tokens_after", static=(3,))


# -- merging ----------------------------------------------------------------------------------------------------------


def test_visual_embeddings_take_the_places_of_image_tokens(params):
    ids = np.array([[0, 0, 5, IMAGE, IMAGE, 6], [IMAGE, 7, IMAGE, 8, 9, IMAGE]])
    visual = np.random.RandomState(0).standard_normal((2, 3, 32)).astype(np.float32)
    found = run(params, ids, visual, method="embed")
    words = params["language"]["token_embedding"]
    np.testing.assert_array_equal(found[0, [0, 2, 5]], words[np.array([0, 5, 6])])
    np.testing.assert_array_equal(found[0, 3:5], visual[0, :2])  # the third is left out
    np.testing.assert_array_equal(found[1, [0, 2, 5]], visual[1])


def test_an_image_token_without_an_embedding_is_nan(params):
    found = run(params, np.array([[5, IMAGE, IMAGE, 6]]), np.ones((1, 1, 32), np.float32), method="embed")
    assert np.isnan(found[0]).all(axis=-1).tolist() == [False, False, True, False]


def test_the_image_token_may_lie_outside_of_the_vocabulary(params):
    module = Llava(dataclasses.replace(CONFIG, image_token=32000))
    visual = np.ones((1, 1, 32), np.float32)
    found = run(params, np.array([[5, 32000]]), visual, method="embed", module=module)
    np.testing.assert_array_equal(found[0, 1], visual[0, 0])


@pytest.mark.parametrize(
    ("method", "inputs", "message"),
    [
        (
            "embed",
            (np.ones((2, 3), np.int32), np.ones((1, 3, 32), np.float32)),
            r"are \[2, m, 32\] here, not \[1, 3, 32\]",
        ),
        ("embed", (np.ones((1, 3), np.int32), np.ones((3, 32), np.float32)), r"not \[3, 32\]"),
        ("embed", (np.ones((1, 3), np.float32), np.ones((1, 3, 32), np.float32)), "token ids, not float32"),
        ("project", (np.ones((1, 3, 32), np.float32),), r"visual tokens are \[\.\.\., 16\], not \[1, 3, 32\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(params, method, inputs, message):
    with pytest.raises(InputError, match=message):
        run(params, *inputs, method=method)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llava-1.5-7b", 7_063_427_072),
        ("llava-v1.6-vicuna-7b", 7_063_427_072 + 4096),
        ("llava-v1.6-mistral-7b", 7_566_747_648),
    ],
)
def test_published_models_have_their_number_of_parameters(name, parameters):
    shapes = param_shapes(Llava(CONFIGS[name]))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_int8_is_of_the_language_model_alone(params):
    module = Llava(CONFIG, weights="int8")
    small = {**params, "language": quantise_weights(params["language"])}
    assert jax.tree.map(lambda leaf: leaf.dtype, small) == jax.tree.map(lambda leaf: leaf.dtype, param_shapes(module))
    ids, mask = prompts([4])
    visual = seen(params, images(1))
    want, found = run(params, ids, visual, mask), run(small, ids, visual, mask, module=module)
    assert 1e-5 < np.abs(found - want).max() / want.std() < 0.2


def test_bfloat16_computes_in_it(params):
    module = Llava(CONFIG, jnp.bfloat16, jnp.bfloat16)
    small = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    visual = seen(small, images(1), module)
    assert visual.dtype == jnp.bfloat16
    np.testing.assert_allclose(visual.astype(np.float32), seen(params, images(1)), atol=0.1)


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_the_rules_split_nearly_all_of_a_model(weights):
    module = Llava(CONFIGS["llava-v1.6-mistral-7b"], weights=weights)
    shapes, mesh = param_shapes(module), make_mesh(model=8)
    shardings = tree_shardings({"mllm": shapes}, mesh, partition_rules(module, "mllm/"))  # no rule is in vain
    sizes = jax.tree.map(lambda leaf, place: (leaf.size, place.is_fully_replicated), {"mllm": shapes}, shardings)
    leaves = jax.tree.leaves(sizes, is_leaf=lambda pair: isinstance(pair, tuple))
    whole = sum(size for size, replicated in leaves if replicated)
    assert whole < 3e-4 * sum(size for size, _ in leaves)
