"""The systems of the papers, one file for each, and what they are compared with."""

from jaxsem.systems.feature_quantizers import (
    FeatureQuantizer,
    ProductQuantizer,
    RotatedProductQuantizer,
    ScalarQuantizer,
)
from jaxsem.systems.features import check_features
from jaxsem.systems.pqvae import PAPER, RELEASED, Pqvae, PqvaeConfig, pqvae_loss

__all__ = [
    "PAPER",
    "RELEASED",
    "FeatureQuantizer",
    "Pqvae",
    "PqvaeConfig",
    "ProductQuantizer",
    "RotatedProductQuantizer",
    "ScalarQuantizer",
    "check_features",
    "pqvae_loss",
]
