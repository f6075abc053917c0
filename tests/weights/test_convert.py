"""Converter tables: both directions, and errors that list everything."""

import jax
import numpy as np
import pytest

from jaxsem.errors import WeightsError
from jaxsem.weights.convert import (
    CONV,
    DECONV,
    LINEAR,
    STRIDE1_DECONV,
    Entry,
    Ignored,
    convert,
    invert,
    reshape,
    strip_prefixes,
)

TABLE = [
    Entry("stem.weight", "stem/kernel", CONV),
    Entry("stem.bias", "stem/bias", reshape((1, -1, 1, 1), (-1,))),
    Entry("blocks.{i}.{part:attn|mlp}.weight", "blocks[{i}]/{part}/kernel", LINEAR),
    Entry("head.{i}.gain", "head_{i}/gain"),
    Entry("head.{i}._old_gain", "head_{i}/gain"),
    Ignored("{rest:.*\\.}mask", "a constant"),
]
SHAPES = {
    "stem": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "blocks": {"attn": {"kernel": (3, 4, 5)}, "mlp": {"kernel": (3, 4, 6)}},
    "head_0": {"gain": (2,)},
    "head_1": {"gain": (2,)},
}
TARGET = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


@pytest.fixture
def state():
    random = np.random.RandomState(0)
    shapes = {"stem.weight": (4, 2, 3, 3), "stem.bias": (1, 4, 1, 1), "head.0.gain": (2,), "head.1._old_gain": (2,)}
    shapes |= {f"blocks.{i}.{part}.weight": (n, 4) for i in range(3) for part, n in (("attn", 5), ("mlp", 6))}
    return {k: random.standard_normal(s).astype(np.float32) for k, s in shapes.items()} | {"stem.mask": np.ones(3)}


def test_keys_find_their_places(state):
    params = convert(TABLE, state, TARGET)
    np.testing.assert_array_equal(params["stem"]["kernel"], state["stem.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(params["stem"]["bias"], state["stem.bias"].ravel())
    np.testing.assert_array_equal(params["head_1"]["gain"], state["head.1._old_gain"])
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda s: (s.shape, s.dtype), TARGET)


def test_equal_layers_are_stacked_in_their_order(state):
    params = convert(TABLE, state, TARGET)
    for i in range(3):
        np.testing.assert_array_equal(params["blocks"]["mlp"]["kernel"][i], state[f"blocks.{i}.mlp.weight"].T)


def test_inverting_gives_the_state_back_under_the_first_names(state):
    again = invert(TABLE, convert(TABLE, state, TARGET))
    state["head.1.gain"] = state.pop("head.1._old_gain")
    del state["stem.mask"]
    assert list(again) == sorted(state)
    for key, value in state.items():
        np.testing.assert_array_equal(again[key], value)


@pytest.mark.parametrize("transform", [CONV, DECONV, STRIDE1_DECONV, LINEAR, reshape((1, -1), (-1,))])
def test_a_transform_and_its_inverse_cancel(transform):
    shape = (3, 2) if transform is LINEAR else (1, 6) if transform.name.startswith("reshape") else (3, 4, 5, 2)
    value = np.arange(np.prod(shape)).reshape(shape)
    changed = transform.forward(value)
    assert changed.shape != value.shape
    np.testing.assert_array_equal(transform.inverse(changed), value)


def test_half_precision_becomes_what_the_model_wants(state):
    state["head.0.gain"] = state["head.0.gain"].astype(np.float16)
    assert convert(TABLE, state, TARGET)["head_0"]["gain"].dtype == np.float32


def test_one_error_lists_all_that_does_not_fit(state):
    state["blocks.1.attn.wieght"] = state.pop("blocks.1.attn.weight")  # misspelt: surplus and missing
    state["blocks.3.mlp.weight"] = state["blocks.0.mlp.weight"]  # a fourth layer
    state["head.0._old_gain"] = state["head.0.gain"]  # both generations of the name
    state["stem.weight"] = np.zeros((4, 2, 5, 5), np.float32)
    state["stem.bias"] = np.zeros((1, 4, 1, 1), np.int32)
    with pytest.raises(WeightsError) as caught:
        convert(TABLE, state, TARGET, "elic.pth")
    assert str(caught.value).splitlines() == [
        "elic.pth does not fit the model: 1 missing, 2 surplus, 1 doubly matched, 1 misshapen, 1 of another kind",
        "  missing: blocks.1.attn.weight (5, 4)",
        "  surplus: blocks.1.attn.wieght (5, 4) (did you mean blocks.1.attn.weight?)",
        "  surplus: blocks.3.mlp.weight (6, 4)",
        "  doubly matched: head_0/gain by head.0._old_gain and head.0.gain",
        "  misshapen: stem.weight is (4, 2, 5, 5), not (4, 2, 3, 3)",
        "  of another kind: stem.bias is int32, not float32",
    ]


def test_a_key_that_two_rules_claim_is_an_error(state):
    with pytest.raises(WeightsError, match=r"doubly matched: stem.mask by \{rest:.*\}mask and stem.mask"):
        convert([*TABLE, Ignored("stem.mask", "twice")], state, TARGET)


def test_a_parameter_without_a_rule_is_an_error_in_both_directions(state):
    wanted = {**TARGET, "tail": {"gain": jax.ShapeDtypeStruct((7,), np.float32)}}
    with pytest.raises(WeightsError, match=r"missing: \(no rule gives it\) tail/gain \(7,\)"):
        convert(TABLE, state, wanted)
    with pytest.raises(WeightsError, match=r"surplus: tail/gain \(7,\)"):
        invert(TABLE, {"tail": {"gain": np.zeros(7)}})


def test_a_rule_whose_sides_have_other_fields_is_refused_when_it_is_written():
    with pytest.raises(ValueError, match="fields"):
        Entry("a.{i}.weight", "a_{j}/kernel")


def test_prefixes_are_stripped_as_often_as_they_occur():
    state = {"module.base_coder.g_a": 1, "g_s": 2, "module.h_a.module.x": 3}
    stripped = strip_prefixes(state, ("module.", "base_coder."))
    assert stripped == {"g_a": 1, "g_s": 2, "h_a.module.x": 3}


def test_prefixes_that_make_two_keys_one_are_an_error():
    with pytest.raises(WeightsError, match="g_a twice"):
        strip_prefixes({"module.g_a": 1, "g_a": 2}, ("module.",))
