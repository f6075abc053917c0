"""How fast a recipe trains: its compiled step by arithmetic type and batch size.

    python tools/bench_training.py [RECIPE] [--set KEY=VALUE ...] [--batch N ...] [--dtype float32 bfloat16] [--json FILE]

RECIPE is a file of `experiments/`, `elic_mini.py` by default. The step is the one that `jaxsem train` runs: loss,
gradient, optimiser and moving average, over all devices. Its batches are noise that already lies on the devices, so
reading and cropping photos is not in the figures, and the parameters are random, for speed depends on neither. After
two steps that are not counted, each measurement takes one step on a CPU, ten on an accelerator, where steps follow each
other without waiting, and ends when the last one's arrays are there.

GFLOP are those of loss and gradient as XLA counts them in the program as written, over all devices; a multiplication
and an addition are two. The optimiser's own are left out of the count, not of the time: XLA counts the body of a loop,
such as Muon's, only once. Compile times hold tracing and are those of an empty compilation cache, unless
JAX_COMPILATION_CACHE_DIR names one.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _timing
import jax
import jax.numpy as jnp
import numpy as np
from _timing import Spread

from jaxsem.codecs import build_module, init_params
from jaxsem.errors import InputError
from jaxsem.recipes import Recipe, override, parse_overrides, read_recipe, training_loss
from jaxsem.training import TrainState, batch_sharding, compile_step, create_state, make_mesh, make_optimizer
from jaxsem.training.step import LossFn

RECIPE = Path(__file__).resolve().parents[1] / "experiments" / "elic_mini.py"
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the result; `seconds` are those of a step."""

    dtype: str
    batch: int
    compile_seconds: float
    seconds: Spread
    images_per_second: Spread
    gflop: float
    gflop_per_second: Spread


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a mistake gives one sentence and the exit status 2."""
    parser = _timing.parser(__doc__, "the recipe's quick mode, one batch size and two repetitions")
    add = parser.add_argument
    add("recipe", nargs="?", default=RECIPE, metavar="RECIPE", help="a recipe file (default: experiments/elic_mini.py)")
    setting = "change a setting of the recipe; may be repeated"
    add("--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides", help=setting)
    add("--batch", type=_timing.positive, nargs="+", metavar="N", help="default: the recipe's, two and four times it")
    add("--dtype", choices=DTYPES, nargs="+", default=DTYPES, help="of the arithmetic (default: both)")
    add("--repeats", type=_timing.positive, metavar="K", help="repetitions that count (default: 11; 2 with --quick)")
    options = parser.parse_args(arguments)
    return _timing.run("bench_training", options, lambda: _measure(options))


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    known, shortcuts = read_recipe(options.recipe)
    recipe = override(override(known, shortcuts if options.quick else {}), parse_overrides(options.overrides))
    repeats = options.repeats or (2 if options.quick else 11)
    batches = options.batch or [recipe.batch * factor for factor in ((1,) if options.quick else (1, 2, 4))]
    devices = jax.device_count()
    for batch in batches:
        if batch % devices:
            raise InputError(f"a batch of {batch} cannot be split evenly over {devices} devices")
    print(f"recipe: {recipe.name}, crops of {recipe.crop}x{recipe.crop}, {devices} devices of {jax.default_backend()}")
    params, rows = init_params(_module(recipe), recipe.seed), []
    for dtype in options.dtype:
        for batch in batches:
            rows.append(measure_step(dataclasses.replace(recipe, dtype=dtype, batch=batch), params, repeats))
            print(f"  {dtype}, batch {batch}: {rows[-1].seconds.median:.3g} s a step", file=sys.stderr)
    print_rows(rows)
    figures = {"recipe": recipe.name, "crop": recipe.crop, "devices": devices, "repeats": repeats}
    return {**figures, "rows": [dataclasses.asdict(row) for row in rows]}


def measure_step(recipe: Recipe, params: Any, repeats: int) -> Row:
    """Compiles and times the step of a recipe, at its batch size and arithmetic type.

    Args:
        recipe: What to train.
        params: First parameters; they are copied.
        repeats: Measurements that count.

    Raises:
        SystemExit: A step was not finite: its speed would mean nothing.
    """
    loss_fn = training_loss(_module(recipe), recipe.weight)
    step, state, batch = build_step(recipe, loss_fn, params)
    begin = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - begin
    steps = 1 if jax.default_backend() == "cpu" else 10
    for _ in range(2):
        state, metrics = jax.block_until_ready(compiled(state, batch))
    times = np.zeros(repeats)
    for i in range(repeats):
        begin = time.perf_counter()
        for _ in range(steps):
            state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        times[i] = (time.perf_counter() - begin) / steps
    if not metrics["finite"]:
        raise SystemExit(f"{recipe.name} diverged within {2 + steps * repeats} steps: try another learning rate.")
    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True)).lower(params, batch, state.rng)
    gflop = gradient.cost_analysis()["flops"] / 1e9
    rates = Spread.of(recipe.batch / times), gflop, Spread.of(gflop / times)
    return Row(recipe.dtype, recipe.batch, compile_seconds, Spread.of(times), *rates)


def build_step(recipe: Recipe, loss_fn: LossFn, params: Any) -> tuple[Callable, TrainState, dict[str, jax.Array]]:
    """The step of a recipe as `jaxsem.recipes.run_recipe` makes it, ready to lower; its first state, and a batch."""
    mesh, average = make_mesh(), recipe.ema_decay is not None
    optimizer = make_optimizer(recipe.optimizer, recipe.steps)
    step = compile_step(loss_fn, optimizer, mesh, ema_decay=recipe.ema_decay)
    state = create_state(params, optimizer, jax.random.key(recipe.seed), ema=average, mesh=mesh)
    shape = (recipe.batch, recipe.crop, recipe.crop, 3)
    image = np.random.default_rng(recipe.seed).integers(0, 256, shape, np.uint8)
    # The outer jit is there to be lowered and compiled by name; the step within it is the same.
    return jax.jit(step, donate_argnums=0), state, {"image": jax.device_put(image, batch_sharding(mesh))}


def _module(recipe: Recipe) -> Any:
    return build_module(recipe.system, dataclasses.asdict(recipe.config), jnp.dtype(recipe.dtype))


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table."""
    print("\na training step: median [quartiles]")
    header = ("arithmetic", "batch", "compile s", "steps/s", "images/s", "GFLOP a step", "GFLOP/s")
    cells = [
        (
            row.dtype,
            str(row.batch),
            f"{row.compile_seconds:.1f}",
            f"{1 / row.seconds.median:.2f}",
            row.images_per_second.show(1),
            f"{row.gflop:.1f}",
            row.gflop_per_second.show(1),
        )
        for row in rows
    ]
    _timing.print_table(header, cells)


if __name__ == "__main__":
    sys.exit(main())
