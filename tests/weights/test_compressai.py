"""CompressAI's and ELICre's layouts: all give the same parameters; what does not fit is said."""

import functools
from unittest import mock

import compressai_reference as reference
import jax
import numpy as np
import pytest

from jaxsem.codecs import ElicConfig, HyperpriorConfig, param_shapes
from jaxsem.errors import InputError, WeightsError
from jaxsem.weights.compressai import load_compressai, to_compressai

CONFIG = reference.CONFIGS["chandelier"]


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """Tracing a model for its shapes takes half a second; these tests ask for the same few again and again."""
    with mock.patch("jaxsem.weights.compressai.param_shapes", functools.cache(param_shapes)):
        yield


@pytest.fixture(scope="module")
def loaded():
    return load_compressai(reference.random_state_dict("chandelier"), "elic", CONFIG)


def same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_every_published_key_is_written():
    """Keys as CompressAI 1.2.8's `Elic2022Official` and ELICre's `Network.py` have them."""
    module = reference.module_of("official")
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), param_shapes(module))
    shapes = {key: value.shape for key, value in to_compressai(module, zeros).items()}
    assert len(shapes) == 390
    for key, shape in {
        "g_a.8.conv_a.2.conv.4.weight": (8, 4, 1, 1),
        "g_s.14.weight": (8, 3, 5, 5),
        "latent_codec.hyper.h_s.4.weight": (12, 16, 3, 3),
        "latent_codec.hyper.entropy_bottleneck.matrices.4": (8, 1, 3),
        "latent_codec.y.channel_context.y3.0.weight": (10, 8, 5, 5),
        "latent_codec.y.latent_codec.y0.context_prediction.mask": (4, 2, 5, 5),
        "latent_codec.y.latent_codec.y2.y.gaussian_conditional.scale_table": (0,),
    }.items():
        assert shapes[key] == shape, key
    shapes = to_compressai(module, zeros, layout="elicre").keys()
    for key in ("cc_transforms.2.4.bias", "context_prediction.3.mask", "ParamAggregation.3.0.weight", "h_s.4.bias",
                "entropy_bottleneck._matrix0", "gaussian_conditional._quantized_cdf"):  # fmt: skip
        assert key in shapes


def test_the_layout_of_elicre_gives_the_same_parameters(loaded):
    module, params = loaded
    state = to_compressai(module, params, layout="elicre")
    assert not any(key.startswith("latent_codec.") for key in state)
    same(load_compressai(state, "elic", CONFIG)[1], params)


@pytest.mark.parametrize("prefix", ["module.", "base_coder.", "module.base_coder."])
def test_files_of_transform_neck_load(loaded, prefix):
    """A dict with `state_dict` and `adapter`, wrapped names, and the CLIP of the training loss beside the codec."""
    module, params = loaded
    state = {prefix + key: value for key, value in to_compressai(module, params, layout="elicre").items()}
    state |= {"SemanticLoss.clip_model.proj": np.zeros(2), "llm_trans_encoder.conv.weight": np.zeros(3)}
    file = {"epoch": 3, "state_dict": state, "adapter": {"ln_pre.weight": np.zeros(4)}}
    same(load_compressai(file, "elic", CONFIG)[1], params)


def test_old_and_new_names_of_the_prior_are_the_same(loaded):
    module, params = loaded
    state = to_compressai(module, params)
    for new, old in (("matrices.", "_matrix"), ("biases.", "_bias"), ("factors.", "_factor")):
        state = {key.replace(f"entropy_bottleneck.{new}", f"entropy_bottleneck.{old}"): v for key, v in state.items()}
    assert "latent_codec.hyper.entropy_bottleneck._factor3" in state
    same(load_compressai(state, "elic", CONFIG)[1], params)


def test_every_parameter_arrives_somewhere(loaded):
    values = jax.tree.leaves(loaded[1])
    assert all(np.std(value) > 0 for value in values)
    shapes = jax.tree.leaves(param_shapes(loaded[0]))
    assert [value.shape for value in values] == [shape.shape for shape in shapes]


def test_a_config_of_other_widths_gets_the_whole_list(loaded):
    state = to_compressai(*loaded)
    with pytest.raises(WeightsError) as caught:
        load_compressai(state, "elic", ElicConfig(**{**vars(CONFIG), "hyper": 6}))
    assert "misshapen: latent_codec.hyper.h_a.2.weight is (8, 8, 5, 5), not (6, 6, 5, 5)" in str(caught.value)
    assert "misshapen: latent_codec.hyper.entropy_bottleneck.quantiles is (8, 1, 3), not (6, 1, 3)" in str(caught.value)


def test_the_other_variant_is_noticed(loaded):
    with pytest.raises(WeightsError, match=r"misshapen: latent_codec.hyper.h_s.4.weight is \(24, 12, 3, 3\)"):
        load_compressai(to_compressai(*loaded), "elic", reference.CONFIGS["official"])


def test_missing_and_surplus_keys_are_named_in_the_layout_of_the_file(loaded):
    state = to_compressai(*loaded, layout="elicre")
    state["h_a.0.wieght"] = state.pop("h_a.0.weight")
    with pytest.raises(WeightsError) as caught:
        load_compressai(state, "elic", CONFIG)
    assert "missing: h_a.0.weight (8, 12, 3, 3)" in str(caught.value)
    assert "surplus: h_a.0.wieght (8, 12, 3, 3) (did you mean h_a.0.weight?)" in str(caught.value)


def test_mistakes_of_the_caller(loaded):
    state = to_compressai(*loaded)
    with pytest.raises(InputError, match="no codec 'elic2022'"):
        load_compressai(state, "elic2022", CONFIG)
    with pytest.raises(InputError, match="a HyperpriorConfig, not a ElicConfig"):
        load_compressai(state, "hyperprior", CONFIG)
    with pytest.raises(InputError, match="one rate; this config has 2"):
        load_compressai(state, "hyperprior", HyperpriorConfig(lambdas=(0.01, 0.02)))
    with pytest.raises(InputError, match="not 'neck'"):
        to_compressai(*loaded, layout="neck")
