"""Zero-shot accuracy over the rate, for every quantiser of features: figures 4 and 5 of papers/1.

    jaxsem features ... --out train.npy          (and test.npy; both with the classes of their images)
    python tools/feature_rates.py --train train.npy --test test.npy --texts pqvae-mini --json rates.json --out plots

`--texts` is the preset whose CLIP reads the class names of `test`, or a file whose row i is the feature of class i. Every method of
`bench_features` is fitted to the train features at every rate that it can meet, and the test features are coded. Measured are

    accuracy      share of the decoded test features whose nearest class, of those that occur in the test data, is in the picture
    cosine        mean cosine similarity with the original
    bits, ideal   per dimension: at fixed length, and with order-0 tables (see `bench_features`)

`--held-out N` keeps N classes for testing, chosen by their names: of the train features those without any of them, and of the test
features those with nothing else (the paper: 200 of ImageNet's 1000). `--ablation` cuts one latent into sub-vectors of different
widths at the same bits. With `--json`, what is measured is written at once, and the same command goes on where it was stopped.
"""

import argparse
import json
import math
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _timing
import matplotlib
import numpy as np
import rd_plot
from bench_features import Fit, ideal_bits, methods, select
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxsem import results
from jaxsem.commands.features import open_clip
from jaxsem.errors import InputError, JaxsemError
from jaxsem.files import check_output, describe, make_folder, read_bytes
from jaxsem.presets import PRESETS
from jaxsem.systems.feature_arrays import Record, read_array, read_features
from jaxsem.systems.feature_networks import SMALL, PqvaeQuantizer, Recipe, configs_of_latent
from jaxsem.systems.features import check_features
from jaxsem.systems.pqvae import PqvaeConfig
from jaxsem.systems.zero_shot import class_split, cosine

RATES = (0.5, 1.0, 2.0, 3.0)
SIZES = {"small": SMALL, "paper": {"hidden": (512, 256), "residual": 128, "residual_layers": 3}}
COLORS = {"SQ": "#8d949c", "PQ": "#c79a2e", "OPQ": "#4f9a6a", "VQ-VAE": "#7b3fa0", "PQVAE": "#1f5fbf"}
MARKERS = "osD^v"
PANELS = {"accuracy": "zero-shot accuracy", "cosine": "cosine similarity"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """What is fitted to, and what is coded and classified.

    Attributes:
        train: Unit features float32 [b, w].
        test: Unit features float32 [t, w].
        classes: Features float32 [c, w] of the classes that occur in the test data.
        right: Which of these are in each test image, bool [t, c].
        shared: How many of these occur in the train data too.
    """

    train: np.ndarray
    test: np.ndarray
    classes: np.ndarray
    right: np.ndarray
    shared: int

    def accuracy(self, features: np.ndarray) -> float:
        """The share of test features [t, w], as they were decoded, that are nearest to a class of their image."""
        answers = (features @ self.classes.T).argmax(axis=1)
        return float(self.right[np.arange(len(answers)), answers].mean())


# -- data -----------------------------------------------------------------------------------------------------------------


def load(train: Path, test: Path, texts: str, held_out: int | None = None) -> tuple[Data, dict[str, Any]]:
    """The data, and what identifies it.

    Raises:
        InputError: A file that is missing, features without classes, files that do not belong together, or nothing left.
        FormatError: A file that is damaged or foreign.
    """
    (seen, seen_record), (coded, record) = read_features(train), read_features(test)
    names = _names(record, test)
    class_features = _class_features(texts, names)
    if _names(seen_record, train) != names:
        raise InputError(f"{train} and {test} have different class names: extract both from the same data")
    shape, wanted = class_features.shape, (len(names), coded.shape[1])
    if shape != wanted or seen.shape[1] != coded.shape[1]:
        raise InputError(
            f"features of width {seen.shape[1]} in {train} and {coded.shape[1]} in {test} with {len(names)} classes need as many "
            f"texts of the same width, not {shape[0]} of {shape[1]} in {texts}"
        )
    before, present = _present(seen_record), _present(record)
    train_rows = list(range(len(seen)))
    test_rows = [row for row, numbers in enumerate(present) if numbers]
    if held_out is not None:
        _, held = class_split(names, len(names) - held_out)
        unseen = set(held.tolist())
        train_rows = [row for row in train_rows if not before[row] & unseen]
        test_rows = [row for row in test_rows if present[row] <= unseen]
    if not train_rows or not test_rows:
        raise InputError(
            f"{len(train_rows)} features of {train} and {len(test_rows)} of {test} are left: nothing to do"
        )
    occurring = sorted(set().union(*(present[row] for row in test_rows)))
    data = Data(
        train=_unit(seen[train_rows], train),
        test=_unit(coded[test_rows], test),
        classes=class_features[occurring],
        right=np.array([[number in present[row] for number in occurring] for row in test_rows]),
        shared=len(set(occurring) & set().union(*(before[row] for row in train_rows))),
    )
    checksum = f"{zlib.crc32(np.ascontiguousarray(class_features)):08x}"
    identity = {"train": seen_record["crc32"], "test": record["crc32"], "texts": checksum, "held_out": held_out}
    return data, identity


def _class_features(texts: str, names: Sequence[str]) -> np.ndarray:
    """Of a file, or of the CLIP of a preset."""
    if texts in PRESETS:
        return open_clip(None, None, texts).class_features(names)
    path = Path(texts)
    return _unit(read_array(path), path)


def _names(record: Record, path: Path) -> list[str]:
    if not record.get("class_names") or not (record.get("classes") or record.get("labels")):
        raise InputError(f"{path} has no classes: extract features from a folder of classes, or from scenes")
    return record["class_names"]


def _present(record: Record) -> list[set[int]]:
    """The classes in each image."""
    rows = record.get("classes") or [[label] for label in record["labels"]]
    return [{number for number in numbers if number >= 0} for numbers in rows]


def _unit(features: np.ndarray, path: Path) -> np.ndarray:
    features = check_features(features)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if not lengths.all():
        raise InputError(f"row {int(np.argmin(lengths))} of those used in {path} is all zeros and has no direction")
    return features / lengths


# -- measuring ------------------------------------------------------------------------------------------------------------


def measure(fit: Fit, data: Data, seed: int) -> Row:
    """Fits a quantiser and codes the test features; the columns are in the tool's docstring."""
    fitted = []
    # A list of host data is what `seconds` does not look into.
    seconds = _timing.seconds(lambda: [fitted.append(fit(data.train, seed))])
    quantizer = fitted[0]
    indices = quantizer.indices(data.test)
    decoded = quantizer.features(indices)
    cosines = cosine(data.test, decoded)
    width = data.test.shape[1]
    return {
        "bits": quantizer.bits / width,
        "ideal": ideal_bits(quantizer, quantizer.indices(data.train), indices) / width,
        "accuracy": data.accuracy(decoded),
        "cosine": cosines["mean"],
        "cosine_low": cosines["q05"],
        "fit_seconds": seconds,
    }


class Ledger:
    """The measurements so far, in memory and, where there is a path, in a file after each of them.

    Args:
        path: A JSON file, which may hold results of the same setting; None for none.
        setting: What the results depend on; JSON.
        force: Whether results of another setting are thrown away.

    Raises:
        InputError: The file holds results of another setting, or none at all.
        OutputError: It cannot be written.
    """

    def __init__(self, path: Path | None, setting: dict[str, Any], force: bool = False):
        setting = json.loads(results.to_json(setting))  # tuples become lists, as they come back
        self.path, self.resumed = path, False
        self.record: dict[str, Any] = {"benchmark": "feature_rates", "setting": setting, "rows": []}
        if path is None:
            return
        check_output(path, True)
        if path.exists() and not force:
            found = _read_object(path)
            if found.get("benchmark") != "feature_rates" or found.get("setting") != setting:
                raise InputError(
                    f"{path} holds results of other data or settings: name another file, or pass --force to begin anew"
                )
            self.record, self.resumed = found, True

    def rows(self, **key: Any) -> list[Row]:
        """The rows with these values."""
        return [row for row in self.record["rows"] if all(row.get(name) == value for name, value in key.items())]

    def get(self, key: dict[str, Any], make: Callable[[], Row]) -> Row:
        """The row of a key, from before or made now."""
        if found := self.rows(**key):
            return found[0]
        row = {**key, **make()}
        self.record["rows"].append(row)
        self.write()
        return row

    def write(self, **figures: Any) -> None:
        """Writes all there is, with these figures."""
        self.record.update(figures)
        if self.path is not None:
            results.write_json(self.path, self.record, force=True)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a JSON file of results ({describe(error)}): name another file") from error
    return found if isinstance(found, dict) else {}


def compare(options: argparse.Namespace, data: Data, recipe: Recipe, ledger: Ledger) -> dict[str, Any]:
    """Every method at every rate that it can meet; what its rows have in common."""
    part = {"part": "methods"}
    for rate in options.rates:
        for method in select(methods(recipe, **SIZES[options.sizes]), options.methods):
            if fit := method.at(rate, data.test.shape[1]):
                key = {**part, "name": method.name, "rate": rate}
                row = ledger.get(key, lambda fit=fit: measure(fit, data, options.seed))
                _say(row, method.name)
    return part


def ablate(options: argparse.Namespace, data: Data, recipe: Recipe, ledger: Ledger) -> dict[str, Any]:
    """PQVAE with one latent at every rate, cut into sub-vectors of all widths that there are; what its rows have in common."""
    width = data.test.shape[1]
    part = {"part": "ablation", "channels": options.channels or 8 * math.ceil(width / 100)}
    for rate in options.rates:
        for config in configs_of_latent(width, rate * width, part["channels"], **SIZES[options.sizes]):
            key = {**part, "rate": rate, "codeword": config.codeword, "codebook": config.codebook}
            fit = partial(_fit_pqvae, config, recipe)
            row = ledger.get(key, lambda fit=fit: measure(fit, data, options.seed))
            _say(row, f"PQVAE, {config.codebook} codewords of width {config.codeword}")
    return part


def _fit_pqvae(config: PqvaeConfig, recipe: Recipe, train: np.ndarray, seed: int) -> PqvaeQuantizer:
    return PqvaeQuantizer.fit(train, config, recipe=recipe, seed=seed)


def _say(row: Row, name: str) -> None:
    figures = f"accuracy {100 * row['accuracy']:5.1f} %  cosine {row['cosine']:.4f}  ideal {row['ideal']:.3f}"
    print(f"{row['rate']:5g} bits a dimension  {name:34}  bits {row['bits']:.3f}  {figures}", flush=True)


# -- plots ----------------------------------------------------------------------------------------------------------------


def draw_rates(rows: Sequence[Row], bound: float, title: str) -> Figure:
    """Accuracy and cosine over the bits a dimension, one line a method, and the accuracy without compression."""

    def curves(axes: Axes, metric: str) -> None:
        for name in dict.fromkeys(row["name"] for row in rows):
            family = name.split(",")[0]
            mine = [n for n in dict.fromkeys(row["name"] for row in rows) if n.split(",")[0] == family].index(name)
            points = sorted((row["bits"], row[metric]) for row in rows if row["name"] == name)
            style = {
                "color": COLORS.get(family, rd_plot.INK),
                "marker": MARKERS[mine % len(MARKERS)],
                "markersize": 3.5,
            }
            axes.plot(*zip(*points), label=name, linewidth=2.0 if family == "PQVAE" else 1.2, **style)
        _bound(axes, metric, bound)
        axes.set_xlabel("bits a dimension, before entropy coding")

    return _draw(curves, title)


def draw_ablation(rows: Sequence[Row], bound: float, title: str) -> Figure:
    """Accuracy and cosine over the width of sub-vectors, one line a rate."""

    def curves(axes: Axes, metric: str) -> None:
        rates = sorted({row["rate"] for row in rows})
        for rate, color in zip(rates, np.resize(rd_plot.PRESET_COLORS, len(rates))):
            points = sorted((row["codeword"], row[metric]) for row in rows if row["rate"] == rate)
            axes.plot(*zip(*points), label=f"{rate:g} bits a dimension", color=color, marker="o", markersize=3.5)
        _bound(axes, metric, bound)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("width of a sub-vector")

    return _draw(curves, title)


def _draw(curves: Callable[[Axes, str], None], title: str) -> Figure:
    with matplotlib.rc_context(rd_plot.STYLE):
        figure = Figure(figsize=(8.4, 3.7), layout="constrained", facecolor="white")
        figure.suptitle(title, x=0.012, ha="left", fontsize=10.5)
        for axes, (metric, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
            curves(axes, metric)
            axes.set_title(label, loc="left", fontsize=9.5, color=rd_plot.INK)
            axes.grid(color=rd_plot.FAINT, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(length=0)
        # One legend is enough: both panels have the same lines, and the bound is in the first.
        figure.axes[0].legend(loc="lower right", frameon=False, fontsize=7.5, handlelength=1.6, labelspacing=0.3)
    return figure


def _bound(axes: Axes, metric: str, bound: float) -> None:
    if metric == "accuracy":
        axes.axhline(bound, color=rd_plot.INK, linewidth=0.9, linestyle=(0, (4, 3)), label="not compressed")


# -- command --------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a mistake gives one sentence and the exit status 2."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except JaxsemError as error:
        print(f"feature_rates: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("train", "features to fit to"), ("test", "features to code")):
        parser.add_argument(f"--{name}", metavar="FILE.npy", type=Path, required=True, help=what)
    parser.add_argument(
        "--texts", metavar="TEXTS", required=True, help="a preset with a CLIP, or features of the classes"
    )
    parser.add_argument("--rates", type=float, nargs="+", metavar="R", default=RATES, help=f"bits a dimension {RATES}")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these, or families such as PQVAE")
    parser.add_argument("--held-out", type=_timing.positive, metavar="N", help="classes kept for testing")
    parser.add_argument("--ablation", action="store_true", help="also the sub-vectors' width at the same bits")
    parser.add_argument("--channels", type=_timing.positive, help="of the ablation's latent (two numbers a dimension)")
    parser.add_argument("--sizes", choices=tuple(SIZES), default="small", help="of the networks (small)")
    parser.add_argument(
        "--steps", type=_timing.positive, default=Recipe().steps, help="of a network's training (%(default)s)"
    )
    parser.add_argument(
        "--mixing", type=_share, default=Recipe().mixing, help="of features, 0 where there are many (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the quantisers (0)")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="draw rates.png, and ablation.png")
    parser.add_argument("--json", metavar="FILE", type=Path, help="keep the results here, and go on from them")
    parser.add_argument("--force", action="store_true", help="throw away results of other settings, and replace plots")
    return parser


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


def _run(options: argparse.Namespace) -> None:
    if not all(math.isfinite(rate) and rate > 0 for rate in options.rates):
        raise InputError(f"--rates are bits a dimension above 0, not {options.rates}")
    if options.seed < 0:
        raise InputError(f"--seed must be at least 0, not {options.seed}")
    recipe = Recipe(steps=options.steps, mixing=options.mixing)
    select(methods(recipe), options.methods)  # refuses a name before the work
    parts = {"rates": (compare, draw_rates)}
    if options.ablation:
        parts["ablation"] = ablate, draw_ablation
    plots = {} if options.out is None else {name: make_folder(options.out) / f"{name}.png" for name in parts}
    data, identity = load(options.train, options.test, options.texts, options.held_out)
    setting = {**identity, "sizes": options.sizes, "recipe": asdict(recipe), "seed": options.seed}
    ledger = Ledger(options.json, setting, options.force)
    for path in plots.values():
        check_output(path, options.force or ledger.resumed)
    about = _timing.machine()
    _timing.print_machine(about)
    bound = data.accuracy(data.test)
    counts = {
        "train": len(data.train),
        "test": len(data.test),
        "width": data.test.shape[1],
        "classes": len(data.classes),
    }
    print(
        f"{counts['train']} features to fit on, {counts['test']} to test, of {counts['classes']} classes ({data.shared} of them in "
        f"the train data too), width {counts['width']}; not compressed: accuracy {100 * bound:.1f} %"
    )
    ledger.write(**about, counts={**counts, "classes_in_train": data.shared}, bound=bound)
    title = f"{counts['test']:,} features of {counts['classes']} classes, width {counts['width']}"
    for name, (work, draw) in parts.items():
        # What was measured before, at other rates perhaps, is drawn too.
        rows = ledger.rows(**work(options, data, recipe, ledger))
        if not rows:
            print(f"no method takes these rates at width {counts['width']}")
        elif plots:
            rd_plot.save(draw(rows, bound, title), plots[name], True)


if __name__ == "__main__":
    sys.exit(main())
