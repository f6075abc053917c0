"""tic-scenes: a small TIC for scenes at the lowest rates, the other codec of the transform-neck's ablation.

    jaxsem train experiments/tic_scenes.py
    jaxsem train experiments/transform_neck_mini.py --set codec=runs/tic-scenes --workdir runs/neck-tic

What: Lu et al., Transformer-based Image Compression (DCC 2022), at widths for images of 128 x 128 with few objects, gains for four
qualities.
Differs from the paper: one set of weights for all rates, and no drop-path.
On an accelerator, a larger setting: --set batch=64 --set steps=50000 --set dtype=bfloat16
"""

from jaxsem.codecs import TicConfig
from jaxsem.recipes import QUICK_RUN, Recipe
from jaxsem.training import OptimizerConfig

RECIPE = Recipe(
    name="tic-scenes",
    system="tic",
    config=TicConfig(
        channels=32,
        latent=64,
        depths=(1, 1, 2, 1, 1),
        heads=(2, 4, 4, 4, 4),
        context_heads=8,
        drop_path=0.0,
        lambdas=(0.00003, 0.00008, 0.0002, 0.0006),
    ),
    data="scenes/seen:train",
    valid="scenes/seen:valid",
    steps=1_200,
    batch=8,
    crop=128,
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=1e-3,
        schedule="trapezoid",
        warmup_steps=100,
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
    "config.channels": 8,
    "config.latent": 16,
    "config.depths": (1, 1, 1, 1, 1),
}
