"""Decoding against plain loops without a cache, exhaustive search and transformers; draws against the distribution."""

import itertools
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem import generation
from jaxsem.backbones.gpt2 import Gpt2, Gpt2Config
from jaxsem.errors import InputError
from jaxsem.generation import FlaxModel, beam_search, greedy, sample, truncated

# -- two models -------------------------------------------------------------------------------------------------------

GPT2 = Gpt2(Gpt2Config(width=16, layers=2, heads=2, hidden=24, vocabulary=11, context=14))
FLAX = FlaxModel(GPT2)


@pytest.fixture(scope="module")
def gpt2():
    """Seeded parameters under which the next token depends on all that came before."""
    random = np.random.RandomState(7)
    shapes = jax.eval_shape(GPT2.init, jax.random.key(0), jnp.zeros((1, 1, 16)))["params"]
    params = jax.tree.map(lambda p: jnp.asarray(0.6 * random.standard_normal(p.shape), jnp.float32), shapes)
    # A bias here would prefer the same token everywhere.
    return {**params, "final_norm": {"scale": jnp.ones(16), "bias": jnp.zeros(16)}}


@dataclass(frozen=True)
class Recurrent:
    """A model that is no Flax module: its cache is one state [b, width]."""

    def init_cache(self, batch, length):
        return jnp.zeros((batch, 6))

    def embed(self, params, ids):
        return params["embedding"][ids]

    def step(self, params, embeddings, cache, mask=None):
        for i in range(embeddings.shape[1]):
            new = jnp.tanh(cache @ params["state"] + embeddings[:, i])
            cache = new if mask is None else jnp.where(mask[:, i, None], new, cache)
        return cache @ params["out"], cache

    def take_rows(self, cache, rows):
        return cache[rows]


def recurrent_params(seed=0, vocabulary=7):
    random = np.random.RandomState(seed)
    shapes = {"embedding": (vocabulary, 6), "state": (6, 6), "out": (6, vocabulary)}
    return {name: jnp.asarray(random.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


@dataclass(frozen=True, eq=False)
class Logged(Recurrent):
    """Keeps a log of traces and of steps that ran; no two are equal, so that each is traced anew."""

    log: list = field(default_factory=list)

    def step(self, params, embeddings, cache, mask=None):
        self.log.append("traced")
        jax.debug.callback(lambda: self.log.append("ran"))
        return super().step(params, embeddings, cache, mask)


@dataclass(frozen=True)
class Constant(Recurrent):
    """Always the logits that are its parameters."""

    def embed(self, params, ids):
        return jnp.zeros((*ids.shape, 1))

    def step(self, params, embeddings, cache, mask=None):
        return jnp.broadcast_to(params, (len(embeddings), len(params))), cache


TOY = Recurrent()
PROMPT = np.random.RandomState(1).standard_normal((3, 2, 6)).astype(np.float32)
WORDS = np.random.RandomState(4).standard_normal((3, 4, 16)).astype(np.float32)


# -- references -------------------------------------------------------------------------------------------------------


def log_probabilities(params, prompt, tokens):
    """float64 [vocabulary] of what follows `tokens` after the prompt [n, 6] in the recurrent model, from the beginning."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    state = np.zeros(6)
    for x in [*prompt, *params["embedding"][list(tokens)]]:
        state = np.tanh(state @ params["state"] + x)
    logits = state @ params["out"]
    return logits - np.log(np.exp(logits).sum())


def mean_of(params, prompt, tokens):
    sums = [log_probabilities(params, prompt, tokens[:i])[token] for i, token in enumerate(tokens)]
    return np.mean(sums)


def beams_of(params, prompt, beams, stop, most):
    """Beam search over lists: keeps the best by mean, in full every time."""
    kept = [()]
    for _ in range(most):
        candidates = []
        for text in kept:
            stopped = bool(text) and text[-1] in stop
            vocabulary = len(params["embedding"])
            candidates += [text] if stopped else [(*text, token) for token in range(vocabulary)]
        kept = sorted(candidates, key=lambda text: -mean_of(params, prompt, text))[:beams]
    return kept


def texts(found):
    """Each row without its padding."""
    return [tuple(row[:n].tolist()) for row, n in zip(np.asarray(found.tokens), np.asarray(found.lengths))]


def same(found, want):
    np.testing.assert_array_equal(found.tokens, want.tokens)
    np.testing.assert_array_equal(found.lengths, want.lengths)
    np.testing.assert_allclose(found.scores, want.scores, rtol=1e-5)


# -- greedy -----------------------------------------------------------------------------------------------------------


def test_greedy_is_a_plain_loop_without_a_cache(gpt2):
    forward = jax.jit(lambda embeddings: GPT2.apply({"params": gpt2}, embeddings))
    embeddings, tokens, sums = np.zeros((3, 14, 16), np.float32), [], 0
    embeddings[:, :4] = WORDS
    for i in range(4, 14):  # causal, so that what is still zero is not seen
        gains = jax.nn.log_softmax(forward(embeddings)[:, i - 1])
        tokens.append(np.argmax(gains, axis=-1))
        sums += np.max(gains, axis=-1)
        embeddings[:, i] = FLAX.embed(gpt2, tokens[-1][:, None])[:, 0]
    found = greedy(FLAX, gpt2, WORDS, max_new_tokens=10)
    assert len(np.unique(tokens)) > 3  # lively
    np.testing.assert_array_equal(found.tokens, np.stack(tokens, axis=1))
    np.testing.assert_array_equal(found.lengths, [10, 10, 10])
    np.testing.assert_allclose(found.scores, sums / 10, rtol=1e-5)
    assert (found.tokens.dtype, found.lengths.dtype, found.scores.dtype) == (jnp.int32, jnp.int32, jnp.float32)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_the_likeliest_token_every_time(seed):
    params = recurrent_params(seed)
    want = [beams_of(params, prompt, 1, (), 9)[0] for prompt in PROMPT]
    found = greedy(TOY, params, PROMPT, max_new_tokens=9)
    assert texts(found) == want
    np.testing.assert_allclose(found.scores, [mean_of(params, p, t) for p, t in zip(PROMPT, want)], rtol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}], ids=["temperature", "top-k", "top-p"]
)
def test_a_sample_of_the_likeliest_alone_is_greedy(settings):
    params = recurrent_params()
    found = sample(TOY, params, PROMPT, jax.random.key(3), max_new_tokens=9, **settings)
    same(found, greedy(TOY, params, PROMPT, max_new_tokens=9))


def test_decoding_works_inside_other_compiled_functions():
    params = recurrent_params()
    inside = jax.jit(lambda p, t: sample(TOY, p, PROMPT, jax.random.key(3), max_new_tokens=9, temperature=t))
    same(inside(params, 0.5), sample(TOY, params, PROMPT, jax.random.key(3), max_new_tokens=9, temperature=0.5))


# -- stopping ---------------------------------------------------------------------------------------------------------


def test_a_text_ends_with_a_stop_token_and_is_padded_after_it():
    params = recurrent_params()
    whole = texts(greedy(TOY, params, PROMPT, max_new_tokens=9))
    stop = {whole[0][2], whole[1][4]}
    ends = [next((i + 1 for i, token in enumerate(text) if token in stop), 9) for text in whole]
    assert len(set(ends)) > 1
    found = greedy(TOY, params, PROMPT, max_new_tokens=9, stop=sorted(stop), pad=-5)
    np.testing.assert_array_equal(found.lengths, ends)
    assert texts(found) == [text[:n] for text, n in zip(whole, ends)]
    for row, n in zip(np.asarray(found.tokens), ends):
        assert (row[n:] == -5).all()
    want = [mean_of(params, prompt, text[:n]) for prompt, text, n in zip(PROMPT, whole, ends)]
    np.testing.assert_allclose(found.scores, want, rtol=1e-5)


@pytest.mark.parametrize("decode", [greedy, partial(beam_search, beams=1)], ids=["greedy", "beams"])
def test_the_loop_ends_when_all_rows_have_stopped(decode):
    model, params = Logged(), recurrent_params()
    stop = texts(greedy(TOY, params, PROMPT, max_new_tokens=9))[0][1]
    found = decode(model, params, PROMPT[:1], max_new_tokens=50, stop=stop)
    jax.block_until_ready(found)
    jax.effects_barrier()
    # The prompt gives the first token, one more step the second; nothing is computed after the stop.
    assert (int(found.lengths[0]), model.log.count("ran")) == (2, 2)


def test_the_last_token_is_never_shown_to_the_model(gpt2):
    """The context of 14 holds a prompt of 4 and 10 tokens that are shown, and so 11 new ones."""
    assert greedy(FLAX, gpt2, WORDS, max_new_tokens=11).tokens.shape == (3, 11)
    with pytest.raises(InputError, match="a cache of 15 tokens is longer than the context of 14"):
        greedy(FLAX, gpt2, WORDS, max_new_tokens=12)


# -- sampling ---------------------------------------------------------------------------------------------------------

LOGITS = np.log(np.float32([0.1, 0.4, 0.02, 0.3, 0.18]))


def draws(rows, new=1, seed=0, **settings):
    prompt = np.zeros((rows, 1, 1), np.float32)
    found = sample(Constant(), jnp.asarray(LOGITS), prompt, jax.random.key(seed), max_new_tokens=new, **settings)
    return np.asarray(found.tokens)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature):
    want = np.exp(LOGITS / temperature)
    want = 20_000 * want / want.sum()
    counts = np.bincount(draws(20_000, temperature=temperature)[:, 0], minlength=5)
    chi_squared = ((counts - want) ** 2 / want).sum()
    assert chi_squared < 18.5, (counts, want)  # the 99.9th percentile for 4 degrees of freedom


def test_tokens_of_one_text_are_drawn_independently():
    first, second = draws(20_000, new=2).T
    counts = np.bincount(5 * first + second, minlength=25)
    want = 20_000 * np.outer(np.exp(LOGITS), np.exp(LOGITS)).reshape(-1)
    assert ((counts - want) ** 2 / want).sum() < 51.2, counts  # the 99.9th percentile for 24 degrees of freedom


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.8}, [1, 3, 4]),
        ({"top_p": 0.99}, [0, 1, 2, 3, 4]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        # Of 0.4, 0.3, 0.18 after top-k the first two are 0.795; of all five they would be 0.7.
        ({"top_k": 3, "top_p": 0.75}, [1, 3]),
        # The temperature comes first: it gives the likeliest 0.55, and the next 0.31.
        ({"temperature": 0.5, "top_p": 0.5}, [1]),
    ],
    ids=str,
)
def test_nothing_is_drawn_outside_what_top_k_and_top_p_leave(settings, allowed):
    assert np.unique(draws(3000, **settings)).tolist() == allowed


def test_what_is_drawn_from_is_the_distribution_of_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    logits = 3 * np.random.RandomState(0).standard_normal((5, 40)).astype(np.float32)
    for temperature, k, p in itertools.product((0.5, 1.5), (3, 12, 40), (0.3, 0.8, 0.95)):
        want = torch.from_numpy(logits)
        for warp in (
            transformers.TemperatureLogitsWarper(temperature),
            transformers.TopKLogitsWarper(k),
            transformers.TopPLogitsWarper(p),
        ):
            want = warp(None, want)
        ordered, tokens = truncated(jnp.asarray(logits), temperature, k, p)
        found = np.zeros_like(logits)
        np.put_along_axis(found, np.asarray(tokens), np.asarray(jax.nn.softmax(ordered)), axis=1)
        np.testing.assert_allclose(found, torch.softmax(want, -1).numpy(), atol=1e-5)


def test_scores_are_those_of_the_model_and_not_of_what_was_left():
    rows = np.zeros((4, 1, 1), np.float32)
    found = sample(Constant(), jnp.asarray(LOGITS), rows, jax.random.key(0), max_new_tokens=6, temperature=3.0, top_k=4)
    np.testing.assert_allclose(found.scores, LOGITS[np.asarray(found.tokens)].mean(axis=1), rtol=1e-5)


def test_a_seed_gives_the_same_texts_and_another_gives_others():
    np.testing.assert_array_equal(draws(50, new=8, seed=1), draws(50, new=8, seed=1))
    assert (draws(50, new=8, seed=1) != draws(50, new=8, seed=2)).mean() > 0.5


# -- beams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_as_many_beams_as_tokens_find_the_best_of_all_short_texts(seed):
    params, stop = recurrent_params(seed), 2
    every = [(stop,)] + [(a, b) for a, b in itertools.product(range(7), repeat=2) if a != stop]
    want = [max(every, key=lambda text, p=prompt: mean_of(params, p, text)) for prompt in PROMPT]
    assert texts(beam_search(TOY, params, PROMPT, max_new_tokens=2, beams=7, stop=stop)) == want


@pytest.mark.parametrize("beams", [1, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_beams_are_those_of_a_search_over_lists(seed, beams):
    params, stop = recurrent_params(seed), [3, 6]
    want = [beams_of(params, prompt, beams, stop, 8)[0] for prompt in PROMPT]
    found = beam_search(TOY, params, PROMPT, max_new_tokens=8, beams=beams, stop=stop, pad=-1)
    assert texts(found) == want
    np.testing.assert_allclose(found.scores, [mean_of(params, p, t) for p, t in zip(PROMPT, want)], rtol=1e-5)
    for row, n in zip(np.asarray(found.tokens), np.asarray(found.lengths)):
        assert (row[n:] == -1).all()


def test_beams_without_a_stop_are_those_of_transformers(gpt2):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from jaxsem.weights.gpt2 import to_transformers

    c = GPT2.config
    config = transformers.GPT2Config(
        n_embd=c.width, n_layer=c.layers, n_head=c.heads, n_inner=c.hidden, vocab_size=c.vocabulary, n_positions=c.context,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    net = transformers.GPT2LMHeadModel(config).eval()
    state = to_transformers(jax.tree.map(np.asarray, gpt2), c)
    net.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    options = {"max_new_tokens": 8, "num_beams": 4, "do_sample": False, "length_penalty": 1.0}
    prompt = torch.from_numpy(WORDS)
    want = net.generate(inputs_embeds=prompt, attention_mask=torch.ones(3, 4).long(), **options)
    found = beam_search(FLAX, gpt2, WORDS, max_new_tokens=8, beams=4)
    np.testing.assert_array_equal(found.tokens, want.numpy())
    assert (found.scores > greedy(FLAX, gpt2, WORDS, max_new_tokens=8).scores).any()


# -- batches ----------------------------------------------------------------------------------------------------------

DECODERS = {
    "greedy": lambda *args, keys, **options: greedy(*args, **options),
    "sample": lambda *args, keys, **options: sample(*args, keys, **options, temperature=1.3, top_p=0.9),
    "beams": lambda *args, keys, **options: beam_search(*args, **options, beams=3),
}


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS.keys())
def test_a_batch_gives_what_its_rows_give_alone(decode):
    params, keys = recurrent_params(), jax.random.split(jax.random.key(5), 3)
    together = decode(TOY, params, PROMPT, keys=keys, max_new_tokens=7, stop=[3, 5], pad=-1)
    assert len(set(texts(together))) == 3
    for i in range(3):
        row = slice(i, i + 1)
        alone = decode(TOY, params, PROMPT[row], keys=keys[row], max_new_tokens=7, stop=[3, 5], pad=-1)
        same(jax.tree.map(lambda array, row=row: array[row], together), alone)


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS.keys())
def test_padded_prompts_give_what_they_give_alone(gpt2, decode):
    keys = jax.random.split(jax.random.key(6), 3)
    mask = np.array([[0, 1, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1]], bool)
    together = decode(FLAX, gpt2, WORDS, keys=keys, max_new_tokens=7, prompt_mask=mask)
    alone = decode(FLAX, gpt2, WORDS[mask].reshape(3, 3, 16), keys=keys, max_new_tokens=7)
    same(together, alone)
    assert texts(together) != texts(decode(FLAX, gpt2, WORDS[:, 1:], keys=keys, max_new_tokens=7))


# -- compilation ------------------------------------------------------------------------------------------------------


def test_other_numbers_run_the_program_that_is_there():
    model, params = Logged(), recurrent_params()
    for seed, temperature, top_k, top_p, stop, pad in (
        (0, 1.0, 0, 1.0, 3, 0),
        (1, 0.0, 3, 0.8, 4, -1),
        (2, 2, 1, 1, 5, 6),
    ):
        sample(
            model, params, PROMPT, jax.random.key(seed), max_new_tokens=5,
            temperature=temperature, top_k=top_k, top_p=top_p, stop=stop, pad=pad,
        )  # fmt: skip
    assert model.log.count("traced") == 2  # the prompt's step and that of the loop


def test_an_equal_module_runs_the_program_that_is_there(gpt2):
    sizes = generation._greedy._cache_size
    greedy(FLAX, gpt2, WORDS, max_new_tokens=10)
    before = sizes()
    greedy(FlaxModel(Gpt2(Gpt2Config(16, 2, 2, 24, 11, 14))), gpt2, WORDS, max_new_tokens=10)
    assert sizes() == before


# -- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": np.zeros((2, 3), np.int32)}, r"not int32 of \[2, 3\]: embed token ids first"),
        ({"prompt": np.zeros((2, 0, 6), np.float32)}, r"of at least one token, not float32 of \[2, 0, 6\]"),
        ({"prompt_mask": np.ones((3, 3), bool)}, r"booleans \[3, 2\], not bool of \[3, 3\]"),
        ({"prompt_mask": np.ones((3, 2), int)}, r"booleans \[3, 2\], not int64"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 leaves no text"),
        ({"temperature": -1.0}, r"temperature=-1\.0 cannot be"),
        ({"temperature": float("nan")}, "temperature=nan cannot be"),
        ({"top_p": 0.0}, r"top_p=0\.0 cannot be"),
        ({"top_p": 1.5}, r"top_p=1\.5 cannot be"),
        ({"top_k": -1}, "top_k=-1 cannot be"),
        ({"rng": jax.random.split(jax.random.key(0), 2)}, r"one for each of 3 rows, not key<fry> of \[2\]"),
        ({"rng": np.zeros(2, np.uint32)}, r"one key \(jax.random.key\).*not uint32 of \[2\]"),
    ],
)
def test_arguments_that_cannot_be_are_refused(change, message):
    options = {"prompt": PROMPT, "rng": jax.random.key(0), "max_new_tokens": 4, **change}
    with pytest.raises(InputError, match=message):
        sample(TOY, recurrent_params(), **options)


@pytest.mark.parametrize(
    ("beams", "message"), [(0, "0 beams finds nothing"), (8, "8 beams cannot start from 7 tokens")]
)
def test_beams_that_cannot_be_are_refused(beams, message):
    with pytest.raises(InputError, match=message):
        beam_search(TOY, recurrent_params(), PROMPT, max_new_tokens=4, beams=beams)
