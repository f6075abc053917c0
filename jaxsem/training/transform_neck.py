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

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsem.errors import InputError
from jaxsem.nn.ops import unit

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

    def weights(self, progress: jax.Array) -> tuple[jax.Array, jax.Array]:
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
    feature: Float[Array, "b width"], texts: Float[Array, "c width"], scale: jax.Array, kind: str
) -> Float[Array, "b c"]:
    """Similarities of projected class embeddings to unit text features; `kind` is one of `LOGITS`."""
    return scale * unit(feature) @ texts.T if kind == "cosine" else feature @ texts.T


def cross_entropy(logits: Float[Array, "b c"], shares: Float[Array, "b c"]) -> Float[Array, ""]:
    """The mean cross-entropy to the classes' shares, which add up to 1 for each image (one class, or several alike): Equation 3."""
    return -(shares * jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)).sum(axis=-1).mean()
