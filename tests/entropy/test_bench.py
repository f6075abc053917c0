"""The benchmark command runs, checks what it times, and writes its figures."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    yield importlib.import_module("bench_entropy")
    sys.modules.pop("bench_entropy")


def test_quick_run_writes_both_cases(bench, tmp_path, capsys):
    assert bench.main(["--quick", "--json", str(tmp_path / "figures.json")]) == 0
    cases = json.loads((tmp_path / "figures.json").read_text())["cases"]
    assert cases["long"]["rows"][0]["name"] == "jaxsem compiled"
    assert 0 < cases["tiny"]["rows"][0]["overhead_percent"] < 1
    assert "device:" in capsys.readouterr().out


def test_a_coder_that_loses_symbols_stops_the_run(bench):
    broken = bench.Coder("broken", lambda: [b"x"], lambda streams: np.zeros(2), np.ones(2))
    with pytest.raises(SystemExit, match="broken does not decode"):
        bench.run([broken], 1, 1.0)


def test_overhead_on_a_long_stream_is_below_a_thousandth(bench):
    coders, ideal = bench.long_case(bench.LONG_SYMBOLS)
    assert 1 < len(coders[0].encode()[0]) / ideal < 1.001
