"""LLaVA's checkpoints: every layout gives the same parameters; configs are read strictly; what does not fit is said."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from llava_reference import POINTS, TEXT, VISION, reference
from safetensors.numpy import load_file, save_file

from jaxsem.backbones.llama import quantise_weights
from jaxsem.backbones.llava import Llava, param_shapes
from jaxsem.backbones.llava_config import CONFIGS, LLAVA_15_7B
from jaxsem.errors import InputError, WeightsError
from jaxsem.weights.llava import load_llava, parse_config, to_transformers

FIELDS = {
    "model_type": "llava_next",
    "vision_config": VISION,
    "text_config": TEXT,
    "image_token_index": 60,
    "image_grid_pinpoints": POINTS,
}
CONFIG = parse_config(FIELDS)

# As the published files have them, less what says nothing of the model.
_TOWER = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
_VICUNA = {
    "_name_or_path": "lmsys/vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "vocab_size": 32064,
}
_MISTRAL = {
    "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
    "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
_SHARED = {
    "ignore_index": -100,
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_config": _TOWER,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
_GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
PUBLISHED = {
    "llava-1.5-7b": {**_SHARED, "model_type": "llava", "text_config": _VICUNA},
    "llava-v1.6-mistral-7b": {
        **_SHARED,
        "model_type": "llava_next",
        "text_config": _MISTRAL,
        "image_grid_pinpoints": _GRID,
        "tie_word_embeddings": False,
        "use_image_newline_parameter": True,
    },
}


@pytest.fixture(scope="module")
def params():
    random = np.random.RandomState(0)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float32), param_shapes(Llava(CONFIG)))


@pytest.fixture(scope="module")
def state(params):
    return to_transformers(params, CONFIG)


def same(first, second):
    first, second = flatten_dict(first, sep="/"), flatten_dict(second, sep="/")
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def renamed(state, newer, tower):
    """The state dict in another layout: `newer` as transformers 5 has it in memory, `tower` with "vision_model."."""

    def name(key):
        if not tower:
            key = key.replace("vision_tower.vision_model.", "vision_tower.")
        if not newer:
            return key
        if key.startswith("language_model.lm_head."):
            return key.removeprefix("language_model.")
        return "model." + key.replace("language_model.model.", "language_model.")

    return {name(key): value for key, value in state.items()}


# -- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newer", [False, True], ids=["file", "memory"])
@pytest.mark.parametrize("tower", [True, False], ids=["vision_model", "bare"])
def test_every_layout_gives_the_same_parameters(params, state, newer, tower):
    same(load_llava(renamed(state, newer, tower), CONFIG)[1], params)


@pytest.mark.parametrize("newer", [False, True], ids=["file", "memory"])
def test_int8_weights_are_those_of_the_float_ones(params, state, newer):
    module, found = load_llava(renamed(state, newer, True), CONFIG, weights="int8")
    assert module == Llava(CONFIG, weights="int8")
    same(found, {**params, "language": quantise_weights(params["language"])})


def test_a_folder_loads_with_its_own_config(tmp_path, params, state):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    save_file({key: np.ascontiguousarray(value) for key, value in state.items()}, tmp_path / "model.safetensors")
    module, found = load_llava(tmp_path)
    assert module == Llava(CONFIG)
    same(found, params)


def test_parameters_come_in_the_type_asked_for(state):
    module, found = load_llava(state, CONFIG, jnp.bfloat16, jnp.bfloat16)
    assert module.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("kind", ["Llava", "LlavaNext"])
def test_a_folder_that_transformers_wrote_loads_and_back(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    net, config = reference(kind)
    net.save_pretrained(tmp_path / "theirs")
    module, found = load_llava(tmp_path / "theirs")
    assert module.config == config
    want = net.model.vision_tower.encoder.layers[1].mlp.fc1.weight.detach().numpy().T
    np.testing.assert_array_equal(found["vision"]["blocks"]["mlp"]["fc1"]["kernel"][1], want)
    np.testing.assert_array_equal(found["language"]["head"], net.lm_head.weight.detach().numpy())

    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "config.json").write_text((tmp_path / "theirs" / "config.json").read_text())
    save_file(to_transformers(found, config), ours / "model.safetensors", {"format": "pt"})
    read = getattr(transformers, f"{kind}ForConditionalGeneration").from_pretrained(ours)
    for key, value in net.state_dict().items():
        np.testing.assert_array_equal(read.state_dict()[key].numpy(), value.numpy(), err_msg=key)


def test_a_tied_output_layer_is_the_embedding_again(tmp_path, params):
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, tied=True))
    tied = {**params, "language": {key: value for key, value in params["language"].items() if key != "head"}}
    state = to_transformers(tied, config)
    save_file(state, tmp_path / "tied.safetensors")
    same(load_llava(load_file(tmp_path / "tied.safetensors"), config)[1], tied)
    state["language_model.lm_head.weight"] = state["language_model.lm_head.weight"] + 1
    with pytest.raises(
        WeightsError, match=r"language_model\.lm_head\.weight is not language_model\.model\.embed_tokens"
    ):
        load_llava(state, config)


def test_what_does_not_fit_is_listed(state):
    changed = dict(state)
    del changed["image_newline"]
    changed["multi_modal_projector.linear_3.weight"] = np.zeros((2, 2), np.float32)
    changed["vision_tower.text_model.final_layer_norm.weight"] = np.zeros(2, np.float32)
    with pytest.raises(WeightsError) as caught:
        load_llava(changed, CONFIG)
    message = str(caught.value)
    assert "1 missing, 2 surplus" in message
    for word in ("image_newline (32,)", "linear_3", "vision_tower.text_model.final_layer_norm.weight (2,)"):
        assert word in message


def test_a_file_does_not_say_its_sizes(state):
    with pytest.raises(InputError, match=r"give a config, or one of llava-1\.5-7b"):
        load_llava(state)


# -- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configs_of_published_models(name):
    assert parse_config(PUBLISHED[name]) == CONFIGS[name]


@pytest.mark.parametrize("kind", ["Llava", "LlavaNext"])
def test_absent_fields_have_the_defaults_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, f"{kind}Config")()
    found = parse_config({"model_type": theirs.model_type})
    assert found == parse_config(theirs.to_dict())
    assert found.vision == LLAVA_15_7B.vision


def test_ties_are_said_in_either_place():
    assert parse_config({**FIELDS, "tie_word_embeddings": True}).text.tied
    assert parse_config({**FIELDS, "text_config": {**TEXT, "tie_word_embeddings": True}}).text.tied
    assert not CONFIG.text.tied


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_onevision"}, "one of 'llava_onevision', not of 'llava' or 'llava_next'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}, and only None"),
        ({"use_image_newline_parameter": False}, "use_image_newline_parameter=False"),
        ({"vision_feature_layer": [-2, -5]}, r"feature_layer=\[-2, -5\]"),
        ({"vision_feature_select_strategy": "cls"}, "visual tokens by 'cls'; there are default, full"),
        ({"projector_hidden_act": "swish"}, "no activation 'swish'"),
        ({"multimodal_projector_bias": 1}, "projector_bias=1"),
        ({"image_token_index": None}, "image_token=None"),
        ({"image_grid_pinpoints": [336]}, r"image_grid_pinpoints are \[336\]"),
        ({"image_grid_pinpoints": [[30, 60]]}, r"squares of 28 do not fill \(30, 60\)"),
        ({"vision_config": "clip"}, "vision_config is a str, not an object"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "is a 'siglip_vision_model', and only"),
        ({"vision_config": {**VISION, "hidden_size": 0}}, "the file, vision_config: it has hidden_size=0"),
        ({"text_config": {"model_type": "qwen2"}}, "the file, text_config: the config is one of 'qwen2'"),
    ],
)
def test_configs_that_cannot_be_are_refused(change, message):
    with pytest.raises(WeightsError, match=message):
        parse_config({**FIELDS, **change}, "the file")
