"""rsic-mini: referring semantic compression of scenes, small enough for one CPU.

    jaxsem train experiments/rsic_mini.py

What: Wu et al., Your Demands Deserve More Bits (papers/5): an autoencoder of scenes, a diffusion model of its latents under
captions, and HSVLC, which codes them finer where a weight map says so.
Differs from the paper: nothing of it is pretrained but the text tower, that of pqvae-mini's CLIP; at 128 x 128 a cell of the map is
16 x 16 pixels instead of 64 x 64, and latents have eight channels.
On an accelerator, a larger setting: --set scenes=100000 --set unet_stage.batch=256 --set unet_stage.steps=50000
"""

from jaxsem.preset_records import RSIC_MINI
from jaxsem.rsic_recipe import RsicRecipe
from jaxsem.systems.gem import MINI
from jaxsem.systems.rsic_files import Companions
from jaxsem.training import OptimizerConfig
from jaxsem.training.stages import Stage

_ADAMW = OptimizerConfig(
    name="adamw", learning_rate=1e-3, schedule="trapezoid", warmup_steps=100, decay_start=0.7, final_scale=0.02, b2=0.99
)

RECIPE = RsicRecipe(
    name="rsic-mini",
    config=RSIC_MINI,
    companions=Companions("pqvae-mini", "llava-mini", gem=MINI, least_peak=0.45),
    autoencoder_stage=Stage(4000, 16, _ADAMW, ema_decay=0.998, log_every=50, eval_every=500),
    unet_stage=Stage(16_000, 32, _ADAMW, ema_decay=0.999, log_every=100, eval_every=2000),
    codec_stage=Stage(6000, 32, _ADAMW, ema_decay=0.998, log_every=100, eval_every=1000),
)

_FEW = {"steps": 2, "batch": 8, "optimizer.warmup_steps": 1, "log_every": 1, "eval_every": 2}
QUICK = {
    **{
        f"{stage}.{key}": value
        for stage in ("autoencoder_stage", "unet_stage", "codec_stage")
        for key, value in _FEW.items()
    },
    "scenes": 64,
    "valid": 64,
}
