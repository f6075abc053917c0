"""Residual bottlenecks and attention blocks: against CompressAI, and check values for machines without it."""

import compressai_reference as reference
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsem.nn.blocks import AttentionBlock, ResidualBottleneck
from jaxsem.weights.convert import CONV, Entry, convert, invert

RANDOM = np.random.RandomState(5)
X = RANDOM.standard_normal((1, 4, 6, 6)).astype(np.float32)


def rules(source, target):
    return [Entry(f"{source}.weight", f"{target}/kernel", CONV), Entry(f"{source}.bias", f"{target}/bias")]


BOTTLENECK = rules("conv{i}", "conv{i}")
ATTENTION = [
    *(
        rule
        for i in (0, 2, 4)
        for rule in rules(f"conv_{{s:a|b}}.{{u}}.conv.{i}", f"conv_{{s}}_{{u}}/conv{i // 2 + 1}")
    ),
    *rules("conv_b.3", "conv_b_3"),
]


def seeded(layer):
    """Parameters from NumPy's frozen generator, in the order of their names."""
    shapes = flatten_dict(jax.eval_shape(layer.init, jax.random.key(0), X)["params"])
    random = np.random.RandomState(6)
    values = {name: random.standard_normal(shapes[name].shape).astype(np.float32) / 3 for name in sorted(shapes)}
    return unflatten_dict(values)


def run(layer):
    return np.asarray(jax.jit(layer.apply)({"params": seeded(layer)}, X))


def check_against(layer, torch_layer, table):
    torch, _ = reference.import_compressai()
    state = invert(table, seeded(layer))
    torch_layer.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    with torch.no_grad():
        expected = torch_layer(torch.from_numpy(np.moveaxis(X, -1, 1).copy())).numpy()
    np.testing.assert_allclose(run(layer), np.moveaxis(expected, 1, -1), rtol=1e-5, atol=1e-5)
    again = convert(table, state, jax.eval_shape(lambda: seeded(layer)))
    jax.tree.map(np.testing.assert_array_equal, again, seeded(layer))


def test_residual_bottleneck_equals_compressai():
    reference.import_compressai()
    from compressai.models.sensetime import ResidualBottleneckBlock

    check_against(ResidualBottleneck(6), ResidualBottleneckBlock(6, 6), BOTTLENECK)


def test_attention_block_equals_compressai():
    reference.import_compressai()
    from compressai.layers import AttentionBlock as Theirs

    check_against(AttentionBlock(6), Theirs(6), ATTENTION)


def test_check_values():
    # Row 1, column 2 of what torch 2.13.0 and CompressAI 1.2.8 give for the inputs above.
    bottleneck = [0.8215494, -0.0478272, -0.3062639, 0.2257422, -2.201012, 1.15079]
    attention = [0.1861103, -0.1006143, 1.44527, 0.3653826, -1.249863, -0.08371711]
    np.testing.assert_allclose(run(ResidualBottleneck(6))[0, 1, 2], bottleneck, atol=1e-5)
    np.testing.assert_allclose(run(AttentionBlock(6))[0, 1, 2], attention, atol=1e-5)


def test_the_attention_units_end_with_a_relu():
    layer = ResidualBottleneck(6, relu_after=True)
    plain = np.asarray(ResidualBottleneck(6).apply({"params": seeded(layer)}, X))
    np.testing.assert_array_equal(np.asarray(layer.apply({"params": seeded(layer)}, X)), np.maximum(plain, 0))
    assert plain.min() < 0
