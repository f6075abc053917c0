"""Optimisers and learning-rate schedules from one frozen config, built from optax parts."""

import dataclasses
import re

import jax
import optax

from jaxsem.errors import InputError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What the optimiser does; steps are not in it, so that a recipe can be shortened without touching it.

    Attributes:
        name: "adam" or "adamw".
        learning_rate: The peak of the schedule.
        schedule: "constant", "cosine" (down to `final_scale`) or "steps" (times `drop_factor` at each of `drops`).
        warmup_steps: Steps of linear warm-up from 0; they count as training steps.
        final_scale: What is left of the learning rate at the end of the cosine, as a fraction.
        drops: When "steps" lowers the rate, as fractions of all training steps, in (0, 1).
        drop_factor: What each drop multiplies the rate by.
        b1: Decay of Adam's first moment.
        b2: Decay of Adam's second moment.
        eps: Added to Adam's denominator.
        weight_decay: Decoupled weight decay of "adamw".
        decay_pattern: Which parameters decay (`re.search` in the path): by default kernels and embeddings.
        clip_norm: The largest norm of the whole gradient; None does not clip.
        multipliers: (pattern, factor) pairs; the first pattern found in a parameter's path scales its learning rate.
    """

    name: str = "adam"
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    final_scale: float = 0.0
    drops: tuple[float, ...] = ()
    drop_factor: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_pattern: str = r"(kernel|embedding)$"
    clip_norm: float | None = 1.0
    multipliers: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Refuses values that mean nothing.

        Raises:
            InputError: Names the field, its value and what is allowed.
        """
        _check(self.name in ("adam", "adamw"), "name", self.name, "adam or adamw")
        _check(self.learning_rate > 0, "learning_rate", self.learning_rate, "a number above 0")
        _check(self.schedule in ("constant", "cosine", "steps"), "schedule", self.schedule, "constant, cosine or steps")
        _check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        _check(0 <= self.final_scale <= 1, "final_scale", self.final_scale, "a number from 0 to 1")
        _check(all(0 < d < 1 for d in self.drops), "drops", self.drops, "fractions between 0 and 1")
        _check(list(self.drops) == sorted(set(self.drops)), "drops", self.drops, "increasing fractions")
        _check(
            bool(self.drops) == (self.schedule == "steps"), "drops", self.drops, "given exactly when schedule is steps"
        )
        _check(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "None or a number above 0")
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _check(
            not self.weight_decay or self.name == "adamw", "weight_decay", self.weight_decay, "0 unless name is adamw"
        )


def _check(fine: bool, field: str, value: object, allowed: str) -> None:
    if not fine:
        raise InputError(f"optimizer {field} is {value!r}; it must be {allowed}")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Makes the learning rate as a function of the step.

    Args:
        config: The optimiser's config.
        steps: All training steps, warm-up included.

    Returns:
        schedule(step) -> learning rate, traceable.

    Raises:
        InputError: If the warm-up is not shorter than the training.
    """
    warmup = config.warmup_steps
    if warmup >= steps:
        raise InputError(f"warmup_steps={warmup} must be smaller than the {steps} training steps")
    peak = config.learning_rate
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, steps - warmup, alpha=config.final_scale)
    elif config.schedule == "steps":
        # A boundary b of optax acts after step b was taken, and the warm-up is cut off below, where `main` starts at 0.
        boundaries = {round(drop * steps) - warmup: config.drop_factor for drop in config.drops}
        if min(boundaries) <= 0:
            raise InputError(f"drops={config.drops} of {steps} steps begin within the {warmup} warm-up steps")
        main = optax.piecewise_constant_schedule(peak, boundaries)
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Builds the optimiser: clip by global norm, Adam, weight decay, multipliers, learning rate, in this order.

    Args:
        config: The optimiser's config.
        steps: All training steps, for the schedule.

    Raises:
        InputError: For a schedule that does not fit, and on `init` for a multiplier that matches no parameter.
    """
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.weight_decay:
        mask = _named(lambda name, _: re.search(config.decay_pattern, name) is not None)
        parts.append(optax.add_decayed_weights(config.weight_decay, mask))
    if config.multipliers:
        parts.append(_scale_by_name(config.multipliers))
    parts.append(optax.scale_by_learning_rate(make_schedule(config, steps)))
    return optax.chain(*parts)


def _named(function):
    """Lifts function(name, leaf) to trees, with the path of each leaf ("a/b/kernel") as its name."""

    def on_tree(tree):
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
        return jax.tree_util.tree_map_with_path(lambda path, leaf: function(name(path), leaf), tree)

    return on_tree


def _scale_by_name(multipliers: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    def scaled(name, update):
        factor = next((factor for pattern, factor in multipliers if re.search(pattern, name)), 1.0)
        return update * factor

    def init(params):
        names = jax.tree.leaves(_named(lambda name, _: name)(params))
        for pattern, _ in multipliers:
            if not any(re.search(pattern, name) for name in names):
                raise InputError(
                    f"the learning-rate multiplier {pattern!r} matches no parameter; "
                    f"they are named like {', '.join(names[:3])}"
                )
        return optax.EmptyState()

    return optax.GradientTransformation(init, lambda updates, state, params=None: (_named(scaled)(updates), state))
