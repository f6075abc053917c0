"""SAM's checkpoints: both layouts give the same parameters; what does not fit is said."""

import json

import jax
import numpy as np
import pytest
import sam_reference as reference
from flax.traverse_util import flatten_dict

from jaxsem.backbones.sam import Sam, param_shapes
from jaxsem.backbones.sam_config import CONFIGS, SAM_B, SAM_H, DecoderConfig, EncoderConfig, SamConfig
from jaxsem.errors import InputError, WeightsError
from jaxsem.weights.sam import config_from_transformers, load_sam, to_transformers

CONFIG = SamConfig(
    EncoderConfig(width=24, layers=6, heads=3, hidden=56, global_every=3, window=3, patch=8, image_size=64),
    DecoderConfig(hidden=40, heads=2, iou_layers=4, iou_hidden=20, epsilon=1e-6),
    channels=32,
    mask_channels=16,
)


@pytest.fixture(scope="module")
def state():
    return reference.state_of(reference.model())


@pytest.fixture(scope="module")
def params(state):
    return load_sam(state, CONFIG)[1]


def same(first, second):
    first, second = flatten_dict(first, sep="/"), flatten_dict(second, sep="/")
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_parameters_have_the_shapes_and_types_of_the_module(params):
    wanted = flatten_dict(param_shapes(Sam(CONFIG)), sep="/")
    found = flatten_dict(params, sep="/")
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in found.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in wanted.items()
    }


def test_layers_go_to_their_groups(state, params):
    groups = params["encoder"]["groups"]
    for layer, block in (
        (0, jax.tree.map(lambda a: a[0, 0], groups["window_layers"])),
        (4, jax.tree.map(lambda a: a[1, 1], groups["window_layers"])),
        (5, jax.tree.map(lambda a: a[1], groups["global_layer"])),
    ):
        key = f"vision_encoder.layers.{layer}"
        np.testing.assert_array_equal(block["attention"]["qkv"]["kernel"], state[f"{key}.attn.qkv.weight"].T)
        np.testing.assert_array_equal(block["attention"]["columns"], state[f"{key}.attn.rel_pos_w"])
        np.testing.assert_array_equal(block["norm2"]["bias"], state[f"{key}.layer_norm2.bias"])


def test_a_folder_that_transformers_wrote_loads_with_its_own_config(params, tmp_path):
    reference.model().save_pretrained(tmp_path)
    module, found = load_sam(tmp_path)
    assert module.config == CONFIG
    same(found, params)


def test_metas_layout_gives_the_same_parameters(params):
    state = reference.meta_state(reference.model())
    state |= {name: np.zeros((3, 1, 1), np.float32) for name in ("pixel_mean", "pixel_std")}
    same(load_sam(state, CONFIG)[1], params)


def test_metas_file_has_the_keys_of_the_published_one():
    """Some of those in sam_vit_b_01ec64.pth; 314 in all."""
    keys = reference.meta_state(reference.model()).keys()
    assert len(keys) == 314 - 6 * 14 + 1 * 2  # six layers fewer, one layer more in the IoU head
    assert keys > {
        "image_encoder.pos_embed",
        "image_encoder.patch_embed.proj.weight",
        "image_encoder.blocks.5.attn.rel_pos_h",
        "image_encoder.blocks.0.mlp.lin1.bias",
        "image_encoder.neck.3.weight",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "prompt_encoder.point_embeddings.3.weight",
        "prompt_encoder.mask_downscaling.6.bias",
        "mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj.weight",
        "mask_decoder.transformer.norm_final_attn.weight",
        "mask_decoder.output_upscaling.3.weight",
        "mask_decoder.output_hypernetworks_mlps.3.layers.2.weight",
        "mask_decoder.iou_prediction_head.layers.3.weight",
    }


def test_a_wrapped_torch_file_in_metas_layout_loads(params, tmp_path):
    torch, _ = reference.import_reference()
    state = {f"module.{key}": torch.tensor(value) for key, value in reference.meta_state(reference.model()).items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "sam.pth")
    same(load_sam(tmp_path / "sam.pth", CONFIG)[1], params)


@pytest.mark.parametrize("kept", [0, 1])
def test_frequencies_stored_once_load_under_either_name(state, params, kept):
    names = "shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding"
    assert all(name in state for name in names)
    same(load_sam({key: value for key, value in state.items() if key != names[1 - kept]}, CONFIG)[1], params)


def test_transformers_loads_what_is_written(state, params):
    torch, _ = reference.import_reference()
    written = to_transformers(CONFIG, params)
    assert written.keys() == state.keys()
    net = type(reference.model())(reference.model().config)
    net.load_state_dict({key: torch.from_numpy(value) for key, value in written.items()}, strict=True)
    for key, value in reference.state_of(net).items():
        np.testing.assert_array_equal(value, state[key], err_msg=key)


def test_parameters_come_in_the_type_asked_for(state):
    module, params = load_sam(state, CONFIG, "bfloat16", "bfloat16")
    assert module.dtype == "bfloat16"
    assert params["encoder"]["positions"].dtype == "bfloat16"
    assert params["encoder"]["groups"]["global_layer"]["attention"]["rows"].dtype == "bfloat16"
    assert params["prompts"]["frequencies"].dtype == "float32"


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [reference.state_of, reference.meta_state])
def test_all_that_does_not_fit_is_listed_under_the_names_of_the_file(layout):
    state = layout(reference.model())
    layer = "vision_encoder.layers" if layout is reference.state_of else "image_encoder.blocks"
    state[f"{layer}.1.mlp.lin1.wieght"] = state.pop(f"{layer}.1.mlp.lin1.weight")
    state[f"{layer}.2.attn.rel_pos_h"] = np.zeros((5, 8), np.float32)  # a global layer with the table of a window
    state[f"{layer}.6.attn.proj.bias"] = np.zeros(24, np.float32)
    del state["mask_decoder.iou_token.weight"]
    with pytest.raises(WeightsError) as caught:
        load_sam(state, CONFIG)
    text = str(caught.value)
    assert "the state dict does not fit the model: 2 missing, 2 surplus, 1 misshapen" in text
    assert f"missing: {layer}.1.mlp.lin1.weight (56, 24)" in text
    assert "missing: mask_decoder.iou_token.weight (1, 32)" in text
    assert f"surplus: {layer}.1.mlp.lin1.wieght (56, 24) (did you mean" in text
    assert f"surplus: {layer}.6.attn.proj.bias (24,)" in text
    assert f"misshapen: {layer}.2.attn.rel_pos_h is (5, 8), not (15, 8)" in text


def test_frequencies_that_differ_are_an_error(state):
    key = "prompt_encoder.shared_embedding.positional_embedding"
    with pytest.raises(WeightsError, match="positional_embedding differ, and are the same parameter"):
        load_sam({**state, key: state[key] + 1}, CONFIG)


def test_parameters_that_no_key_can_hold_are_an_error(params):
    with pytest.raises(WeightsError, match=r"surplus: decoder/extra \(3,\)"):
        to_transformers(CONFIG, {**params, "decoder": {**params["decoder"], "extra": np.zeros(3)}})


def test_a_file_without_sizes_needs_a_config(state, tmp_path):
    with pytest.raises(InputError, match="give a config, or one of vit_b, vit_l, vit_h"):
        load_sam(state)
    path = tmp_path / "sam_vit_h_4b8939.pth"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="give a config"):
        load_sam(path)
    with pytest.raises(InputError, match="no published SAM 'vit_g'; there are vit_b"):
        load_sam(state, "vit_g")


# -- configs ----------------------------------------------------------------------------------------------------------


def of_transformers(config):
    """The config with the epsilon that transformers has in the decoder."""
    decoder = DecoderConfig(epsilon=1e-6)
    return SamConfig(config.encoder, decoder)


def test_fields_that_are_absent_have_the_defaults_of_transformers():
    assert config_from_transformers({"model_type": "sam"}) == of_transformers(SAM_B)


def test_the_largest_models_config_is_read():
    """Fields of facebook/sam-vit-huge."""
    vision = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_dim": 5120, "mlp_ratio": 4.0,
              "global_attn_indexes": [7, 15, 23, 31], "window_size": 14, "num_pos_feats": 128, "image_size": 1024,
              "hidden_act": "gelu", "layer_norm_eps": 1e-06, "output_channels": 256, "use_rel_pos": True}  # fmt: skip
    assert config_from_transformers({"model_type": "sam", "vision_config": vision}) == of_transformers(SAM_H)


@pytest.mark.parametrize("name", CONFIGS)
def test_published_models_attend_to_the_whole_image_four_times(name):
    layers = {"vit_b": (2, 5, 8, 11), "vit_l": (5, 11, 17, 23), "vit_h": (7, 15, 23, 31)}
    assert CONFIGS[name].encoder.global_layers == layers[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "sam2"}, "one of 'sam2', not of 'sam'"),
        ({"vision_config": [1]}, "vision_config is a list, not an object"),
        ({"vision_config": {"hidden_size": "768"}}, "hidden_size='768'; a number from 1 to"),
        ({"vision_config": {"hidden_size": 770}}, "width of 770 cannot be split into 12"),
        ({"vision_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers=1000000000; a number from 1 to 1000"),
        (
            {"vision_config": {"global_attn_indexes": [2, 5, 8, 10]}},
            r"global_attn_indexes=\[2, 5, 8, 10\] in 12 layers; only",
        ),
        ({"vision_config": {"global_attn_indexes": []}}, r"global_attn_indexes=\[\] in 12 layers; only equal groups"),
        ({"vision_config": {"use_rel_pos": False}}, "use_rel_pos=False, and only True is known here"),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act='relu', and only 'gelu' is known here"),
        ({"vision_config": {"layer_norm_eps": "0"}}, "layer_norm_eps='0'"),
        ({"vision_config": {"mlp_ratio": -1}}, "mlp_ratio=-1"),
        ({"vision_config": {"image_size": [1024, 512]}}, r"image_size=\[1024, 512\]"),
        ({"vision_config": {"image_size": 512}}, "image_size=1024, and only 512 is known here"),
        ({"vision_config": {"num_pos_feats": 64}}, "num_pos_feats=64, and only 128"),
        ({"prompt_encoder_config": {"num_point_embeddings": 3}}, "num_point_embeddings=3, and only 4"),
        ({"mask_decoder_config": {"hidden_size": 128}}, "hidden_size=128, and only 256"),
        ({"mask_decoder_config": {"iou_head_depth": 1}}, "the IoU head has one layer"),
    ],
)
def test_configs_that_this_sam_cannot_have_are_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam", **change}))
    with pytest.raises(WeightsError, match=message) as caught:
        load_sam(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
