"""Training: one compiled step, the loop around it, optimisers, sharding and checkpoints.

A model brings `loss_fn(params, batch, rng) -> (loss, metrics)`, pure; everything here works for any such function.
"""

from jaxsem.training.checkpoint import Checkpoints, load_best
from jaxsem.training.loop import LoopConfig, train
from jaxsem.training.metrics import DivergedError
from jaxsem.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxsem.training.sharding import batch_sharding, make_mesh, tree_shardings
from jaxsem.training.state import TrainState, create_state, merge_params, place, split_params
from jaxsem.training.step import compile_step, pmap_step, replicate, step_fn, unreplicate

__all__ = [
    "Checkpoints",
    "DivergedError",
    "LoopConfig",
    "OptimizerConfig",
    "TrainState",
    "batch_sharding",
    "compile_step",
    "create_state",
    "load_best",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "merge_params",
    "place",
    "pmap_step",
    "replicate",
    "split_params",
    "step_fn",
    "train",
    "tree_shardings",
    "unreplicate",
]
