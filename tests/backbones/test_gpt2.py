"""GPT-2 against transformers' torch model of the same small random weights, and its cache against the whole text at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.backbones.gpt2 import CONFIGS, Gpt2, Gpt2Config, init_cache, param_shapes
from jaxsem.errors import InputError
from jaxsem.weights.gpt2 import load_gpt2

CONFIG = Gpt2Config(width=24, layers=3, heads=3, hidden=80, vocabulary=61, context=16)
MODULE = Gpt2(CONFIG)
IDS = np.random.RandomState(1).randint(0, 61, (2, 9)).astype(np.int32)
# The second row ends early.
ENDS = np.arange(9) < np.array([[9], [5]])


def lively_net():
    """A GPT2LMHeadModel of `CONFIG` with seeded weights under which every layer changes its output by its own size."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=24, n_layer=3, n_head=3, n_inner=80, vocab_size=61, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    net, random = transformers.GPT2LMHeadModel(config).eval(), np.random.RandomState(5)
    with torch.no_grad():
        for name, value in sorted(net.named_parameters()):
            normal = random.standard_normal(tuple(value.shape))
            if ".ln_" in name:
                array = 0.2 * normal + name.endswith("weight")
            elif ".c_" in name and name.endswith("weight"):
                array = normal / np.sqrt(len(normal))
            else:
                array = 0.5 * normal
            value.copy_(torch.from_numpy(np.asarray(array, np.float32)))
    return net


def state_of(net) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in net.state_dict().items()}


@pytest.fixture(scope="module")
def params():
    """Seeded parameters that need no torch: fresh ones, with everything moved."""
    random = np.random.RandomState(3)
    fresh = jax.jit(MODULE.init)(jax.random.key(0), jnp.zeros((1, 1, 24)))["params"]
    return jax.tree.map(lambda p: jnp.asarray(p + 0.2 * random.standard_normal(p.shape), jnp.float32), fresh)


@functools.partial(jax.jit, static_argnames=("method", "last_only", "module"))
def run(params, *inputs, method="__call__", module=MODULE, **options):
    return module.apply({"params": params}, *inputs, method=method, **options)


def logits_of(params, ids, mask=None):
    return run(params, run(params, ids, method="embed_tokens"), mask)


# -- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, ENDS], ids=["whole", "padded"])
def test_logits_are_those_of_transformers(mask):
    torch = pytest.importorskip("torch")
    net = lively_net()
    _, params = load_gpt2(state_of(net), CONFIG)
    with torch.no_grad():
        given = None if mask is None else torch.from_numpy(mask).long()
        want = net(torch.from_numpy(IDS).long(), attention_mask=given).logits.numpy()
    assert want.std() > 1  # lively
    np.testing.assert_allclose(logits_of(params, IDS, mask), want, rtol=1e-5, atol=1e-5)


def test_a_prefix_of_embeddings_gives_the_logits_of_transformers():
    torch = pytest.importorskip("torch")
    net = lively_net()
    _, params = load_gpt2(state_of(net), CONFIG)
    prefix = np.random.RandomState(2).standard_normal((2, 4, 24)).astype(np.float32)
    with torch.no_grad():
        want = net(inputs_embeds=torch.from_numpy(prefix)).logits.numpy()
    np.testing.assert_allclose(run(params, prefix), want, rtol=1e-5, atol=1e-5)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_published_models_have_their_number_of_parameters(name, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(Gpt2(CONFIGS[name])))) == count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "GPT-2 has layers=0; it takes an integer of at least 1"),
        ({"context": 8.0}, r"GPT-2 has context=8\.0"),
        ({"width": 770}, "width of 770 cannot be split into 12"),
        ({"epsilon": 0.0}, r"epsilon=0\.0; it takes a number between 0 and 1"),
    ],
)
def test_configs_that_cannot_be_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Gpt2Config(**change)


# -- the whole text ---------------------------------------------------------------------------------------------------


def test_a_token_sees_nothing_after_it(params):
    changed = IDS.copy()
    changed[:, 6:] = 0
    np.testing.assert_allclose(logits_of(params, changed)[:, :6], logits_of(params, IDS)[:, :6], atol=1e-5)


def test_padding_changes_nothing_before_it(params):
    masked = logits_of(params, IDS, ENDS)
    np.testing.assert_allclose(masked[1, :5], logits_of(params, IDS[1:, :5])[0], atol=1e-5)
    hole = np.ones((2, 9), bool)
    hole[:, 2] = False
    assert np.abs(logits_of(params, IDS, hole) - logits_of(params, IDS))[:, 3:].max() > 0.1


def test_ids_outside_the_vocabulary_give_nan(params):
    found = run(params, np.array([[-1, 0, 61]]), method="embed_tokens")
    assert np.isnan(found).all(axis=-1).tolist() == [[True, False, True]]


def test_bfloat16_computes_in_it_and_gives_float32_logits(params):
    module = Gpt2(CONFIG, jnp.bfloat16)
    embeddings = run(params, IDS, method="embed_tokens", module=module)
    logits = run(params, embeddings, module=module)
    assert (embeddings.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    want = logits_of(params, IDS)
    assert 1e-4 < np.abs(logits - want).max() / want.std() < 0.2
    extended, cache = run(params, embeddings, module.init_cache(2, 9), method="extend", module=module)
    assert (extended.dtype, cache.keys.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(extended, logits, atol=0.05 * float(want.std()))


def test_remat_changes_no_gradient(params):
    def loss(params, module):
        return jnp.mean(module.apply({"params": params}, run(params, IDS, method="embed_tokens")) ** 2)

    plain, remat = (jax.jit(jax.grad(loss), static_argnums=1)(params, Gpt2(CONFIG, remat=r)) for r in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, remat)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            (np.zeros((2, 3, 25), np.float32),),
            r"embeddings \[batch, n, 24\], floats, not float32 of shape \[2, 3, 25\]",
        ),
        ((IDS,), r"not int32 of shape \[2, 9\]: see embed_tokens"),
        ((np.zeros((1, 17, 24), np.float32),), "17 tokens does not fit the context of 16"),
        ((np.zeros((1, 3, 24), np.float32), np.ones((1, 4), bool)), r"a mask of \[1, 4\] does not fit"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(params, inputs, message):
    with pytest.raises(InputError, match=message):
        run(params, *inputs)


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [(9,), (4, 5), (1,) * 9, (6, 1, 2)], ids=str)
def test_parts_with_a_cache_are_the_whole_text(params, parts):
    embeddings, found = run(params, IDS, method="embed_tokens"), []
    cache = init_cache(CONFIG, 2, 12)
    for part in np.split(embeddings, np.cumsum(parts)[:-1], axis=1):
        logits, cache = run(params, part, cache, method="extend")
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), logits_of(params, IDS), atol=1e-5)
    assert int(cache.position) == 9


def test_a_cache_is_a_plain_tree_of_the_shapes_promised():
    cache = init_cache(CONFIG, 2, 12, jnp.bfloat16)
    assert cache.keys.shape == cache.values.shape == (3, 2, 12, 3, 8)
    assert (cache.keys.dtype, cache.position.dtype, cache.position.shape) == (jnp.bfloat16, jnp.int32, ())
    assert len(jax.tree.leaves(cache)) == 4


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_goes_on_as_it_would_alone(params, side):
    mask = ENDS if side == "right" else ENDS[:, ::-1]
    alone = IDS[1:, :5]
    given = IDS.copy()
    given[1, mask[1]] = alone[0]
    more = np.array([[7, 8], [9, 10]])
    cache, found = init_cache(CONFIG, 2, 12), []
    for ids, part in ((given, mask), (more, None)):
        embeddings = run(params, ids, method="embed_tokens")
        logits, cache = run(params, embeddings, cache, part, method="extend")
        found.append(logits)
    whole = logits_of(params, np.concatenate([alone, more[1:]], axis=1))[0]
    np.testing.assert_allclose(found[0][1, mask[1]], whole[:5], atol=1e-5)
    np.testing.assert_allclose(found[1][1], whole[5:], atol=1e-5)


@pytest.mark.parametrize("mask", [None, ENDS, ENDS[:, ::-1]], ids=["none", "right", "left"])
def test_the_last_logits_alone_are_those_of_the_last_token_that_is_no_padding(params, mask):
    embeddings, cache = run(params, IDS, method="embed_tokens"), init_cache(CONFIG, 2, 9)
    every, _ = run(params, embeddings, cache, mask, method="extend")
    last, _ = run(params, embeddings, cache, mask, last_only=True, method="extend")
    places = [8, 4] if mask is ENDS else [8, 8]
    np.testing.assert_allclose(last[:, 0], every[np.arange(2), places], atol=1e-6)


def test_rows_of_a_cache_can_be_taken(params):
    embeddings = run(params, IDS, method="embed_tokens")
    _, cache = run(params, embeddings[:, :8], init_cache(CONFIG, 2, 9), method="extend")
    rows = np.array([1, 1, 0])
    found, _ = run(params, embeddings[rows, 8:], cache.take(rows), method="extend")
    np.testing.assert_allclose(found[:, 0], logits_of(params, IDS)[rows, -1], atol=1e-5)


def test_more_tokens_than_there_is_room_for_are_refused(params):
    with pytest.raises(InputError, match="a cache of 17 tokens is longer than the context of 16"):
        init_cache(CONFIG, 1, 17)
    with pytest.raises(InputError, match="3x0x4x3x8 is empty"):
        init_cache(CONFIG, 0, 4)
    embeddings = run(params, IDS, method="embed_tokens")
    with pytest.raises(InputError, match="9 tokens after 0 do not fit a cache of 8"):
        run(params, embeddings, init_cache(CONFIG, 2, 8), method="extend")
    _, cache = run(params, embeddings, init_cache(CONFIG, 2, 12), method="extend")
    with pytest.raises(InputError, match="4 tokens after 9 do not fit a cache of 12"):
        MODULE.apply({"params": params}, embeddings[:, :4], cache, method="extend")  # outside of jit, the 9 is known
    with pytest.raises(InputError, match=r"tokens of \[1, 1\] with no mask do not fit a cache of 2 rows"):
        run(params, embeddings[:1, :1], cache, method="extend")


@pytest.mark.parametrize("length", [12, 16], ids=["the cache ends", "the context ends"])
def test_a_cache_that_runs_out_while_tracing_gives_nan(params, length):
    embeddings, cache = run(params, IDS, method="embed_tokens")[:, :4], init_cache(CONFIG, 2, length)
    finite = []
    for _ in range(5):
        logits, cache = run(params, embeddings, cache, method="extend")
        finite.append(bool(np.isfinite(logits).all()))
        assert finite[-1] or np.isnan(logits).all()
    assert finite == [4 * (i + 1) <= length for i in range(5)]
