"""The rate-distortion figure: PSNR and MS-SSIM against bits per pixel, presets over classic codecs."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxsem.errors import InputError
from jaxsem.files import write_file

Curve = tuple[str, np.ndarray]
"""A label and `[n, 2]` points (bpp, metric)."""

SUFFIXES = (".png", ".svg", ".pdf")

INK, FAINT = "#22262b", "#d9dde2"
PRESET_COLORS = ("#1f5fbf", "#c0392b", "#7b3fa0", "#0f8a8a", "#b0651a")
CLASSIC_COLORS = {"JPEG": "#8d949c", "WebP": "#c79a2e", "AVIF": "#4f9a6a"}
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": "#9aa1a9",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "xtick.color": "#5c646d",
    "ytick.color": "#5c646d",
}


def draw(
    panels: Mapping[str, tuple[Sequence[Curve], Sequence[Curve]]],
    *,
    title: str,
    bpp_limit: float = 0.6,
    bpp_range: tuple[float, float] | None = None,
) -> Figure:
    """Draw one panel per metric.

    Args:
        panels: for each axis label, the curves of the presets and those of the classic codecs.
        title: what was measured, a line above the panels.
        bpp_limit: the right end of the rate axis.
        bpp_range: rates to shade: those over which BD-rate is computed.

    Returns:
        The figure, 8.4 x 3.7 inches; `save` writes it.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.7), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.05)
        figure.suptitle(title, x=0.012, ha="left", fontsize=10.5)
        for axes, (label, (presets, classics)) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items()
        ):
            _panel(axes, label, presets, classics, bpp_limit, bpp_range)
    return figure


def save(figure: Figure, path: str | os.PathLike, force: bool = False) -> None:
    """Write the figure, raster formats at 200 dots per inch: twice the width of a README.

    Args:
        figure: what `draw` returned.
        path: a file that ends in one of `SUFFIXES`.
        force: replace an existing file.

    Raises:
        InputError: for another ending.
        OutputError: if the file exists already and `force` is false, or cannot be written.
    """
    check_suffix(path)
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, dpi=200, format=Path(path).suffix[1:].lower())
    write_file(path, buffer.getvalue(), force)


def check_suffix(path: str | os.PathLike) -> None:
    """Refuse a path whose ending names no format of a plot, before the work rather than after it.

    Raises:
        InputError: names the endings there are.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"The plot {path} needs a name that ends in {', '.join(SUFFIXES)}.")


def _panel(
    axes: Axes,
    label: str,
    presets: Sequence[Curve],
    classics: Sequence[Curve],
    bpp_limit: float,
    bpp_range: tuple[float, float] | None,
) -> None:
    if bpp_range:
        axes.axvspan(*bpp_range, color="#f4f6f8", zorder=0)
        note = f"BD-rate: {bpp_range[0]:g} to {bpp_range[1]:g} bpp"
        axes.text(bpp_range[0], 1.01, note, transform=axes.get_xaxis_transform(), fontsize=7.5, color="#5c646d")
    for i, (name, points) in enumerate(classics):
        color = CLASSIC_COLORS.get(name.split()[0], list(CLASSIC_COLORS.values())[i % len(CLASSIC_COLORS)])
        _line(axes, name, points, color=color, linewidth=1.3, markersize=2.6, zorder=2)
    for i, (name, points) in enumerate(presets):
        color = PRESET_COLORS[i % len(PRESET_COLORS)]
        _line(axes, name, points, color=color, linewidth=2.2, markersize=5, zorder=3)
    axes.set_title(label, loc="left", pad=12, fontsize=9.5, color=INK)
    axes.set_xlabel("bits per pixel (real bytes)")
    axes.set_xlim(0, bpp_limit)
    _fit_height(axes, [points for _, points in (*classics, *presets)], bpp_limit)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    _legend(axes, bpp_limit)


def _line(axes: Axes, name: str, points: np.ndarray, **style) -> None:
    points = points[np.argsort(points[:, 0])]
    axes.plot(points[:, 0], points[:, 1], marker="o", label=name, solid_capstyle="round", **style)


def _at(points: np.ndarray, bpp: float) -> float:
    points = points[np.argsort(points[:, 0])]
    return float(np.interp(bpp, points[:, 0], points[:, 1]))


def _fit_height(axes: Axes, curves: Sequence[np.ndarray], bpp_limit: float) -> None:
    """Fit the vertical axis to what lies left of the limit; curves may go on far beyond it."""
    seen = [value for points in curves for value in [*points[points[:, 0] <= bpp_limit, 1], _at(points, bpp_limit)]]
    if seen:
        margin = 0.05 * (max(seen) - min(seen)) or 1.0
        axes.set_ylim(min(seen) - margin, max(seen) + margin)


def _legend(axes: Axes, bpp_limit: float) -> None:
    """The names in the order of the curves, best first, in the corner that rising curves leave free."""

    def height(handle) -> float:
        return _at(np.column_stack(handle.get_data()), 0.5 * bpp_limit)

    handles = sorted(axes.get_legend_handles_labels()[0], key=height, reverse=True)
    if handles:
        axes.legend(handles=handles, loc="lower right", frameon=False, handlelength=1.6, labelspacing=0.35)
