"""A whole pipeline of Stable Diffusion, loaded from the folder that diffusers wrote."""

import json

import diffusion_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.diffusion import classifier_free, sample
from jaxsem.errors import InputError, WeightsError
from jaxsem.systems.latent_diffusion import load_latent_diffusion, read_pipeline_config

TEXT, STEPS, SCALE = "a red star", 3, 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reference.write_pipeline(tmp_path_factory.mktemp("pipeline") / "sd")


def test_a_prompt_gives_the_latents_of_diffusers(folder):
    import transformers

    _, diffusers = reference.import_reference()
    pipeline = diffusers.StableDiffusionPipeline(
        vae=reference.model("vae"),
        unet=reference.model("sd1"),
        text_encoder=reference.text_encoder(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=diffusers.DDIMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = reference.some(1, 8, 8, 4)
    options = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent"}
    want = pipeline(TEXT, latents=reference.first(noise), height=32, width=32, **options).images

    ours = load_latent_diffusion(folder)
    denoise = lambda z, t, context: ours.unet.apply({"params": ours.params["unet"]}, z, t, context)  # noqa: E731
    guided = classifier_free(denoise, ours.text(TEXT), ours.text.null(), SCALE)
    reference.close(sample(guided, ours.schedule, jnp.asarray(noise), STEPS), want, 1e-4)


def test_parts_that_do_not_fit_together_are_refused(folder, tmp_path):
    reference.import_reference()
    other = tmp_path / "other"
    other.mkdir()
    for part in folder.iterdir():
        (other / part.name).symlink_to(part)
    (other / "unet").unlink()
    reference.model("sd2").save_pretrained(other / "unet")
    with pytest.raises(WeightsError, match="latents of 4 and 5 channels"):
        load_latent_diffusion(other)


def test_its_sizes_are_read_without_its_weights(folder, tmp_path):
    ours = load_latent_diffusion(folder)
    for path in folder.rglob("*config.json"):
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    found = read_pipeline_config(tmp_path)
    assert (found.autoencoder, found.unet) == (ours.autoencoder.config, ours.unet.config)
    assert (found.schedule, found.text) == (ours.schedule, ours.text.module.config)


def test_a_folder_without_a_part_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"scheduler_config\.json"):
        load_latent_diffusion(tmp_path)
    (tmp_path / "scheduler").mkdir()
    fields = {"_class_name": "DDIMScheduler", **reference.DDIM}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"no vae/config\.json"):
        load_latent_diffusion(tmp_path)


def test_computation_may_be_in_half_precision(folder):
    ours = load_latent_diffusion(folder, jnp.bfloat16, jnp.bfloat16)
    z = jnp.zeros((1, 8, 8, 4))
    found = ours.unet.apply({"params": ours.params["unet"]}, z, jnp.array([5]), ours.text(TEXT))
    assert {leaf.dtype for leaf in jax.tree.leaves(ours.params)} == {jnp.dtype(jnp.bfloat16)}
    assert np.isfinite(np.asarray(found, np.float32)).all()
