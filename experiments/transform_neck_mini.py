"""transform-neck-mini: compressed scenes straight into llava-mini, in the paper's three scenarios.

    jaxsem train experiments/elic_scenes.py
    jaxsem train experiments/transform_neck_mini.py --set codec=runs/elic-scenes

What: Kao et al., Bridging Compressed Image Latents and Multimodal Large Language Models (papers/2): a neck from ELIC's latent into
the tower of llava-mini behind its first layer (d1), codec and neck together with the image (d2) and without it (d3), and
the baseline Post-processing, a U-Net on decoded images trained by the same loss.
Differs from the paper: one codec of four rates and one neck for all of them; a neck of two blocks, in the place of one of the
tower's four layers; the classes of a scene of several objects share the cross-entropy, which counts in the first tenth of the steps
instead of two thirds.
The shipped d1 took two goes, for the first had learned its 16,384 scenes by heart: 2,400 steps of this recipe on these, then
    --set init=runs/first/d1.safetensors --set scenes=40960 --set neck_stage.steps=2200 --set "surrogate.phases=(0.0, 0.0)"
    --set neck_stage.optimizer.learning_rate=5e-3 --set neck_stage.optimizer.decay_start=0.3
The U-Net saw 8,192 scenes in 500 steps.
On an accelerator, a larger setting: --set scenes=200000 --set neck_stage.batch=256 --set neck_stage.steps=20000
"""

from dataclasses import replace

from jaxsem.neck_recipe import NeckRecipe
from jaxsem.nn.unet import UnetConfig
from jaxsem.training import OptimizerConfig
from jaxsem.training.stages import Stage
from jaxsem.training.transform_neck import Surrogate

# In short trials the tokens' squared distance fell to 1.90 in 100 steps of Muon at 1.5e-2, and to 1.95 in 450 of AdamW (one block).
_MUON = OptimizerConfig(
    name="muon", learning_rate=1e-2, schedule="trapezoid", warmup_steps=50, decay_start=0.5, final_scale=0.01, b2=0.99
)
_ADAMW = OptimizerConfig(
    name="adamw", learning_rate=1e-3, schedule="trapezoid", warmup_steps=50, decay_start=0.7, final_scale=0.02, b2=0.99
)

RECIPE = NeckRecipe(
    name="transform-neck-mini",
    codec="runs/elic-scenes",
    neck_stage=Stage(2400, 64, _MUON, ema_decay=0.998, log_every=20, eval_every=200),
    joint_stage=Stage(600, 16, replace(_ADAMW, learning_rate=2e-4), ema_decay=0.998, log_every=20, eval_every=200),
    bypassed=1,
    blocks=2,
    surrogate=Surrogate(phases=(0.05, 0.1)),
    unet=UnetConfig((8, 16, 32, 64), residual=True),
    unet_stage=Stage(500, 32, _ADAMW, ema_decay=0.998, log_every=20, eval_every=200),
)

_FEW = {"steps": 2, "batch": 8, "optimizer.warmup_steps": 1, "log_every": 1, "eval_every": 2}
QUICK = {
    **{f"{stage}.{key}": value for stage in ("neck_stage", "joint_stage", "unet_stage") for key, value in _FEW.items()},
    "codec": "elic-mini",
    "scenarios": ("d1", "d2"),
    "unet": UnetConfig((4, 8), residual=True),
    "scenes": 64,
    "valid": 64,
}
