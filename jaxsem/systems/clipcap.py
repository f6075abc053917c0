"""ClipCap: a caption from one CLIP feature, by a mapping network and GPT-2.

    feature [b, d] ── mapper ──▶ prefix [b, p, width] ─┐
                                                       ├─ GPT-2 ──▶ logits [b, n, vocabulary]
    tokens [b, n] ── embed_tokens ──▶ [b, n, width] ───┘

The mapper turns the feature into p vectors that stand where the embeddings of p words would, and GPT-2 goes on from
there. The feature may come from anywhere: CLIP's own, or one that PQVAE-shared has decoded, which is how papers/1,
section 4.6 shows what 400 bits keep of an image.

The authors ignore the token 0 in the loss, which is their padding and GPT-2's "!" as well; here the mask says what is
padding. The released code of papers/1 forgets to hand GPT-2 a mask; here it gets one. As captions are padded at their end
and GPT-2 is causal, no word sees the padding either way, so that the loss is the same. Fresh parameters are drawn with
zero biases, and those of the transformer mapper as for CLIP's text tower.

Source: Mokady et al., ClipCap: CLIP Prefix for Image Captioning (2021), and the authors' code for what it leaves open:
widths, and which layers have biases.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxsem.backbones.gpt2 import GPT2, Gpt2, Gpt2Config
from jaxsem.errors import InputError
from jaxsem.generation import FlaxModel, Generated, beam_search, greedy, sample
from jaxsem.nn.attention import check_heads
from jaxsem.nn.conv import kernel_init
from jaxsem.nn.ops import unit
from jaxsem.nn.transformer import Block, scan_layers

MAPPERS = ("mlp", "transformer")
METHODS = ("greedy", "top_p", "beam")

FULL_STOP = 13  # "." among GPT-2's tokens, where the authors' captions end


@dataclass(frozen=True)
class ClipCapConfig:
    """Sizes of ClipCap; the defaults are those of the published MLP models.

    Attributes:
      feature_width: Width of the features (CLIP ViT-B/32: 512, RN50x4: 640, ViT-L/14: 768).
      mapper: "mlp", or "transformer".
      prefix: p, vectors that GPT-2 is given for a feature.
      clip_length: Tokens that the transformer mapper makes of the feature; the MLP has none.
      layers: Layers of the transformer mapper.
      heads: Attention heads of the transformer mapper.
      gpt2: Sizes of GPT-2.
      normalise: Whether features are scaled to unit length first, as papers/1 does and ClipCap does not.

    Raises:
      InputError: No such mapper, a size below 1, a prefix that leaves the context no room for a word, or heads that do
        not divide the width.
    """

    feature_width: int = 512
    mapper: str = "mlp"
    prefix: int = 10
    clip_length: int = 10
    layers: int = 8
    heads: int = 8
    gpt2: Gpt2Config = GPT2
    normalise: bool = False

    def __post_init__(self) -> None:
        if self.mapper not in MAPPERS:
            raise InputError(f"there is no mapper {self.mapper!r}; there are {', '.join(MAPPERS)}")
        for name in ("feature_width", "prefix", "clip_length", "layers", "heads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.prefix >= self.gpt2.context:
            raise InputError(f"a prefix of {self.prefix} leaves no room for words in a context of {self.gpt2.context}")
        if self.mapper == "transformer":
            check_heads(self.gpt2.width, self.heads)


MLP_COCO = ClipCapConfig()
"""`coco_weights.pt` and `conceptual_weights.pt`: features of ViT-B/32, GPT-2 trained with the mapper."""

TRANSFORMER_COCO = ClipCapConfig(640, "transformer", prefix=40, clip_length=40)
"""`transformer_weights.pt`: features of RN50x4, GPT-2 as it was."""

PAPER = ClipCapConfig(768, normalise=True)
"""papers/1, section 4.6: unit features of ViT-L/14@336px, original or decoded by PQVAE-shared."""


# -- mappers ----------------------------------------------------------------------------------------------------------


class MlpMapper(nn.Module):
    """Two linear layers with a tanh between, half as wide as what they give.

    Attributes:
      config: Sizes.
      dtype: Of the computation.
      param_dtype: Of the parameters.
    """

    config: ClipCapConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps features [b, feature_width] to [b, prefix, width]."""
        c = self.config
        size = c.prefix * c.gpt2.width
        x = jnp.tanh(_dense(self, "fc1", size // 2)(features))
        return _dense(self, "fc2", size)(x).reshape(-1, c.prefix, c.gpt2.width)


class TransformerMapper(nn.Module):
    """Tokens of the feature and learned constants through a transformer; what leaves at the constants' places is taken.

    Attributes:
      config: Sizes.
      dtype: Of the computation.
      param_dtype: Of the parameters.
      remat: Whether to recompute each layer in the backward pass: less memory, more time.
    """

    config: ClipCapConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps features [b, feature_width] to [b, prefix, width]."""
        c, width = self.config, self.config.gpt2.width
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(1.0)
        constants = jnp.asarray(self.param("constants", init, (c.prefix, width), self.param_dtype), self.dtype)
        x = _dense(self, "linear", c.clip_length * width)(features).reshape(-1, c.clip_length, width)
        x = jnp.concatenate([x, jnp.broadcast_to(constants, (len(x), *constants.shape))], axis=1)
        block = Block(c.heads, 2 * width, "relu", depth=c.layers, qkv_bias=False, name="blocks", **types)
        return scan_layers(block, x, layers=c.layers, remat=self.remat)[0][:, c.clip_length :]


def _dense(mapper: nn.Module, name: str, features: int) -> nn.Dense:
    types = {"dtype": mapper.dtype, "param_dtype": mapper.param_dtype}
    return nn.Dense(features, kernel_init=kernel_init, name=name, **types)


# -- the model --------------------------------------------------------------------------------------------------------


class ClipCap(nn.Module):
    """The mapper and GPT-2.

    Attributes:
      config: Sizes.
      dtype: Of the computation; logits are float32 all the same.
      param_dtype: Of the parameters.
      remat: Whether to recompute each layer in the backward pass: less memory, more time.
    """

    config: ClipCapConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Makes both networks."""
        c, types = self.config, (self.dtype, self.param_dtype)
        if c.mapper == "mlp":
            self.mapper = MlpMapper(c, *types)
        else:
            self.mapper = TransformerMapper(c, *types, self.remat)
        self.gpt2 = Gpt2(c.gpt2, *types, self.remat)

    def prefix(self, features: jax.Array) -> jax.Array:
        """What GPT-2 is given for features: [b, prefix, width].

        Args:
          features: [b, feature_width], from CLIP or decoded by PQVAE-shared.

        Raises:
          InputError: Features of another width.
        """
        c = self.config
        if features.ndim != 2 or features.shape[1] != c.feature_width:
            raise InputError(f"features are [images, {c.feature_width}] for this model, not of shape {features.shape}")
        features = jnp.asarray(features, jnp.float32)
        return self.mapper(unit(features) if c.normalise else features)

    def __call__(self, features: jax.Array, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The pass of training.

        Args:
          features: [b, feature_width].
          tokens: Captions as token ids [b, n], padded at their end with anything; ids outside the vocabulary give NaN.
          mask: [b, n], True where a token belongs to the caption; None: they all do.

        Returns:
          Float32 logits [b, n, vocabulary]: those at i are of token i, from the feature and the tokens before it.

        Raises:
          InputError: Features of another width, tokens that are not [b, n] integers or that do not fit the context with
            the prefix, or a mask of another shape.
        """
        c = self.config
        mask = _check_captions(tokens, mask)
        if c.prefix + tokens.shape[1] - 1 > c.gpt2.context:
            raise InputError(
                f"a caption of {tokens.shape[1]} tokens after a prefix of {c.prefix} does not fit the context of "
                f"{c.gpt2.context}: cut it to {c.gpt2.context - c.prefix + 1}"
            )
        prefix = self.prefix(features)
        # The last token predicts nothing. Padding becomes a token like any other: a NaN would pass through every mask.
        words = self.gpt2.embed_tokens(jnp.where(mask, tokens, 0)[:, :-1])
        seen = jnp.concatenate([jnp.ones((len(prefix), c.prefix), bool), mask[:, :-1]], axis=1)
        return self.gpt2(jnp.concatenate([prefix, words], axis=1), seen)[:, c.prefix - 1 :]


def param_shapes(module: ClipCap) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    features, tokens = jnp.zeros((1, module.config.feature_width)), jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), features, tokens)["params"]


# -- training ---------------------------------------------------------------------------------------------------------


def clipcap_loss(
    logits: jax.Array, tokens: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The cross-entropy of the captions.

    Args:
      logits: What `ClipCap` gives, [b, n, vocabulary].
      tokens: The captions [b, n], padded with anything.
      mask: [b, n], True where a token belongs to the caption; None: they all do.

    Returns:
      Nats a token, the mean over all tokens of the batch, long captions weighing more, as in the authors' code; with it
      `accuracy`, the share of tokens that were the likeliest, and `perplexity`.

    Raises:
      InputError: Tokens that are not [b, n] integers, or a mask of another shape.
    """
    mask = _check_captions(tokens, mask)
    tokens = jnp.where(mask, tokens, 0)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    count = jnp.maximum(mask.sum(), 1)
    loss = jnp.where(mask, nats, 0.0).sum() / count
    accuracy = (mask & (logits.argmax(-1) == tokens)).sum() / count
    return loss, {"accuracy": accuracy, "perplexity": jnp.exp(loss)}


def partition(params: dict[str, Any], train: str = "both") -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits the parameters for training; `jaxsem.training.merge_params` joins them again.

    Args:
      params: Of `ClipCap`.
      train: "mapper", with GPT-2 frozen, as the authors train the transformer mapper; or "both", as they do the MLP and
        as papers/1 does.

    Returns:
      The trainable and the frozen parameters; the frozen ones get no gradient and no state of the optimiser.

    Raises:
      InputError: Another word.
    """
    if train not in ("mapper", "both"):
        raise InputError(f"what is trained is 'mapper' or 'both', not {train!r}")
    if train == "both":
        return dict(params), {}
    return {"mapper": params["mapper"]}, {"gpt2": params["gpt2"]}


# -- captions ---------------------------------------------------------------------------------------------------------


def caption(
    module: ClipCap,
    params: dict[str, Any],
    features: jax.Array,
    method: str = "greedy",
    *,
    max_new_tokens: int = 67,
    stop: int | Sequence[int] = FULL_STOP,
    pad: int = 0,
    beams: int = 5,
    rng: jax.Array | None = None,
    temperature: float = 1.0,
    top_p: float = 0.8,
) -> Generated:
    """Captions of features, decoded in one compiled loop; see `jaxsem.generation` for what it costs.

    The defaults are the authors'. Their two ways are "greedy" (their code cuts to a nucleus of 0.8 and then takes the
    likeliest token, which is the likeliest of all) and "beam".

    Args:
      module: The model.
      params: Its parameters; on the device, or they travel at every call.
      features: [b, feature_width], finite (`jaxsem.systems.check_features`).
      method: "greedy", "top_p" or "beam".
      max_new_tokens: Most tokens of a caption.
      stop: Token or tokens that end a caption, and belong to it.
      pad: What stands in `tokens` after the end.
      beams: For "beam": captions kept at every place, of which the best is given.
      rng: For "top_p": a key, or one for each row.
      temperature: For "top_p": divides the logits.
      top_p: For "top_p": the probability of the nucleus that tokens are drawn from, in (0, 1].

    Returns:
      `tokens` int32 [b, max_new_tokens], `lengths` int32 [b], and `scores` float32 [b], the mean log-probability of a
      token.

    Raises:
      InputError: No such method, features of another width, no key to draw with, settings out of their range, or more
        tokens than the context has room for.
    """
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    if method == "top_p" and rng is None:
        raise InputError("the method 'top_p' draws its tokens: give it a key, such as rng=jax.random.key(0)")
    model = FlaxModel(Gpt2(module.config.gpt2, module.dtype, module.param_dtype))
    given = model, params["gpt2"], _prefix(module, params, features)
    limits = {"max_new_tokens": max_new_tokens, "stop": stop, "pad": pad}
    if method == "greedy":
        return greedy(*given, **limits)
    if method == "beam":
        return beam_search(*given, beams=beams, **limits)
    return sample(*given, rng, temperature=temperature, top_p=top_p, **limits)


@partial(jax.jit, static_argnames="module")
def _prefix(module: ClipCap, params: dict[str, Any], features: jax.Array) -> jax.Array:
    return module.apply({"params": params}, features, method="prefix")


def _check_captions(tokens: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The mask, all True where there is none."""
    if tokens.ndim != 2 or not tokens.shape[1] or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(f"captions are [batch, n] token ids, n at least 1, not {tokens.dtype} of shape {tokens.shape}")
    if mask is None:
        return jnp.ones(tokens.shape, bool)
    if mask.shape != tokens.shape:
        raise InputError(f"the mask of captions of shape {tokens.shape} has that shape, not {mask.shape}")
    return jnp.asarray(mask, bool)
