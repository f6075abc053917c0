"""llava-mini: a small LLaVA that answers questions about scenes, for transform-neck-mini.

    jaxsem train experiments/llava_mini.py

What: Liu et al., Improved baselines with visual instruction tuning (CVPR 2024), at a size for one CPU: the image tower of
pqvae-mini's CLIP, all of its layers, and a Llama of four layers, whose language are the words of questions about scenes.
Differs from the paper: one stage of training instead of two, and all layers of the tower instead of all but the last.
On an accelerator, a larger setting: --set scenes=200000 --set stage.batch=256 --set stage.steps=20000
"""

from dataclasses import replace

from jaxsem.mllm_recipe import MllmRecipe
from jaxsem.presets import PRESETS
from jaxsem.training import OptimizerConfig
from jaxsem.training.stages import Stage

RECIPE = MllmRecipe(
    name="llava-mini",
    config=PRESETS["llava-mini"].config,
    stage=Stage(
        6000,
        32,
        OptimizerConfig(
            name="adamw",
            learning_rate=2e-3,
            schedule="trapezoid",
            warmup_steps=100,
            decay_start=0.6,
            final_scale=0.02,
            b2=0.98,
            weight_decay=0.05,
        ),
        ema_decay=0.998,
        log_every=20,
        eval_every=250,
    ),
)

_SIZES = RECIPE.config
QUICK = {
    "stage.steps": 2,
    "stage.batch": 8,
    "stage.optimizer.warmup_steps": 1,
    "stage.log_every": 1,
    "stage.eval_every": 2,
    "scenes": 16,
    "valid": 64,
    "config": replace(_SIZES, text=replace(_SIZES.text, width=16, layers=1, heads=2, kv_heads=1, hidden=32)),
}
