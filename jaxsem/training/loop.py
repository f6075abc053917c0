"""The training loop: steps, logs, evaluations and checkpoints, interrupted and resumed without losing a bit.

A run lives in one folder:

    checkpoints/       the newest states, to resume from
    best.safetensors   the parameters with the lowest evaluation so far, to choose and ship
    metrics.jsonl      one JSON object a line: step, time, images_per_second, lr and the means of the metrics;
                       evaluations as rows with names like `eval/loss`
    metrics.png        the same, drawn
"""

import dataclasses
import json
import math
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxsem.data.batching import DevicePrefetch
from jaxsem.errors import InputError
from jaxsem.training.checkpoint import Checkpoints, load_best, save_best
from jaxsem.training.metrics import DivergedError, MetricLog, plot_rows, read_rows, show_progress
from jaxsem.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxsem.training.sharding import Rules, batch_sharding
from jaxsem.training.state import TrainState, create_state, merge_params, place
from jaxsem.training.step import LossFn, compile_step

EvalFn = Callable[[Any], dict[str, float]]
RenewFn = Callable[[Any, Any, jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train and how often to do what; all intervals in steps.

    Attributes:
        steps: Steps of the whole run, those before a resume included.
        log_every: Interval of rows in `metrics.jsonl`; only here does the loop wait for the device.
        eval_every: Interval of evaluations; there is one at the end in any case.
        checkpoint_every: Interval of checkpoints; there is one at the end and at an interruption in any case.
        keep: How many checkpoints to keep.
        ema_decay: Decay of the moving average of the parameters, or None for no average.
        best_metric: The evaluation metric whose lowest value chooses `best.safetensors`.
        renew_every: Interval of calls of `renew_fn`, where there is one.
        quiet: Whether to print nothing.
    """

    steps: int
    log_every: int = 100
    eval_every: int = 1000
    checkpoint_every: int = 1000
    keep: int = 3
    ema_decay: float | None = None
    best_metric: str = "loss"
    renew_every: int = 100
    quiet: bool = False

    def __post_init__(self) -> None:
        """Refuses intervals below 1 and decays outside (0, 1).

        Raises:
            InputError: Names the field and its value.
        """
        for field in ("steps", "log_every", "eval_every", "checkpoint_every", "keep", "renew_every"):
            if getattr(self, field) < 1:
                raise InputError(f"{field}={getattr(self, field)} must be at least 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError(f"ema_decay={self.ema_decay} must lie between 0 and 1, or be None")


def train(
    loss_fn: LossFn,
    init_params: Any,
    make_batches: Callable[[], Any],
    optimizer: OptimizerConfig,
    loop: LoopConfig,
    workdir: str | Path,
    *,
    eval_fn: EvalFn | None = None,
    renew_fn: RenewFn | None = None,
    mesh: Mesh | None = None,
    rules: Rules = (),
    frozen: Any = None,
    seed: int = 0,
    config: dict | None = None,
) -> TrainState:
    """Trains until `loop.steps`, going on from the newest checkpoint in `workdir` if there is one.

    SIGINT and SIGTERM end the step under way, save a checkpoint and return; a second SIGINT stops at once. Called again
    with the same arguments it continues, and reaches the same parameters bit for bit as a run that was not stopped.

    Args:
        loss_fn: loss_fn(params, batch, rng) -> (loss, metrics), pure; see `jaxsem.training.step`.
        init_params: The trainable parameters to start from; they are copied.
        make_batches: Gives an iterator over batches with `get_state()` and `set_state(state)` (JSON), such as
            `jaxsem.data.batching.Batches`; in each process it yields that process' share of every batch.
        optimizer: The optimiser's config.
        loop: How long, and how often to do what.
        workdir: The folder of the run (see the module's docstring).
        eval_fn: eval_fn(params) -> metrics as floats, called with the moving average where there is one.
        renew_fn: renew_fn(params, batch, rng) -> params, pure: what gradients cannot do, such as moving dead codewords; called
            with the trainable parameters after every `loop.renew_every` steps. The optimiser's state and the moving average
            stay as they are.
        mesh: A mesh of `make_mesh`, or None for one device.
        rules: Partition rules for the parameters.
        frozen: Parameters that are not trained; loss_fn and eval_fn see them merged with the others. What `place` has
            put on the mesh stays there, anything else is replicated.
        seed: Seed of the step's random numbers.
        config: What defines the run, as JSON; a resume with another config is refused.

    Returns:
        The last state; `state.step` is below `loop.steps` if the run was interrupted.

    Raises:
        InputError: For a config that differs from the one in `workdir`, or data that ends early.
        DivergedError: At the first step with an infinite or undefined loss, gradient or update.
    """
    workdir, config = Path(workdir), json.loads(json.dumps(config or {}))  # tuples become lists, as they come back
    workdir.mkdir(parents=True, exist_ok=True)
    transform = make_optimizer(optimizer, loop.steps)
    frozen = _place_frozen(frozen, mesh)
    step = compile_step(loss_fn, transform, mesh, ema_decay=loop.ema_decay, rules=rules, frozen=frozen)
    rng = jax.random.key(seed)
    state = create_state(init_params, transform, rng, ema=loop.ema_decay is not None, mesh=mesh, rules=rules)
    batches = make_batches()
    with Checkpoints(workdir / "checkpoints", loop.keep) as checkpoints:
        state = _resume(state, batches, checkpoints, config)
        run = _Run(
            loop, workdir, checkpoints, make_schedule(optimizer, loop.steps), eval_fn, frozen, config, int(state.step)
        )
        sharding = None if mesh is None else batch_sharding(mesh)
        with DevicePrefetch(batches, sharding) as feed, _StopSignal() as stop:
            return _loop(step, renew_fn and jax.jit(renew_fn), state, feed, run, stop)


def _loop(step, renew, state: TrainState, feed: DevicePrefetch, run: "_Run", stop: "_StopSignal") -> TrainState:
    loop, position = run.loop, None
    for index in range(run.first_step, loop.steps):
        batch, position = _next(feed, index)
        run.batch_size = jax.tree.leaves(batch)[0].shape[0]
        state, metrics = step(state, batch)
        done = index + 1
        if renew is not None and done % loop.renew_every == 0:
            state = state.replace(params=renew(state.params, batch, jax.random.fold_in(state.rng, state.step)))
        run.log.add(done, metrics)
        if index == run.first_step:
            jax.block_until_ready(metrics)  # the first step compiles; the clock starts after it
            run.log.start_clock()
        last = done == loop.steps
        stopping = not last and stop.agreed(done % loop.log_every == 0)
        evaluating = run.eval_fn is not None and (last or done % loop.eval_every == 0)
        saving = last or stopping or done % loop.checkpoint_every == 0
        if done % loop.log_every == 0 or evaluating or saving:
            run.flush(done)  # before anything is saved: it raises if the state is not finite
        if evaluating and not stopping:
            run.evaluate(done, state)
        if saving:
            run.checkpoints.save(state, position, run.config)
        if evaluating or saving:
            run.log.start_clock()
        if stopping:
            run.say(f"stopped at step {done} of {loop.steps}, checkpoint saved: run the same command again to continue")
            break
    run.plot()
    return state


@dataclasses.dataclass
class _Run:
    """What the loop needs besides the state: where results go, and how they are made."""

    loop: LoopConfig
    workdir: Path
    checkpoints: Checkpoints
    schedule: Callable[[int], Any]
    eval_fn: EvalFn | None
    frozen: Any
    config: dict
    first_step: int
    batch_size: int = 0

    def __post_init__(self) -> None:
        self.log = MetricLog(self.workdir / "metrics.jsonl", self.first_step)
        self.lowest = math.inf
        if (self.workdir / "best.safetensors").exists() and self.first_step:
            self.lowest = load_best(self.workdir)[1]["value"]

    def say(self, text: str) -> None:
        if not self.loop.quiet and jax.process_index() == 0:
            print(text, file=sys.stderr)

    def flush(self, done: int) -> None:
        try:
            row = self.log.flush(self.batch_size, float(self.schedule(done - 1)))
        except DivergedError as error:
            kept = self.checkpoints.latest()
            kept = f"the checkpoint of step {kept} is kept" if kept else "no checkpoint was saved before"
            raise DivergedError(
                f"{error}; {kept}; try a lower learning rate, a longer warm-up or a lower clip_norm"
            ) from None
        if row and not self.loop.quiet and jax.process_index() == 0:
            show_progress(row, self.loop.steps, self.log.seconds_left(self.loop.steps - done))

    def evaluate(self, done: int, state: TrainState) -> None:
        metrics = {name: float(x) for name, x in self.eval_fn(merge_params(state.eval_params, self.frozen)).items()}
        name = self.loop.best_metric
        if name not in metrics:
            raise InputError(f"best_metric={name!r} is not among the evaluation metrics {', '.join(sorted(metrics))}")
        self.log.write({"step": done, **{f"eval/{key}": value for key, value in metrics.items()}})
        self.say(f"evaluation at step {done}: " + "  ".join(f"{key} {value:.5g}" for key, value in metrics.items()))
        if metrics[name] < self.lowest:
            self.lowest = metrics[name]
            info = {"step": done, "metric": name, "value": self.lowest, "config": self.config}
            save_best(self.workdir / "best.safetensors", state.eval_params, info)
        self.plot()

    def plot(self) -> None:
        if jax.process_index() == 0:
            plot_rows(read_rows(self.workdir / "metrics.jsonl"), self.workdir / "metrics.png")


def _place_frozen(frozen: Any, mesh: Mesh | None) -> Any:
    if frozen is None or mesh is None:
        return jax.device_put(frozen)
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(frozen)]
    placed = all(isinstance(sharding, NamedSharding) and sharding.mesh == mesh for sharding in shardings)
    return frozen if placed else place(frozen, mesh)


def _resume(state: TrainState, batches: Any, checkpoints: Checkpoints, config: dict) -> TrainState:
    latest = checkpoints.latest()
    if latest is None:
        return state
    saved = checkpoints.config(latest)
    differing = sorted(key for key in saved.keys() | config.keys() if saved.get(key) != config.get(key))
    if differing:
        shown = ", ".join(f"{key} (there {saved.get(key)!r}, now {config.get(key)!r})" for key in differing)
        raise InputError(
            f"the run in {checkpoints.folder.parent} was started with other settings: {shown}; use another workdir"
        )
    state, position = checkpoints.restore(state, latest)
    batches.set_state(position)
    return state


def _next(feed: DevicePrefetch, index: int) -> tuple[Any, Any]:
    try:
        return next(feed)
    except StopIteration:
        raise InputError(f"the data ended after {index} steps: repeat it, or train fewer steps") from None


class _StopSignal:
    """Notes SIGINT and SIGTERM while the loop runs, instead of breaking into the middle of a step."""

    def __init__(self):
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignal":
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def agreed(self, may_ask: bool) -> bool:
        """Whether to stop now: all processes of a run must answer alike, so with several they ask at log steps only."""
        if jax.process_count() == 1:
            return self.requested
        if not may_ask:
            return False
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.asarray(self.requested))))
