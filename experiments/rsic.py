"""rsic: referring semantic compression at its published size, on the latents of Stable Diffusion.

    jaxsem train experiments/rsic.py --set diffusion=STABLE_DIFFUSION --set data=PHOTOS

What: Wu et al., Your Demands Deserve More Bits (papers/5): HSVLC of four scales on latents of 4 x 64 x 64, a cell of M to 64 x 64
pixels, lambda = 0.01 exp(7 M). Settings and drawn maps are those of Song et al. (ICCV 2021), which the paper says to follow: Adam
at 1e-4, batches of 8, 2 M steps, a tenth of the rate from 1.4 M on, gradient norm at most 1. The paper's photos are the validation
images of Open Images. STABLE_DIFFUSION is a folder or Hugging Face id of diffusers, 1.x or 2.x; it is not trained, and the weights
file names it without holding it.
Differs from the paper: the widths of HSVLC, which are not published, and the version of Stable Diffusion, likewise; photos have no
objects marked, so the fifth of the maps that give each its level are uniform too; the distortion is not scaled by 255^2, see
`jaxsem.codecs.hsvlc`.
Not run here at this size: it wants an accelerator for days.
On an accelerator, a larger setting: --set stage.batch=64 --set stage.steps=250000 --set dtype=bfloat16
"""

from jaxsem.codecs.hsvlc import HsvlcConfig
from jaxsem.hsvlc_recipe import HsvlcRecipe
from jaxsem.recipes import QUICK_RUN
from jaxsem.systems.weight_map import WeightMapConfig
from jaxsem.training import OptimizerConfig
from jaxsem.training.stages import Stage

_ADAM = OptimizerConfig(learning_rate=1e-4, schedule="steps", drops=(0.7,), clip_norm=1.0)

RECIPE = HsvlcRecipe(
    name="rsic",
    stage=Stage(2_000_000, 8, _ADAM, ema_decay=None, log_every=100, eval_every=10_000),
    codec=HsvlcConfig(latent=4, channels=(32, 32, 32, 32), boundaries=(7 / 8, 3 / 4, 1 / 2), map_stride=8, pixels=64),
    weight_map=WeightMapConfig(stride=64, levels=8),
    crop=512,
)

QUICK = {
    "data": QUICK_RUN["data"],
    **{f"stage.{key}": QUICK_RUN[key] for key in ("steps", "batch", "log_every", "eval_every")},
    "stage.optimizer.schedule": "constant",
    "stage.optimizer.drops": (),
    "codec.width": 8,
    "codec.channels": (4, 4, 4, 4),
    "codec.condition": 4,
    "codec.hidden": 8,
    "codec.prior": 8,
    "crop": 128,
    "valid_crops": 4,
}
