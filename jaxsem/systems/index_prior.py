r"""A learned prior of index rows: how likely each index is after those before it.

    x_0 ... x_{i-1} --sum of embeddings--> a_i --clip--> h_i --matrix of position i--> logits of x_i

It is trained here, in floating point and on any device, and then frozen to integers, which code (`PriorRans`):

    prior = fit_prior(indices, sizes)
    coder = PriorRans(freeze_prior(prior))

The sum before every position is one prefix sum over the positions, so a training step costs about as much as one layer.
Without its hidden units the network is a table for each position. It starts as that, and training keeps what does best on
rows held out, so a prior is hardly worse than static tables even where there are too few rows to learn from.

Source: Larochelle and Murray, The neural autoregressive distribution estimator (AISTATS 2011). Its sigmoid is a unit here
that is clipped at -1 and 1: integers compute it exactly, and being linear in between it needs no direct terms from index to
index beside it. On correlated indices it took 2 % fewer bits than a clipped ReLU.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsem.entropy.adaptive import PRECISION
from jaxsem.entropy.index_coder import check_rows, check_sizes, count_indices
from jaxsem.entropy.index_network import HIDDEN_BITS, MAX_HIDDEN, STEPS, IndexNetwork, powers_of_two
from jaxsem.errors import InputError

Params = dict[str, jax.Array]

_ROUNDS = 20  # how often the held-out rows are looked at
_HELD_OUT = 2048  # rows, at most
_DECAYED = ("hidden_weights", "output_weights")
_ABSENT = -1e9  # logit of an entry that pads a table
_BITS = 1 / math.log(2)


@dataclass(frozen=True, eq=False)
class IndexPrior:
    """A trained prior.

    Attributes:
        sizes: int64 [n], index i is in ``range(sizes[i])``.
        params: `hidden_weights` [n, k, hidden], `hidden_bias` [hidden], `output_weights` [n, hidden, k] and `output_bias`
            [n, k], with k the largest size; entries beyond a position's size mean nothing.
        held_out_bits: mean bits of a held-out row.
        curve: float64 [rounds + 1], the same before training and after each of its rounds; the least of them was kept.
    """

    sizes: np.ndarray
    params: Params
    held_out_bits: float
    curve: np.ndarray


def fit_prior(
    indices: np.ndarray,
    sizes: Sequence[int],
    *,
    hidden: int = 64,
    steps: int = 2500,
    batch: int = 128,
    learning_rate: float = 5e-3,
    weight_decay: float = 4000.0,
    dropout: float = 0.1,
    held_out: float = 0.1,
    seed: int = 0,
) -> IndexPrior:
    """Trains a prior with Adam, the learning rate falling as a cosine, on rows drawn with replacement.

    Args:
        indices: Rows of training features, integers [m, n].
        sizes: The codebook size of each position, [n].
        hidden: Hidden units; the parameters are about 2 n k hidden.
        steps: Of the optimiser.
        batch: Rows a step.
        learning_rate: Its peak.
        weight_decay: Decoupled decay of the weights, divided by the number of rows to train on, as a prior's weight is.
        dropout: Probability that a hidden unit is left out for a row.
        held_out: Share of the rows that are not trained on but choose among the rounds of training, at most 2048 rows.
        seed: Of the start, the split, the draws and the dropout.

    Returns:
        The parameters that did best on the held-out rows.

    Raises:
        InputError: Rows that do not fit the sizes, too few of them, or an option out of range.
    """
    sizes = check_sizes(sizes)
    indices = check_rows(indices, sizes)
    _check_options(hidden, steps, batch, learning_rate, weight_decay, dropout, held_out)
    kept_back = min(max(1, round(held_out * len(indices))), _HELD_OUT)
    if len(indices) <= kept_back:
        raise InputError(f"{len(indices)} rows are too few to train on some and hold out others: use more")
    shuffled = np.random.default_rng(seed).permutation(indices)
    choosing, training = shuffled[:kept_back], shuffled[kept_back:]
    key = jax.random.key(seed)
    params = _start(training, sizes, hidden, key)
    state = optax.scale_by_adam().init(params)
    options = {
        "learning_rate": learning_rate,
        "decay": weight_decay / len(training),
        "dropout": dropout,
        "steps": steps,
    }
    rows, present = jnp.asarray(training), jnp.asarray(_present(sizes))
    best, curve = params, [_mean_bits(params, present, choosing)]
    marks = np.unique(np.linspace(0, steps, _ROUNDS + 1).astype(int))
    for first, last in itertools.pairwise(marks):
        params, state = _train(params, state, rows, present, key, first, last, options, batch)
        curve.append(_mean_bits(params, present, choosing))
        if not math.isfinite(curve[-1]):
            raise InputError(f"training diverged at a learning rate of {learning_rate}: take a smaller one")
        if curve[-1] == min(curve):
            best = params
    return IndexPrior(sizes, best, min(curve), np.array(curve))


def prior_bits(prior: IndexPrior, indices: np.ndarray) -> np.ndarray:
    """Bits of rows [b, n] by the trained network, before it is frozen: float64 [b].

    Raises:
        InputError: Rows that do not fit the prior's sizes.
    """
    return _bits_of(prior.params, jnp.asarray(_present(prior.sizes)), check_rows(indices, prior.sizes))


def freeze_prior(prior: IndexPrior) -> IndexNetwork:
    """Rounds a prior to integers: each kind of weights to the finest power of two at which the largest fits.

    Raises:
        InputError: Weights so large that they do not fit, or not finite.
    """
    present = _present(prior.sizes)
    embedding, bias, matrix, offset = (
        np.asarray(prior.params[name], np.float64)
        for name in ("hidden_weights", "hidden_bias", "output_weights", "output_bias")
    )
    # Logits to base 2, and only their differences count.
    matrix, offset = (
        matrix.transpose(0, 2, 1)[present] * _BITS,
        (offset - offset.max(1, keepdims=True))[present] * _BITS,
    )
    embedding = embedding[present]
    if not all(np.isfinite(part).all() for part in (embedding, bias, matrix, offset)):
        raise InputError("a prior with parameters that are not finite cannot be frozen: train it again")
    fine = _exponent("hidden weights", embedding, 32767, HIDDEN_BITS)
    coarse = _exponent("output weights", matrix, 127, int(math.log2(STEPS)) - HIDDEN_BITS)
    # What is rarer than a table can tell is as rare as it can.
    offset = np.maximum(offset, -2.0 * PRECISION)
    return IndexNetwork(
        sizes=prior.sizes.astype(np.uint16),
        hidden_weights=_integers(embedding, fine, np.int16),
        hidden_bias=_integers(bias, fine, np.int32),
        output_weights=_integers(matrix, coarse, np.int8),
        output_bias=_integers(offset, coarse + HIDDEN_BITS, np.int32),
        powers=powers_of_two(),
        shifts=np.array([fine - HIDDEN_BITS, coarse + HIDDEN_BITS - int(math.log2(STEPS))], np.uint8),
    )


def prior_logits(params: Params, indices: jax.Array, keep: jax.Array | None = None) -> jax.Array:
    """The network on whole rows.

    Args:
        params: As in `IndexPrior`.
        indices: int32 [b, n].
        keep: [b, hidden], what each hidden unit of a row is multiplied by, for dropout.

    Returns:
        Natural logarithms up to a constant of each table, float32 [n, b, k].
    """
    terms = params["hidden_weights"][jnp.arange(indices.shape[1])[:, None], indices.T]
    # A prefix sum in log n rounds: on a CPU ten times faster than jnp.cumsum.
    sums = jax.lax.associative_scan(jnp.add, terms) - terms + params["hidden_bias"]
    units = jnp.clip(sums, -1.0, 1.0)
    if keep is not None:
        units = units * keep
    return jnp.einsum("nbh,nhk->nbk", units, params["output_weights"]) + params["output_bias"][:, None]


def _row_bits(params: Params, present: jax.Array, indices: jax.Array, keep: jax.Array | None = None) -> jax.Array:
    """Bits of each row, float32 [b]."""
    logits = jnp.where(present[:, None], prior_logits(params, indices, keep), _ABSENT)
    own = jnp.take_along_axis(logits, indices.T[..., None], 2)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - own).sum(0) * _BITS


@partial(jax.jit, static_argnames="batch", donate_argnums=1)
def _train(params, state, rows, present, key, first, last, options, batch):
    """Steps `first` to `last`, on one call of the device."""

    def loss(params, drawn, keep):
        return _row_bits(params, present, drawn, keep).mean()

    def step(i, carry):
        params, state = carry
        draw, drop = jax.random.split(jax.random.fold_in(key, i))
        drawn = rows[jax.random.randint(draw, (batch,), 0, len(rows))]
        stay = 1.0 - options["dropout"]
        keep = jax.random.bernoulli(drop, stay, (batch, len(params["hidden_bias"]))) / stay
        gradient = jax.grad(loss)(params, drawn, keep)
        updates, state = optax.scale_by_adam().update(gradient, state, params)
        rate = options["learning_rate"] * 0.5 * (1.0 + jnp.cos(jnp.pi * i / options["steps"]))
        decay = {name: options["decay"] if name in _DECAYED else 0.0 for name in params}
        params = jax.tree.map(lambda p, u, d: p - rate * (u + d * p), params, updates, decay)
        return params, state

    return jax.lax.fori_loop(first, last, step, (params, state))


_evaluate = jax.jit(_row_bits)


def _bits_of(params: Params, present: jax.Array, indices: np.ndarray) -> np.ndarray:
    """Bits of each row, float64 [b], in batches of one shape."""
    parts, size = [np.zeros(0)], 256
    for begin in range(0, len(indices), size):
        part = indices[begin : begin + size]
        padded = np.pad(part, ((0, size - len(part)), (0, 0)))
        parts.append(np.asarray(_evaluate(params, present, padded), np.float64)[: len(part)])
    return np.concatenate(parts)


def _mean_bits(params: Params, present: jax.Array, indices: np.ndarray) -> float:
    return float(_bits_of(params, present, indices).mean())


def _start(training: np.ndarray, sizes: np.ndarray, hidden: int, key: jax.Array) -> Params:
    """A table for each position, from how often its indices occur, and hidden units that do not yet count."""
    n, k = len(sizes), int(sizes.max())
    offset = np.zeros((n, k), np.float32)
    for row, counts in zip(offset, count_indices(training, sizes, per_position=True)[0]):
        row[: len(counts)] = np.log((counts + 0.5) / (counts + 0.5).sum())
    return {
        # Sums of a row's n terms have the standard deviation 0.8 at the end, within the units' range.
        "hidden_weights": jax.random.normal(key, (n, k, hidden)) * (0.8 / math.sqrt(n)),
        "hidden_bias": jnp.zeros(hidden),
        "output_weights": jnp.zeros((n, hidden, k)),
        "output_bias": jnp.asarray(offset),
    }


def _present(sizes: np.ndarray) -> np.ndarray:
    """Which entries of the padded tables there are: bool [n, k]."""
    return np.arange(int(sizes.max())) < sizes[:, None]


def _exponent(what: str, values: np.ndarray, limit: int, least: int) -> int:
    """The largest e up to 14 such that values * 2^e, rounded, are within the limit."""
    largest = float(np.abs(values).max())
    found = min(14, math.floor(math.log2(limit / largest))) if largest else 14
    if found < least:
        raise InputError(f"the {what} of a prior reach {largest:.3g}, too much to freeze: decay them more")
    return found


def _integers(values: np.ndarray, exponent: int, dtype: type) -> np.ndarray:
    """Rounded multiples of 2^-exponent; the network refuses the ends of the type, where larger ones are put."""
    limits = np.iinfo(dtype)
    return np.clip(np.round(values * 2.0**exponent), limits.min, limits.max).astype(dtype)


def _check_options(hidden, steps, batch, learning_rate, weight_decay, dropout, held_out) -> None:
    fine = {
        f"hidden is 1 to {MAX_HIDDEN}, not {hidden}": 1 <= hidden <= MAX_HIDDEN,
        f"steps are at least 1, not {steps}": steps >= 1,
        f"batch is at least 1, not {batch}": batch >= 1,
        f"learning_rate is a number above 0, not {learning_rate}": 0 < learning_rate < math.inf,
        f"weight_decay is a number of at least 0, not {weight_decay}": 0 <= weight_decay < math.inf,
        f"dropout is at least 0 and below 1, not {dropout}": 0 <= dropout < 1,
        f"held_out is a share above 0 and below 1, not {held_out}": 0 < held_out < 1,
    }
    for what, holds in fine.items():
        if not holds:
            raise InputError(what)
