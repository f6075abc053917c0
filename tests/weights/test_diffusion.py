"""Checkpoints of diffusers: folders, both names of attention, both directions; what does not fit is said."""

import functools
import json
import re

import diffusion_reference as reference
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from jaxsem.backbones import autoencoder_kl, unet_2d_condition
from jaxsem.backbones.autoencoder_kl import AutoencoderKlConfig
from jaxsem.backbones.unet_2d_condition import UnetConditionConfig
from jaxsem.errors import InputError, WeightsError
from jaxsem.weights import diffusion
from jaxsem.weights.convert import Entry
from jaxsem.weights.diffusion import load_autoencoder_kl, load_unet_condition

PART = {"vae": "vae", "flux": "vae", "sd1": "unet", "sd2": "unet"}
LOAD = {"vae": load_autoencoder_kl, "unet": load_unet_condition}
WRITE = {"vae": diffusion.autoencoder_to_diffusers, "unet": diffusion.unet_to_diffusers}
KIND = {"vae": AutoencoderKlConfig, "unet": UnetConditionConfig}
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def state_of(name):
    return reference.state_of(reference.model(name))


def load(name, source):
    """The parameters in a state dict or file of a network of the reference."""
    return LOAD[PART[name]](source, KIND[PART[name]].from_json(reference.config(name)))[1]


@functools.cache
def params_of(name):
    """The parameters of a network of the reference."""
    return load(name, state_of(name))


def same(first, second):
    first, second = flatten_dict(first, sep="/"), flatten_dict(second, sep="/")
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


# -- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PART)
def test_diffusers_loads_what_is_written(name):
    torch, _ = reference.import_reference()
    net, state = reference.model(name), state_of(name)
    written = WRITE[PART[name]](KIND[PART[name]].from_json(reference.config(name)), params_of(name))
    assert written.keys() == state.keys()
    for key, value in written.items():
        np.testing.assert_array_equal(value, state[key], err_msg=key)
    copy = type(net).from_config(net.config)
    copy.load_state_dict({key: torch.from_numpy(value) for key, value in written.items()}, strict=True)


@pytest.mark.parametrize(
    ("part", "name"), [("vae", "sd"), ("vae", "flux"), ("unet", "sd15"), ("unet", "sd21")], ids=str
)
def test_published_ones_have_the_keys_and_shapes_of_diffusers(part, name):
    """At full size, without memory."""
    torch, diffusers = reference.import_reference()
    four = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    four |= {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    newer = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
    fields = {
        "sd": four,
        "flux": four | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
        "sd15": {"cross_attention_dim": 768},
        "sd21": newer,
    }[name]
    with torch.device("meta"):
        net = (diffusers.AutoencoderKL if part == "vae" else diffusers.UNet2DConditionModel)(**fields)
    want = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    home = autoencoder_kl if part == "vae" else unet_2d_condition
    config = home.CONFIGS[name]
    module = (home.AutoencoderKl if part == "vae" else home.UnetCondition)(config)
    table = (diffusion.autoencoder_table if part == "vae" else diffusion.unet_table)(config)
    found = {}
    for path, leaf in flatten_dict(home.param_shapes(module), sep="/").items():
        rules = [(rule, list(rule.keys_of(path, leaf.shape))) for rule in table if isinstance(rule, Entry)]
        rule, keys = next((rule, keys) for rule, keys in rules if keys)
        for i, key in keys:
            shape = leaf.shape if i is None else leaf.shape[1:]
            found[key] = rule.transform.inverse(np.broadcast_to(np.uint8(0), shape)).shape
    assert found == want


@pytest.mark.parametrize("name", ["vae", "flux"])
def test_the_older_names_of_attention_params_of(name):
    older = {}
    for key, value in state_of(name).items():
        new = next((new for new in OLD if f"attentions.0.{new}." in key), None)
        older[key.replace(new, OLD[new]) if new else key] = value
    assert sum("proj_attn" in key for key in older) == 4
    same(load(name, older), params_of(name))


def test_both_names_of_one_parameter_are_too_many():
    state = state_of("vae")
    key = "encoder.mid_block.attentions.0."
    state[f"{key}query.weight"] = state[f"{key}to_q.weight"]
    with pytest.raises(WeightsError, match=rf"1 doubly matched\n.* by {key}query.weight and {key}to_q.weight"):
        load("vae", state)


def test_parameters_come_in_the_type_asked_for():
    config = UnetConditionConfig.from_json(reference.config("sd1"))
    module, params = load_unet_condition(state_of("sd1"), config, "bfloat16", "bfloat16", remat=True)
    assert (module.dtype, module.param_dtype, module.remat) == ("bfloat16", "bfloat16", True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_wrappers_names_are_taken_off():
    same(load("sd1", {f"module.{key}": value for key, value in state_of("sd1").items()}), params_of("sd1"))


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "sd2"])
@pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "part"])
def test_a_folder_that_diffusers_wrote_loads_with_its_own_config(tmp_path, name, whole):
    reference.model(name).save_pretrained(tmp_path / PART[name])
    module, params = LOAD[PART[name]](tmp_path if whole else tmp_path / PART[name])
    assert module.config == KIND[PART[name]].from_json(reference.config(name))
    same(params, params_of(name))


def test_the_variant_of_half_precision_loads(tmp_path):
    torch, _ = reference.import_reference()
    net = type(reference.model("sd1")).from_config(reference.model("sd1").config)
    net.load_state_dict(reference.model("sd1").state_dict())
    net.to(torch.float16).save_pretrained(tmp_path / "unet", variant="fp16")
    assert (tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    params = load_unet_condition(tmp_path)[1]
    same(params, jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), params_of("sd1")))


def test_a_torch_file_loads_and_full_precision_comes_first(tmp_path):
    torch, _ = reference.import_reference()
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(reference.config("vae")))
    torch.save(reference.model("vae").state_dict(), folder / "diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not to be read")
    same(load_autoencoder_kl(tmp_path)[1], params_of("vae"))


def test_a_file_of_weights_needs_a_config(tmp_path):
    path = tmp_path / "vae.safetensors"
    save_file(state_of("vae"), path)
    same(load("vae", path), params_of("vae"))
    with pytest.raises(InputError, match="give a config, or one of sd, flux"):
        load_autoencoder_kl(path)
    with pytest.raises(InputError, match="no published U-Net 'sdxl'; there are sd15, sd21"):
        load_unet_condition(path, "sdxl")


def test_folders_without_the_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no config.json: give the config"):
        load_unet_condition(tmp_path)
    message = "holds neither vae/diffusion_pytorch_model.safetensors nor diffusion_pytorch_model.safetensors"
    with pytest.raises(InputError, match=message):
        load_autoencoder_kl(tmp_path, "sd")
    with pytest.raises(InputError, match="neither a folder nor an id"):
        load_autoencoder_kl(tmp_path / "none")


# -- what does not fit ------------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_listed_under_the_names_of_the_file():
    state = state_of("sd2")
    block = "down_blocks.1.attentions.0.transformer_blocks.1"
    state[f"{block}.attn2.to_k.wieght"] = state.pop(f"{block}.attn2.to_k.weight")
    state["down_blocks.1.attentions.0.transformer_blocks.2.norm1.weight"] = np.zeros(64, np.float32)
    state["mid_block.attentions.0.proj_in.weight"] = np.zeros((64, 64, 1, 1), np.float32)
    state["add_embedding.linear_1.weight"] = np.zeros((4, 4), np.float32)
    del state["up_blocks.2.resnets.1.conv_shortcut.bias"]
    with pytest.raises(WeightsError) as caught:
        load("sd2", state)
    text = str(caught.value)
    assert "the state dict does not fit the model: 2 missing, 3 surplus, 1 misshapen" in text
    assert f"missing: {block}.attn2.to_k.weight (64, 20)" in text
    assert "missing: up_blocks.2.resnets.1.conv_shortcut.bias (32,)" in text
    assert f"surplus: {block}.attn2.to_k.wieght (64, 20) (did you mean {block}.attn2.to_k.weight?)" in text
    assert "surplus: down_blocks.1.attentions.0.transformer_blocks.2.norm1.weight (64,)" in text
    assert "surplus: add_embedding.linear_1.weight (4, 4)" in text
    assert "misshapen: mid_block.attentions.0.proj_in.weight is (64, 64, 1, 1), not (64, 64)" in text


def test_convolutions_that_the_config_does_not_have_are_surplus():
    state = state_of("flux") | {"quant_conv.weight": np.zeros((12, 12, 1, 1), np.float32)}
    with pytest.raises(WeightsError, match=r"1 surplus\n  surplus: quant_conv.weight \(12, 12, 1, 1\)"):
        load("flux", state)


def test_parameters_that_no_key_can_hold_are_an_error():
    config = UnetConditionConfig.from_json(reference.config("sd1"))
    with pytest.raises(WeightsError, match=r"surplus: extra \(3,\)"):
        diffusion.unet_to_diffusers(config, {"extra": np.zeros(3)})


@pytest.mark.parametrize("part", LOAD)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is no JSON file \(.*\): download it again"),
        ('{"a": ', "is no JSON file"),
        ("[" * 100_000, "is no JSON file"),
        ("[1, 2]", "holds a list, not a JSON object"),
        ("{}", "the config is one of None, not of"),
    ],
    ids=["empty", "cut", "deep", "list", "no class"],
)
def test_a_config_that_is_none_is_one_sentence(tmp_path, part, text, message):
    (tmp_path / part).mkdir()
    path = tmp_path / part / "config.json"
    path.write_text(text)
    with pytest.raises(WeightsError, match=message) as caught:
        LOAD[part](tmp_path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type='text_time', and only None is known"),
        ("unet", {"_class_name": "UNet3DConditionModel"}, "one of 'UNet3DConditionModel', not of"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ("unet", {"block_out_channels": {"a": 1}}, "block_out_channels={'a': 1}; a list"),
        ("vae", {"_class_name": ["x" * 10_000]}, r"one of \['x{198}, not of"),
        ("vae", {"latent_channels": 4.0}, "latent_channels=4.0; a number"),
    ],
)
def test_a_config_of_another_architecture_is_one_sentence(tmp_path, part, change, message):
    (tmp_path / "config.json").write_text(json.dumps(reference.config("vae" if part == "vae" else "sd1") | change))
    with pytest.raises(WeightsError, match=message) as caught:
        LOAD[part](tmp_path)
    assert re.fullmatch(rf"{re.escape(str(tmp_path / 'config.json'))}: [^\n]+", str(caught.value))
    assert len(str(caught.value)) < 600
