"""A CLIP of a few thousand random parameters that speaks the language of scenes, and its folder in transformers' layout."""

import dataclasses
import functools
import json

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxsem.backbones.clip import Clip, param_shapes
from jaxsem.backbones.clip_config import ClipConfig, TextConfig, VisionConfig
from jaxsem.data.words import WordTokenizer
from jaxsem.systems.clip_model import ClipModel
from jaxsem.weights.clip import to_transformers

SIZE, WIDTH = 16, 12


@functools.cache
def toy_clip() -> ClipModel:
    """The model, with weights under which every layer matters."""
    tokenizer = WordTokenizer()
    config = ClipConfig(
        VisionConfig(width=16, layers=2, heads=2, hidden=32, patch=4, image_size=SIZE),
        TextConfig(width=16, layers=2, heads=2, hidden=32, vocabulary=len(tokenizer), context=40),
        WIDTH,
    )
    module, random = Clip(config), np.random.RandomState(3)
    params = jax.tree.map(
        lambda shape: np.asarray(0.3 * random.standard_normal(shape.shape), np.float32), param_shapes(module)
    )
    return ClipModel("toy", module, params, tokenizer, ("a picture of a {}", "an image of a {}"), article=True)


def save_clip(folder) -> str:
    """Writes the model as transformers would, without a tokenizer."""
    model = toy_clip()
    vision, text = (dataclasses.asdict(tower) for tower in (model.module.config.vision, model.module.config.text))
    names = {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "hidden": "intermediate_size",
        "patch": "patch_size",
        "image_size": "image_size",
        "vocabulary": "vocab_size",
        "context": "max_position_embeddings",
    }
    towers = [{theirs: tower[ours] for ours, theirs in names.items() if ours in tower} for tower in (vision, text)]
    config = {"model_type": "clip", "projection_dim": WIDTH, "vision_config": towers[0], "text_config": towers[1]}
    config["text_config"]["eos_token_id"] = 2
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    state = to_transformers(model.module.config, model.params)
    state["logit_scale"] = state["logit_scale"].reshape(())
    save_file(state, folder / "model.safetensors")
    return str(folder)


def pictures(count, height=20, width=24, seed=0) -> list[np.ndarray]:
    """uint8 images [height, width, 3] that differ."""
    return list(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8))
