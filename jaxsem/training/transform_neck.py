"""Training of a transform-neck: the surrogate loss, and the three scenarios.

Nothing here sees a language model. The loss looks at the image tower's tokens only: those behind the neck against those of the
uncompressed image (distillation), and their class embedding against the texts' (cross-entropy). The towers are frozen: they are in
the loss's closure of parameters that `jaxsem.training` calls frozen, without gradients or optimiser state.

    d1   neck alone, the codec as it is                      surrogate(step)
    d2   codec and neck                                      R + lambda (gamma MSE + delta distillation), gamma : delta = 60 : 1
    d3   codec and neck, no image                            R + lambda delta distillation

Source: Kao et al., Bridging Compressed Image Latents and Multimodal Large Language Models (papers/2), sections 3.4 and 3.5,
Table 1; what the released code does differently is an option of `Surrogate`.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsem.backbones.clip import Clip, ClipConfig
from jaxsem.backbones.clip_inputs import normalize
from jaxsem.errors import InputError
from jaxsem.nn.ops import unit
from jaxsem.nn.unet import Unet, UnetConfig
from jaxsem.systems.transform_neck import NeckConfig, TransformNeck

DISTILL = ("tokens", "patches", "feature")
LOGITS = ("cosine", "released")


@dataclass(frozen=True)
class Surrogate:
    """What the surrogate loss compares, and when.

    Attributes:
      distill: "tokens": the mean squared error of all tokens that the tower gives; "patches": of all but the class token, of the
        layer that the language model takes; "feature": of the projected class embedding, as the released code does.
      logits: "cosine": cosine similarities times CLIP's own scale, with which they were trained (Equation 2 has none: then all
        probabilities stay near 1 / classes); "released": the projected class embedding, not of unit length, times unit texts.
      cross_entropy: Weight of the cross-entropy, alpha.
      distillation: Weight of the distillation, beta; the paper has alpha : beta = 1 : 100.
      phases: Shares of the steps, E1 and E2: cross-entropy alone before the first, distillation alone from the second on, both
        between. The paper has 20 and 40 of 60 epochs.

    Raises:
      InputError: An unknown word, a negative weight, or shares that do not rise in [0, 1].
    """

    distill: str = "tokens"
    logits: str = "cosine"
    cross_entropy: float = 1.0
    distillation: float = 100.0
    phases: tuple[float, float] = (1 / 3, 2 / 3)

    def __post_init__(self) -> None:
        for name, known in (("distill", DISTILL), ("logits", LOGITS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        if min(self.cross_entropy, self.distillation) < 0 or not self.cross_entropy + self.distillation:
            raise InputError(
                f"weights of {self.cross_entropy} and {self.distillation}: give at least 0, and one above it"
            )
        if len(self.phases) != 2 or not 0 <= self.phases[0] <= self.phases[1] <= 1:
            raise InputError(f"phases={self.phases} are two shares of the steps, rising in [0, 1]")

    def weights(self, progress: jax.Array | float) -> tuple[jax.Array, jax.Array]:
        """Weights of cross-entropy and distillation when this share of the steps is done, traced.

        Cross-entropy and distillation alone keep the weight that they have together, as in the released code; there the first
        phase's cross-entropy counts a hundred times as much, which an optimiser that divides by the gradient's size, such as Adam,
        hardly notices.
        """
        early, late = self.phases
        return (
            jnp.where(progress < late, self.cross_entropy, 0.0),
            jnp.where(progress >= early, self.distillation, 0.0),
        )


RELEASED = Surrogate(distill="feature", logits="released")


def distillation(student: Float[Array, "*shape"], teacher: Float[Array, "*shape"]) -> Float[Array, ""]:
    """The mean squared error to what the teacher gives, which gets no gradient: Equation 1."""
    return jnp.square(student.astype(jnp.float32) - jax.lax.stop_gradient(teacher).astype(jnp.float32)).mean()


def class_logits(
    feature: Float[Array, "b width"], texts: Float[Array, "c width"], scale: jax.Array | float, kind: str
) -> Float[Array, "b c"]:
    """Similarities of projected class embeddings to unit text features; `kind` is one of `LOGITS`."""
    return scale * unit(feature) @ texts.T if kind == "cosine" else feature @ texts.T


def cross_entropy(logits: Float[Array, "b c"], shares: Float[Array, "b c"]) -> Float[Array, ""]:
    """The mean cross-entropy to the classes' shares, which add up to 1 for each image (one class, or several alike): Equation 3."""
    return -(shares * jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)).sum(axis=-1).mean()


# -- losses of the scenarios --------------------------------------------------------------------------------------------


class Student(nn.Module):
    """What is trained against the tower: a neck, or for the baseline Post-processing a U-Net before the whole tower.

    Attributes:
      tower: The CLIP whose image tower is fed.
      neck: The neck's sizes; None for a U-Net.
      unet: The U-Net's sizes, for decoded images in [0, 1].
    """

    tower: ClipConfig
    neck: NeckConfig | None = None
    unet: UnetConfig | None = None

    def setup(self) -> None:
        """Declares what is trained; the tower's parameters come with each call."""
        self.front = Unet(self.unet) if self.neck is None else TransformNeck(self.neck)

    def __call__(self, inputs: jax.Array, clip_params: Any, train: bool = False) -> dict[str, jax.Array]:
        """The tower's `tokens` [b, n, width] after its last layer and the projected `feature` [b, projection].

        Args:
          inputs: Latents [b, h, w, m] in the units of g_a for a neck, images [b, h, w, 3] in [0, 1] for a U-Net.
          clip_params: Frozen parameters of CLIP.
          train: Whether the U-Net normalises by the batch.
        """
        clip = Clip(self.tower, parent=None)
        if self.neck is None:
            images = normalize(self.front(inputs, train))
            tokens = clip.apply({"params": clip_params}, images, method="image_tokens")
        else:
            first = self.neck.bypassed
            tokens = clip.apply(
                {"params": clip_params}, self.front(inputs), method=lambda c, x: c.vision.run_layers(x, first)
            )
        return {
            "tokens": tokens,
            "feature": clip.apply({"params": clip_params}, tokens, method="image_feature"),
        }


def surrogate_loss(
    found: dict[str, jax.Array],
    teacher: dict[str, jax.Array],
    shares: jax.Array,
    texts: jax.Array,
    scale: jax.Array | float,
    options: Surrogate,
    progress: jax.Array | float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The surrogate loss of Equation 4.

    Args:
      found: `tokens` and `feature` of `Student`.
      teacher: The same of the uncompressed image.
      shares: The classes' shares [b, c].
      texts: Unit features of the classes [c, width].
      scale: CLIP's factor of similarities.
      options: What is compared.
      progress: The share of the steps that is done.

    Returns:
      The loss, and its parts before weighting.
    """
    entropy = cross_entropy(class_logits(found["feature"], texts, scale, options.logits), shares)
    distance = distance_of(found, teacher, options.distill)
    for_entropy, for_distance = options.weights(progress)
    return for_entropy * entropy + for_distance * distance, {"cross_entropy": entropy, "distillation": distance}


def distance_of(found: dict[str, jax.Array], teacher: dict[str, jax.Array], kind: str) -> jax.Array:
    """The distillation loss of one `kind` of DISTILL."""
    if kind == "feature":
        return distillation(found["feature"], teacher["feature"])
    first = 0 if kind == "tokens" else 1
    return distillation(found["tokens"][:, first:], teacher["tokens"][:, first:])


def joint_loss(
    x: jax.Array,
    outputs: dict[str, jax.Array],
    distance: jax.Array,
    weight: jax.Array,
    scenario: str,
    ratio: float = 60.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of d2 or d3: rate plus weighted distortion of image and tokens.

    With lambda' = weight 255^2 / ratio it is R + lambda' (ratio MSE + distance) for d2, where MSE is that of images in [0, 1] and
    gamma : delta = ratio : 1 as in the paper, and R + lambda' distance for d3. So d2 is the loss that the codec was trained with,
    and the distance besides.

    Args:
      x: Images [b, h, w, 3] in [0, 1].
      outputs: What the codec's forward pass gives.
      distance: The distillation loss of each image [b].
      weight: lambda of the codec's own loss for each image [b], on 255^2 MSE.
      scenario: "d2" or "d3".
      ratio: gamma / delta.
    """
    pixels = x.shape[1] * x.shape[2]
    bpp = (outputs["bits_y"] + outputs["bits_z"]) / pixels
    mse = jnp.square(outputs["x_hat"] - x).mean(axis=(1, 2, 3))
    for_tokens = weight * 255.0**2 / ratio
    loss = bpp + for_tokens * distance
    if scenario == "d2":
        loss = loss + weight * 255.0**2 * mse
    metrics = {"bpp": bpp.mean(), "distillation": distance.mean(), "psnr": -10 * jnp.log10(mse.mean())}
    return loss.mean(), metrics
