from pathlib import Path

import jax
import numpy as np
import pytest

import jaxsem
from jaxsem import presets, recipes
from jaxsem.errors import InputError
from jaxsem.training import sharding

pytestmark = pytest.mark.usefixtures("fast_compilation")

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RECIPES = sorted(path.name for path in EXPERIMENTS.glob("*.py") if not path.name.startswith("_"))


@pytest.mark.parametrize("name", RECIPES)
def test_the_quick_mode_trains_saves_and_loads(name, tmp_path, noise_photo, monkeypatch):
    if (
        name != "hyperprior.py"
    ):  # which runs on all devices; for a checkpoint there, Orbax compiles a slice of every array
        one = sharding.make_mesh(devices=jax.devices()[:1])
        monkeypatch.setattr(sharding, "make_mesh", lambda: one)
    path = recipes.run_recipe(EXPERIMENTS / name, tmp_path, quick=True, quiet=True)
    codec = presets.load(str(tmp_path))
    assert path == tmp_path / presets.WEIGHTS_NAME
    photo = noise_photo(64, 64)
    files = jaxsem.compress(codec, [photo])
    if isinstance(codec, jaxsem.FeatureCodec):
        assert np.isfinite(jaxsem.read_features(codec, files)).all()
        assert len(jaxsem.caption(codec, jaxsem.read_features(codec, files))) == 1
    else:
        assert jaxsem.decompress(codec, files)[0].shape == photo.shape


def test_quantisation_in_the_loop_goes_on_from_calibrated_weights(tmp_path):
    recipe, quick = recipes.read_recipe(EXPERIMENTS / "hyperprior.py")
    settings = recipes.override(recipe, quick)
    first = recipes.run_recipe(settings, tmp_path / "first", quiet=True)
    assert presets.load(str(first)).arithmetic == "exact"
    second = recipes.run_recipe(settings, tmp_path / "second", [f"init={first}", "exact=True"], quiet=True)
    assert presets.load(str(second)).arithmetic == "exact"
    assert presets.load(str(second)).digest != presets.load(str(first)).digest


def test_quantisation_in_the_loop_needs_calibrated_weights(tmp_path):
    overrides = [f"data={presets.BUNDLED_PHOTOS}", "exact=True"]
    with pytest.raises(InputError, match="exact=True needs init=WEIGHTS"):
        recipes.run_recipe(EXPERIMENTS / "hyperprior.py", tmp_path, overrides, quick=True, quiet=True)


def test_overrides_reach_inside_and_are_strict():
    recipe, _ = recipes.read_recipe(EXPERIMENTS / "elic_mini.py")
    values = recipes.parse_overrides(["steps=7", "optimizer.learning_rate=1e-2", "data=some folder", "config.hyper=32"])
    changed = recipes.override(recipe, values)
    assert (changed.steps, changed.optimizer.learning_rate, changed.data, changed.config.hyper) == (
        7,
        1e-2,
        "some folder",
        32,
    )
    with pytest.raises(InputError, match="did you mean 'steps'"):
        recipes.override(recipe, {"step": 3})
    with pytest.raises(InputError, match="cannot become 'many'"):
        recipes.override(recipe, {"steps": "many"})
    with pytest.raises(InputError, match="key=value"):
        recipes.parse_overrides(["steps"])


def test_a_recipe_without_data_says_how_to_give_it(tmp_path):
    with pytest.raises(InputError, match="--set data=FOLDER"):
        recipes.run_recipe(EXPERIMENTS / "elic_mini.py", tmp_path, quiet=True)


def test_a_missing_recipe_lists_those_there_are(tmp_path):
    with pytest.raises(InputError, match="no recipe file"):
        recipes.read_recipe(tmp_path / "none.py")
