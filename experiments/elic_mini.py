"""elic-mini: the shipped variable-rate codec, ELIC's layout at widths that a CPU decodes quickly.

    jaxsem train experiments/elic_mini.py --set data=PHOTOS/train --set valid=PHOTOS/valid

What: He et al., ELIC (CVPR 2022), chandelier variant at 5.17 M parameters, with gains for four qualities (Cui et al., Asymmetric
Gained Deep Image Compression, CVPR 2021).
Differs from the papers: one set of weights for all rates, and Muon instead of Adam (at step 250 a loss of 5.6 instead of 11.4 at
the same learning rate, one run of each, nothing tuned).
Cost: 0.4 s a step of 8 x 128^2 on two idle x86 cores, an hour for the steps below.
Result: see `jaxsem presets`. The shipped weights are of 2026-11-20: 1,294 photos of BSDS500 and imagenet-sample-images with a short
side of 256 to 288 pixels, chosen on 109 of BSDS500's test photos. They were trained in pieces, each starting from the last one's
parameters with fresh momentum: 3,800 steps with lambdas (0.0008, 0.0022, 0.006, 0.016), then 648, 1,000, 4,000 and 6,000 with those
below, the last 3,000 and the last 4,200 with a falling rate. The first piece was run by a plain script of the same loss and
optimiser, before this loop existed. Exact arithmetic is calibrated on the first 48 of the 109 photos.
Expected on 12 valid crops of 256^2, mean loss over the qualities: 0.964 after 5,400 steps, 0.930 after 7,400, 0.913 after 9,400 and
0.896 after 15,400.
On an accelerator, a larger setting: --set batch=32 --set crop=256 --set steps=200000 --set dtype=bfloat16
"""

from jaxsem.presets import PRESETS
from jaxsem.recipes import QUICK_RUN, Recipe
from jaxsem.training import OptimizerConfig

RECIPE = Recipe(
    name="elic-mini",
    system="elic",
    config=PRESETS["elic-mini"].config,
    steps=9_400,
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
