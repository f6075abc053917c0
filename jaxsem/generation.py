"""Text from a causal language model, decoded in one compiled loop: greedy, sampled, or by beam search.

    model = generation.FlaxModel(Gpt2(config))
    found = generation.greedy(model, params, prompt, max_new_tokens=67, stop=13)
    words = tokenizer.decode(found.tokens[0, : found.lengths[0]])

The prompt is given as embeddings, [b, n, width]: of words (`model.embed`), or of an image in their place. Rows of unequal
length are padded on either side, and `prompt_mask` is False there.

The loop ends as soon as every row has stopped. What is compiled depends on the model, on the shapes and on `max_new_tokens`;
another temperature, top_p, top_k, seed or stop token runs the same program. Put the parameters on the device first
(`jax.device_put`), or they travel at every call.

ClipCap's two ways of decoding, with GPT-2's token 13, ".": `greedy(..., max_new_tokens=67, stop=13)`, since the likeliest token
lies in every nucleus and its code takes the likeliest of it; and `beam_search` with 5 beams and the same limits.

Source: Mokady et al., ClipCap (2021), and its implementation; Holtzman et al., The Curious Case of Neural Text Degeneration
(2020), for top-p.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsem.errors import InputError

# -- models -----------------------------------------------------------------------------------------------------------


class LanguageModel(Protocol):
    """What a causal language model must offer: pure functions, of an object that hashes by its value.

    A cache is any pytree; only the model looks inside.
    """

    def init_cache(self, batch: int, length: int) -> Any:
        """An empty cache with room for `length` tokens; InputError if the model cannot see so many."""

    def embed(self, params: Any, ids: Int[Array, "b n"]) -> Float[Array, "b n width"]:
        """The embeddings of token ids."""

    def step(
        self, params: Any, embeddings: Float[Array, "b n width"], cache: Any, mask: Bool[Array, "b n"] | None = None
    ) -> tuple[Float[Array, "b vocabulary"], Any]:
        """Appends tokens; gives the logits of what follows the last one that is no padding (mask False), and the cache."""

    def take_rows(self, cache: Any, rows: Int[Array, " m"]) -> Any:
        """The cache of these rows of the batch, in that order, perhaps repeated."""


@dataclass(frozen=True)
class FlaxModel:
    """A `LanguageModel` from a Flax module with methods as those of `jaxsem.backbones.gpt2.Gpt2`.

    Attributes:
      module: Has `init_cache(batch, length)`, `embed_tokens(ids)` and `extend(embeddings, cache, mask, last_only)`; the cache has
        `take(rows)`.
    """

    module: nn.Module

    def init_cache(self, batch: int, length: int) -> Any:
        """See `LanguageModel`."""
        return self.module.init_cache(batch, length)

    def embed(self, params: Any, ids: jax.Array) -> jax.Array:
        """See `LanguageModel`."""
        return self.module.apply({"params": params}, ids, method="embed_tokens")

    def step(self, params: Any, embeddings: jax.Array, cache: Any, mask: Any = None) -> tuple[jax.Array, Any]:
        """See `LanguageModel`."""
        options = {"mask": mask, "last_only": True, "method": "extend"}
        logits, cache = self.module.apply({"params": params}, embeddings, cache, **options)
        return logits[:, 0], cache

    def take_rows(self, cache: Any, rows: jax.Array) -> Any:
        """See `LanguageModel`."""
        return cache.take(rows)


class Generated(NamedTuple):
    """Texts, one a row.

    Attributes:
      tokens: int32 [b, max_new_tokens], without the prompt; after a stop token, the pad.
      lengths: int32 [b], tokens of each row, a stop token included.
      scores: float32 [b], the mean natural log-probability of these tokens under the model itself: at temperature 1, and
        whatever the filters leave out.
    """

    tokens: Int[Array, "b n"]
    lengths: Int[Array, " b"]
    scores: Float[Array, " b"]


# -- one text a row ---------------------------------------------------------------------------------------------------


def greedy(
    model: LanguageModel,
    params: Any,
    prompt: Float[Array, "b n width"],
    *,
    max_new_tokens: int,
    stop: int | Sequence[int] = (),
    pad: int = 0,
    prompt_mask: Bool[Array, "b n"] | None = None,
) -> Generated:
    """Takes the likeliest token at every place.

    Args:
      model: The language model.
      params: Its parameters.
      prompt: What the text continues, as embeddings without positions.
      max_new_tokens: Most tokens of a text.
      stop: Token or tokens that end a text; none by default.
      pad: What stands in `tokens` after the end.
      prompt_mask: False at the padding of the prompt.

    Raises:
      InputError: A prompt or mask that does not fit, no token wanted, or more than the model can see.
    """
    prompt, stop = _checked(prompt, prompt_mask, max_new_tokens, stop)
    return _greedy(model, params, prompt, prompt_mask, stop, pad, max_new_tokens=max_new_tokens)


def sample(
    model: LanguageModel,
    params: Any,
    prompt: Float[Array, "b n width"],
    rng: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: int | Sequence[int] = (),
    pad: int = 0,
    prompt_mask: Bool[Array, "b n"] | None = None,
) -> Generated:
    """Draws every token from the model's distribution, perhaps a sharper or truncated one.

    As in transformers, the temperature comes first, then top-k, then top-p on what top-k left.

    Args:
      model: The language model.
      params: Its parameters.
      prompt: What the text continues, as embeddings without positions.
      rng: One key, or one for each row [b]: a row's text depends on its own key and prompt alone.
      max_new_tokens: Most tokens of a text.
      temperature: Divides the logits; 0 takes the likeliest.
      top_k: Draws from the k likeliest tokens alone; 0 does not limit.
      top_p: Draws from the nucleus alone, the fewest likeliest tokens of together at least this probability, in (0, 1].
      stop: Token or tokens that end a text; none by default.
      pad: What stands in `tokens` after the end.
      prompt_mask: False at the padding of the prompt.

    Raises:
      InputError: As `greedy`, and for keys of another shape, or a setting out of its range.
    """
    prompt, stop = _checked(prompt, prompt_mask, max_new_tokens, stop)
    for name, value, valid in (
        ("temperature", temperature, lambda x: 0 <= x < float("inf")),
        ("top_k", top_k, lambda x: x >= 0),
        ("top_p", top_p, lambda x: 0 < x <= 1),
    ):
        if not isinstance(value, jax.core.Tracer) and not valid(value):
            raise InputError(f"{name}={value} cannot be: temperature and top_k are at least 0, top_p is in (0, 1]")
    keys = _keys_of_rows(rng, len(prompt))
    settings = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
    return _sample(model, params, prompt, prompt_mask, stop, pad, keys, settings, max_new_tokens=max_new_tokens)


def truncated(
    logits: Float[Array, "b vocabulary"], temperature: Any, top_k: Any, top_p: Any
) -> tuple[Float[Array, "b vocabulary"], Int[Array, "b vocabulary"]]:
    """What `sample` draws from.

    Returns:
      Logits from the largest down, -inf where a token cannot be drawn, and the token of each; of equal ones the first comes
      first.
    """
    # Less their maximum, so that a temperature near 0 gives 0 and large negative numbers.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.maximum(temperature, 1e-6)
    logits, tokens = jax.lax.top_k(logits, logits.shape[-1])
    rank = jnp.arange(logits.shape[-1])
    logits = jnp.where((rank < top_k) | (top_k == 0), logits, -jnp.inf)
    reached = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
    before = jnp.pad(reached[:, :-1], ((0, 0), (1, 0)))
    # At top_p = 1 nothing is left out, though the sum may reach 1 early by rounding.
    return jnp.where((before < top_p) | (top_p >= 1), logits, -jnp.inf), tokens


@partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def _greedy(model, params, prompt, prompt_mask, stop, pad, *, max_new_tokens: int) -> Generated:
    def choose(logits: jax.Array, count: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1)

    return _decode(model, params, prompt, prompt_mask, stop, pad, choose, max_new_tokens)


@partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def _sample(model, params, prompt, prompt_mask, stop, pad, keys, settings, *, max_new_tokens: int) -> Generated:
    def choose(logits: jax.Array, count: jax.Array) -> jax.Array:
        logits, tokens = truncated(logits, *settings)
        rank = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, count), row))(keys, logits)
        return jnp.take_along_axis(tokens, rank[:, None], axis=1)[:, 0]

    return _decode(model, params, prompt, prompt_mask, stop, pad, choose, max_new_tokens)


class _Texts(NamedTuple):
    """What the loop carries: the texts so far (...: a row, or a beam of a row), and what the last token needs.

    `last` is the token to be shown to the model next. A stopped text goes on in the model, and nobody looks.
    """

    tokens: jax.Array  # int32 [..., max_new_tokens]
    lengths: jax.Array  # int32 [...]
    sums: jax.Array  # float32 [...]
    stopped: jax.Array  # bool [...]
    last: jax.Array  # int32 [...]

    @classmethod
    def empty(cls, shape: tuple[int, ...], max_new_tokens: int, pad: jax.Array) -> "_Texts":
        zeros = jnp.zeros(shape, jnp.int32)
        tokens = jnp.full((*shape, max_new_tokens), pad, jnp.int32)
        return cls(tokens, zeros, zeros.astype(jnp.float32), zeros.astype(bool), zeros)

    def add(self, count: jax.Array, token: jax.Array, sums: jax.Array, stop: jax.Array) -> "_Texts":
        """Appends a token to those that have not stopped; `sums` are the new ones."""
        token = token.astype(jnp.int32)
        shown = jnp.where(self.stopped, self.tokens[..., count], token)
        return _Texts(
            self.tokens.at[..., count].set(shown),
            self.lengths + ~self.stopped,
            jnp.where(self.stopped, self.sums, sums),
            self.stopped | jnp.isin(token, stop),
            token,
        )

    def generated(self) -> Generated:
        return Generated(self.tokens, self.lengths, self.sums / self.lengths)


def _decode(
    model: LanguageModel,
    params: Any,
    prompt: jax.Array,
    prompt_mask: jax.Array | None,
    stop: jax.Array,
    pad: jax.Array,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
    max_new_tokens: int,
) -> Generated:
    """The loop of `greedy` and `sample`; `choose` gives a token [b] from logits [b, vocabulary] and the count of tokens."""

    def add(texts: _Texts, count: Any, logits: jax.Array) -> _Texts:
        logits = logits.astype(jnp.float32)
        token = choose(logits, count)
        gain = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        return texts.add(count, token, texts.sums + gain, stop)

    def body(state: tuple) -> tuple:
        count, texts, cache = state
        logits, cache = model.step(params, model.embed(params, texts.last[:, None]), cache)
        return count + 1, add(texts, count, logits), cache

    batch = len(prompt)
    logits, cache = _prefill(model, params, prompt, prompt_mask, max_new_tokens)
    texts = add(_Texts.empty((batch,), max_new_tokens, pad), 0, logits)
    _, texts, _ = jax.lax.while_loop(_goes_on(max_new_tokens), body, (jnp.int32(1), texts, cache))
    return texts.generated()


# -- beams ------------------------------------------------------------------------------------------------------------


def beam_search(
    model: LanguageModel,
    params: Any,
    prompt: Float[Array, "b n width"],
    *,
    max_new_tokens: int,
    beams: int = 5,
    stop: int | Sequence[int] = (),
    pad: int = 0,
    prompt_mask: Bool[Array, "b n"] | None = None,
) -> Generated:
    """Keeps the texts with the highest mean log-probability so far, stopped ones among them; gives each row's best.

    As ClipCap: all candidates compete by the mean over their own length, and the search goes on until every beam has stopped
    or is full.

    Args:
      model: The language model.
      params: Its parameters.
      prompt: What the text continues, as embeddings without positions.
      max_new_tokens: Most tokens of a text.
      beams: Texts kept for each row; one is greedy.
      stop: Token or tokens that end a text; none by default.
      pad: What stands in `tokens` after the end.
      prompt_mask: False at the padding of the prompt.

    Raises:
      InputError: As `greedy`, and for fewer than one beam, or more than there are tokens.
    """
    prompt, stop = _checked(prompt, prompt_mask, max_new_tokens, stop)
    if beams < 1:
        raise InputError(f"a search with {beams} beams finds nothing: take at least 1")
    return _beam_search(model, params, prompt, prompt_mask, stop, pad, max_new_tokens=max_new_tokens, beams=beams)


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "beams"))
def _beam_search(model, params, prompt, prompt_mask, stop, pad, *, max_new_tokens: int, beams: int) -> Generated:
    batch = len(prompt)
    logits, cache = _prefill(model, params, prompt, prompt_mask, max_new_tokens)
    vocabulary = logits.shape[-1]
    if beams > vocabulary:
        raise InputError(f"{beams} beams cannot start from {vocabulary} tokens: take fewer")

    # The first tokens make the beams differ.
    sums, tokens = jax.lax.top_k(jax.nn.log_softmax(logits.astype(jnp.float32)), beams)
    texts = _Texts.empty((batch, beams), max_new_tokens, pad).add(0, tokens, sums, stop)
    cache = model.take_rows(cache, jnp.repeat(jnp.arange(batch), beams))

    def body(state: tuple) -> tuple:
        count, texts, cache = state
        logits, cache = model.step(params, model.embed(params, texts.last.reshape(-1, 1)), cache)
        gains = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, beams, vocabulary)
        # A stopped text competes as it is, once.
        once = jnp.where(jnp.arange(vocabulary) == 0, 0.0, -jnp.inf)
        sums = texts.sums[..., None] + jnp.where(texts.stopped[..., None], once, gains)
        means = sums / (texts.lengths + ~texts.stopped)[..., None]
        _, places = jax.lax.top_k(means.reshape(batch, -1), beams)
        source, tokens = places // vocabulary, places % vocabulary
        sums = jnp.take_along_axis(sums.reshape(batch, -1), places, axis=1)
        texts = jax.vmap(lambda row, beams: jax.tree.map(lambda array: array[beams], row))(texts, source)
        cache = model.take_rows(cache, (source + beams * jnp.arange(batch)[:, None]).reshape(-1))
        return count + 1, texts.add(count, tokens, sums, stop), cache

    _, texts, _ = jax.lax.while_loop(_goes_on(max_new_tokens), body, (jnp.int32(1), texts, cache))
    # The beams are in the order of their means.
    return jax.tree.map(lambda array: array[:, 0], texts).generated()


# -- shared -----------------------------------------------------------------------------------------------------------


def _prefill(
    model: LanguageModel, params: Any, prompt: jax.Array, mask: jax.Array | None, max_new_tokens: int
) -> tuple[jax.Array, Any]:
    """Shows the prompt to the model: logits [b, vocabulary] of the first token, and the cache with room for the others."""
    batch, n, _ = prompt.shape
    # Nothing follows the last token, which is never shown to the model.
    return model.step(params, prompt, model.init_cache(batch, n + max_new_tokens - 1), mask)


def _goes_on(max_new_tokens: int) -> Callable[[tuple], jax.Array]:
    return lambda state: (state[0] < max_new_tokens) & ~jnp.all(state[1].stopped)


def _checked(prompt: Any, mask: Any, max_new_tokens: int, stop: int | Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """The prompt and the stop tokens [k] as arrays."""
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 3 or 0 in prompt.shape or not jnp.issubdtype(prompt.dtype, jnp.floating):
        raise InputError(
            f"a prompt is embeddings [batch, n, width] of at least one token, not {prompt.dtype} of {list(prompt.shape)}: embed "
            f"token ids first"
        )
    if mask is not None and (mask.shape != prompt.shape[:2] or mask.dtype != bool):
        raise InputError(
            f"the mask of a prompt of {list(prompt.shape)} is booleans {list(prompt.shape[:2])}, not {mask.dtype} of "
            f"{list(mask.shape)}"
        )
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} leaves no text: ask for at least 1")
    return prompt, jnp.atleast_1d(jnp.asarray(stop, jnp.int32))


def _keys_of_rows(rng: jax.Array, batch: int) -> jax.Array:
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) or rng.shape not in ((), (batch,)):
        raise InputError(
            f"rng is one key (jax.random.key) or one for each of {batch} rows, not {rng.dtype} of {list(rng.shape)}"
        )
    return jax.random.split(rng, batch) if rng.shape == () else rng
