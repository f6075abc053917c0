import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from toy import CountedBatches, assert_trees_equal, init_params, loss_fn, make_batch, noisy_loss_fn

from jaxsem.errors import InputError
from jaxsem.training import DivergedError, LoopConfig, OptimizerConfig, load_best, make_mesh, place, split_params, train

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=2)


def loop(steps=12, **options):
    options = {"log_every": 4, "eval_every": 6, "checkpoint_every": 5, "ema_decay": 0.9, "quiet": True, **options}
    return LoopConfig(steps, **options)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class Interrupting(CountedBatches):
    """Sends this process a signal when batch `at` is asked for."""

    def __init__(self, at, number):
        super().__init__()
        self.at, self.number = at, number

    def __next__(self):
        if self.position + 1 == self.at:
            os.kill(os.getpid(), self.number)
        return super().__next__()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_resumed_is_bit_identical(tmp_path, number):
    # Noise from the state's key and data from the iterator's position: both must continue where they were.
    whole = train(noisy_loss_fn, init_params(), CountedBatches, OPTIMIZER, loop(), tmp_path / "whole", seed=5)
    arguments = (OPTIMIZER, loop(), tmp_path / "parts")
    part = train(noisy_loss_fn, init_params(), lambda: Interrupting(7, number), *arguments, seed=5)
    assert 3 < int(part.step) < 12
    again = train(noisy_loss_fn, init_params(seed=1), CountedBatches, *arguments, seed=5)
    assert int(again.step) == 12
    assert_trees_equal(again.params, whole.params)
    assert_trees_equal(again.ema_params, whole.ema_params)
    assert_trees_equal(again.opt_state, whole.opt_state)


def test_crash_resumes_from_the_last_checkpoint_bit_for_bit(tmp_path):
    class Crashing(CountedBatches):
        def __next__(self):
            if self.position == 8:
                raise OSError("the disk is gone")
            return super().__next__()

    whole = train(noisy_loss_fn, init_params(), CountedBatches, OPTIMIZER, loop(), tmp_path / "whole")
    with pytest.raises(OSError, match="the disk is gone"):
        train(noisy_loss_fn, init_params(), Crashing, OPTIMIZER, loop(), tmp_path / "parts")
    again = train(noisy_loss_fn, init_params(), CountedBatches, OPTIMIZER, loop(), tmp_path / "parts")
    assert_trees_equal(again.params, whole.params)
    steps = [row["step"] for row in rows(tmp_path / "parts")]
    assert steps == sorted(set(steps))  # rows after the checkpoint were dropped, not written twice
    assert steps[-1] == 12


def test_renewing_acts_on_the_parameters_and_resumes_bit_for_bit(tmp_path):
    def renew(params, batch, rng):
        noise = jax.random.normal(rng, ()) + 0 * jax.tree.leaves(batch)[0].sum()
        return jax.tree.map(lambda leaf: leaf + 0.1 * noise, params)

    options = {"renew_fn": renew}
    settings = OPTIMIZER, loop(renew_every=3)
    whole = train(noisy_loss_fn, init_params(), CountedBatches, *settings, tmp_path / "whole", **options)
    train(
        noisy_loss_fn, init_params(), lambda: Interrupting(8, signal.SIGINT), *settings, tmp_path / "parts", **options
    )
    again = train(noisy_loss_fn, init_params(), CountedBatches, *settings, tmp_path / "parts", **options)
    assert_trees_equal(again.params, whole.params)
    without = train(noisy_loss_fn, init_params(), CountedBatches, *settings, tmp_path / "without")
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(without.params), jax.tree.leaves(whole.params)))


def test_training_lowers_the_loss_on_a_mesh(tmp_path):
    train(loss_fn, init_params(), CountedBatches, OPTIMIZER, loop(40), tmp_path, mesh=make_mesh())
    found = rows(tmp_path)
    assert found[-1]["loss"] < 0.7 * found[0]["loss"]


def test_metrics_are_complete_json_lines(tmp_path):
    train(loss_fn, init_params(), CountedBatches, OPTIMIZER, loop(8, checkpoint_every=8), tmp_path)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [4, 8]
    for row in found:
        assert {"step", "time", "images_per_second", "lr", "loss", "mse", "grad_norm"} == row.keys()
        assert row["images_per_second"] > 0
    assert found[1]["lr"] < found[0]["lr"] <= OPTIMIZER.learning_rate
    assert found[1]["time"] > found[0]["time"]
    assert (tmp_path / "metrics.png").read_bytes()[:4] == b"\x89PNG"


def test_rows_hold_means_over_their_interval(tmp_path):
    def loss(params, batch, rng):
        return 0.0 * params["x"], {"first": batch["image"][0, 0, 0, 0].astype(jnp.float32)}

    train(loss, {"x": jnp.ones(())}, CountedBatches, OPTIMIZER, loop(8, checkpoint_every=8, ema_decay=None), tmp_path)
    firsts = [float(make_batch(i)["image"][0, 0, 0, 0]) for i in range(1, 9)]
    np.testing.assert_allclose([row["first"] for row in rows(tmp_path)], [np.mean(firsts[:4]), np.mean(firsts[4:])])


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    def loss(params, batch, rng):
        value, metrics = loss_fn(params, batch, rng)
        poison = jnp.where(jnp.any(batch["image"] != bad), 0.0, jnp.nan)
        return value + poison, metrics

    bad = make_batch(8)["image"]  # the batch of step 8; the state is checked at steps 10 and before each checkpoint
    arguments = (OPTIMIZER, loop(12, log_every=10, eval_every=100), tmp_path)
    with pytest.raises(DivergedError, match=r"diverged at step 8: loss is nan; the checkpoint of step 5 is kept"):
        train(loss, init_params(), CountedBatches, *arguments)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["5"]


def test_best_evaluation_is_kept(tmp_path):
    losses = iter([3.0, 1.0, 2.0])
    seen = []

    def evaluate(params):
        seen.append(jax.tree.map(np.array, params))
        return {"loss": next(losses), "psnr": 30.0}

    train(loss_fn, init_params(), CountedBatches, OPTIMIZER, loop(), tmp_path, eval_fn=evaluate, config={"width": 16})
    assert len(seen) == 2
    params, info = load_best(tmp_path)
    assert info == {"step": 12, "metric": "loss", "value": 1.0, "config": {"width": 16}}
    assert_trees_equal(params, seen[1])
    evaluations = [row for row in rows(tmp_path) if "eval/loss" in row]
    assert [(row["step"], row["eval/loss"], row["eval/psnr"]) for row in evaluations] == [
        (6, 3.0, 30.0),
        (12, 1.0, 30.0),
    ]


def test_worse_evaluation_leaves_the_best(tmp_path):
    losses = iter([1.0, 2.0])
    arguments = (OPTIMIZER, loop(), tmp_path)
    train(loss_fn, init_params(), CountedBatches, *arguments, eval_fn=lambda params: {"loss": next(losses)})
    assert load_best(tmp_path)[1]["step"] == 6


def test_frozen_parameters_reach_loss_and_evaluation(tmp_path):
    trainable, frozen = split_params(init_params(), ["encoder"])
    seen = []

    def evaluate(params):
        seen.append(sorted(params))
        return {"loss": float(loss_fn(params, make_batch(), None)[0])}

    arguments = (OPTIMIZER, loop(), tmp_path)
    state = train(loss_fn, trainable, CountedBatches, *arguments, eval_fn=evaluate, frozen=frozen, mesh=make_mesh())
    assert sorted(state.params) == ["decoder"]
    assert seen == [["decoder", "encoder"]] * 2


def test_frozen_parameters_stay_where_they_were_placed(tmp_path):
    mesh, (trainable, frozen) = make_mesh(4, 2), split_params(init_params(), ["encoder"])
    frozen = place(frozen, mesh, ((r"encoder/kernel$", P(None, "model")),))
    shapes = []

    def evaluate(params):
        kernel = params["encoder"]["kernel"]
        shapes.append(kernel.sharding.shard_shape(kernel.shape))
        return {"loss": 1.0}

    arguments = (OPTIMIZER, loop(3), tmp_path)
    train(loss_fn, trainable, CountedBatches, *arguments, eval_fn=evaluate, frozen=frozen, mesh=mesh)
    assert shapes == [(12, 8)]


def test_resume_with_another_config_names_the_difference(tmp_path):
    arguments = (loss_fn, init_params(), CountedBatches, OPTIMIZER, loop(5), tmp_path)
    train(*arguments, config={"width": 16, "sizes": (1, 2)})
    assert int(train(*arguments, config={"width": 16, "sizes": (1, 2)}).step) == 5
    with pytest.raises(InputError, match=r"width \(there 16, now 32\)"):
        train(*arguments, config={"width": 32, "sizes": (1, 2)})


def test_data_that_ends_early_is_an_error(tmp_path):
    with pytest.raises(InputError, match="ended after 3 steps"):
        train(loss_fn, init_params(), lambda: CountedBatches(end=3), OPTIMIZER, loop(), tmp_path)


def test_unknown_best_metric_lists_the_metrics(tmp_path):
    arguments = (OPTIMIZER, loop(best_metric="rate"), tmp_path)
    with pytest.raises(InputError, match=r"'rate' is not among .* loss, psnr"):
        train(loss_fn, init_params(), CountedBatches, *arguments, eval_fn=lambda params: {"loss": 1.0, "psnr": 2.0})


def test_progress_shows_rate_and_time_left(tmp_path, capfd):
    train(loss_fn, init_params(), CountedBatches, OPTIMIZER, loop(8, quiet=False), tmp_path)
    lines = capfd.readouterr().err.splitlines()
    first = next(line for line in lines if line.startswith("step 4/8"))
    assert "images/s" in first
    assert first.endswith("0:00:00 left")


def test_quiet_prints_nothing(tmp_path, capfd):
    train(loss_fn, init_params(), CountedBatches, OPTIMIZER, loop(8), tmp_path)
    assert capfd.readouterr() == ("", "")
