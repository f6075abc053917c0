"""How much of a feature survives at how many bits, for every quantiser of features.

    python tools/bench_features.py --features FILE.npy [--train 800] [--rates 0.5 1 2 3] [--methods PQVAE OPQ] [--json FILE]

FILE holds features [count, width], such as the image embeddings of CLIP; each is brought to length 1 first. The first
`--train` rows fit the quantisers and the others are coded, after a shuffle if `--shuffle` is given. The columns:

    bits          per dimension, at fixed length
    ideal         bits per dimension that the indices would take with one order-0 table per index, counted on the train
                  rows (each count plus one): no real bytes, but what an entropy coder with those tables comes close to
    cosine        mean cosine similarity of a test feature and what is decoded of it, its 5 % quantile in brackets
    itself        how many decoded test features have their own original as the nearest of all originals
    neighbours    share of the 10 nearest train features of a test feature that its decoded version still has
    fit           seconds to fit

A method takes part at the rates that it can meet, those with a network from 5 % below on; `methods` is the list to extend. A
network takes minutes on a CPU for each rate, `--steps` or `--methods SQ PQ` less.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _timing
import numpy as np

from jaxsem.errors import InputError
from jaxsem.systems.feature_arrays import read_array
from jaxsem.systems.feature_networks import PqvaeQuantizer, Recipe, VqvaeQuantizer, config_at, learn_scalar_quantizer
from jaxsem.systems.feature_quantizers import (
    FeatureQuantizer,
    ProductQuantizer,
    RotatedProductQuantizer,
    ScalarQuantizer,
)
from jaxsem.systems.features import check_features
from jaxsem.systems.zero_shot import accuracy, cosine, neighbour_agreement

NEIGHBOURS = 10
RATES = (0.25, 0.5, 1.0, 2.0, 3.0)
QUICK_RATES = (1.0,)
QUICK_STEPS = 20

# Fits a quantiser to train features [b, w] with a seed.
Fit = Callable[[np.ndarray, int], FeatureQuantizer]


@dataclass(frozen=True)
class Method:
    """A contestant: `at(rate, width)` is its fit for so many bits a dimension, or None if it cannot meet them."""

    name: str
    at: Callable[[float, int], Fit | None]


@dataclass(frozen=True)
class Row:
    """One line of the result; its columns are in the tool's docstring."""

    name: str
    rate: float
    bits: int
    ideal: float
    cosine: float
    cosine_low: float
    itself: float
    neighbours: float
    fit_seconds: float


def product(kind: type, codewords: int) -> Callable[[float, int], Fit | None]:
    """PQ or OPQ with codebooks of one size: the rate decides the width of the sub-vectors."""

    def at(rate: float, width: int) -> Fit | None:
        part = math.log2(codewords) / rate
        if part % 1 or width % part:
            return None
        return lambda train, seed: kind.fit(train, subspaces=width // int(part), codewords=codewords, seed=seed)

    return at


def scalar(per_dimension: bool) -> Callable[[float, int], Fit | None]:
    """Learned SQ, at whole bits a dimension."""

    def at(rate: float, width: int) -> Fit | None:
        if rate % 1 or not 1 <= rate <= 8:
            return None
        return lambda train, seed: ScalarQuantizer.fit(train, bits=int(rate), per_dimension=per_dimension, seed=seed)

    return at


def learned_scalar(rate: float, width: int) -> Fit | None:
    """SQ with levels learned by gradients, at whole bits a dimension."""
    del width
    if rate % 1 or not 1 <= rate <= 8:
        return None
    return lambda train, seed: learn_scalar_quantizer(train, bits=int(rate), seed=seed)


def network(kind: type, codewords: int, recipe: Recipe, **sizes: Any) -> Callable[[float, int], Fit | None]:
    """PQVAE or VQ-VAE with codebooks of one size: the rate decides the number of sub-vectors."""

    def at(rate: float, width: int) -> Fit | None:
        config = config_at(width, rate * width, codewords, **sizes)
        return config and (lambda train, seed: kind.fit(train, config, recipe=recipe, seed=seed))

    return at


def methods(recipe: Recipe, **sizes: Any) -> tuple[Method, ...]:
    """All contestants.

    Args:
        recipe: The training of those with a network.
        sizes: Of these networks, as in `PqvaeConfig`; by default those of `feature_networks.SMALL`.
    """
    pqvae, vqvae = (partial(network, kind, recipe=recipe, **sizes) for kind in (PqvaeQuantizer, VqvaeQuantizer))
    return (
        Method("SQ, shared levels", scalar(per_dimension=False)),
        Method("SQ, levels per dimension", scalar(per_dimension=True)),
        Method("SQ, learned levels", learned_scalar),
        *(Method(f"PQ, {size} codewords", product(ProductQuantizer, size)) for size in (16, 64, 256)),
        *(Method(f"OPQ, {size} codewords", product(RotatedProductQuantizer, size)) for size in (16, 64, 256)),
        Method("VQ-VAE, 16 codewords", vqvae(16)),
        *(Method(f"PQVAE, {size} codewords", pqvae(size)) for size in (4, 16, 64)),
    )


def select(contestants: Sequence[Method], wanted: Sequence[str] | None) -> list[Method]:
    """The contestants of these names, or families such as PQ (which is what stands before the comma); all for None.

    Raises:
        InputError: A name that there is not.
    """
    names = [{method.name, method.name.split(",")[0]} for method in contestants]
    for word in wanted or ():
        if not any(word in known for known in names):
            raise InputError(f"no method is called {word!r}: there are {'; '.join(m.name for m in contestants)}")
    return [method for method, known in zip(contestants, names) if wanted is None or known & set(wanted)]


def load(path: Path) -> np.ndarray:
    """Unit features float32 [b, w] of a .npy file.

    Raises:
        InputError: No such file, numbers that are not finite, or a feature of zeros.
        FormatError: Another format, or no matrix of real numbers.
    """
    features = check_features(read_array(path))
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if not lengths.all():
        raise InputError(f"row {int(np.argmin(lengths))} of {path} is all zeros and has no direction: leave it out")
    return features / lengths


def split(features: np.ndarray, train: int, shuffle: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The train and the test features.

    Raises:
        InputError: Nothing left to test, or fewer train features than neighbours are asked for.
    """
    if not NEIGHBOURS <= train < len(features):
        raise InputError(
            f"--train must be {NEIGHBOURS} to {len(features) - 1} of {len(features)} features, not {train}"
        )
    if shuffle:
        features = np.random.default_rng(seed).permutation(features)
    return features[:train], features[train:]


def ideal_bits(quantizer: FeatureQuantizer, train: np.ndarray, test: np.ndarray) -> float:
    """Mean bits a test feature of indices int [b, n] would take with a table per index counted on the train indices."""
    total = 0.0
    for size, seen, coded in zip(quantizer.table_sizes, train.T, test.T):
        counts = np.bincount(seen, minlength=size) + 1.0
        total -= np.log2(counts / counts.sum())[coded].sum()
    return total / len(test)


def measure(name: str, fit: Fit, train: np.ndarray, test: np.ndarray, seed: int) -> Row:
    """Fit a quantiser and see what its test features are still good for."""
    fitted: list[FeatureQuantizer] = []
    # A list of host data is what `seconds` does not look into.
    seconds = _timing.seconds(lambda: [fitted.append(fit(train, seed))])
    quantizer = fitted[0]
    indices = quantizer.indices(test)
    decoded = quantizer.features(indices)
    cosines = cosine(test, decoded)
    return Row(
        name=name,
        rate=quantizer.bits / test.shape[1],
        bits=quantizer.bits,
        ideal=ideal_bits(quantizer, quantizer.indices(train), indices) / test.shape[1],
        cosine=cosines["mean"],
        cosine_low=cosines["q05"],
        itself=accuracy(decoded, np.concatenate([test, train]), np.arange(len(test))),
        neighbours=neighbour_agreement(decoded, test, train, NEIGHBOURS),
        fit_seconds=seconds,
    )


def report(rate: float, rows: list[Row]) -> None:
    """Print the rows of one rate as a table."""
    header = (f"{rate:g} bits a dimension", "bits", "ideal", "cosine", "itself", "neighbours", "fit")
    lines = [
        (
            row.name,
            f"{row.rate:.3f}",
            f"{row.ideal:.3f}",
            f"{row.cosine:.4f} [{row.cosine_low:.4f}]",
            f"{100 * row.itself:.1f}%",
            f"{100 * row.neighbours:.1f}%",
            f"{row.fit_seconds:.1f} s",
        )
        for row in rows
    ]
    print()
    _timing.print_table(header, lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure every method at every rate that it can meet; with ``--json`` also write the figures to a file."""
    quick = f"only {QUICK_RATES[0]:g} bit a dimension and {QUICK_STEPS} steps, to see that it works"
    parser = _timing.parser(__doc__, quick)
    parser.add_argument("--features", metavar="FILE", type=Path, required=True, help=".npy file [count, width]")
    parser.add_argument("--train", metavar="N", type=_timing.positive, default=800, help="rows to fit on (800)")
    parser.add_argument("--shuffle", action="store_true", help="shuffle the rows before the split, by --seed")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle and of the quantisers (0)")
    parser.add_argument("--rates", type=float, nargs="+", metavar="R", help=f"bits a dimension {RATES}")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these, or families such as PQVAE")
    parser.add_argument("--steps", type=_timing.positive, help=f"of the training of a network ({Recipe().steps})")
    options = parser.parse_args(arguments)
    return _timing.run("bench_features", options, lambda: _measure(options))


def _measure(options: argparse.Namespace) -> dict:
    if options.seed < 0:
        raise InputError(f"--seed must be at least 0, not {options.seed}")
    rates = options.rates or (QUICK_RATES if options.quick else RATES)
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise InputError(f"--rates are bits a dimension above 0, not {rates}")
    steps = options.steps or (QUICK_STEPS if options.quick else Recipe().steps)
    contestants = select(methods(Recipe(steps=steps)), options.methods)
    train, test = split(load(options.features), options.train, options.shuffle, options.seed)
    print(f"{len(train)} features to fit on, {len(test)} to test, width {train.shape[1]}, seed {options.seed}")
    result = []
    for rate in rates:
        fits = [(method.name, method.at(rate, train.shape[1])) for method in contestants]
        rows = [measure(name, fit, train, test, options.seed) for name, fit in fits if fit]
        if rows:
            report(rate, rows)
        else:
            print(f"\nno method takes {rate:g} bits a dimension at width {train.shape[1]}")
        result += map(asdict, rows)
    split_record = {"train": len(train), "test": len(test), "shuffle": options.shuffle, "seed": options.seed}
    return {**split_record, "steps": steps, "width": train.shape[1], "neighbours": NEIGHBOURS, "rows": result}


if __name__ == "__main__":
    sys.exit(main())
