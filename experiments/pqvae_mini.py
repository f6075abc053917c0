"""pqvae-mini: CLIP features of scenes in tens of bytes, with everything that uses them.

    jaxsem train experiments/pqvae_mini.py

What: Shen et al., Compression beyond pixels (papers/1), at a size that a CPU trains in some two hours: a CLIP of 1.3 M parameters
for scenes at 128 x 128, features of 192 numbers, PQVAE-shared at 0.52, 1.04 and 2.60 bits a dimension, a learned prior for the
indices of each, and a ClipCap with a small GPT-2. All of it is trained on the 48 seen classes; the 16 others are for zero-shot
tests.
"""

from dataclasses import replace

from jaxsem.backbones.clip_config import ClipConfig
from jaxsem.feature_recipe import FeatureRecipe, Stage
from jaxsem.presets import PRESETS
from jaxsem.systems.feature_config import FeatureConfig
from jaxsem.training import OptimizerConfig

_ADAMW = OptimizerConfig(
    name="adamw",
    learning_rate=1e-3,
    schedule="trapezoid",
    decay_start=0.7,
    final_scale=0.02,
    b2=0.98,
    weight_decay=0.05,
)

RECIPE = FeatureRecipe(
    name="pqvae-mini",
    config=PRESETS["pqvae-mini"].config,
    clip_stage=Stage(1100, 128, replace(_ADAMW, warmup_steps=150), ema_decay=0.995, log_every=20, eval_every=100),
    rate_stage=Stage(3000, 256, replace(_ADAMW, warmup_steps=100), ema_decay=0.998),
    captioner_stage=Stage(3000, 64, replace(_ADAMW, warmup_steps=100), ema_decay=0.998),
)

_SIZES = RECIPE.config
_FEW = {"steps": 2, "batch": 16, "optimizer.warmup_steps": 1, "log_every": 1, "eval_every": 2}
QUICK = {
    **{
        f"{stage}.{key}": value
        for stage in ("clip_stage", "rate_stage", "captioner_stage")
        for key, value in _FEW.items()
    },
    "features": 64,
    "prior_steps": 2,
    "config": FeatureConfig(
        ClipConfig(
            replace(_SIZES.clip.vision, width=16, layers=1, hidden=32, image_size=32, stem=(4, 4)),
            replace(_SIZES.clip.text, width=16, layers=1, hidden=32),
            projection=16,
        ),
        (replace(_SIZES.rates[0], width=16, hidden=(8, 8), residual=4, residual_layers=1),),
        replace(
            _SIZES.captioner,
            feature_width=16,
            prefix=2,
            gpt2=replace(_SIZES.captioner.gpt2, width=16, layers=1, hidden=32),
        ),
    ),
}
