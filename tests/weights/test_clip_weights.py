"""CLIP's checkpoints: every layout gives the same parameters; what does not fit is said."""

import dataclasses
import json

import clip_reference as reference
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxsem.backbones.clip_config import VIT_B32, VIT_H14, ClipConfig, TextConfig, VisionConfig
from jaxsem.errors import InputError, WeightsError
from jaxsem.weights.clip import config_from_transformers, load_clip, to_transformers

CONFIG = ClipConfig(
    VisionConfig(width=32, layers=3, heads=4, hidden=80, patch=8, image_size=32),
    TextConfig(width=24, layers=2, heads=3, hidden=56, vocabulary=99, context=12, end_of_text=98),
    projection=20,
)


@pytest.fixture(scope="module")
def state():
    return reference.state_of(reference.model())


@pytest.fixture(scope="module")
def params(state):
    return load_clip(state, CONFIG)[1]


def same(first, second):
    first, second = flatten_dict(first, sep="/"), flatten_dict(second, sep="/")
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_transformers_wrote_loads_with_its_own_config(params, tmp_path):
    reference.model().save_pretrained(tmp_path)
    module, found = load_clip(tmp_path)
    assert module.config == CONFIG
    same(found, params)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "CLIPTextModel"])
@pytest.mark.parametrize("projected", [False, True], ids=["bare keys", "keys with the tower's name"])
def test_a_tower_that_transformers_wrote_loads_in_both_layouts(tmp_path, name, projected):
    _, transformers = reference.import_reference()
    part = "vision_config" if "Vision" in name else "text_config"
    sizes = getattr(reference.config(), part)
    sizes.projection_dim = reference.PROJECTION
    net = reference.lively(getattr(transformers, name + "WithProjection" * projected)(sizes))
    net.save_pretrained(tmp_path)
    module, found = load_clip(tmp_path)
    assert (module.config.vision is None, module.config.text is None) == ("Text" in name, "Vision" in name)
    if "Vision" in name:
        inputs, encode = reference.images(), "encode_image"
        given = reference.import_reference()[0].from_numpy(inputs).permute(0, 3, 1, 2)
    else:
        inputs, encode = reference.texts(), "encode_text"
        given = reference.import_reference()[0].from_numpy(inputs).long()
    result = net(given)
    want = (result[0] if projected else result.pooler_output).detach().numpy()
    assert want.shape[1] == (20 if projected else {"V": 32, "T": 24}[name[4]])
    got = module.apply({"params": found}, inputs, method=encode)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_openais_layout_gives_the_same_parameters(params):
    state = reference.openai_state(reference.model())
    state |= {name: np.array(77) for name in ("input_resolution", "context_length", "vocab_size")}
    state["attn_mask"] = np.zeros((12, 12), np.float32)
    same(load_clip(state, CONFIG)[1], params)


def test_a_wrapped_torch_file_in_openais_layout_loads(params, tmp_path):
    torch, _ = reference.import_reference()
    state = {f"module.{key}": torch.tensor(value) for key, value in reference.openai_state(reference.model()).items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "open_clip.pt")
    same(load_clip(tmp_path / "open_clip.pt", CONFIG)[1], params)


def test_position_ids_of_older_files_are_passed_over(state, params):
    ids = {f"{tower}_model.embeddings.position_ids": np.arange(9)[None] for tower in ("vision", "text")}
    same(load_clip(state | ids, CONFIG)[1], params)


@pytest.mark.parametrize("layout", [reference.state_of, reference.openai_state])
def test_one_tower_of_a_checkpoint_of_both_can_be_taken(params, layout):
    state = layout(reference.model())
    image = load_clip(state, ClipConfig(CONFIG.vision, None, 20))[1]
    same(image, {key: params[key] for key in ("vision", "image_projection")})
    text = load_clip(state, ClipConfig(None, CONFIG.text, None))[1]
    same(text, {"text": params["text"]})


def test_transformers_loads_what_is_written(state, params):
    torch, transformers = reference.import_reference()
    written = to_transformers(CONFIG, params)
    assert written.keys() == state.keys()
    net = transformers.CLIPModel(reference.config())
    net.load_state_dict({key: torch.from_numpy(value) for key, value in written.items()}, strict=True)
    for key, value in reference.state_of(net).items():
        np.testing.assert_array_equal(value, state[key], err_msg=key)


def test_parameters_come_in_the_type_asked_for(state):
    module, params = load_clip(state, CONFIG, "bfloat16", "bfloat16")
    assert module.dtype == "bfloat16"
    assert params["vision"]["patch_kernel"].dtype == "bfloat16"
    np.testing.assert_allclose(
        params["vision"]["positions"].astype(np.float32),
        state["vision_model.embeddings.position_embedding.weight"],
        rtol=2**-8,
    )


# -- what does not fit ------------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_listed_under_the_names_of_the_file(params):
    state = reference.openai_state(reference.model())
    state["visual.transformer.resblocks.1.mlp.c_fc.wieght"] = state.pop(
        "visual.transformer.resblocks.1.mlp.c_fc.weight"
    )
    state["transformer.resblocks.0.attn.in_proj_weight"] = np.zeros((72, 25), np.float32)
    with pytest.raises(WeightsError) as caught:
        load_clip(state, CONFIG)
    text = str(caught.value)
    assert "missing: visual.transformer.resblocks.1.mlp.c_fc.weight (80, 32)" in text
    assert "surplus: visual.transformer.resblocks.1.mlp.c_fc.wieght (80, 32) (did you mean" in text
    assert "misshapen: transformer.resblocks.0.attn.in_proj_weight[key] is (24, 25), not (24, 24)" in text


def test_fused_weights_that_are_not_three_are_an_error():
    state = reference.openai_state(reference.model())
    state["transformer.resblocks.0.attn.in_proj_bias"] = np.zeros(71, np.float32)
    with pytest.raises(WeightsError, match=r"in_proj_bias is \(71,\), which is not queries, keys and values"):
        load_clip(state, CONFIG)


def test_a_missing_tower_is_an_error(state):
    image = {key: value for key, value in state.items() if not key.startswith("text_")}
    with pytest.raises(WeightsError, match=r"missing: text_model.embeddings.token_embedding.weight \(99, 24\)"):
        load_clip(image, CONFIG)


def test_a_file_without_sizes_needs_a_config(state, tmp_path):
    with pytest.raises(InputError, match="give a config, or one of ViT-B/32, "):
        load_clip(state)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="give a config"):
        load_clip(path)
    with pytest.raises(InputError, match="no published CLIP 'ViT-B-32'; there are ViT-B/32"):
        load_clip(state, "ViT-B-32")


# -- configs ----------------------------------------------------------------------------------------------------------


def test_fields_that_are_absent_have_the_defaults_of_transformers():
    """A CLIPConfig of nothing is ViT-B/32 there, with the end of text by its id."""
    want = dataclasses.replace(VIT_B32, text=dataclasses.replace(VIT_B32.text, end_of_text=49407))
    assert config_from_transformers({"model_type": "clip"}) == want


def test_sections_given_twice_are_read_as_transformers_reads_them():
    """As in the config of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, where `..._dict` decides."""
    text = {"hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
            "num_hidden_layers": 24, "eos_token_id": 2}  # fmt: skip
    vision = {"hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16,
              "num_hidden_layers": 32, "patch_size": 14}  # fmt: skip
    fields = {"model_type": "clip", "projection_dim": 1024, "text_config": {"hidden_size": 1}, "text_config_dict": text,
              "vision_config": vision, "vision_config_dict": None}  # fmt: skip
    assert config_from_transformers(fields) == VIT_H14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip"}, "one of 'siglip', not of 'clip'"),
        ({"model_type": "clip_vision_model"}, "does not name its class"),
        ({"projection_dim": "512"}, "projection_dim='512'; a number from 1 to"),
        ({"vision_config": [1]}, "vision_config is a list, not an object"),
        ({"vision_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers=1000000000; a number from 1 to 1000"),
        ({"vision_config": {"hidden_size": True}}, "hidden_size=True"),
        ({"vision_config": {"hidden_size": 770}}, "width of 770 cannot be split into 12"),
        ({"vision_config": {"num_channels": 1}}, "images have 1 channels"),
        ({"vision_config": {"image_size": [224, 160]}}, r"image_size=\[224, 160\]"),
        ({"text_config": {"hidden_act": "silu"}}, "no activation 'silu'"),
        ({"text_config": {"layer_norm_eps": "0"}}, "layer_norm_eps='0'"),
        ({"text_config": {"eos_token_id": [1, 2]}}, r"eos_token_id is \[1, 2\]"),
    ],
)
def test_configs_that_no_clip_can_have_are_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **change}))
    with pytest.raises(WeightsError, match=message) as caught:
        load_clip(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
