"""The published models at full size, without their memory."""

import math

import jax
import pytest

from jaxsem.codecs import (
    Elic,
    ElicConfig,
    Factorized,
    FactorizedConfig,
    HyperpriorConfig,
    MeanScaleHyperprior,
    ScaleHyperprior,
    ScaleHyperpriorConfig,
    param_shapes,
)
from jaxsem.errors import InputError


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("variant", "total", "hyper_synthesis", "channel", "first_aggregation"), [
    ("official", 32_074_200, 3_300_192, 6_158_816, (416, 384, 384, 32)),
    ("chandelier", 33_792_771, 3_964_000, 5_800_416, (672, 640, 512, 32)),
])  # fmt: skip
def test_elic_has_the_published_counts(variant, total, hyper_synthesis, channel, first_aggregation):
    shapes = param_shapes(Elic(ElicConfig(variant=variant)))
    assert count(shapes) == total
    assert count(shapes["g_a"]) == 7_337_792
    assert count(shapes["g_s"]) == 7_337_475
    assert count(shapes["h_a"]) == 2_396_736
    assert count(shapes["h_s"]) == hyper_synthesis
    assert count(shapes["entropy_bottleneck"]) == 11_712
    assert sum(count(shapes[f"channel_context_{k}"]) for k in range(4)) == channel
    spatial = [count(shapes[f"spatial_context_{k}"]) for k in range(5)]
    assert spatial == [12_832, 12_832, 51_264, 204_928, 1_843_584]
    layers = [shapes["aggregation_0"][f"layers_{i}"]["kernel"].shape for i in (0, 2, 4)]
    assert (*(shape[2] for shape in layers), layers[-1][3]) == first_aggregation


def test_the_hyperprior_has_the_published_count():
    # mbt2018-mean, qualities 1 to 4: N=128, M=192 (CompressAI 1.2.8's model counted with numel()).
    assert count(param_shapes(MeanScaleHyperprior(HyperpriorConfig()))) == 7_028_003


@pytest.mark.parametrize(("module", "count_of"), [
    (MeanScaleHyperprior(HyperpriorConfig(192, 320)), 17_561_699),
    (Factorized(FactorizedConfig()), 2_998_147),
    (Factorized(FactorizedConfig(192, 320)), 7_030_531),
    (ScaleHyperprior(ScaleHyperpriorConfig()), 5_075_843),
    (ScaleHyperprior(ScaleHyperpriorConfig(192, 320)), 11_816_323),
])  # fmt: skip
def test_the_classic_codecs_have_the_published_counts(module, count_of):
    # CompressAI 1.2.8's models counted with numel().
    assert count(param_shapes(module)) == count_of


@pytest.mark.parametrize("config", [ElicConfig, HyperpriorConfig, ScaleHyperpriorConfig])
def test_an_unknown_rule_for_scales_is_refused(config):
    with pytest.raises(InputError, match="'nearest' or 'above', not 'below'"):
        config(scale_rule="below")


def test_groups_must_add_up():
    with pytest.raises(InputError, match=r"add up to 24, not to latent=320"):
        ElicConfig(groups=(8, 16))
