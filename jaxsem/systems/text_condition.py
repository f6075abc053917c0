"""Texts as the conditions of latent diffusion: every token's state after the last layer of CLIP's text tower.

condition = load_text_condition("stable-diffusion-v1-5")   # a folder of diffusers, or its Hugging Face id
context = condition(["a red star", "a small blue circle"])  # float32 [2, 77, 768]
null = condition.null()                                     # float32 [1, 77, 768], for classifier-free guidance
kept, was_cut = condition.cut(long_text)[1:]                # what the model sees of a text too long for it

A text is start, words, end, and padding up to a fixed length. The padding is part of the condition: no attention mask hides it, so
it must be that with which the U-Net was trained. It is the tokenizer's own: the end again in Stable Diffusion 1.x, the id 0 in 2.x,
whose tokenizer calls "!" its padding.

Source: Rombach et al., High-resolution image synthesis with latent diffusion models (2022), and diffusers' Stable Diffusion, with
whose prompt embeddings these agree.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsem.backbones.clip import TextTower
from jaxsem.backbones.clip_inputs import load_tokenizer
from jaxsem.errors import InputError
from jaxsem.systems.clip_model import ClipModel, filled
from jaxsem.weights.huggingface import find
from jaxsem.weights.text_encoder import load_text_tower

_TEXTS = 64  # in a device batch; one condition of Stable Diffusion takes a quarter of a megabyte
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


class Cut(NamedTuple):
    """A text as the model sees it.

    Attributes:
      ids: int32 [length].
      kept: The text itself, or what the ids that fit say of it, in the tokenizer's spelling.
      was_cut: Whether words were left out.
    """

    ids: Int[np.ndarray, " length"]
    kept: str
    was_cut: bool


@dataclass(frozen=True, eq=False)
class TextCondition:
    """A text tower with its tokenizer.

    Attributes:
      module: The text tower.
      params: Its parameters.
      tokenizer: Gives `{"input_ids": rows}` for a list of texts, start and end included; has `pad_token_id` and `decode`.
      length: Tokens of every condition.

    Raises:
      InputError: A length that the tower's context does not hold, or a tokenizer without padding.
    """

    module: TextTower
    params: Any
    tokenizer: Any
    length: int = 77

    def __post_init__(self) -> None:
        context = self.module.config.context
        if not 2 <= self.length <= context:
            raise InputError(
                f"conditions of {self.length} tokens: start and end take 2, and {context} fit the text tower"
            )
        if self.tokenizer.pad_token_id is None:
            raise InputError("the tokenizer names no padding token: give the one that belongs to the text tower")

    @classmethod
    def of_clip(cls, clip: ClipModel) -> "TextCondition":
        """The text tower of a whole CLIP, over its whole context.

        Raises:
          InputError: It was loaded for images alone.
        """
        text = clip.module.config.text
        if text is None or clip.tokenizer is None:
            raise InputError(f"{clip.name} was loaded for images alone: load it with its texts")
        module = TextTower(text, clip.module.dtype, clip.module.param_dtype)
        return cls(module, clip.params["text"], clip.tokenizer, text.context)

    @property
    def width(self) -> int:
        """Numbers of a token's state, the U-Net's `cross_attention_dim`."""
        return self.module.config.width

    def __call__(self, texts: str | Sequence[str]) -> Float[Array, "b length width"]:
        """The conditions of texts, float32; what does not fit is cut, and an empty text is that of `null`.

        Raises:
          InputError: No text, something that is none, or a word that the tokenizer does not know.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise InputError("there is no text to condition on: give at least one, or take null()")
        rows = np.stack([self.cut(text).ids for text in texts])
        size = min(_TEXTS, 1 << (len(rows) - 1).bit_length())  # few sizes to compile
        starts = range(0, len(rows), size)
        parts = [encode_states(self.module, self.params, filled(rows[i : i + size], size)) for i in starts]
        return jnp.concatenate(parts)[: len(rows)]

    def null(self) -> Float[Array, "1 length width"]:
        """The condition of the empty prompt, from which classifier-free guidance leads away."""
        return self([""])

    def cut(self, text: str) -> Cut:
        """The ids of one text; the first words of one that is too long, and the end.

        Raises:
          InputError: It is no text, holds a word that the tokenizer does not know, or the tokenizer is another model's.
        """
        if not isinstance(text, str):
            raise InputError(f"a text to condition on is a {type(text).__name__}: give strings")
        [row] = self.tokenizer([text])["input_ids"]
        was_cut = len(row) > self.length
        if was_cut:
            row = [*row[: self.length - 1], row[-1]]
        kept = self.tokenizer.decode(row[1:-1]) if was_cut else text
        ids = np.full(self.length, self.tokenizer.pad_token_id, np.int32)
        ids[: len(row)] = row
        known = self.module.config.vocabulary
        if ids.max() >= known:
            raise InputError(
                f"the tokenizer gave the id {ids.max()}, and the text tower knows {known}: they do not match"
            )
        return Cut(ids, kept, was_cut)


def load_text_condition(
    source: str | os.PathLike, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> TextCondition:
    """Loads tokenizer and text tower of a diffusers pipeline.

    Args:
      source: Its folder, with `tokenizer/` and `text_encoder/`, or its Hugging Face id.
      dtype: Of the computation; conditions are float32 all the same.
      param_dtype: Of the parameters.

    Raises:
      InputError: Either is missing, or transformers, which has the tokenizer, is not installed.
      WeightsError: The files of the text encoder are damaged, of another architecture, or do not fit.
    """
    module, params = load_text_tower(source, dtype, param_dtype)
    files = list(filter(None, (find(source, f"tokenizer/{file}") for file in _TOKENIZER)))
    if not files:
        raise InputError(f"{os.fspath(source)} holds no tokenizer/ beside its text encoder: give the pipeline's folder")
    tokenizer = load_tokenizer(files[0].parent)
    length = min(module.config.context, tokenizer.model_max_length)
    # transformers would warn of texts that are cut here; this is its number for no limit.
    tokenizer.model_max_length = int(1e30)
    return TextCondition(module, jax.device_put(params), tokenizer, length)


@partial(jax.jit, static_argnames="module")
def encode_states(module: TextTower, params: Any, ids: Int[Array, "b n"]) -> Float[Array, "b n width"]:
    """The states of token ids, float32."""
    return module.apply({"params": params}, ids, method="token_states").astype(jnp.float32)
