"""The benchmarks of necks, serial contexts and language models, in their quick modes."""

import importlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # runs whole commands

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module


def _run(module, tmp_path, *arguments) -> dict:
    path = tmp_path / "figures.json"
    assert module.main([*arguments, "--quick", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_the_neck_is_held_against_the_way_through_an_image(tool, tmp_path, capsys):
    record = _run(tool("bench_neck"), tmp_path, "--batch", "2")
    [found] = record["batches"].values()
    assert set(found) == {"ratio", "neck", "decode", "U-Net", "two layers"}
    assert found["ratio"]["median"] > 0
    assert "times as long as the neck" in capsys.readouterr().out


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_a_language_model_writes_without_compiling_anew(tool, tmp_path, weights):
    record = _run(tool("bench_mllm"), tmp_path, "--batch", "1", "2", "--weights", weights)
    assert [found["compiled"] for found in record["batches"].values()] == [0, 0]
    # Of so few tokens the times mean nothing, and their difference may be negative; what must be right is what was read.
    assert record["bytes"] > 500_000
    assert record["copy"]["median"] > 0


def test_a_text_that_does_not_fit_is_refused(tool, capsys):
    assert tool("bench_mllm").main(["--prompt", "500", "--tokens", "64"]) == 2
    assert "must fit the context of 512" in capsys.readouterr().err


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_a_serial_latent_is_coded_and_comes_back(tool, tmp_path, arithmetic):
    record = _run(tool("bench_serial"), tmp_path, "--size", "128x64", "--arithmetic", arithmetic)
    assert record["positions"] == [4, 8]
    assert record["encode"]["median"] > 0
    assert record["decode"]["median"] > 0


def test_a_size_with_padding_is_refused(tool, capsys):
    assert tool("bench_serial").main(["--size", "100x64"]) == 2
    assert "multiples of 64" in capsys.readouterr().err
