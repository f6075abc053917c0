"""The benchmark of the coders of indices."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # runs whole commands

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("bench_indices")
    sys.path.remove(str(TOOLS))


@pytest.fixture
def indices(tmp_path):
    """A file of 300 rows of 12 indices below 4, each mostly the one before it."""
    rng = np.random.default_rng(0)
    rows = np.zeros((300, 12), np.int64)
    rows[:, 0] = rng.integers(0, 4, 300)
    for i in range(1, 12):
        rows[:, i] = np.where(rng.random(300) < 0.9, rows[:, i - 1], rng.integers(0, 4, 300))
    path = tmp_path / "indices.npy"
    np.save(path, rows)
    return path


def test_quick_run_on_indices_compares_all_coders(bench, indices, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert bench.main(["--indices", str(indices), "--quick", "--hidden", "16", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert (figures["train"], figures["test"], figures["positions"], figures["codewords"]) == (240, 60, 12, 4)
    rows = {row["name"]: row for row in figures["rows"]}
    assert rows["fixed length"]["bits"] == rows["fixed length"]["ideal"] == 24
    assert rows[bench.PAPER]["saving"] == 0
    assert rows["rANS, learned prior"]["saving"] > 5
    for row in figures["rows"]:
        assert set(row["encode"]) == set(row["decode"]) == {"1", "64"}
        assert row["ideal"] > 0
        assert abs(row["bits"] - row["ideal"]) < 8
        assert row["overhead"] == pytest.approx(100 * (row["bits"] / row["ideal"] - 1))
        assert row["encode"]["64"]["median"] > row["encode"]["1"]["median"] > 0
        assert row["tables"] > 0
    assert "rANS, one per position" in capsys.readouterr().out


def test_features_are_quantised_first(bench, tmp_path, capsys):
    path = tmp_path / "features.npy"
    np.save(path, np.random.default_rng(0).normal(size=(60, 16)).astype(np.float32))
    options = ["--features", str(path), "--quick", "--subspaces", "4", "--codewords", "8", "--train", "40"]
    assert bench.main(options) == 0
    assert "features.npy, pq: 40 rows to fit on, 20 to code, 4 indices below 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "300"], "--train must be 2 to 299 of 300 rows, not 300"),
        (["--codewords", "3"], "is not below 3"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--indices", "nothing.npy"], "nothing.npy is not a .npy file"),
    ],
)
def test_mistakes_are_one_sentence(bench, indices, capsys, options, message):
    assert bench.main(["--indices", str(indices), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench_indices: ")
    assert message in error


def test_a_file_of_something_else_is_refused(bench, tmp_path, capsys):
    path = tmp_path / "floats.npy"
    np.save(path, np.zeros((3, 4)))
    assert bench.main(["--indices", str(path)]) == 2
    assert "does not hold one array of integers" in capsys.readouterr().err


def test_a_coder_that_loses_indices_stops_the_run(bench):
    class Broken(bench.FixedLength):
        def decode(self, data):
            return super().decode(data) * 0

    with pytest.raises(SystemExit, match="broken does not decode"):
        bench.measure({"broken": lambda: Broken(np.array([4, 4]))}, np.ones((3, 2), int), (1,), 1)
