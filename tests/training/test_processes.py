"""Two real processes, each with its own simulated devices, train as one and agree with one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy import CountedBatches, init_params, loss_fn

from jaxsem.training import LoopConfig, OptimizerConfig, load_best, train

OPTIMIZER = OptimizerConfig(learning_rate=1e-2)
LOOP = LoopConfig(4, log_every=2, eval_every=4, checkpoint_every=2, quiet=True)

WORKER = """
import sys
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
port, index, workdir, here = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
sys.path.insert(0, here)
from toy import CountedBatches, init_params, loss_fn
from test_processes import LOOP, OPTIMIZER
from jaxsem.training import LoopConfig, make_mesh, train

class Share(CountedBatches):
    def __next__(self):
        return {"image": super().__next__()["image"][index::2]}

rules = ((r"encoder/kernel$", P(None, "model")),)
mesh = make_mesh(2, 2)
assert jax.process_count() == 2 and jax.device_count() == 4
calls = (loss_fn, init_params(), Share, OPTIMIZER)
options = dict(mesh=mesh, rules=rules, eval_fn=lambda params: {"loss": 1.0})
state = train(*calls, LOOP, workdir, **options)
state = train(*calls, LOOP, workdir, **options)  # once more: restores the finished run in both processes
assert int(state.step) == 4
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    here = Path(__file__).parent
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(here.parents[1])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, port, str(index), str(tmp_path / "pair"), str(here)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=100)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)

    train(
        loss_fn, init_params(), CountedBatches, OPTIMIZER, LOOP, tmp_path / "one", eval_fn=lambda params: {"loss": 1.0}
    )
    pair, one = load_best(tmp_path / "pair")[0], load_best(tmp_path / "one")[0]
    for module in one:
        for name in one[module]:
            np.testing.assert_allclose(pair[module][name], one[module][name], atol=1e-6)
    assert len((tmp_path / "pair" / "metrics.jsonl").read_text().splitlines()) == 3  # two rows and an evaluation
