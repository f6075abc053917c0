"""Sizes of a codec of CLIP features: CLIP, PQVAE-shared at every quality, and the captioner."""

from dataclasses import dataclass
from typing import Any

from jaxsem.backbones import clip
from jaxsem.backbones.clip import Clip
from jaxsem.backbones.clip_config import ClipConfig
from jaxsem.errors import InputError
from jaxsem.systems import clipcap, pqvae
from jaxsem.systems.clipcap import ClipCap, ClipCapConfig
from jaxsem.systems.pqvae import Pqvae, PqvaeConfig


@dataclass(frozen=True)
class FeatureConfig:
    """Sizes of all parts of a codec of features.

    Attributes:
      clip: CLIP.
      rates: PQVAE-shared at each quality, lowest rate first.
      captioner: The captioner, if there is one.

    Raises:
      InputError: No rate, or parts whose features have different widths.
    """

    clip: ClipConfig
    rates: tuple[PqvaeConfig, ...]
    captioner: ClipCapConfig | None = None

    def __post_init__(self) -> None:
        if not self.rates:
            raise InputError("a codec of features needs at least one rate")
        widths = {self.clip.projection, *(rate.width for rate in self.rates)}
        if self.captioner is not None:
            widths.add(self.captioner.feature_width)
        if len(widths) > 1:
            raise InputError(f"CLIP, PQVAE and captioner take features of different widths: {sorted(map(str, widths))}")


def param_shapes(config: FeatureConfig) -> dict[str, Any]:
    """Shapes and types of the parameters of all parts, without memory or arithmetic."""
    shapes = {
        "clip": clip.param_shapes(Clip(config.clip)),
        "rates": {str(k): pqvae.param_shapes(Pqvae(rate)) for k, rate in enumerate(config.rates)},
    }
    return (
        shapes if config.captioner is None else {**shapes, "captioner": clipcap.param_shapes(ClipCap(config.captioner))}
    )
