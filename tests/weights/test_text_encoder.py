"""Text encoders of diffusers' folders: parity with transformers' CLIPTextModel, both layouts, what is passed over and refused."""

import dataclasses
import json
import math

import clip_reference as reference
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from jaxsem.backbones.clip import Clip, TextConfig, TextTower, param_shapes
from jaxsem.backbones.clip_config import VIT_H14, VIT_L14
from jaxsem.errors import InputError, WeightsError
from jaxsem.weights.clip import config_from_transformers
from jaxsem.weights.text_encoder import load_text_tower

# As their config.json says; the rest are transformers' defaults.
SD1 = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
SD2 = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
SD2 |= {"hidden_act": "gelu", "projection_dim": 512}
PUBLISHED = {
    "sd1": (SD1, VIT_L14.text, 123_060_480),
    "sd2": (SD2, dataclasses.replace(VIT_H14.text, layers=23), 340_387_840),
}


def encoder(activation="quick_gelu", kind="CLIPTextModel"):
    """A text model of transformers with lively weights, 77 tokens and 99 ids."""
    _, transformers = reference.import_reference()
    fields = {**reference.TEXT, "max_position_embeddings": 77, "hidden_act": activation}
    return reference.lively(getattr(transformers, kind)(transformers.CLIPTextConfig(**fields)))


def texts():
    return np.random.RandomState(4).randint(0, 99, (3, 77)).astype(np.int32)


def states(net, ids):
    """The last hidden state, as diffusers takes it from the model."""
    torch, _ = reference.import_reference()
    with torch.no_grad():
        return net(torch.from_numpy(ids).long()).last_hidden_state.numpy()


def same(first, second):
    first, second = flatten_dict(first, sep="/"), flatten_dict(second, sep="/")
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline's folder with a text encoder alone; not to be changed."""
    path = tmp_path_factory.mktemp("pipeline")
    encoder().save_pretrained(path / "text_encoder")
    return path


@pytest.fixture(scope="module")
def params(folder):
    return load_text_tower(folder)[1]


def write(folder, state, name="model.safetensors", **fields):
    """A text encoder's folder with these weights, its config with other fields."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config_fields(), **fields}))
    save_file({key: np.ascontiguousarray(value) for key, value in state.items()}, folder / name)
    return folder


def config_fields():
    """Without the name of the class, as some older files are."""
    return {"model_type": "clip_text_model", **reference.TEXT, "max_position_embeddings": 77}


def bare(state):
    """Under the names without the tower's."""
    return {key.removeprefix("text_model."): value for key, value in state.items()}


# -- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_states_are_those_of_transformers(tmp_path, activation):
    net = encoder(activation)
    net.save_pretrained(tmp_path / "text_encoder")
    module, params = load_text_tower(tmp_path)
    assert module.config.activation == activation
    want = states(net, texts())
    assert want.shape == (3, 77, 24)
    assert 0.5 < want.std() < 2  # lively
    found = module.apply({"params": params}, texts(), method="token_states")
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


def test_the_two_activations_differ():
    first, second = (states(encoder(activation), texts()) for activation in ("quick_gelu", "gelu"))
    assert np.abs(first - second).max() > 1e-2


# -- published sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_encoders_have_their_number_of_parameters(name):
    fields, sizes, count = PUBLISHED[name]
    config = config_from_transformers(
        {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "eos_token_id": 2, **fields}
    )
    assert config.text == sizes
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(Clip(config)))) == count


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_encoders_have_as_many_in_transformers(name):
    """At full size, without memory."""
    torch, transformers = reference.import_reference()
    fields, _, count = PUBLISHED[name]
    with torch.device("meta"):
        net = transformers.CLIPTextModel(transformers.CLIPTextConfig(**fields))
    assert sum(math.prod(value.shape) for value in net.parameters()) == count


# -- folders ----------------------------------------------------------------------------------------------------------


def test_the_encoders_own_folder_loads(folder, params):
    module, found = load_text_tower(folder / "text_encoder")
    assert isinstance(module, TextTower)
    assert module.config == TextConfig(24, 2, 3, 56, vocabulary=99, context=77, end_of_text=98)
    same(found, params)


@pytest.mark.parametrize("prefix", ["text_model.", ""], ids=["with the tower's name", "without"])
def test_both_names_of_the_keys_load(tmp_path, folder, params, prefix):
    state = bare(load_file(folder / "text_encoder/model.safetensors"))
    write(tmp_path, {prefix + key: value for key, value in state.items()})
    same(load_text_tower(tmp_path)[1], params)


def test_a_projection_and_the_numbers_of_positions_are_passed_over(tmp_path, params):
    net = encoder(kind="CLIPTextModelWithProjection")
    net.save_pretrained(tmp_path / "text_encoder")
    file = tmp_path / "text_encoder/model.safetensors"
    state = load_file(file)
    assert "text_projection.weight" in state
    save_file({**state, "text_model.embeddings.position_ids": np.arange(77)[None]}, file)
    module, found = load_text_tower(tmp_path)
    assert found.keys() == params.keys()
    np.testing.assert_allclose(
        module.apply({"params": found}, texts(), method="token_states"), states(net, texts()), rtol=0, atol=1e-5
    )


def test_the_text_tower_of_a_whole_clip_loads(tmp_path):
    net = reference.model()
    net.save_pretrained(tmp_path)
    module, params = load_text_tower(tmp_path)
    found = module.apply({"params": params}, reference.texts(), method="token_states")
    np.testing.assert_allclose(found, states(net.text_model, reference.texts()), rtol=0, atol=1e-5)


def test_half_precision_and_torch_files_load_and_full_precision_comes_first(tmp_path, folder, params):
    torch, _ = reference.import_reference()
    state = load_file(folder / "text_encoder/model.safetensors")
    half = {key: value.astype(np.float16) for key, value in state.items()}
    rounded = jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), params)
    part = tmp_path / "text_encoder"
    write(part, {}, "none.safetensors")
    torch.save({key: torch.from_numpy(value) for key, value in half.items()}, part / "pytorch_model.fp16.bin")
    same(load_text_tower(tmp_path)[1], rounded)
    (part / "pytorch_model.fp16.bin").write_bytes(b"not to be read")
    write(part, half, "model.fp16.safetensors")
    same(load_text_tower(tmp_path)[1], rounded)
    torch.save({key: torch.from_numpy(value) for key, value in state.items()}, part / "pytorch_model.bin")
    same(load_text_tower(tmp_path)[1], params)
    (part / "pytorch_model.bin").write_bytes(b"not to be read")
    write(part, state)
    same(load_text_tower(tmp_path)[1], params)


def test_types_are_those_asked_for(folder):
    module, params = load_text_tower(folder, "bfloat16", "bfloat16")
    assert (module.dtype, module.param_dtype) == ("bfloat16", "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


# -- what does not fit ------------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_listed(tmp_path, folder):
    state = bare(load_file(folder / "text_encoder/model.safetensors"))
    state["final_layer_norm.wieght"] = state.pop("final_layer_norm.weight")
    state["encoder.layers.2.mlp.fc1.bias"] = np.zeros(56, np.float32)
    state["embeddings.position_embedding.weight"] = np.zeros((76, 24), np.float32)
    with pytest.raises(WeightsError) as caught:
        load_text_tower(write(tmp_path, state))
    message = str(caught.value)
    assert "model.safetensors does not fit the model: 1 missing, 2 surplus, 1 misshapen" in message
    assert "missing: final_layer_norm.weight (24,)" in message
    assert "surplus: encoder.layers.2.mlp.fc1.bias (56,)" in message
    assert "misshapen: embeddings.position_embedding.weight is (76, 24), not (77, 24)" in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "t5"}, "config.json is one of 't5', not of 'clip_text_model' or 'clip': give the text encoder"),
        ({"model_type": "clip_vision_model"}, "is one of 'clip_vision_model', not of"),
        ({"model_type": None}, "is one of None, not of"),
        ({"model_type": ["x" * 10_000]}, r"is one of \['x{198}, not of"),
        ({"use_attention_mask": True}, "says use_attention_mask, and only text encoders that see the padding"),
        ({"hidden_act": "swish"}, "swish"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0; a number from 1"),
    ],
    ids=["t5", "image tower", "none", "long", "mask", "activation", "layers"],
)
def test_another_architecture_is_one_sentence(tmp_path, fields, message):
    write(tmp_path / "text_encoder", {}, **fields)
    with pytest.raises(WeightsError, match=message) as caught:
        load_text_tower(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "text_encoder/config.json"))
    assert "\n" not in str(caught.value)


def test_folders_without_the_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds neither text_encoder/config.json nor config.json: give the folder"):
        load_text_tower(tmp_path)
    write(tmp_path / "text_encoder", {}, "other.safetensors")
    with pytest.raises(InputError, match=r"has text_encoder/config.json, but none of model.safetensors, pytorch_model"):
        load_text_tower(tmp_path)
    with pytest.raises(InputError, match="neither a folder nor an id"):
        load_text_tower(tmp_path / "none")
