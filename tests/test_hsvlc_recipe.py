"""The recipe for HSVLC on the latents of a published diffusion model."""

from pathlib import Path

import diffusion_reference
import jax
import numpy as np
import pytest
from PIL import Image

import jaxsem
from jaxsem import presets, recipes
from jaxsem.backbones.autoencoder_kl import SD_VAE, AutoencoderKl, param_shapes
from jaxsem.codecs.hsvlc import Hsvlc
from jaxsem.data.batching import training_batches
from jaxsem.errors import InputError
from jaxsem.hsvlc_recipe import MappedBatches, photo_loss
from jaxsem.systems.weight_map import Box

RECIPE = Path(__file__).parents[1] / "experiments" / "rsic.py"
# The small autoencoder of the tests halves twice, and that of Stable Diffusion three times.
FITTING = ["weight_map.stride=32", "codec.pixels=16", "crop=64", "clip="]


class Photos:
    """Twelve small photos, each of one grey."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"image": np.full((40, 40, 3), 20 * index, np.uint8)}


def stream():
    return MappedBatches(training_batches(Photos(), 4, 32, threads=1), cells=3, seed=1)


def joined(batches):
    """The first two batches in one."""
    parts = [next(batches) for _ in range(2)]
    batches.close()
    return {name: np.concatenate([part[name] for part in parts]) for name in ("image", "weight")}


def test_maps_go_on_where_they_were():
    first = stream()
    batches = [next(first) for _ in range(6)]
    first.close()
    weights = np.concatenate([batch["weight"] for batch in batches])
    assert weights.shape == (24, 3, 3)
    assert len(np.unique(weights, axis=0)) == 24
    again = stream()
    next(again)
    again.set_state({"batches": 4})
    assert again.get_state() == {"batches": 4}
    for batch in batches[4:]:
        found = next(again)
        for name in ("image", "weight"):
            np.testing.assert_array_equal(found[name], batch[name])
    again.close()


def test_a_map_belongs_to_its_image_on_any_number_of_processes(monkeypatch):
    whole = joined(stream())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    share = joined(stream())
    for name in ("image", "weight"):
        np.testing.assert_array_equal(share[name], whole[name][1::2])


def test_the_loss_at_full_size_can_be_computed_and_trains_the_codec_alone():
    recipe, quick = recipes.read_recipe(RECIPE)
    recipes.override(recipe, quick)  # which takes all of the short cuts
    c, cells, side = recipe.codec, recipe.crop // recipe.weight_map.stride, recipe.crop // SD_VAE.stride
    autoencoder, codec = AutoencoderKl(SD_VAE), Hsvlc(c)
    shape = jax.ShapeDtypeStruct
    rows = {
        "image": shape((recipe.stage.batch, recipe.crop, recipe.crop, 3), np.uint8),
        "weight": shape((recipe.stage.batch, cells, cells), np.float32),
    }
    z, weight = shape((1, side, side, c.latent), np.float32), shape((1, cells, cells), np.float32)
    net = jax.eval_shape(codec.init, jax.random.key(0), z, weight)["params"]
    frozen = {name: param_shapes(autoencoder)[name] for name in ("encoder", "quant")}

    def step(net, frozen, rows, rng):
        loss_of = photo_loss(autoencoder, codec)
        return jax.value_and_grad(lambda net: loss_of({"net": net, "autoencoder": frozen}, rows, rng), has_aux=True)(
            net
        )

    (loss, metrics), grads = jax.eval_shape(step, net, frozen, rows, jax.random.key(0))
    assert loss.shape == ()
    assert {"objective", "bpp", "mse"} <= metrics.keys()
    assert jax.tree.structure(grads) == jax.tree.structure(net)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="--set diffusion=FOLDER"):
        recipes.run_recipe(RECIPE, tmp_path / "run", quick=True, quiet=True)
    with pytest.raises(InputError, match="--set data=FOLDER"):
        recipes.run_recipe(RECIPE, tmp_path / "run", [f"diffusion={tmp_path}"], quiet=True)
    with pytest.raises(InputError, match="scheduler_config"):
        recipes.run_recipe(RECIPE, tmp_path / "run", [f"diffusion={tmp_path}"], quick=True, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("crop=500", "crop=500 must be a multiple of 128"),
        ("crop=0", "crop=0 must be a multiple"),
        ("codec.pixels=16", "codec.pixels=16"),
        ("weight_map.stride=60", "a cell of M is 60 pixels"),
        ("valid_crops=0", "valid_crops=0"),
        ("dtype=float16", "'float32' or 'bfloat16'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    recipe, _ = recipes.read_recipe(RECIPE)
    with pytest.raises(InputError, match=message):
        recipes.override(recipe, recipes.parse_overrides([change]))


@pytest.mark.slow
def test_the_quick_mode_trains_a_codec_of_a_folder_of_diffusers(tmp_path, noise_photo, one_device):
    folder = diffusion_reference.write_pipeline(tmp_path / "sd")
    (tmp_path / "photos").mkdir()
    for seed in range(8):
        Image.fromarray(noise_photo(80, 96, seed)).save(tmp_path / "photos" / f"{seed}.png")
    with pytest.raises(InputError, match="a cell of M is 64 pixels"):  # that of Stable Diffusion, and not this one
        recipes.run_recipe(RECIPE, tmp_path / "run", [f"diffusion={folder}"], quick=True, quiet=True)
    settings = [*FITTING, f"diffusion={folder}", f"data={tmp_path / 'photos'}", "dtype=bfloat16"]
    path = recipes.run_recipe(RECIPE, tmp_path / "run", settings, quick=True, quiet=True)

    codec = presets.load(str(path))
    assert codec.arithmetic == "exact"
    assert path.stat().st_size < sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 4
    photo = noise_photo(70, 64)
    demands = [jaxsem.Demand("a red star", regions=(Box(0, 0, 32, 32),))]
    files = jaxsem.compress(codec, [photo], demands=demands)
    assert jaxsem.decompress(codec.decoding(steps=1, recurrences=1), files)[0].shape == photo.shape
