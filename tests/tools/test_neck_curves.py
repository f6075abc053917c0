"""Scores over the rate, of a run of the neck's recipe: what is measured, and that nothing is measured twice."""

import importlib
import json
import sys
from pathlib import Path

import jax
import pytest

from jaxsem import recipes
from jaxsem.training import sharding, stages

pytestmark = pytest.mark.slow  # trains, and runs a whole command

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--scenes", "3", "--episodes", "3", "--qualities", "0")


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("neck_curves")
    sys.path.remove(str(ROOT / "tools"))
    for name in ("neck_curves", "rd_plot", "_timing"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def run(tiny_preset, tmp_path_factory):
    """The folder of a run of two steps a stage."""
    one = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        for module in (sharding, stages):
            patch.setattr(module, "make_mesh", lambda: one)
        settings = [f"codec={tiny_preset}"]
        path = recipes.run_recipe(
            ROOT / "experiments/transform_neck_mini.py", tmp_path_factory.mktemp("run"), settings, True, True
        )
    return path.parent


def test_every_way_is_measured_once(tool, run, tmp_path, monkeypatch):
    record, plot = tmp_path / "curves.json", tmp_path / "curves.png"
    command = [str(run), *SMALL, "--json", str(record), "--out", str(plot), "--also", f"again={run}"]
    assert tool.main(command) == 0
    rows = json.loads(record.read_text())["rows"]
    assert [row["path"] for row in rows] == ["reconstruction", "post-processing", "d1", "d2", "again"]
    assert all(row.keys() >= {"bpp", *tool.SCORES} for row in rows)
    assert {name: value for name, value in rows[2].items() if name != "path"} == {
        name: value for name, value in rows[4].items() if name != "path"
    }
    assert plot.stat().st_size > 10_000
    monkeypatch.setattr(tool, "measure", None)
    assert tool.main(command) == 0


def test_what_is_no_run_is_refused(tool, run, tmp_path, capsys):
    assert tool.main([str(tmp_path), *SMALL]) == 2
    assert "has no d1.safetensors" in capsys.readouterr().err
    record = tmp_path / "other.json"
    record.write_text(json.dumps({"setting": "other"}))
    assert tool.main([str(run), *SMALL, "--json", str(record)]) == 2
    assert "results of other settings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main([str(run), "--also", "nothing"])


def test_a_neck_goes_on_from_another(run, tiny_preset, tmp_path):
    recipe = ROOT / "experiments/transform_neck_mini.py"
    settings = [
        f"codec={tiny_preset}",
        f"init={run / 'd1.safetensors'}",
        "scenarios=()",
        "unet=None",
        "unet_stage=None",
    ]
    path = recipes.run_recipe(recipe, tmp_path / "more", settings, True, True)
    assert path.name == "d1.safetensors"
    with pytest.raises(recipes.InputError, match="has no neck of these sizes"):
        recipes.run_recipe(recipe, tmp_path / "other", [*settings, "blocks=1"], True, True)
