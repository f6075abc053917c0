"""Measures of rate, distortion and meaning, each a pure function; `anchors` measures classic codecs to compare with."""

from jaxsem.metrics.attributes import score_attributes
from jaxsem.metrics.bd_rate import bd_rate, distortion_interval
from jaxsem.metrics.captions import score_captions
from jaxsem.metrics.ms_ssim import ms_ssim, ssim
from jaxsem.metrics.psnr import psnr

__all__ = ["bd_rate", "distortion_interval", "ms_ssim", "psnr", "score_attributes", "score_captions", "ssim"]
