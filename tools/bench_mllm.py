"""Tokens a second that a LLaVA writes, and what share of the memory's bandwidth that takes.

    python tools/bench_mllm.py [--size mini] [--weights int8] [--batch 1 32] [--tokens 64] [--json FILE]

A Llama of a published size, or llava-mini's, with random weights. Each token of a text reads all weights once, whatever the
batch, so at batch 1 the memory's bandwidth is the bound: the table gives the bytes of the weights times the steps a second, beside
what a copy of a large array moves on the same device in the same run. Timed is `jaxsem.generation.greedy` on a prompt of
embeddings as long as an image and a question, less the time of its first token. A second prompt of other lengths must compile
nothing new.
"""

import argparse
import sys
from dataclasses import asdict
from typing import Any

import _timing
import jax
import jax.numpy as jnp
import numpy as np
from _timing import Spread

from jaxsem.backbones.llama import CONFIGS, Llama, LlamaConfig, param_shapes
from jaxsem.errors import InputError
from jaxsem.generation import FlaxModel, greedy
from jaxsem.preset_records import LLAVA_MINI

REPETITIONS = 5
_COPY = 1 << 28  # bytes of the array whose copying is timed


def sizes() -> dict[str, LlamaConfig]:
    """The models by name."""
    return {"mini": LLAVA_MINI.text, **CONFIGS}


def make_params(module: Llama) -> Any:
    """Random parameters of the module's types, made on the device."""
    keys = iter(jax.random.split(jax.random.key(0), 10_000))

    def leaf(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(shape.dtype, jnp.integer):
            return jax.random.randint(next(keys), shape.shape, -127, 128, jnp.int8).astype(shape.dtype)
        return (0.02 * jax.random.normal(next(keys), shape.shape, jnp.float32)).astype(shape.dtype)

    return jax.tree.map(leaf, param_shapes(module))


def bandwidth(repetitions: int) -> Spread:
    """Bytes a second that a copy reads and writes."""
    array = jnp.zeros(_COPY // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    _timing.seconds(lambda: copy(array))
    return Spread.of([2 * _COPY / _timing.seconds(lambda: copy(array)) for _ in range(repetitions)])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times everything and prints a table."""
    config = sizes()[options.size]
    prompt, tokens = (16, 8) if options.quick else (options.prompt, options.tokens)
    if tokens < 2 or prompt + tokens > config.context:
        raise InputError(
            f"a prompt of {prompt} and {tokens} tokens, at least 2, must fit the context of {config.context}"
        )
    dtype = jnp.bfloat16 if options.bfloat16 else jnp.float32
    module = Llama(config, dtype, dtype, weights=options.weights)
    params = make_params(module)
    # The table of embeddings is read a row at a time, unless it is the output layer too.
    table = params["token_embedding"].nbytes if "head" in params else 0
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - table
    repetitions = 2 if options.quick else REPETITIONS
    copied = bandwidth(repetitions)
    model, rows, found = FlaxModel(module), [], {}
    for batch in options.batch:
        rng = np.random.default_rng(0)
        embeddings = jnp.asarray(rng.normal(0, 0.02, (batch, prompt, config.width)), dtype)
        mask = np.ones((batch, prompt), bool)

        def run(count: int, mask: np.ndarray = mask, embeddings: jax.Array = embeddings) -> jax.Array:
            return greedy(model, params, embeddings, max_new_tokens=count, prompt_mask=mask).tokens

        for count in (1, tokens):
            _timing.seconds(lambda count=count: run(count))
        before = _compiled()
        shorter = np.arange(prompt) >= prompt // 2  # padded on the left
        run(tokens, np.broadcast_to(shorter, mask.shape))
        fresh = _compiled() - before
        steps = []
        for _ in range(repetitions):
            first, whole = _timing.seconds(lambda: run(1)), _timing.seconds(lambda: run(tokens))
            steps.append((whole - first) / (tokens - 1))
        step = Spread.of(steps)
        share = read / step.median / copied.median
        rows.append(
            [
                str(batch),
                Spread.of(1e3 * np.array(steps)).show(2),
                f"{batch / step.median:,.1f}",
                f"{read / step.median / 1e9:,.1f}",
                f"{100 * share:.0f} %",
                str(fresh),
            ]
        )
        found[str(batch)] = {
            "step": asdict(step),
            "tokens_per_second": batch / step.median,
            "bandwidth_share": share,
            "compiled": fresh,
        }
    print(f"{options.size}, weights {options.weights} of {read / 1e6:,.1f} MB, prompt of {prompt}, {tokens} tokens")
    print(f"a copy moves {copied.median / 1e9:,.1f} GB/s")
    _timing.print_table(["batch", "ms a step", "tokens/s", "GB/s of weights", "of a copy's", "compiled anew"], rows)
    return {"size": options.size, "weights": options.weights, "bytes": read, "copy": asdict(copied), "batches": found}


def _compiled() -> int:
    """Programs that generation has compiled."""
    from jaxsem import generation

    return generation._greedy._cache_size()


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = _timing.parser(__doc__, "a few tokens, repeated twice")
    parser.add_argument("--size", choices=tuple(sizes()), default="mini", help="of the model (%(default)s)")
    parser.add_argument("--weights", choices=("float", "int8"), default="float", help="how they are held (%(default)s)")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16, and hold floats so")
    parser.add_argument("--batch", type=_timing.positive, nargs="+", default=[1, 32], help="texts at once (1 32)")
    parser.add_argument("--prompt", type=_timing.positive, default=80, help="tokens before the text (%(default)s)")
    parser.add_argument("--tokens", type=_timing.positive, default=64, help="of the text (%(default)s)")
    options = parser.parse_args(arguments)
    return _timing.run("bench_mllm", options, lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
