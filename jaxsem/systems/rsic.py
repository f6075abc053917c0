"""Referring semantic compression: a description, a weight map, and a latent that is finer where the map is high.

    image ─ autoencoder ─ z_0 ─ HSVLC under M ─ slices ─▶ latents
    words, boxes, masks, clicks ─▶ M ─ level coder ──────▶ map
    description ─ deflate ───────────────────────────────▶ caption

    sections ─▶ ẑ_0, M, c ─ guided decoding (`rsic_decoding`) ─ autoencoder ─▶ image

Here is what the codec is and what can be asked of it; `rsic_coding` makes items and images.

Source: Wu et al., Your Demands Deserve More Bits (papers/5).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PRNGKeyArray

from jaxsem.backbones.autoencoder_kl import AutoencoderKl
from jaxsem.backbones.unet_2d_condition import UnetCondition
from jaxsem.codecs.hsvlc import Hsvlc
from jaxsem.entropy.tables import Tables
from jaxsem.errors import InputError, WeightsError
from jaxsem.systems.clip_model import ClipModel
from jaxsem.systems.gem import GemConfig, min_max, similarity_maps
from jaxsem.systems.rsic_config import RsicConfig
from jaxsem.systems.rsic_decoding import guided_latents, keys_of, run_decoder, run_encoder
from jaxsem.systems.text_condition import TextCondition
from jaxsem.systems.weight_map import Heat, Region, WeightMapConfig, build_map, constant_map, find_region

SYSTEM = "rsic"
"""What a weights file calls the family."""


@dataclass(frozen=True)
class Phrase:
    """Words for a part of an image.

    Attributes:
      text: The words.
      weight: How much what they refer to deserves bits, 0 to 1.

    Raises:
      InputError: No words, or another weight.
    """

    text: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise InputError("a phrase is empty: say what to look for")
        if not 0 <= self.weight <= 1:
            raise InputError(f"the weight of {self.text!r} lies between 0 and 1, not at {self.weight}")


@dataclass(frozen=True, eq=False)
class Demand:
    """What is asked of one image.

    Attributes:
      text: Its description; "" sends none, and None lets the codec's captioner write one.
      phrases: What to look for: words, or a `Phrase` with a weight; M is high there.
      regions: Boxes, masks and clicks that deserve bits; see `jaxsem.systems.weight_map`.
      background: M elsewhere, in [0, 1].
      level: M everywhere where nothing is referred to, in [0, 1]: global mode. None takes the codec's quality.
      levels: The levels of M as `weight_levels` gives them; what is referred to is then not looked at.

    Raises:
      InputError: A number outside of [0, 1], or an empty phrase.
    """

    text: str | None = None
    phrases: tuple[str | Phrase, ...] = ()
    regions: tuple[Region, ...] = ()
    background: float = 0.0
    level: float | None = None
    levels: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, value in (("background", self.background), ("level", self.level)):
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{name}={value} is a weight: give a number from 0 to 1")
        given = (Phrase(each) if isinstance(each, str) else each for each in self.phrases)
        object.__setattr__(self, "phrases", tuple(given))

    @property
    def refers(self) -> bool:
        """Whether it marks a part of the image."""
        return bool(self.phrases or self.regions)


@dataclass(frozen=True, eq=False)
class Rsic:
    """A codec that is told what matters: all that it takes, and nothing that changes.

    Attributes:
      name: What errors call it.
      config: Sizes, and how files are decoded.
      params: Of `autoencoder`, `unet` and `codec`, by these names.
      text: The text tower of the diffusion model.
      tables: The integer tables.
      digest: Identity of config, weights and tables; files carry its first bytes.
      exact: Variables of the codec's priors in exact arithmetic, or None.
      arithmetic: What `compress` uses, "exact" or "float"; a packet says which it needs, and either is read.
      clip: Finds phrases; None where none is at hand.
      gem: How it looks.
      least_contrast: Of a phrase's similarity, below which it finds nothing: see `find_region`.
      least_peak: Likewise.
      describe: Writes descriptions of images, or None.
      quality: The level of M in global mode, of 0 to levels - 1.
      seed: Of the noise in decoding.
      dtype: Of the networks' computation.
    """

    name: str
    config: RsicConfig
    params: Any
    text: TextCondition
    tables: Tables
    digest: bytes
    exact: Any = None
    arithmetic: str = "float"
    clip: ClipModel | None = None
    gem: GemConfig = field(default_factory=GemConfig)
    least_contrast: float = 0.02
    least_peak: float = 0.0
    describe: Callable[[Sequence[np.ndarray]], list[str]] | None = None
    quality: float = 0.0
    seed: int = 0
    dtype: Any = jnp.float32

    referring: ClassVar[bool] = True  # what `jaxsem.pipeline` asks before it loads any of this

    @cached_property
    def autoencoder(self) -> AutoencoderKl:
        """Its module."""
        return AutoencoderKl(self.config.autoencoder, self.dtype)

    @cached_property
    def unet(self) -> UnetCondition:
        """Its module."""
        return UnetCondition(self.config.unet, self.dtype)

    @cached_property
    def codec(self) -> Hsvlc:
        """Its module."""
        return Hsvlc(self.config.codec, self.dtype)

    @cached_property
    def null(self) -> jax.Array:
        """The condition of the empty text."""
        return self.text.null()

    @property
    def qualities(self) -> int:
        """How many levels global mode has."""
        return self.config.weight_map.levels

    @property
    def default_quality(self) -> float:
        """The middle one, rounded up."""
        return self.qualities // 2

    def at_quality(self, quality: float) -> "Rsic":
        """The same codec with another level in global mode.

        Raises:
          InputError: It is no whole number of those there are.
        """
        if quality not in range(self.qualities):
            raise InputError(f"{self.name} has the whole qualities 0 to {self.qualities - 1}, not {quality:g}")
        return replace(self, quality=float(quality))

    def with_levels(self, levels: int) -> "Rsic":
        """The same codec, telling so many levels of M apart; its quality is the middle one of them, rounded up.

        Raises:
          InputError: Not 1 to 8.
        """
        weight_map = replace(self.config.weight_map, levels=levels)
        return replace(self, config=replace(self.config, weight_map=weight_map), quality=float(levels // 2))

    def in_arithmetic(self, arithmetic: str) -> "Rsic":
        """The same codec, compressing in "exact" or "float" arithmetic; it decompresses both.

        Raises:
          InputError: Neither of the two.
          WeightsError: The weights were not calibrated for exact arithmetic.
        """
        if arithmetic not in ("exact", "float"):
            raise InputError(f"the arithmetic is 'exact' or 'float', not {arithmetic!r}")
        if arithmetic == "exact" and self.exact is None:
            raise WeightsError(f"{self.name} has no exact arithmetic: calibrate it first")
        return replace(self, arithmetic=arithmetic)

    def decoding(self, seed: int | None = None, **changes: Any) -> "Rsic":
        """The same codec, decoding in another way: no file changes, and nothing is compiled for another number.

        Args:
          seed: Of the noise.
          **changes: Of `GuidanceConfig`: `steps`, `recurrences`, `gamma`, `scale`, `relax`.

        Raises:
          InputError: A number out of range.
        """
        guidance = replace(self.config.guidance, **changes)
        return replace(
            self, config=replace(self.config, guidance=guidance), seed=self.seed if seed is None else int(seed)
        )

    # -- pure functions, as every codec has them -----------------------------------------------------------------------

    def analyze(self, params: Any, batch: Mapping[str, Any], rng: PRNGKeyArray | None = None) -> dict[str, jax.Array]:
        """Latents of images, pure; not rounded yet.

        Args:
          params: Of `autoencoder` and `codec`.
          batch: `image` uint8 [b, h, w, 3], sides multiples of `config.stride`, and `weight`, M [b, rows, columns].
          rng: Unused: analysis is deterministic.

        Returns:
          `z`, the scaled latent, and `f_0`, `f_1`, ... of each scale, the finest first.
        """
        z = run_encoder(self.autoencoder, params["autoencoder"], batch["image"])
        return {"z": z, **self.codec.apply({"params": params["codec"]}, z, batch["weight"], method="analyze")}

    def guide(self, params: Any, latents: Mapping[str, Any], keys: Key[Array, " b"]) -> jax.Array:
        """z_0 of decoded latents by Algorithm 1, with `config.guidance`, pure.

        Args:
          params: Of `unet` and `codec`.
          latents: `z_hat` [b, h, w, l], `weight`, M [b, rows, columns], and `context`, of the texts, from `text`.
          keys: Of the noise, one for each image.
        """
        guidance = self.config.guidance
        numbers = {name: getattr(guidance, name) for name in ("steps", "recurrences", "pull", "scale", "relax")}
        given = self.unet, self.codec, self.config.schedule, guidance.max_steps
        params = {"unet": params["unet"], "codec": params["codec"]}
        inputs = latents["z_hat"], latents["weight"], latents["context"], self.null
        return guided_latents(*given, params, *inputs, numbers, keys)

    def synthesize(self, params: Any, latents: Mapping[str, Any], rng: PRNGKeyArray | None = None) -> jax.Array:
        """Images, uint8 [b, h, w, 3], of what `guide` takes, pure; the noise is that of `rng`, or of the codec's seed."""
        batch = len(latents["z_hat"])
        keys = keys_of(self.seed, batch) if rng is None else jax.random.split(rng, batch)
        return run_decoder(self.autoencoder, params["autoencoder"], self.guide(params, latents, keys))

    def loss(
        self, params: Any, batch: Mapping[str, Any], rng: PRNGKeyArray | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Rate plus distortion of the latent, weighted by M, pure; `rng` None evaluates with rounding.

        Gradients reach `codec` alone; `batch` is that of `analyze`. See `jaxsem.training.diffusion.spatial_rate_distortion`.
        """
        from jaxsem.training.diffusion import codec_loss  # not before it is needed: training loads much

        z = jax.lax.stop_gradient(run_encoder(self.autoencoder, params["autoencoder"], batch["image"]))
        return codec_loss(self.codec)(params["codec"], z, jnp.asarray(batch["weight"]), rng)


def weight_levels(codec: Rsic, image: np.ndarray, demand: Demand) -> np.ndarray:
    """The levels of M for an image, uint8 [rows, columns].

    Raises:
      InputError: A phrase that finds nothing, a codec without a CLIP to look for it, or a region or levels that do not fit the
        image.
    """
    config, (height, width) = codec.config.weight_map, image.shape[:2]
    top = config.levels - 1
    if demand.levels is not None:
        return _checked(demand.levels, config, height, width)
    if not demand.refers:
        level = codec.quality if demand.level is None else demand.level * top
        return constant_map(height, width, round(level), config)
    regions = list(demand.regions)
    if demand.phrases:
        if codec.clip is None:
            raise InputError(
                f"{codec.name} has no CLIP to look for {demand.phrases[0].text!r} with: mark it by a box or a mask"
            )
        texts = [phrase.text for phrase in demand.phrases]
        maps = similarity_maps(codec.clip, [image], texts, codec.gem, (height, width))[0]
        least = {"least_contrast": codec.least_contrast, "least_peak": codec.least_peak}
        for similarity, phrase in zip(maps, demand.phrases, strict=True):
            found = find_region(similarity, phrase.text, **least)
            regions.append(Heat(np.where(found, min_max(similarity), np.float32(0)), weight=phrase.weight))
    return build_map(height, width, regions, config, round(demand.background * top))


def _checked(levels: np.ndarray, config: WeightMapConfig, height: int, width: int) -> np.ndarray:
    levels, grid = np.asarray(levels), config.grid(height, width)
    if levels.dtype != np.uint8 or levels.shape != grid or levels.max() >= config.levels:
        raise InputError(
            f"a map of this image is uint8 {list(grid)} below {config.levels}, not {levels.dtype} {list(levels.shape)} up to "
            f"{levels.max(initial=0)}"
        )
    return levels
