"""Files in both directions: what CompressAI does with ours, and what we read in theirs and in the transform-neck authors'."""

import dataclasses
import os

import compressai_reference as reference
import jax
import numpy as np
import pytest

from jaxsem import presets
from jaxsem.codecs import Elic, ElicConfig, FactorizedConfig, HyperpriorConfig, ScaleHyperpriorConfig, param_shapes
from jaxsem.errors import InputError, OutputError, WeightsError
from jaxsem.weights.compressai import (
    class_of,
    load_compressai,
    split_neck_checkpoint,
    table_of,
    to_compressai,
    write_compressai,
)
from jaxsem.weights.native import is_foreign

CLASSIC = ("factorized", "hyperprior", "scale-hyperprior")


def loaded(name):
    return load_compressai(reference.random_state_dict(name), reference.system_of(name), reference.CONFIGS[name])


@pytest.mark.parametrize("name", CLASSIC)
def test_compressai_makes_the_same_image_from_our_file(name, tmp_path):
    torch, compressai = reference.import_compressai()
    from safetensors.torch import load_file

    module, params = loaded(name)
    quality = None
    if name == "scale-hyperprior":  # one rate of a codec of two
        config = dataclasses.replace(module.config, lambdas=(0.001, 0.01))
        rng, quality = np.random.default_rng(1), 0.5
        for gain, width in (("gain_y", 12), ("gain_z", 8)):
            params[gain] = {side: rng.normal(0, 0.2, (2, width)).astype(np.float32) for side in ("forward", "inverse")}
        module = type(module)(config)
    write_compressai(tmp_path / "theirs.safetensors", module, params, quality=quality)

    net = eval(class_of(module.config), vars(compressai.models)).eval()
    net.load_state_dict(load_file(tmp_path / "theirs.safetensors"), strict=True)
    net.update()
    image = reference.image() / np.float32(255)
    x = torch.from_numpy(image).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs, packed = net(x)["x_hat"], net.compress(x)
        decoded = net.decompress(packed["strings"], packed["shape"])["x_hat"]
    ours = jax.jit(module.apply)({"params": params}, image, np.float32([quality or 0]))["x_hat"]
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(decoded, theirs.clamp(0, 1), rtol=0, atol=1e-5)


def test_what_we_write_for_compressai_loads_here(tmp_path, monkeypatch):
    module, params = loaded("factorized")
    path = tmp_path / "theirs.safetensors"
    write_compressai(path, module, params)
    assert is_foreign(path)
    preset = presets.Preset("tiny", "factorized", module.config, "a test")
    monkeypatch.setattr(presets, "PRESETS", {"tiny": preset})
    codec = presets.load("tiny", weights=path, arithmetic="float")
    np.testing.assert_array_equal(codec.params["g_a"]["layers_0"]["kernel"], params["g_a"]["layers_0"]["kernel"])
    assert presets.card_of("tiny", path) == {}
    with pytest.raises(OutputError, match="exists already"):
        write_compressai(path, module, params)


def test_a_damaged_file_is_not_taken_for_a_foreign_one(tmp_path):
    (tmp_path / "half.safetensors").write_bytes(b"\x40\x00\x00\x00")
    assert not is_foreign(tmp_path / "half.safetensors")
    assert not is_foreign(tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", ["factorized", "scale-hyperprior"])
def test_what_does_not_fit_is_listed(name):
    state = dict(reference.random_state_dict(name))
    state["g_a.0.wieght"] = state.pop("g_a.0.weight")
    state["entropy_bottleneck.quantiles"] = state["entropy_bottleneck.quantiles"][:3]
    with pytest.raises(WeightsError) as caught:
        load_compressai(state, name, reference.CONFIGS[name])
    message = str(caught.value)
    assert "1 missing, 1 surplus, 1 misshapen" in message
    assert "missing: g_a.0.weight (8, 3, 5, 5)" in message
    assert "surplus: g_a.0.wieght (8, 3, 5, 5) (did you mean g_a.0.weight?)" in message
    assert "misshapen: entropy_bottleneck.quantiles is (3, 1, 3)" in message


def test_a_file_of_another_codec_is_noticed():
    with pytest.raises(WeightsError, match=r"surplus: h_s\.4\.weight"):
        load_compressai(reference.random_state_dict("scale-hyperprior"), "factorized", reference.CONFIGS["factorized"])
    with pytest.raises(WeightsError, match=r"misshapen: h_s\.4\.weight is \(12, 8, 3, 3\), not \(24, 18, 3, 3\)"):
        load_compressai(reference.random_state_dict("scale-hyperprior"), "hyperprior", reference.CONFIGS["hyperprior"])
    with pytest.raises(InputError, match="a ScaleHyperpriorConfig, not a HyperpriorConfig"):
        load_compressai({}, "scale-hyperprior", reference.CONFIGS["hyperprior"])


def test_the_oldest_names_of_the_prior_load():
    state = reference.random_state_dict("factorized")
    for part in ("matrices", "biases", "factors"):
        state = {
            key.replace(f"entropy_bottleneck.{part}.", f"entropy_bottleneck._{part}."): v for key, v in state.items()
        }
    assert "entropy_bottleneck._factors.3" in state
    params = load_compressai(state, "factorized", reference.CONFIGS["factorized"])[1]
    jax.tree.map(np.testing.assert_array_equal, params, loaded("factorized")[1])


def test_the_class_is_named_where_there_is_one():
    assert class_of(FactorizedConfig()) == "FactorizedPrior(128, 192)"
    assert class_of(ScaleHyperpriorConfig(192, 320)) == "ScaleHyperprior(192, 320)"
    assert class_of(HyperpriorConfig()) == "MeanScaleHyperprior(128, 192)"
    assert class_of(ElicConfig()) == "Elic2022Chandelier(192, 320, [16, 16, 32, 64, 192])"
    assert class_of(ElicConfig(variant="official")) == "Elic2022Official(192, 320, [16, 16, 32, 64, 192])"
    assert class_of(presets.PRESETS["elic-mini"].config) is None


@pytest.mark.parametrize("config", [ElicConfig((8, 8, 8), 12, 8, (2, 2, 4, 4), variant="official"), ElicConfig()])
def test_the_named_class_of_elic_has_the_keys_and_shapes(config):
    torch, compressai = reference.import_compressai()
    with torch.device("cpu" if config.official else "meta"):  # the full size without its memory
        net = eval(class_of(config), vars(compressai.models))
    module = Elic(config)
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), param_shapes(module))
    written = {key: value.shape for key, value in to_compressai(module, zeros).items()}
    assert written == {key: tuple(value.shape) for key, value in net.state_dict().items()}


def test_mistakes_of_the_caller():
    module, params = loaded("factorized")
    with pytest.raises(InputError, match="the layout is 'compressai', not 'elicre'"):
        to_compressai(module, params, layout="elicre")
    with pytest.raises(InputError, match="one rate: leave the quality out"):
        to_compressai(module, params, quality=0)
    two = dataclasses.replace(reference.CONFIGS["hyperprior"], lambdas=(0.1, 0.2))
    with pytest.raises(InputError, match=r"this config has 2: name the quality to write"):
        to_compressai(type(reference.module_of("hyperprior"))(two), {})
    with pytest.raises(InputError, match=r"no codec of dict; converted are elic, .*factorized"):
        table_of({}, "compressai")


# -- the files of the transform-neck authors ----------------------------------------------------------------------------


@pytest.fixture
def neck_file(tmp_path):
    """A file as they write it, by torch: the codec in two wrappers, the neck beside it."""
    torch = pytest.importorskip("torch")
    state = to_compressai(*loaded("chandelier"), layout="elicre")
    state["llm_trans_encoder.conv.weight"] = np.zeros(3, np.float32)
    codec = {f"module.base_coder.{key}": torch.from_numpy(value) for key, value in state.items()}
    adapter = {"module.ln_pre.weight": torch.arange(4.0), "module.linear.bias": torch.ones(2)}
    path = tmp_path / "d1_1.pth.tar"
    torch.save({"epoch": 59, "state_dict": codec, "adapter": adapter, "loss": torch.tensor(0.5)}, path)
    return path


def test_a_neck_checkpoint_gives_the_codec_and_the_neck(neck_file):
    codec, adapter = split_neck_checkpoint(neck_file)
    assert adapter.keys() == {"ln_pre.weight", "linear.bias"}
    np.testing.assert_array_equal(adapter["ln_pre.weight"], np.arange(4, dtype=np.float32))
    assert "g_a.0.weight" in codec
    module, params = loaded("chandelier")
    for source in (neck_file, codec):
        again = load_compressai(source, "elic", module.config)[1]
        jax.tree.map(np.testing.assert_array_equal, again, params)


def test_other_files_have_no_neck(tmp_path):
    state = reference.random_state_dict("factorized")
    assert split_neck_checkpoint(state)[1] is None
    assert split_neck_checkpoint({"state_dict": state, "adapter": None})[1] is None
    write_compressai(tmp_path / "a.safetensors", *loaded("factorized"))
    codec, adapter = split_neck_checkpoint(tmp_path / "a.safetensors")
    assert (codec.keys(), adapter) == (state.keys(), None)


def test_a_neck_that_is_none_is_an_error():
    state = reference.random_state_dict("factorized")
    with pytest.raises(
        WeightsError, match="the adapter of the state dict: the state dict holds other things than tensors: ln_pre"
    ):
        split_neck_checkpoint({"state_dict": state, "adapter": {"ln_pre": "text"}})
    with pytest.raises(WeightsError, match="adapter of the state dict holds no state dict"):
        split_neck_checkpoint({"state_dict": state, "adapter": [1, 2]})
    with pytest.raises(InputError, match="does not exist"):
        split_neck_checkpoint(os.devnull + "-none")
