"""ConvNeXt's checkpoints: all layouts give the same parameters; what does not fit is said."""

import dataclasses

import convnext_reference as reference
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxsem.backbones.convnext import ConvNext, ConvNextConfig, param_shapes
from jaxsem.errors import InputError, WeightsError
from jaxsem.weights.convnext import config_from_transformers, load_convnext, to_transformers

TRUNK = ConvNextConfig((8, 12, 16), (2, 1, 3), pool_epsilon=1e-12)
WITH_PROJECTION = dataclasses.replace(TRUNK, projection=10)
FIELDS = {"model_type": "convnext", "hidden_sizes": [8, 12, 16], "depths": [2, 1, 3], "num_stages": 3}


@pytest.fixture(scope="module")
def state():
    return reference.state_of(reference.model())


@pytest.fixture(scope="module")
def params(state):
    return load_convnext(state, TRUNK)[1]


def same(first, second):
    first, second = flatten_dict(first, sep="/"), flatten_dict(second, sep="/")
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_parameters_have_the_shapes_and_types_of_the_module(params):
    wanted = flatten_dict(param_shapes(ConvNext(TRUNK)), sep="/")
    found = flatten_dict(params, sep="/")
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in found.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in wanted.items()
    }


@pytest.mark.parametrize("classes", [0, 7])
def test_a_folder_that_transformers_wrote_loads_with_its_own_config(params, tmp_path, classes):
    reference.model(classes).save_pretrained(tmp_path)
    module, found = load_convnext(tmp_path)
    assert module.config == TRUNK
    same(found, params)


def test_transformers_loads_what_is_written(state, params):
    torch, _ = reference.import_reference()
    written = to_transformers(TRUNK, params)
    assert written.keys() == state.keys()
    net = type(reference.model())(reference.model().config)
    net.load_state_dict({key: torch.from_numpy(value) for key, value in written.items()}, strict=True)
    for key, value in reference.state_of(net).items():
        np.testing.assert_array_equal(value, state[key], err_msg=key)


def test_timms_layout_gives_the_same_parameters(params):
    state = reference.timm_state(reference.model())
    classifier = {"head.fc.weight": np.zeros((5, 16), np.float32), "head.fc.bias": np.zeros(5, np.float32)}
    same(load_convnext(state | classifier, TRUNK)[1], params)


def test_timms_keys_are_those_of_the_published_files():
    assert reference.timm_state(reference.model()).keys() > {
        "stem.0.weight",
        "stem.1.bias",
        "stages.0.blocks.1.conv_dw.weight",
        "stages.1.downsample.0.weight",
        "stages.1.downsample.1.bias",
        "stages.2.blocks.2.norm.weight",
        "stages.2.blocks.2.mlp.fc1.weight",
        "stages.2.blocks.0.mlp.fc2.bias",
        "stages.2.blocks.0.gamma",
        "head.norm.weight",
    }


@pytest.mark.parametrize("hidden", [False, True])
def test_open_clips_layout_gives_the_same_trunk_and_its_projection(params, hidden):
    state = reference.open_clip_state(reference.model(), hidden)
    config = dataclasses.replace(WITH_PROJECTION, hidden=14 if hidden else None)
    found = load_convnext(state, config)[1]
    same({key: found[key] for key in params}, params)
    last = "mlp.fc2" if hidden else "proj"
    np.testing.assert_array_equal(found["projection"]["kernel"], state[f"visual.head.{last}.weight"].T)
    assert ("hidden" in found) == hidden
    if hidden:
        np.testing.assert_array_equal(found["hidden"]["kernel"], state["visual.head.mlp.fc1.weight"].T)
        np.testing.assert_array_equal(found["hidden"]["bias"], state["visual.head.mlp.fc1.bias"])


@pytest.mark.parametrize("hidden", [False, True])
def test_the_trunk_of_an_open_clip_loads_without_its_projection(params, hidden):
    same(load_convnext(reference.open_clip_state(reference.model(), hidden), TRUNK)[1], params)


def test_a_wrapped_torch_file_of_the_image_side_alone_loads(params, tmp_path):
    torch, _ = reference.import_reference()
    state = reference.open_clip_state(reference.model())
    image = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    torch.save({"state_dict": {f"module.{key}": torch.tensor(v) for key, v in image.items()}}, tmp_path / "side.pt")
    found = load_convnext(tmp_path / "side.pt", WITH_PROJECTION)[1]
    same({key: found[key] for key in params}, params)


# -- what does not fit ------------------------------------------------------------------------------------------------


def test_a_config_of_other_sizes_lists_what_does_not_fit(state):
    with pytest.raises(WeightsError, match=r"surplus: encoder\.stages\.2\.layers\.2\.dwconv\.bias") as error:
        load_convnext(state, dataclasses.replace(TRUNK, depths=(2, 1, 2), widths=(10, 12, 16)))
    assert "misshapen: embeddings.layernorm.bias is (8,), not (10,)" in str(error.value)


def test_a_missing_projection_is_named():
    state = reference.open_clip_state(reference.model())
    with pytest.raises(WeightsError, match=r"surplus: visual\.head\.proj\.weight") as error:
        load_convnext(state, dataclasses.replace(WITH_PROJECTION, hidden=14))
    assert "missing: visual.head.mlp.fc1.weight (14, 16)" in str(error.value)


def test_a_file_without_a_config_needs_one(state):
    with pytest.raises(InputError, match="does not say its sizes: give a config, or one of convnext_tiny"):
        load_convnext(state)
    with pytest.raises(InputError, match="there is no published ConvNeXt 'convnext_huge'"):
        load_convnext(state, "convnext_huge")


# -- configs ----------------------------------------------------------------------------------------------------------


def test_a_config_of_transformers_is_read():
    assert config_from_transformers(FIELDS) == TRUNK
    tiny = ConvNextConfig((96, 192, 384, 768), (3, 3, 9, 3), pool_epsilon=1e-12)
    assert config_from_transformers({"model_type": "convnext"}) == tiny
    assert config_from_transformers({**FIELDS, "patch_size": [4, 4], "layer_norm_eps": 1e-6}).pool_epsilon == 1e-6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "convnextv2"}, "the config is one of 'convnextv2', not of 'convnext'"),
        ({"num_channels": 1}, "1 channels, and only 3"),
        ({"layer_scale_init_value": 0}, "layer_scale_init_value=0; only blocks with a scale"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps='x' and hidden_act='gelu'"),
        ({"hidden_act": "mish"}, "there is no activation 'mish'"),
        ({"hidden_sizes": [8, "y"]}, r"hidden_sizes=\[8, 'y'\]; numbers"),
        ({"hidden_sizes": None}, "hidden_sizes=None; numbers"),
        ({"patch_size": [4, 2]}, r"patch_size=\[4, 2\], and only squares"),
        ({"depths": [2, 1]}, r"depths \[2, 1\]: give one of each"),
        ({"num_stages": 4}, "num_stages=4 and sizes of 3"),
    ],
)
def test_configs_that_this_convnext_cannot_have_are_refused(fields, message):
    with pytest.raises(WeightsError, match=f"here: .*{message}"):
        config_from_transformers({**FIELDS, **fields}, "here")
