"""A tiny regression that stands in for a codec: parameters, loss and data for the tests of training."""

import jax
import jax.numpy as jnp
import numpy as np


def init_params(seed: int = 0) -> dict:
    a, b = jax.random.split(jax.random.key(seed))
    return {
        "encoder": {"kernel": jax.random.normal(a, (12, 16)) * 0.3, "bias": jnp.zeros(16)},
        "decoder": {"kernel": jax.random.normal(b, (16, 12)) * 0.3},
    }


def loss_fn(params, batch, rng):
    """An auto-encoder of flat 2x2 images; no random numbers, so that any split of the batch gives the same."""
    x = batch["image"].reshape(len(batch["image"]), -1).astype(jnp.float32) / 255
    hidden = jnp.tanh(x @ params["encoder"]["kernel"] + params["encoder"]["bias"])
    error = jnp.mean((hidden @ params["decoder"]["kernel"] - x) ** 2)
    return error, {"mse": error}


def noisy_loss_fn(params, batch, rng):
    """The same with noise in the hidden layer, as a codec has."""
    noise = jax.random.uniform(rng, (16,), minval=-0.5, maxval=0.5)
    encoder = {**params["encoder"], "bias": params["encoder"]["bias"] + noise}
    return loss_fn({**params, "encoder": encoder}, batch, rng)


def make_batch(seed: int = 0, size: int = 16) -> dict:
    return {"image": np.random.default_rng(seed).integers(0, 256, (size, 2, 2, 3), np.uint8)}


class CountedBatches:
    """Batch i drawn from seed i: the smallest iterator with a position."""

    def __init__(self, size: int = 16, end: int | None = None):
        self.position, self.size, self.end = 0, size, end

    def __next__(self):
        if self.position == self.end:
            raise StopIteration
        self.position += 1
        return make_batch(self.position, self.size)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def assert_trees_equal(a, b, atol: float | None = None):
    """Compares all leaves: bit for bit, or within an absolute tolerance."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    leaves = list(zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    assert leaves
    for x, y in leaves:
        x, y = np.asarray(x), np.asarray(y)
        if atol is None:
            np.testing.assert_array_equal(x, y)
        else:
            np.testing.assert_allclose(x, y, atol=atol, rtol=0)
