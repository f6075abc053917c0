import numpy as np
import pytest

from jaxsem.errors import InputError
from jaxsem.metrics import bd_rate, distortion_interval
from jaxsem.metrics.bd_rate import pchip

ANCHOR = [(0.11, 26.1), (0.19, 28.3), (0.35, 30.9), (0.62, 33.2)]
TEST = [(0.08, 25.9), (0.15, 28.6), (0.27, 30.8), (0.55, 34.0)]


def reference_cubic(anchor, test):
    """The published formula, term by term: cubics of ln R in D, integrated over the overlap."""
    anchor, test = np.array(anchor), np.array(test)
    low, high = max(anchor[:, 1].min(), test[:, 1].min()), min(anchor[:, 1].max(), test[:, 1].max())
    integrals = []
    for points in (anchor, test):
        integral = np.polyint(np.polyfit(points[:, 1], np.log(points[:, 0]), 3))
        integrals.append(np.polyval(integral, high) - np.polyval(integral, low))
    return 100 * (np.exp((integrals[1] - integrals[0]) / (high - low)) - 1)


@pytest.mark.parametrize("method", ["cubic", "pchip"])
@pytest.mark.parametrize("bpp_range", [None, (0.15, 0.5)])
def test_files_of_70_percent_are_minus_30_percent(method, bpp_range):
    smaller = [(0.7 * rate, quality) for rate, quality in ANCHOR]
    assert bd_rate(ANCHOR, smaller, method=method, bpp_range=bpp_range) == pytest.approx(-30, abs=1e-9)


def test_cubic_equals_the_published_formula():
    assert bd_rate(ANCHOR, TEST) == pytest.approx(reference_cubic(ANCHOR, TEST), abs=1e-6)
    assert bd_rate(ANCHOR, TEST) == pytest.approx(-23.87549, abs=1e-4)


def test_cubic_fits_more_than_four_points_by_least_squares():
    anchor = [*ANCHOR, (0.9, 34.6), (0.25, 29.7)]
    assert bd_rate(anchor, TEST) == pytest.approx(reference_cubic(anchor, TEST), abs=1e-6)


def test_pchip_equals_scipy():
    interpolate = pytest.importorskip("scipy.interpolate")
    low, high = 26.1, 33.2
    areas = [
        interpolate.PchipInterpolator([q for _, q in points], np.log([r for r, _ in points])).integrate(low, high)
        for points in (ANCHOR, TEST)
    ]
    expected = 100 * np.expm1((areas[1] - areas[0]) / (high - low))
    assert bd_rate(ANCHOR, TEST, method="pchip") == pytest.approx(expected, abs=1e-9)


def test_pchip_literal():
    assert bd_rate(ANCHOR, TEST, method="pchip") == pytest.approx(-23.99466, abs=1e-4)  # SciPy 1.17.1


@pytest.mark.parametrize("y", [[0, 1, 4, 9, 9.5], [0, 3, 1, 1, 5], [2, 1.9, -4, -4.1, -9], [0, 1, 0, 8, 0]])
def test_interpolation_and_integral_equal_scipy(y):
    interpolate = pytest.importorskip("scipy.interpolate")
    x = np.array([0, 0.3, 1, 1.2, 4])
    value, antiderivative = pchip(x, np.array(y))
    expected = interpolate.PchipInterpolator(x, y)
    positions = np.linspace(0, 4, 41)
    np.testing.assert_allclose(value(positions), expected(positions), atol=1e-12)
    np.testing.assert_allclose(antiderivative(positions), expected.antiderivative()(positions), atol=1e-12)


def test_two_points_are_a_straight_line():
    value, antiderivative = pchip(np.array([1.0, 3.0]), np.array([2.0, 6.0]))
    assert value(2.0) == pytest.approx(4)
    assert antiderivative(3.0) == pytest.approx(8)


@pytest.mark.parametrize("method", ["cubic", "pchip"])
def test_the_roles_exchanged_give_the_inverse_ratio(method):
    forth, back = (bd_rate(*curves, method=method) for curves in ((ANCHOR, TEST), (TEST, ANCHOR)))
    assert (1 + forth / 100) * (1 + back / 100) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("method", ["cubic", "pchip"])
def test_a_lower_is_better_distortion_gives_the_same(method):
    mirrored = [[(rate, 50 - quality) for rate, quality in points] for points in (ANCHOR, TEST)]
    assert bd_rate(*mirrored, method=method) == pytest.approx(bd_rate(ANCHOR, TEST, method=method), abs=1e-9)
    expected = sorted(50 - quality for quality in distortion_interval(ANCHOR, TEST, bpp_range=(0.19, 0.35)))
    assert distortion_interval(*mirrored, bpp_range=(0.19, 0.35)) == pytest.approx(expected)


def test_the_order_of_points_and_a_point_given_twice_change_nothing():
    assert bd_rate([*ANCHOR[::-1], ANCHOR[2]], TEST[::-1]) == bd_rate(ANCHOR, TEST)


def test_a_rate_range_is_cut_at_the_qualities_of_the_anchor():
    assert distortion_interval(ANCHOR, TEST, bpp_range=(0.19, 0.35)) == pytest.approx((28.3, 30.9))


def test_a_rate_range_beyond_the_curves_is_the_overlap():
    assert distortion_interval(ANCHOR, TEST, bpp_range=(0.01, 9)) == distortion_interval(ANCHOR, TEST) == (26.1, 33.2)


def test_a_rate_range_takes_the_mean_inside_it_only():
    kinked = [(0.05, 20), (0.1, 25), (0.2, 30), (0.4, 35)]
    half_above_30 = [(0.05, 20), (0.1, 25), (0.2, 30), (0.3, 32.925), (0.3001, 35)]
    below = bd_rate(kinked, half_above_30, method="pchip", bpp_range=(0.05, 0.1))
    assert below == pytest.approx(0, abs=1)
    assert bd_rate(kinked, half_above_30, method="pchip", bpp_range=(0.3, 0.4)) < -10


@pytest.mark.parametrize(
    ("anchor", "test", "options", "message"),
    [
        (ANCHOR, TEST[:3], {}, "test curve has 3 points, but method 'cubic' needs at least 4"),
        (ANCHOR[:1], TEST, {"method": "pchip"}, "anchor curve has 1 points"),
        (ANCHOR, [(0.1, 40), (0.2, 41), (0.3, 42), (0.4, 43)], {}, "share no quality: the anchor spans 26.1 to 33.2"),
        (ANCHOR, TEST, {"bpp_range": (0.5, 0.1)}, "0 < low < high"),
        (ANCHOR, TEST, {"bpp_range": (1, 2)}, "at 1 to 2 bpp"),
        ([*ANCHOR, (0.7, 33.2)], TEST, {}, "one distortion twice"),
        ([*ANCHOR, (0.62, 33.5)], TEST, {}, "one rate twice"),
        ([*ANCHOR, (0.9, np.inf)], TEST, {}, "finite"),
        ([*ANCHOR, (0.0, 20)], TEST, {}, "positive rates"),
        (ANCHOR, [0.1, 0.2], {}, r"shape is \(2,\)"),
        (ANCHOR, TEST, {"method": "spline"}, "not 'spline'"),
    ],
)
def test_curves_that_cannot_be_compared_are_refused(anchor, test, options, message):
    with pytest.raises(InputError, match=message):
        bd_rate(anchor, test, **options)
