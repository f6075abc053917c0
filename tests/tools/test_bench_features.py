"""The comparison of feature quantisers takes in those with a network; the others are tested with the quantisers."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxsem.errors import InputError
from jaxsem.systems import feature_networks
from jaxsem.systems.feature_networks import Recipe

pytestmark = pytest.mark.slow  # runs whole commands

TOOLS = Path(__file__).resolve().parents[2] / "tools"
WIDTH = 25


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("bench_features")
    sys.path.remove(str(TOOLS))
    sys.modules.pop("bench_features", None)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "features.npy"
    np.save(path, np.random.default_rng(0).normal(size=(60, WIDTH)).astype(np.float32) + 0.5)
    return str(path)


@pytest.fixture
def tiny_networks(monkeypatch):
    for name, size in {"hidden": (6, 5), "residual": 3, "residual_layers": 1}.items():
        monkeypatch.setitem(feature_networks.SMALL, name, size)


def run(tool, features, path, *arguments):
    arguments = ["--features", features, "--train", 40, "--json", path, *arguments]
    status = tool.main([str(argument) for argument in arguments])
    return status, json.loads(path.read_text()) if path.exists() else None


def test_networks_take_part_in_the_quick_mode(tool, features, tmp_path, capsys, tiny_networks):
    status, record = run(
        tool, features, tmp_path / "r.json", "--quick", "--rates", 2, "--methods", "VQ-VAE", "PQVAE", "SQ"
    )
    assert status == 0
    assert record["steps"] == tool.QUICK_STEPS
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == [
        "SQ, shared levels",
        "SQ, levels per dimension",
        "SQ, learned levels",
        "PQVAE, 4 codewords",
    ]
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert name in printed
        assert row["bits"] == 50
        assert row["rate"] == 2
        assert 0 < row["cosine"] <= 1


def test_a_rate_that_is_met_from_below_says_its_own_bits(tool, features, tmp_path, capsys, tiny_networks):
    status, record = run(
        tool, features, tmp_path / "r.json", "--steps", 2, "--rates", 4.1, "--methods", "VQ-VAE", "PQVAE, 16 codewords"
    )
    assert status == 0
    assert record["steps"] == 2
    assert [(row["name"], row["bits"]) for row in record["rows"]] == [
        ("VQ-VAE, 16 codewords", 100),
        ("PQVAE, 16 codewords", 100),
    ]
    assert "4.1 bits a dimension" in capsys.readouterr().out


def test_methods_are_chosen_by_name_or_family(tool):
    contestants = tool.methods(Recipe())
    assert len({method.name for method in contestants}) == len(contestants)
    assert {method.name.split(",")[0] for method in tool.select(contestants, ["PQ"])} == {"PQ"}
    assert [m.name for m in tool.select(contestants, ["OPQ, 16 codewords"])] == ["OPQ, 16 codewords"]
    assert tool.select(contestants, None) == list(contestants)
    with pytest.raises(InputError, match="no method is called 'PQV': there are SQ, shared levels; "):
        tool.select(contestants, ["PQV"])


def test_sizes_reach_the_networks(tool, monkeypatch):
    seen = []
    monkeypatch.setattr(tool.PqvaeQuantizer, "fit", lambda train, config, **options: seen.append((config, options)))
    recipe = Recipe(steps=7)
    (method,) = tool.select(tool.methods(recipe, hidden=(9, 8)), ["PQVAE, 4 codewords"])
    method.at(2, WIDTH)(None, 5)
    ((config, options),) = seen
    assert config.hidden == (9, 8)
    assert options == {"recipe": recipe, "seed": 5}
