"""elic-mini: the shipped variable-rate codec, ELIC's layout at widths that a CPU decodes quickly.

    jaxsem train experiments/elic_mini.py --set data=PHOTOS/train --set valid=PHOTOS/valid

What: He et al., ELIC (CVPR 2022), chandelier variant at 5.17 M parameters, with gains for four qualities (Cui et al., CVPR 2021).
Differs from the papers: one set of weights for all rates; Muon instead of Adam (at 250 steps a loss of 5.6 instead of 11.4
with Adam at the same learning rate); photos of 256 to 288 pixels' short side.
Cost: 0.35 s a step of 8 x 128^2 on two idle x86 cores.
On an accelerator: `experiments/elic_mini_large_batch.py`.
"""

from jaxsem.codecs import ElicConfig
from jaxsem.recipes import QUICK_RUN, Recipe
from jaxsem.training import OptimizerConfig

CONFIG = ElicConfig(
    widths=(32, 64, 96),
    latent=128,
    hyper=64,
    groups=(8, 8, 16, 32, 64),
    context=(96, 64),
    variant="chandelier",
    lambdas=(0.0003, 0.001, 0.0035, 0.012),
)

RECIPE = Recipe(
    name="elic-mini",
    system="elic",
    config=CONFIG,
    steps=16_000,
    batch=8,
    crop=128,
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=1e-3,
        schedule="trapezoid",
        warmup_steps=200,
        decay_start=0.7,
        final_scale=0.02,
        b2=0.99,
    ),
    ema_decay=0.999,
)

QUICK = {
    **QUICK_RUN,
    "optimizer.warmup_steps": 1,
    "config.widths": (8, 8, 8),
    "config.latent": 16,
    "config.hyper": 8,
    "config.groups": (4, 12),
    "config.context": (8, 8),
}
