"""Quantisers of features that are trained by gradients: PQVAE-shared, the VQ-VAE it is compared with, and learned levels.

All are `FeatureQuantizer`s like those without a network (`jaxsem.systems.feature_quantizers`), so that tools can hold them side by
side; what is trained here takes minutes and leaves no files. `Recipe` says how, `config_at` finds a model for a number of bits:

    config = config_at(width=512, bits=256, codebook=4)
    quantizer = PqvaeQuantizer.fit(features, config)
    decoded = quantizer.features(quantizer.indices(others))
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxsem.errors import InputError
from jaxsem.systems.feature_codec import run_features, run_indices
from jaxsem.systems.feature_quantizers import FeatureQuantizer, ProductQuantizer, ScalarQuantizer, check_indices
from jaxsem.systems.features import check_features
from jaxsem.systems.pqvae import GRID, Pqvae, PqvaeConfig
from jaxsem.training import pqvae as pqvae_training
from jaxsem.training.fit import fit
from jaxsem.training.optimizer import OptimizerConfig

SMALL = {"hidden": (96, 48), "residual": 32, "residual_layers": 2}
"""Sizes that a CPU trains: about a million parameters at width 512, a tenth of those of the paper."""

_ROWS = 256  # features that a network takes at once
_KMEANS = 16_384  # latents that codebooks are fitted to, at most
_CELLS = GRID * GRID


@dataclass(frozen=True)
class Recipe:
    """How a network is trained from scratch.

    With the default, 800 features of CLIP ViT-B/32 (Flickr8k) and networks of `SMALL` sizes, the cosine of 200 others is 0.909 at
    0.49 bits a dimension, where OPQ has 0.900 at 0.5. From 1 bit on OPQ is ahead, 0.941 to 0.923: there it is the networks that
    lose, not the codebook, and more bits hardly help (0.941 at 3 bits after 800 steps; OPQ 0.993). Muon is ahead of AdamW at the
    same number of steps there, 0.947 to 0.933 after 600, and takes nearly twice the time for each.

    Attributes:
      steps: Of the optimiser, in all.
      batch: Features of a step.
      mixing: Share of features that `jaxsem.training.pqvae.resampled` replaces. It is what matters most with some hundred
        features: without it, they are learned by heart.
      ema_decay: Of the moving average of the parameters, which is what is kept.
      optimizer: Its config.
    """

    steps: int = 2000
    batch: int = 128
    mixing: float = 0.7
    ema_decay: float = 0.99
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            name="adamw",
            learning_rate=1e-3,
            schedule="cosine",
            final_scale=0.01,
            weight_decay=0.05,
            decay_pattern=r"kernel$",
        )
    )

    def __post_init__(self) -> None:
        """Refuses a share that is none; the numbers are checked where they are used.

        Raises:
          InputError: `mixing` outside [0, 1].
        """
        pqvae_training.check_mixing(self.mixing)


def config_at(width: int, bits: float, codebook: int, **sizes: Any) -> PqvaeConfig | None:
    """The model whose indices take the most bits below a budget, and at least 95 % of it.

    The number of indices decides the latent, which has 25 times a whole number of channels: of the numbers of indices that fit,
    the largest counts whose latent has two to four numbers for each of the feature's. (The paper's has four, and its authors say
    why it is larger than the feature: codebooks are then easier to learn.)

    Args:
      width: Of the features.
      bits: The budget for one feature; it may be exceeded by 0.5 %, as rates are told in two digits (0.52 for 400 of 768).
      codebook: Codewords, at least 2.
      sizes: Of the networks, as in `PqvaeConfig`.

    Returns:
      The config, or None if no number of indices fits.
    """
    each = math.log2(codebook)
    for count in range(int(1.005 * bits / each), 0, -1):
        if count * each < 0.95 * bits:
            break
        step = _CELLS // math.gcd(_CELLS, count)  # only with multiples of it as the codeword's width are channels whole
        codeword = step * math.ceil(2 * width / (step * count))
        if count * codeword <= 4 * width:
            channels = count * codeword // _CELLS
            return PqvaeConfig(width, channels, codeword=codeword, codebook=codebook, **{**SMALL, **sizes})
    return None


def configs_of_latent(width: int, bits: float, channels: int, largest: int = 1024, **sizes: Any) -> list[PqvaeConfig]:
    """All ways to cut a latent for about the same bits: the ablation of sub-spaces, papers/1, section 4.3.

    Args:
      width: Of the features.
      bits: For one feature; within 5 % of them.
      channels: Of the latent.
      largest: Codebook, at most; the sub-vector's width decides it.
      sizes: Of the networks, as in `PqvaeConfig`.

    Returns:
      Configs with codebooks of powers of two, by growing sub-vector; of those with the same codebook, the nearest to `bits`.
    """
    latent, found = _CELLS * channels, {}
    for codeword in (d for d in range(1, latent + 1) if not latent % d):
        each = round(bits * codeword / latent)
        error = abs(latent // codeword * each - bits) / bits
        if 1 <= each <= math.log2(largest) and error <= 0.05 and error < found.get(each, (math.inf,))[0]:
            found[each] = error, codeword
    return [
        PqvaeConfig(width, channels, codeword=codeword, codebook=2**each, **{**SMALL, **sizes})
        for each, (_, codeword) in sorted(found.items())
    ]


# -- PQVAE-shared ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PqvaeQuantizer(FeatureQuantizer):
    """PQVAE-shared as a quantiser.

    Attributes:
      module: The networks.
      params: Their parameters, with the codebook.
    """

    module: Pqvae
    params: Any

    @classmethod
    def fit(
        cls, features: ArrayLike, config: PqvaeConfig, *, recipe: Recipe | None = None, seed: int = 0
    ) -> "PqvaeQuantizer":
        """Trains from scratch.

        Args:
          features: [b, width], of any length, from some hundred on.
          config: Sizes and weights of the loss.
          recipe: How; None is the default.
          seed: Decides the parameters' start and what training draws.

        Raises:
          InputError: Features of another width or not finite, too few for the codebook, or a number out of range.
          DivergedError: Training did.
        """
        recipe, module = recipe or Recipe(), Pqvae(config)
        features = check_features(features, config.width)
        start = pqvae_training.first_params(module, features, seed)
        loss_fn = pqvae_training.training_loss(config, recipe.mixing)
        renew_fn = pqvae_training.revival(config)
        return cls(module, _train(recipe, loss_fn, start, features, seed, renew_fn=renew_fn))

    @property
    def table_sizes(self) -> tuple[int, ...]:
        """The alphabet of each of the n indices."""
        return (self.module.config.codebook,) * self.module.config.codewords

    def indices(self, features: ArrayLike) -> np.ndarray:
        """The indices int32 [b, n] of features [b, width].

        Raises:
          InputError: Features of another width or not finite.
        """
        points = check_features(features, self.module.config.width)
        return _in_blocks(partial(run_indices, self.module, self.params), points)

    def features(self, indices: ArrayLike) -> np.ndarray:
        """The unit features float32 [b, width] of indices [b, n].

        Raises:
          InputError: Indices that do not fit `table_sizes`.
        """
        found = check_indices(indices, self.table_sizes)
        return _in_blocks(partial(run_features, self.module, self.params), found)


# -- VQ-VAE with k-means product quantisation ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class VqvaeQuantizer(FeatureQuantizer):
    """The paper's baseline: encoder and decoder of PQVAE-shared, but each sub-space with a codebook of its own, by k-means.

    The paper names it ("VQ-VAE with k-means product quantization") and cites two works, but tells neither how the networks were
    trained nor when k-means came in. Here it is what the name says, one thing after the other, so that the comparison shows what
    learning the codebook together with the networks is worth, and only that:

    1. encoder and decoder are trained as an autoencoder without quantisation, for half of the steps;
    2. k-means finds the codebooks of the n sub-spaces in its latents, each of as many codewords as PQVAE's one has;
    3. the decoder is trained on quantised latents for the other half; encoder and codebooks stay.

    A VQ-VAE of van den Oord et al. would move codebooks and encoder in step 3 too; with that it would be PQVAE with n codebooks.
    With 800 features of CLIP, 800 steps and 0.49 bits a dimension its cosine is 0.880, that of PQVAE 0.901.

    Attributes:
      module: The networks; their shared codebook has no part in it.
      params: Their parameters.
      product: The codebooks.
    """

    module: Pqvae
    params: Any
    product: ProductQuantizer

    @classmethod
    def fit(
        cls, features: ArrayLike, config: PqvaeConfig, *, recipe: Recipe | None = None, seed: int = 0
    ) -> "VqvaeQuantizer":
        """Trains from scratch.

        Args:
          features: [b, width], of any length, at least as many as codewords.
          config: Sizes; of the weights only that of the cosine counts.
          recipe: How; None is the default, and its steps are those of both trainings.
          seed: Decides the parameters' start, what training draws, and where k-means starts.

        Raises:
          InputError: Features of another width or not finite, too few for the codebooks, or fewer than 2 steps.
          DivergedError: Training did.
        """
        recipe, module = recipe or Recipe(), Pqvae(config)
        if recipe.steps < 2:
            raise InputError(f"a VQ-VAE is trained in two parts, so for at least 2 steps, not {recipe.steps}")
        features = check_features(features, config.width)
        first = dataclasses.replace(recipe, steps=recipe.steps // 2)
        second = dataclasses.replace(recipe, steps=recipe.steps - first.steps)

        start = pqvae_training.first_params(module, features, seed)
        params = _train(first, _decoding_loss(module, recipe.mixing), start, features, seed)
        points = np.random.default_rng(seed).permutation(features)[:_KMEANS]
        latents = _in_blocks(partial(_run_latents, module, params), points)
        product = ProductQuantizer.fit(latents, subspaces=config.codewords, codewords=config.codebook, seed=seed)

        held = {
            "model": {name: part for name, part in params.items() if name != "decoder"},
            "codebooks": product.codebooks,
        }
        trained = {"model": {"decoder": params["decoder"]}}
        loss_fn = _decoding_loss(module, recipe.mixing, quantised=True)
        trained = _train(second, loss_fn, trained, features, seed + 1, frozen=held)
        return cls(module, {**params, **trained["model"]}, product)

    @property
    def table_sizes(self) -> tuple[int, ...]:
        """The alphabet of each of the n indices."""
        return self.product.table_sizes

    def indices(self, features: ArrayLike) -> np.ndarray:
        """The indices int32 [b, n] of features [b, width].

        Raises:
          InputError: Features of another width or not finite.
        """
        points = check_features(features, self.module.config.width)
        return self.product.indices(_in_blocks(partial(_run_latents, self.module, self.params), points))

    def features(self, indices: ArrayLike) -> np.ndarray:
        """The unit features float32 [b, width] of indices [b, n].

        Raises:
          InputError: Indices that do not fit `table_sizes`.
        """
        return _in_blocks(partial(_run_decoder, self.module, self.params), self.product.features(indices))


def _decoding_loss(module: Pqvae, mixing: float, quantised: bool = False) -> Callable:
    """Loss of an autoencoder: 1 - cosine of what is decoded from latents as they are, or from their nearest codewords.

    With `quantised`, the parameters are {"model": those of the module, "codebooks": [n, k, d]}.
    """

    def loss_fn(params, batch, rng):
        model = params["model"] if quantised else params
        features = pqvae_training.augmented(batch["features"], mixing, rng)
        z = module.apply({"params": model}, features, method="encode")
        if quantised:
            z = _nearest(z, params["codebooks"])
        decoded = module.apply({"params": model}, z, method="decode")
        loss = 1 - (features * decoded).sum(-1).mean()
        return module.config.cosine_weight * loss, {"cosine": loss}

    return loss_fn


def _nearest(z: jax.Array, codebooks: jax.Array) -> jax.Array:
    """The nearest codewords [b, n, d] of sub-vectors [b, n, d], each position with its own codebook of [n, k, d]."""
    products = jnp.einsum("bnd,nkd->bnk", z, codebooks, precision=jax.lax.Precision.HIGHEST)
    indices = (jnp.square(codebooks).sum(-1) - 2 * products).argmin(-1)
    return codebooks[jnp.arange(len(codebooks)), indices]


# -- learned levels --------------------------------------------------------------------------------------------------------


def learn_scalar_quantizer(
    features: ArrayLike, *, bits: int, limit: float = 0.5, steps: int = 2000, seed: int = 0
) -> ScalarQuantizer:
    """Learned scalar quantisation by gradients, as footnote 1 of papers/1 describes it: levels for all dimensions alike.

    The levels start evenly spread over [-limit, limit] and descend on the squared error of unit features. The choice of a level
    is passed by straight through; the level that was chosen gets the gradient. `ScalarQuantizer.fit` minimises the same error by
    Lloyd's and Max's alternation, without steps or rates. On 800 CLIP features (ViT-B/32, Flickr8k) both find the same levels at 1,
    2 and 3 bits, up to 0.0005, and the cosines of 200 others agree to 0.0001 (0.602, 0.901, 0.970): the paper's baseline
    is no weaker for being learned, and either stands for it.

    Args:
      features: [b, w].
      bits: Per dimension, 1 to 8: 2^bits levels.
      limit: Levels stay within [-limit, limit].
      steps: Of Adam, at a rate of a hundredth of the limit that falls to zero.
      seed: Decides the batches.

    Raises:
      InputError: Features that are no finite matrix, or bits, limit or steps out of range.
    """
    points = check_features(features)
    if not 1 <= bits <= 8:
        raise InputError(f"a scalar quantiser takes 1 to 8 bits a dimension, not {bits}")
    if not (math.isfinite(limit) and limit > 0):
        raise InputError(f"the levels' limit must be above 0, not {limit}")
    count = 2**bits
    start = {"levels": limit * ((2 * jnp.arange(count) + 1) / count - 1)}

    def loss_fn(params, batch, rng):
        del rng
        # Clipped so that a level pushed over the edge stays at it.
        levels = jnp.clip(params["levels"], -limit, limit)
        numbers = batch["features"].reshape(-1)
        chosen = jnp.abs(jax.lax.stop_gradient(levels) - numbers[:, None]).argmin(axis=1)
        error = jnp.square(levels[chosen] - numbers).sum() / len(batch["features"])
        return error, {"error": error}

    optimizer = OptimizerConfig(learning_rate=limit / 100, schedule="cosine", clip_norm=None)
    levels = fit(loss_fn, start, {"features": points}, optimizer, steps, 128, seed=seed)["levels"]
    ordered = np.sort(np.clip(np.asarray(levels, np.float32), -limit, limit))
    return ScalarQuantizer(ordered[None], points.shape[1])


# -- pieces ----------------------------------------------------------------------------------------------------------------


def _train(recipe: Recipe, loss_fn: Callable, params: Any, features: np.ndarray, seed: int, **options: Any) -> Any:
    """Parameters trained on features [b, width] by a recipe."""
    arrays = {"features": features}
    options = {"seed": seed, "ema_decay": recipe.ema_decay, **options}
    return fit(loss_fn, params, arrays, recipe.optimizer, recipe.steps, recipe.batch, **options)


@partial(jax.jit, static_argnames="module")
def _run_latents(module: Pqvae, params: Any, features: jax.Array) -> jax.Array:
    """Latents [b, n * d] of features [b, width]."""
    return module.apply({"params": params}, features, method="encode").reshape(len(features), -1)


@partial(jax.jit, static_argnames="module")
def _run_decoder(module: Pqvae, params: Any, latents: jax.Array) -> jax.Array:
    """Unit features [b, width] of latents [b, n * d]."""
    shape = -1, module.config.codewords, module.config.codeword
    return module.apply({"params": params}, latents.reshape(shape), method="decode")


def _in_blocks(run: Callable, rows: np.ndarray) -> np.ndarray:
    """What `run` makes of rows [b, ...], in blocks of one size: zeros fill up the last one, and are cut off again."""
    parts = []
    for start in range(0, max(len(rows), 1), _ROWS):
        part = rows[start : start + _ROWS]
        rest = np.zeros((_ROWS - len(part), *rows.shape[1:]), rows.dtype)
        parts.append(np.asarray(run(np.concatenate([part, rest])))[: len(part)])
    return np.concatenate(parts)
