"""Optimisers and learning-rate schedules from one frozen config, built from optax parts."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import optax

from jaxsem.errors import InputError

# Coefficients of x, x^3 and x^5 in an iteration of Muon, from its authors; and the updates' root mean square.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_MUON_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What the optimiser does; steps are not in it, so that a recipe can be shortened without touching it.

    Attributes:
        name: "adam", "adamw", or "muon": orthogonalised momentum for kernels of two or more dimensions, as matrices of
            (fan-in, out), and Adam for the rest, with updates of Adam's usual size, so that one learning rate serves both.
        learning_rate: The peak of the schedule.
        schedule: "constant", "cosine" (down to `final_scale`), "steps" (times `drop_factor` at each of `drops`), or
            "trapezoid": constant, then from `decay_start` on down to `final_scale` as 1 - sqrt(progress), so that a run
            can be lengthened without having wasted its high rates.
        warmup_steps: Steps of linear warm-up from 0; they count as training steps.
        final_scale: What is left of the learning rate at the end of the cosine or the trapezoid, as a fraction.
        decay_start: Where the trapezoid begins to fall, as a fraction of all training steps.
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
    decay_start: float = 0.8
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
        _check(self.name in ("adam", "adamw", "muon"), "name", self.name, "adam, adamw or muon")
        _check(self.learning_rate > 0, "learning_rate", self.learning_rate, "a number above 0")
        schedules = ("constant", "cosine", "steps", "trapezoid")
        _check(self.schedule in schedules, "schedule", self.schedule, "one of " + ", ".join(schedules))
        _check(0 < self.decay_start < 1, "decay_start", self.decay_start, "a number between 0 and 1")
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
    elif config.schedule == "trapezoid":
        main = _trapezoid(peak, round(config.decay_start * steps) - warmup, steps - warmup, config.final_scale)
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def _trapezoid(peak: float, start: int, end: int, final_scale: float) -> optax.Schedule:
    def schedule(step):
        progress = jnp.clip((step - start) / (end - start), 0.0, 1.0)
        return peak * (final_scale + (1 - final_scale) * (1 - jnp.sqrt(progress)))

    return schedule


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Builds the optimiser: clip by global norm, Adam or Muon, weight decay, learning rate, multipliers.

    Args:
        config: The optimiser's config.
        steps: All training steps, for the schedule.

    Raises:
        InputError: For a schedule that does not fit, and on `init` for a multiplier that matches no parameter.
    """
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    schedule = make_schedule(config, steps)
    if config.name == "muon":
        parts.append(_muon(config, schedule))
    else:
        parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
        if config.weight_decay:
            mask = _named(lambda name, _: re.search(config.decay_pattern, name) is not None)
            parts.append(optax.add_decayed_weights(config.weight_decay, mask))
        parts.append(optax.scale_by_learning_rate(schedule))
    if config.multipliers:
        parts.append(_scale_by_name(config.multipliers))
    return optax.chain(*parts)


def _muon(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon for kernels, Adam for everything else.

    Source: Jordan et al., Muon (2024); the updates' scale after Liu et al., Muon is Scalable for LLM Training (2025); three
    iterations suffice with the preconditioning of Boissin et al., Turbo-Muon (2025).
    """
    is_kernel = lambda name, leaf: "muon" if name.endswith("kernel") and leaf.ndim > 1 else "adam"  # noqa: E731
    # The links without effect are where `optax.contrib.muon` has others: checkpoints made with it fit.
    unused = optax.identity()
    return optax.partition(
        {
            "muon": optax.chain(_orthogonal_momentum(), unused, unused, optax.scale_by_learning_rate(schedule)),
            "adam": optax.nadamw(schedule, config.b1, config.b2, config.eps, weight_decay=0.0),
        },
        _named(is_kernel),
    )


def _orthogonal_momentum(beta: float = 0.95) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised and of Adam's usual size: what `optax.contrib.muon` does with one kernel at a time.

    Here kernels that are matrices of one shape go through the iteration together: many small products become few, which
    compile and run faster.
    """
    from optax import contrib

    def init(params):
        return contrib.MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), jnp.asarray(_NEWTON_SCHULZ))

    def update(updates, state, params=None):
        mu = optax.tree.update_moment(updates, state.mu, beta, 1)
        count = optax.safe_increment(state.count)
        ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
        momentum = jax.tree.map(
            lambda m, g: beta * m + (1 - beta) * g, ahead, optax.tree.bias_correction(updates, beta, count)
        )
        return _orthogonalise(momentum, state.ns_coeffs), contrib.MuonState(count, mu, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def _orthogonalise(tree, coefficients: jax.Array):
    """Nearly orthogonal matrices (fan-in, out) instead of the kernels, with entries of a mean square of 0.2^2 or so."""
    leaves, treedef = jax.tree.flatten(tree)
    shapes = [(math.prod(leaf.shape[:-1]), leaf.shape[-1]) for leaf in leaves]
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, shape in enumerate(shapes):
        alike.setdefault((*sorted(shape), leaves[index].dtype), []).append(index)
    for (rows, columns, _), indices in alike.items():
        wide = [
            leaves[i].reshape(shapes[i]) if shapes[i][0] == rows else leaves[i].reshape(shapes[i]).T for i in indices
        ]
        stack = _newton_schulz(jnp.stack(wide), coefficients) * (_MUON_RMS * math.sqrt(columns))
        for i, matrix in zip(indices, stack):
            leaves[i] = (matrix if shapes[i][0] == rows else matrix.T).reshape(leaves[i].shape)
    return jax.tree.unflatten(treedef, leaves)


def _newton_schulz(x: jax.Array, coefficients: jax.Array, steps: int = 3) -> jax.Array:
    """Brings the singular values of wide matrices [n, rows, columns] near 1."""
    first, third, fifth = coefficients.astype(x.dtype)
    for step in range(steps):
        gram = x @ x.mT
        if step == 0:  # instead of dividing by a norm: bounds the singular values by 1, more tightly
            scale = jax.lax.rsqrt(jnp.maximum(jnp.abs(gram).sum(-1), 1e-8))[..., None]
            x, gram = x * scale, gram * scale * scale.mT
        x = first * x + (third * gram + fifth * (gram @ gram)) @ x
    return x


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
