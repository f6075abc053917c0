"""elic-scenes: a small ELIC for scenes at the lowest rates, the codec under transform-neck-mini.

    jaxsem train experiments/elic_scenes.py --set "config.lambdas=(0.0001, 0.0003, 0.001, 0.0035)" --workdir runs/higher
    jaxsem train experiments/elic_scenes.py --set init=runs/higher --set steps=1500

What: He et al., ELIC (CVPR 2022), chandelier variant at widths for images of 128 x 128 with few objects, gains for four qualities.
Differs from the papers: as elic-mini; every training image is one whole scene of the 48 seen classes; the low rates are
trained from the weights of higher ones.
On an accelerator, a larger setting: --set batch=64 --set steps=50000 --set dtype=bfloat16
"""

from jaxsem.codecs import ElicConfig
from jaxsem.recipes import QUICK_RUN, Recipe
from jaxsem.training import OptimizerConfig

RECIPE = Recipe(
    name="elic-scenes",
    system="elic",
    config=ElicConfig(
        widths=(24, 48, 64),
        latent=64,
        hyper=32,
        groups=(8, 8, 16, 32),
        context=(48, 32),
        lambdas=(0.00002, 0.00005, 0.00012, 0.0003),
    ),
    data="scenes/seen:train",
    valid="scenes/seen:valid",
    steps=4_000,
    batch=8,
    crop=128,
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=1e-3,
        schedule="trapezoid",
        warmup_steps=200,
        decay_start=0.68,
        final_scale=0.02,
        b2=0.99,
    ),
    ema_decay=0.998,
)

QUICK = {
    **QUICK_RUN,
    "data": "scenes/seen:train",
    "valid": "scenes/seen:valid",
    "optimizer.warmup_steps": 1,
    "config.widths": (8, 8, 8),
    "config.latent": 16,
    "config.hyper": 8,
    "config.groups": (4, 12),
    "config.context": (8, 8),
}
