"""Sizes and settings of referring semantic compression."""

from dataclasses import dataclass

from jaxsem.backbones.autoencoder_kl import AutoencoderKlConfig
from jaxsem.backbones.unet_2d_condition import UnetConditionConfig
from jaxsem.codecs.hsvlc import HsvlcConfig
from jaxsem.diffusion import NoiseSchedule
from jaxsem.errors import InputError
from jaxsem.systems.weight_map import WeightMapConfig

FAST = {"steps": 10, "recurrences": 1}
"""Changes of `GuidanceConfig` that decode in a fortieth of the default's time."""

_REFERENCE = 4 * 64 * 64  # numbers in a latent of Stable Diffusion at 512x512, for which the paper's gamma is given


@dataclass(frozen=True)
class GuidanceConfig:
    """How a file is decoded; any of it may be chosen anew at every decode.

    Attributes:
      steps: T, of the sampler.
      recurrences: T_r, how often each step is taken.
      gamma: The referring scale without its factor sqrt(abar_{t-1} / abar_t). The distance is taken as the mean squared error of a
        latent of 4 x 64 x 64 numbers: of the sum of squares it is gamma / 16384, for any size of latent. With a norm that is not
        squared, steps of 1000 would leap far beyond the latents.
      scale: Of classifier-free guidance where M is 0.
      relax: How much of it M takes away: the scale is `scale` (1 - relax M).
      max_steps: Most steps: the inverted path has room for so many.

    Raises:
      InputError: A number out of range.
    """

    steps: int = 50
    recurrences: int = 8
    gamma: float = 1000.0
    scale: float = 3.0
    relax: float = 0.7
    max_steps: int = 100

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= self.max_steps or self.recurrences < 1:
            raise InputError(
                f"{self.steps} steps of {self.recurrences} recurrences: take 1 to {self.max_steps} steps, and at least 1 recurrence"
            )
        if not (self.gamma >= 0 and self.scale >= 0 and 0 <= self.relax <= 1):
            raise InputError(
                f"gamma={self.gamma} and scale={self.scale} are 0 or more, and relax={self.relax} lies between 0 and 1"
            )

    @property
    def pull(self) -> float:
        """The weight of half the sum of squares."""
        return 2.0 * self.gamma / _REFERENCE


@dataclass(frozen=True)
class RsicConfig:
    """Sizes of all parts.

    Attributes:
      autoencoder: Images to latents.
      unet: The diffusion model of these latents.
      codec: HSVLC, which codes them.
      weight_map: M's cells and levels.
      schedule: The diffusion model's noise.
      guidance: How files are decoded unless otherwise asked for.

    Raises:
      InputError: Parts that do not fit together.
    """

    autoencoder: AutoencoderKlConfig
    unet: UnetConditionConfig
    codec: HsvlcConfig
    weight_map: WeightMapConfig
    schedule: NoiseSchedule
    guidance: GuidanceConfig = GuidanceConfig()

    def __post_init__(self) -> None:
        widths = {self.autoencoder.latent_channels, self.unet.in_channels, self.unet.out_channels, self.codec.latent}
        if len(widths) > 1:
            raise InputError(f"autoencoder, U-Net and codec have latents of different widths: {sorted(widths)}")
        if self.weight_map.stride != self.codec.map_stride * self.autoencoder.stride:
            raise InputError(
                f"a cell of M is {self.weight_map.stride} pixels, and the codec takes one for {self.codec.map_stride} positions of "
                f"{self.autoencoder.stride} pixels each"
            )

    @property
    def stride(self) -> int:
        """Pixels of which an image's sides must be multiples."""
        return self.autoencoder.stride * self.codec.stride
