"""Llama and Mistral against transformers' torch models of the same small random weights, and the cache against the whole text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.backbones.llama import (
    CONFIGS,
    LLAMA_7B,
    Llama,
    LlamaConfig,
    init_cache,
    param_shapes,
    partition_rules,
    quantise_weights,
)
from jaxsem.errors import InputError
from jaxsem.generation import FlaxModel, greedy
from jaxsem.nn.llama_block import RopeScaling, rope_frequencies, rope_rotation, rotate
from jaxsem.training import make_mesh
from jaxsem.training.state import place
from jaxsem.weights.llama import load_llama, parse_config

CONFIG = LlamaConfig(width=32, layers=2, heads=4, kv_heads=2, hidden=48, vocabulary=64, context=32)
WINDOWED = dataclasses.replace(CONFIG, window=4)
MODULE = Llama(CONFIG)
IDS = np.random.RandomState(1).randint(0, 64, (2, 11)).astype(np.int32)
# The second row ends early.
ENDS = np.arange(11) < np.array([[11], [6]])
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
    "llama": ("Llama", {}),
    "all heads": ("Llama", {"num_key_value_heads": 4}),
    "wide heads": ("Llama", {"head_dim": 12}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}}),
    "llama3": (
        "Llama",
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8}},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "window": ("Mistral", {"sliding_window": 4}),
}


def lively(kind="Llama", **changes):
    """A seeded torch model under which every layer changes its input by its own size, and the config we read for it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 32, "rms_norm_eps": 1e-5}
    sizes |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "attn_implementation": "eager"}
    theirs = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    net, random = getattr(transformers, f"{kind}ForCausalLM")(theirs).eval(), np.random.RandomState(5)
    with torch.no_grad():
        for name, value in sorted(net.named_parameters()):
            array = random.standard_normal(tuple(value.shape))
            if "norm" in name:
                array = 0.2 * array + 1
            elif "embed" not in name:
                array /= np.sqrt(array.shape[1])
            value.copy_(torch.from_numpy(array.astype(np.float32)))
    return net, parse_config(theirs.to_dict())


def state_of(net) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in net.state_dict().items()}


@pytest.fixture(scope="module")
def params():
    """Seeded parameters that need no torch."""
    random = np.random.RandomState(3)

    def draw(path, leaf):
        scale = path[-1].key == "scale"
        return jnp.asarray(0.2 * random.standard_normal(leaf.shape) + scale, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(MODULE))


@functools.partial(jax.jit, static_argnames=("method", "last_only", "module"))
def run(params, *inputs, method="__call__", module=MODULE, **options):
    return module.apply({"params": params}, *inputs, method=method, **options)


def logits_of(params, ids, mask=None, module=MODULE):
    return run(params, run(params, ids, method="embed_tokens", module=module), mask, module=module)


# -- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant):
    torch = pytest.importorskip("torch")
    kind, changes = VARIANTS[variant]
    net, config = lively(kind, **changes)
    module, params = load_llama(state_of(net), config)
    with torch.no_grad():
        want = net(torch.from_numpy(IDS).long()).logits.numpy()
    assert want.std() > 0.5  # lively
    np.testing.assert_allclose(logits_of(params, IDS, module=module), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("mask", [ENDS, ENDS[:, ::-1]], ids=["right", "left"])
@pytest.mark.parametrize("variant", ["llama", "window"])
def test_padding_is_that_of_transformers(variant, mask):
    torch = pytest.importorskip("torch")
    kind, changes = VARIANTS[variant]
    net, config = lively(kind, **changes)
    module, params = load_llama(state_of(net), config)
    with torch.no_grad():
        want = net(torch.from_numpy(IDS).long(), attention_mask=torch.from_numpy(mask.copy()).long()).logits.numpy()
    np.testing.assert_allclose(logits_of(params, IDS, mask, module)[mask], want[mask], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("variant", ["llama", "window", "llama3"])
def test_greedy_texts_are_those_of_transformers(variant):
    torch = pytest.importorskip("torch")
    kind, changes = VARIANTS[variant]
    net, config = lively(kind, **changes)
    module, params = load_llama(state_of(net), config)
    mask = ENDS[:, ::-1]  # it takes padding on the left alone
    with torch.no_grad():
        options = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.from_numpy(mask.copy()).long()}
        want = net.generate(torch.from_numpy(IDS).long(), **options)[:, 11:].numpy()
    prompt = run(params, IDS, method="embed_tokens", module=module)
    found = greedy(FlaxModel(module), params, prompt, max_new_tokens=9, prompt_mask=mask)
    np.testing.assert_array_equal(found.tokens, want)


# -- positions --------------------------------------------------------------------------------------------------------


def test_only_the_distance_of_two_positions_matters():
    frequencies = rope_frequencies(8, 100.0)
    random = np.random.RandomState(0)
    first, second = (np.tile(random.standard_normal((1, 1, 3, 8)), (1, 20, 1, 1)).astype(np.float32) for _ in range(2))
    rotation = rope_rotation(jnp.arange(20)[None], frequencies)
    products = jnp.einsum("bnhd,bmhd->hnm", rotate(first, rotation), rotate(second, rotation))
    for offset in range(-5, 6):
        diagonal = jnp.diagonal(products, offset, 1, 2)
        np.testing.assert_allclose(diagonal, np.broadcast_to(diagonal[:, :1], diagonal.shape), atol=1e-4)
    assert float(jnp.std(products[:, 0])) > 0.3


def test_the_frequencies_of_transformers_are_met_in_float32():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {**LLAMA3, "factor": 8.0, "rope_theta": 5e5, "original_max_position_embeddings": 8192}
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](transformers.LlamaConfig(rope_parameters=rope), torch.device("cpu"))
    found = rope_frequencies(128, 5e5, RopeScaling("llama3", 8.0))
    np.testing.assert_allclose(found, theirs.numpy(), rtol=2e-6)


# -- sizes ------------------------------------------------------------------------------------------------------------


def count(module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(module)))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("mistral-7b-v0.1", 7_241_732_096),
        ("mistral-7b-v0.2", 7_241_732_096),
    ],
)
def test_published_models_have_their_number_of_parameters(name, parameters):
    assert count(Llama(CONFIGS[name])) == parameters


def test_the_vocabulary_of_llava_and_tied_embeddings_change_the_number_as_they_should():
    wide = dataclasses.replace(LLAMA_7B, vocabulary=32064)
    assert count(Llama(wide)) == 6_738_415_616 + 2 * 64 * 4096
    assert count(Llama(dataclasses.replace(wide, tied=True))) == 6_738_415_616 + 64 * 4096 - 32000 * 4096


def test_int8_takes_a_byte_for_each_weight_of_the_layers():
    shapes = param_shapes(Llama(LLAMA_7B, param_dtype=jnp.bfloat16, weights="int8"))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    kernels = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    scales = 32 * (5 * 4096 + 2 * 11008)
    assert size == kernels + 4 * scales + 2 * (2 * 32000 * 4096 + 65 * 4096)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "Llama has layers=0; it takes an integer of at least 1"),
        ({"context": 8.0}, r"Llama has context=8\.0"),
        ({"window": 0}, "window=0; it takes an integer"),
        ({"width": 4098}, "width of 4098 cannot be split into 32"),
        ({"kv_heads": 5}, "32 heads of queries cannot share 5 of keys and values"),
        ({"head_width": 7}, "heads of 7 channels cannot turn"),
        ({"epsilon": 0.0}, r"epsilon=0\.0; it takes a number between 0 and 1"),
        ({"rope_base": 10000}, "rope_base=10000; it takes a number above 1, such as 10000.0"),
        ({"tied": 1}, "tied=1"),
        ({"rope_scaling": {"factor": 2}}, "they take a bool and a RopeScaling or None"),
    ],
)
def test_configs_that_cannot_be_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        LlamaConfig(**change)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("yarn", 2.0), "kind='yarn'; there are linear and llama3"),
        (("linear", 0.5), r"factor=0\.5"),
        (("linear", None), "factor=None; it takes a number above 0"),
        (("llama3", 8.0, 4.0, 4.0), "low below high"),
        (("llama3", 8.0, 1.0, 4.0, 0), "context=0"),
    ],
)
def test_scalings_that_cannot_be_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        RopeScaling(*given)


# -- the whole text ---------------------------------------------------------------------------------------------------


def test_a_token_sees_nothing_after_it(params):
    changed = IDS.copy()
    changed[:, 6:] = 0
    np.testing.assert_allclose(logits_of(params, changed)[:, :6], logits_of(params, IDS)[:, :6], atol=1e-5)


def test_nothing_reaches_further_than_a_window_for_each_layer(params):
    module = Llama(WINDOWED)
    changed = IDS.copy()
    changed[:, 0] = (changed[:, 0] + 1) % 64
    moved = np.abs(logits_of(params, changed, module=module) - logits_of(params, IDS, module=module)).max(axis=(0, 2))
    assert (moved[:7] > 1e-4).all()  # two layers: 2 · (4 - 1) further
    assert (moved[7:] < 1e-6).all()


def test_padding_changes_nothing_before_it(params):
    masked = logits_of(params, IDS, ENDS)
    np.testing.assert_allclose(masked[1, :6], logits_of(params, IDS[1:, :6])[0], atol=1e-5)
    hole = np.ones((2, 11), bool)
    hole[:, 2] = False
    assert np.abs(logits_of(params, IDS, hole) - logits_of(params, IDS))[:, 3:].max() > 0.1


def test_ids_outside_the_vocabulary_give_nan(params):
    found = run(params, np.array([[-1, 0, 64]]), method="embed_tokens")
    assert np.isnan(found).all(axis=-1).tolist() == [[True, False, True]]


def test_bfloat16_computes_in_it_and_gives_float32_logits(params):
    module = Llama(CONFIG, jnp.bfloat16, jnp.bfloat16)
    small = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    assert jax.tree.map(lambda p: p.dtype, small) == jax.tree.map(lambda p: p.dtype, param_shapes(module))
    embeddings = run(small, IDS, method="embed_tokens", module=module)
    logits = run(small, embeddings, module=module)
    assert (embeddings.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    want = logits_of(params, IDS)
    assert 1e-4 < np.abs(logits - want).max() / want.std() < 0.2
    extended, cache = run(small, embeddings, module.init_cache(2, 11), method="extend", module=module)
    assert (extended.dtype, cache.keys.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(extended, logits, atol=0.05 * float(want.std()))


def test_remat_changes_no_gradient(params):
    def loss(params, module):
        return jnp.mean(module.apply({"params": params}, run(params, IDS, method="embed_tokens")) ** 2)

    plain, remat = (jax.jit(jax.grad(loss), static_argnums=1)(params, Llama(CONFIG, remat=r)) for r in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, remat)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            (np.zeros((2, 3, 33), np.float32),),
            r"embeddings \[batch, n, 32\], floats, not float32 of shape \[2, 3, 33\]",
        ),
        ((IDS,), r"not int32 of shape \[2, 11\]: see embed_tokens"),
        ((np.zeros((1, 33, 32), np.float32),), "33 tokens does not fit the context of 32"),
        ((np.zeros((1, 3, 32), np.float32), np.ones((1, 4), bool)), r"a mask of \[1, 4\] does not fit"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(params, inputs, message):
    with pytest.raises(InputError, match=message):
        run(params, *inputs)


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["all", "window"])
@pytest.mark.parametrize("parts", [(11,), (4, 7), (1,) * 11, (7, 1, 3)], ids=str)
def test_parts_with_a_cache_are_the_whole_text(params, parts, config):
    embeddings, found, module = run(params, IDS, method="embed_tokens"), [], Llama(config)
    cache = init_cache(config, 2, 14)
    for part in np.split(embeddings, np.cumsum(parts)[:-1], axis=1):
        logits, cache = run(params, part, cache, method="extend", module=module)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), logits_of(params, IDS, module=module), atol=1e-5)
    assert int(cache.position) == 11


def test_a_cache_holds_the_heads_of_keys_and_values_alone():
    cache = init_cache(CONFIG, 2, 12, jnp.bfloat16)
    assert cache.keys.shape == cache.values.shape == (2, 2, 12, 2, 8)
    assert (cache.keys.dtype, cache.position.dtype, cache.position.shape) == (jnp.bfloat16, jnp.int32, ())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["all", "window"])
def test_a_padded_row_goes_on_as_it_would_alone(params, side, config):
    module, mask = Llama(config), ENDS if side == "right" else ENDS[:, ::-1]
    alone = IDS[1:, :6]
    given = IDS.copy()
    given[1, mask[1]] = alone[0]
    more = np.array([[7, 8], [9, 10]])
    cache, found = init_cache(config, 2, 14), []
    for ids, part in ((given, mask), (more, None)):
        embeddings = run(params, ids, method="embed_tokens")
        logits, cache = run(params, embeddings, cache, part, method="extend", module=module)
        found.append(logits)
    whole = logits_of(params, np.concatenate([alone, more[1:]], axis=1), module=module)[0]
    np.testing.assert_allclose(found[0][1, mask[1]], whole[:6], atol=1e-5)
    np.testing.assert_allclose(found[1][1], whole[6:], atol=1e-5)


@pytest.mark.parametrize("mask", [None, ENDS, ENDS[:, ::-1]], ids=["none", "right", "left"])
def test_the_last_logits_alone_are_those_of_the_last_token_that_is_no_padding(params, mask):
    embeddings, cache = run(params, IDS, method="embed_tokens"), init_cache(CONFIG, 2, 11)
    every, _ = run(params, embeddings, cache, mask, method="extend")
    last, _ = run(params, embeddings, cache, mask, last_only=True, method="extend")
    places = [10, 5] if mask is ENDS else [10, 10]
    np.testing.assert_allclose(last[:, 0], every[np.arange(2), places], atol=1e-6)


def test_more_tokens_than_there_is_room_for_are_refused(params):
    with pytest.raises(InputError, match="a cache of 33 tokens is longer than the context of 32"):
        init_cache(CONFIG, 1, 33)
    embeddings = run(params, IDS, method="embed_tokens")
    with pytest.raises(InputError, match="11 tokens after 0 do not fit a cache of 8"):
        run(params, embeddings, init_cache(CONFIG, 2, 8), method="extend")


def test_a_cache_that_runs_out_while_tracing_gives_nan(params):
    embeddings, cache = run(params, IDS, method="embed_tokens")[:, :4], init_cache(CONFIG, 2, 10)
    finite = []
    for _ in range(4):
        logits, cache = run(params, embeddings, cache, method="extend")
        finite.append(bool(np.isfinite(logits).all()))
        assert finite[-1] or np.isnan(logits).all()
    assert finite == [True, True, False, False]


# -- int8 -------------------------------------------------------------------------------------------------------------


def test_int8_weights_give_the_logits_of_what_they_stand_for(params):
    quantised = quantise_weights(params)
    module = Llama(CONFIG, weights="int8")
    assert jax.tree.map(lambda p: (p.shape, p.dtype), quantised) == jax.tree.map(
        lambda p: (p.shape, p.dtype), param_shapes(module)
    )
    meant = jax.tree.map(lambda p: p, params)
    for part in ("attention", "mlp"):
        for name, leaf in quantised["blocks"][part].items():
            kernel = leaf["kernel"] * leaf["scale"][:, None]
            old = params["blocks"][part][name]["kernel"]
            assert (np.abs(kernel - old) <= 0.5001 * leaf["scale"][:, None]).all()
            meant["blocks"][part][name]["kernel"] = kernel
    found, want = logits_of(quantised, IDS, module=module), logits_of(meant, IDS)
    np.testing.assert_allclose(found, want, atol=2e-5)
    exact = logits_of(params, IDS)
    print("XX", jnp.std(want - exact) / jnp.std(exact))
    assert 1e-3 < jnp.std(want - exact) / jnp.std(exact) < 0.03
    last, _ = run(
        quantised, run(quantised, IDS, method="embed_tokens"), init_cache(CONFIG, 2, 11), method="extend", module=module
    )
    np.testing.assert_allclose(last, found, atol=1e-5)


def test_weights_of_another_kind_are_refused():
    with pytest.raises(InputError, match="no 'int4' weights"):
        param_shapes(Llama(CONFIG, weights="int4"))


# -- many devices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("weights", ["float", "int8"])
def test_a_model_split_over_devices_gives_the_same(params, devices, weights):
    module = Llama(CONFIG, weights=weights)
    whole = quantise_weights(params) if weights == "int8" else params
    mesh = make_mesh(model=devices)
    split = place(whole, mesh, partition_rules(module))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(split))
    assert held < 1.3 / devices * sum(leaf.nbytes for leaf in jax.tree.leaves(whole)) + 2000
    np.testing.assert_allclose(
        logits_of(split, IDS, ENDS, module), logits_of(whole, IDS, ENDS, module), rtol=1e-5, atol=1e-5
    )


def test_a_model_split_over_devices_writes_the_same_texts(params):
    texts = []
    for tree in (params, place(params, make_mesh(model=4), partition_rules(MODULE))):
        prompt = run(tree, IDS, method="embed_tokens")
        texts.append(greedy(FlaxModel(MODULE), tree, prompt, max_new_tokens=5).tokens)
    np.testing.assert_array_equal(*texts)


def test_partition_rules_of_a_part_leave_the_rest_of_the_tree_whole(params):
    tree = {"language": params, "vision": {"blocks": {"attention": {"query": {"kernel": np.zeros((2, 3, 3))}}}}}
    found = place(tree, make_mesh(model=8), partition_rules(MODULE, "language/"))
    query = found["language"]["blocks"]["attention"]["query"]["kernel"]
    assert query.addressable_shards[0].data.shape == (2, 32, 4)
    assert found["language"]["head"].addressable_shards[0].data.shape == (8, 32)
    assert found["vision"]["blocks"]["attention"]["query"]["kernel"].is_fully_replicated
