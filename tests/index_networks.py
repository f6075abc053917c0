"""A small integer network of indices with random weights, for the tests of what uses one."""

import numpy as np

from jaxsem.entropy.index_network import IndexNetwork, powers_of_two


def random_network(sizes=(4, 3, 7, 2, 5, 4, 4, 6), hidden=5, seed=0) -> IndexNetwork:
    """Tables from nearly even to nearly certain."""
    rng, rows = np.random.default_rng(seed), sum(sizes)
    return IndexNetwork(
        sizes=np.array(sizes, np.uint16),
        hidden_weights=rng.integers(-3000, 3001, (rows, hidden)).astype(np.int16),
        hidden_bias=rng.integers(-1000, 1001, hidden).astype(np.int32),
        output_weights=rng.integers(-127, 128, (rows, hidden)).astype(np.int8),
        output_bias=rng.integers(-9000, 9001, rows).astype(np.int32),
        powers=powers_of_two(),
        shifts=np.array([5, 7], np.uint8),
    )


def random_rows(sizes, count, seed=0) -> np.ndarray:
    """Indices int64 [count, n], small ones more often."""
    drawn = np.random.default_rng(seed).random((count, len(sizes)))
    return (drawn**2 * np.array(sizes)).astype(np.int64)
