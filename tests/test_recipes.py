import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxsem
from jaxsem import presets, recipes
from jaxsem.codecs import Elic, build_module, param_shapes
from jaxsem.errors import InputError

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RECIPES = sorted(path.name for path in EXPERIMENTS.glob("*.py") if not path.name.startswith("_"))
# Of the kind of elic_mini.py, which is run: of these it is seen that their loss can be computed at full size.
SAME = ("elic.py", "elic_scenes.py", "tic_scenes.py")
# Needs a pipeline of Stable Diffusion, which test_hsvlc_recipe.py has.
ELSEWHERE = ("rsic.py",)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(RECIPES) - {*SAME, *ELSEWHERE, "hyperprior.py"}))
def test_the_quick_mode_trains_saves_and_loads(name, tmp_path, noise_photo, one_device, tiny_preset):
    tiny = [f"codec={tiny_preset}"] if name == "transform_neck_mini.py" else []
    _train_and_use(name, tmp_path, noise_photo(64, 64), tiny)


def test_the_quick_mode_works_on_all_devices(tmp_path, noise_photo):
    _train_and_use("hyperprior.py", tmp_path, noise_photo(64, 64))


def _train_and_use(name, folder, photo, overrides=()):
    path = recipes.run_recipe(EXPERIMENTS / name, folder, overrides, quick=True, quiet=True)
    assert path.parent == folder
    if name == "llava_mini.py":
        assert len(presets.load_mllm(path).answer([photo], ["Describe the image."], max_new_tokens=3)) == 1
        return
    codec = presets.load(str(path))
    if name == "rsic_mini.py":
        files = jaxsem.compress(codec, [photo], demands=[jaxsem.Demand("a red star", level=1.0)])
        assert jaxsem.decompress(codec.decoding(steps=1, recurrences=1), files)[0].shape == photo.shape
        return
    files = jaxsem.compress(codec, [photo])
    if isinstance(codec, jaxsem.FeatureCodec):
        assert np.isfinite(jaxsem.read_features(codec, files)).all()
        assert len(jaxsem.caption(codec, jaxsem.read_features(codec, files))) == 1
    else:
        assert jaxsem.decompress(codec, files)[0].shape == photo.shape


@pytest.mark.parametrize("name", sorted(SAME))
def test_the_loss_of_a_full_size_recipe_can_be_computed(name):
    recipe, quick = recipes.read_recipe(EXPERIMENTS / name)
    recipes.override(recipe, quick)  # which takes all of the short cuts
    module = build_module(recipe.system, dataclasses.asdict(recipe.config))
    image = jax.ShapeDtypeStruct((recipe.batch, recipe.crop, recipe.crop, 3), np.uint8)
    loss_fn = recipes.training_loss(module, recipe.weight)
    loss, metrics = jax.eval_shape(loss_fn, param_shapes(module), {"image": image}, jax.random.key(0))
    assert loss.shape == ()
    assert {"bpp", "psnr"} <= metrics.keys()


@pytest.mark.slow
def test_quantisation_in_the_loop_goes_on_from_calibrated_weights(tmp_path, one_device):
    recipe, quick = recipes.read_recipe(EXPERIMENTS / "hyperprior.py")
    settings = recipes.override(recipe, quick)
    first = recipes.run_recipe(settings, tmp_path / "first", quiet=True)
    assert presets.load(str(first)).arithmetic == "exact"
    second = recipes.run_recipe(settings, tmp_path / "second", [f"init={first}", "exact=True"], quiet=True)
    assert presets.load(str(second)).arithmetic == "exact"
    assert presets.load(str(second)).digest != presets.load(str(first)).digest


def test_a_training_goes_on_at_other_rates_but_not_with_another_config(tiny_codec, tiny_preset):
    recipe, _ = recipes.read_recipe(EXPERIMENTS / "elic_mini.py")
    settings = dataclasses.replace(recipe, init=tiny_preset)
    config = tiny_codec.module.config
    lower = Elic(dataclasses.replace(config, lambdas=(0.0001, 0.001)))
    assert recipes._first_codec(lower, settings).digest == tiny_codec.digest
    for changes in ({"lambdas": (0.0001, 0.001, 0.01)}, {"hyper": 16}):
        with pytest.raises(InputError, match="of another config"):
            recipes._first_codec(Elic(dataclasses.replace(config, **changes)), settings)


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
