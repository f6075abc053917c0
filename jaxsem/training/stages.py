"""Recipes of several trainings: stages, each with a folder of its own, left out where their result is there."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxsem.configs import plain
from jaxsem.errors import InputError
from jaxsem.training.checkpoint import load_best
from jaxsem.training.loop import LoopConfig, train
from jaxsem.training.optimizer import OptimizerConfig
from jaxsem.training.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training.

    Attributes:
      steps: Optimiser steps.
      batch: Examples a step.
      optimizer: Of the parameters.
      ema_decay: Of the moving average that is evaluated and kept; None for none.
      log_every: Steps between rows of metrics.
      eval_every: Steps between evaluations and checkpoints.
    """

    steps: int
    batch: int
    optimizer: OptimizerConfig
    ema_decay: float | None = 0.99
    log_every: int = 50
    eval_every: int = 500

    def loop(self, best_metric: str, quiet: bool) -> LoopConfig:
        """The loop's config."""
        return LoopConfig(
            self.steps, self.log_every, self.eval_every, self.eval_every, 1, self.ema_decay, best_metric, quiet=quiet
        )


def train_stage(
    stage: Stage,
    folder: Path,
    loss_fn: Callable,
    init: Callable[[], Any],
    make_batches: Callable[[], Any],
    eval_fn: Callable,
    best_metric: str,
    quiet: bool,
    seed: int,
    renew_fn: Callable | None = None,
    frozen: Any = None,
) -> Any:
    """The best parameters of a stage on the device, trained unless the folder has them; see `jaxsem.training.train`.

    Args:
      stage: Its settings.
      folder: Its own.
      loss_fn: The loss.
      init: Makes the first parameters.
      make_batches: Makes the batches.
      eval_fn: The evaluation.
      best_metric: The metric of it whose lowest value is the best.
      quiet: Whether to print nothing.
      seed: Of the steps' random numbers.
      renew_fn: What gradients cannot do.
      frozen: Parameters that are not trained, and that are not among those returned.

    Raises:
      InputError: The training was interrupted.
    """
    done = folder / "done"
    if not done.exists():
        state = train(
            loss_fn,
            init(),
            make_batches,
            stage.optimizer,
            stage.loop(best_metric, quiet),
            folder,
            eval_fn=eval_fn,
            renew_fn=renew_fn,
            mesh=make_mesh(),
            frozen=frozen,
            seed=seed,
        )
        if int(state.step) < stage.steps:
            raise InputError(f"stopped in {folder} at step {int(state.step)}: run the same command again to continue")
        done.touch()
    return jax.device_put(load_best(folder)[0])


def remember(recipe: Any, folder: Path) -> None:
    """Makes the folder of a run and notes its recipe there.

    Raises:
      InputError: The folder is that of another recipe, whose finished stages would not be trained again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, mine = folder / "recipe.json", plain(recipe)
    if path.exists() and (found := json.loads(path.read_text())) != mine:
        names = ", ".join(sorted(key for key in mine if found.get(key) != mine[key]))
        raise InputError(f"the run in {folder} was started with other settings of {names}; use another workdir")
    path.write_text(json.dumps(mine, indent=1))
