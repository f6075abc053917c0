"""The mean-scale hyperprior at its published size, one model per rate.

    jaxsem train experiments/hyperprior.py --set data=PHOTOS --set weight=0.0067

What: Minnen et al., Joint Autoregressive and Hierarchical Priors (NeurIPS 2018), without the autoregressive part:
`mbt2018-mean` of the CompressAI zoo, whose settings these are: Adam at 1e-4 (1e-3 for the quantiles), batches of 16 crops of
256^2. Rates: weight = 0.0018, 0.0035, 0.0067, 0.013 with N=128, M=192; 0.025, 0.0483, 0.0932, 0.18 with `--set
config.channels=192 --set config.latent=320`.
Expected on Kodak, from the zoo's results: 0.124 bpp 27.7 dB, 0.198 29.4, 0.307 31.1, 0.461 33.0, 0.662 35.0, 0.914 36.9, 1.234
38.8, 1.619 40.6. Not run here: it wants an accelerator.
A small one was, for the figures of exact arithmetic in the README: --set config.channels=64 --set config.latent=96 --set batch=8
--set crop=128 --set steps=6000 --set optimizer.name=muon --set optimizer.learning_rate=1e-3 --set optimizer.schedule=trapezoid
--set optimizer.warmup_steps=100 --set optimizer.decay_start=0.6 --set optimizer.final_scale=0.02 --set ema_decay=0.999 --set
eval_every=500, 23 minutes of two x86 cores: 0.478 bpp, 26.2 dB on 12 valid crops of 256^2; then calibrated on 24 valid photos.
"""

from jaxsem.codecs import HyperpriorConfig
from jaxsem.recipes import QUICK_RUN, Recipe
from jaxsem.training import OptimizerConfig

RECIPE = Recipe(
    name="hyperprior",
    system="hyperprior",
    config=HyperpriorConfig(),
    steps=2_000_000,
    batch=16,
    crop=256,
    weight=0.0067,
    optimizer=OptimizerConfig(learning_rate=1e-4, clip_norm=1.0, multipliers=(("quantiles", 10.0),)),
    eval_every=10_000,
    log_every=100,
)

QUICK = {
    **QUICK_RUN,
    "config.channels": 8,
    "config.latent": 12,
}
