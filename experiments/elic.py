"""ELIC at its published size, one model per rate.

    jaxsem train experiments/elic.py --set data=PHOTOS --set weight=0.016

What: He et al., ELIC (CVPR 2022), chandelier variant, 33.8 M parameters; the settings of its public re-implementation: Adam at
1e-4 (1e-3 for the quantiles), batches of 16 crops of 256^2, gradient norm at most 1, the rate divided by ten for the last
twentieth. Six rates: weight = 0.004, 0.008, 0.016, 0.032, 0.15, 0.45.
Differs: 2 M steps of any photos instead of 4000 epochs of the 8000 largest of ImageNet (also 2 M steps); the mixture of noise
and straight-through rounding from the start, instead of noise alone for the first nineteen twentieths.
Expected on Kodak, from the paper as CompressAI records it: 0.124 bpp 29.1 dB, 0.197 30.7, 0.334 32.8, 0.491 34.6, 0.704 36.5,
0.857 37.6.
Not run here: it wants an accelerator for days.
On several devices the batch is divided among them; `--set dtype=bfloat16` for the arithmetic, `--set init=FILE` to start from a
neighbouring rate.
"""

from jaxsem.codecs import ElicConfig
from jaxsem.recipes import QUICK_RUN, Recipe
from jaxsem.training import OptimizerConfig

RECIPE = Recipe(
    name="elic",
    system="elic",
    config=ElicConfig(),
    steps=2_000_000,
    batch=16,
    crop=256,
    weight=0.016,
    optimizer=OptimizerConfig(
        learning_rate=1e-4, schedule="steps", drops=(0.95,), clip_norm=1.0, multipliers=(("quantiles", 10.0),)
    ),
    eval_every=10_000,
    log_every=100,
)

QUICK = {
    **QUICK_RUN,
    "optimizer.schedule": "constant",
    "optimizer.drops": (),
    "config.widths": (8, 8, 8),
    "config.latent": 16,
    "config.hyper": 8,
    "config.groups": (4, 12),
    "config.context": (8, 8),
}
