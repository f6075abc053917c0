"""A language model of random parameters that speaks of scenes, and a neck into its tower."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxsem.backbones.clip_config import VisionConfig
from jaxsem.backbones.llama import LlamaConfig
from jaxsem.backbones.llava import Llava, LlavaConfig
from jaxsem.codec import Codec
from jaxsem.data.questions import MARKS, question_words
from jaxsem.data.words import WordTokenizer
from jaxsem.systems.mllm import Mllm
from jaxsem.systems.mllm_files import make_mllm
from jaxsem.systems.neck_codec import NeckCodec, with_neck
from jaxsem.systems.transform_neck import NeckConfig, TransformNeck

VISION = VisionConfig(width=16, layers=3, heads=2, hidden=32, patch=16, image_size=64)
NECK = NeckConfig(16, VISION, (4, 4), 2)


def language(name: str = "words", **changes) -> Mllm:
    """A LLaVA of random parameters that speaks of scenes."""
    words = WordTokenizer(question_words(), MARKS)
    text = LlamaConfig(
        width=16, layers=1, heads=2, kv_heads=1, hidden=32, vocabulary=len(words), context=256, tied=True
    )
    config = LlavaConfig(dataclasses.replace(VISION, **changes), text, len(words), feature_layer=-1)
    ids, visual = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 1, 16))
    params = Llava(config).init(jax.random.key(0), ids, visual)["params"]
    return make_mllm(name, config, params, words.words, words.marks)


def with_toy_neck(codec: Codec, scenario: str = "d2") -> NeckCodec:
    """`tiny_codec` with a neck into the tower of `language`."""
    params = TransformNeck(NECK).init(jax.random.key(0), jnp.zeros((1, *NECK.grid, NECK.latent)))["params"]
    return with_neck(codec, NECK, params, scenario)
