"""A codec of features of a few thousand random parameters: everything works, no answer is right."""

import functools

import jax
import numpy as np
from toy_clip import WIDTH, toy_clip

from jaxsem.backbones.gpt2 import Gpt2Config
from jaxsem.data.words import WordTokenizer
from jaxsem.entropy.indices import FixedLength, StaticRans
from jaxsem.systems import clipcap
from jaxsem.systems.clipcap import ClipCap, ClipCapConfig
from jaxsem.systems.feature_codec import Captioner, FeatureCodec, Level, run_indices
from jaxsem.systems.feature_files import assemble
from jaxsem.systems.pqvae import Pqvae, PqvaeConfig
from jaxsem.training.pqvae import first_params

RATES = tuple(
    PqvaeConfig(WIDTH, channels=4, hidden=(8, 8), residual=4, residual_layers=1, codeword=10, codebook=size)
    for size in (3, 8)
)


@functools.cache
def toy_codec(captions: bool = True) -> FeatureCodec:
    """Two qualities of ten indices, of 3 codewords with a fixed length and of 8 with rANS."""
    clip, features = toy_clip(), np.random.default_rng(0).standard_normal((64, WIDTH)).astype(np.float32)
    levels = []
    for config in RATES:
        module = Pqvae(config)
        params = first_params(module, features)
        sizes = (config.codebook,) * config.codewords
        seen = np.asarray(run_indices(module, params, features))
        coder = StaticRans.from_indices(seen, sizes) if levels else FixedLength(sizes)
        levels.append(Level(module, params, coder))
    return assemble("toy", clip, levels, _captioner() if captions else None)


def _captioner() -> Captioner:
    words = WordTokenizer()
    gpt2 = Gpt2Config(width=8, layers=1, heads=2, hidden=16, vocabulary=len(words), context=16)
    module = ClipCap(ClipCapConfig(WIDTH, prefix=2, gpt2=gpt2, normalise=True))
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda shape: np.asarray(0.5 * random.standard_normal(shape.shape), np.float32), clipcap.param_shapes(module)
    )
    return Captioner(module, params, words, words.end, longest=12)
