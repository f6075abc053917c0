"""What referring buys, and what each part of RSIC is for: figure 4's question and Table I of papers/5, on scenes.

    python tools/rsic_table.py runs/rsic-mini --scenes 200 --json rsic.json --out rsic.png
    python tools/rsic_table.py runs/rsic-mini --also "single scale=runs/rsic-single" --fast --gem 500 --json rsic.json

The images are held-out scenes with one referred object each: the first that fills a cell of the weight map. All files have the same
description, the scene's caption, and bytes are those of whole files.

Referring against global mode. The object is marked by its mask, by its box, by its class ("red star", the paper's way) and by its
phrase ("the star": as few attributes as tell it from the others), which GEM looks for; scenes where GEM finds nothing are counted
and left out of that row. Single files cannot be made equally large, so means are compared: global mode's mean scores at all levels
of M are interpolated, linearly and never falling with more bytes, at the mean bytes of referring mode over the same scenes. Where
these lie outside of global mode's, nothing is compared.

Ablation, in referring mode by the mask: without a description; without referring guidance, where the file holds the description
alone and an image is drawn from it and from noise; T steps of the sampler; and with `--also LABEL=FOLDER` another trained codec.
"Fréchet, CLIP" is the Fréchet distance between CLIP features of decoded and original images: it is no FID, and too large for few
images, so compare it only between rows of as many. The CLIP is the codec's own. f-LPIPS needs `--lpips` and `--vgg`.

`--gem N` tells whether M is higher on N objects than beside them, and whether words for absent objects are refused.

With `--json`, every row is kept at once, and the same command goes on where it was stopped.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _rsic
import _timing
import jax
import matplotlib
import rd_plot
from _rsic import Row
from matplotlib.figure import Figure

import jaxsem
from jaxsem import results
from jaxsem.errors import InputError, JaxsemError
from jaxsem.files import check_output, make_folder, read_bytes
from jaxsem.systems.rsic import Rsic
from jaxsem.systems.rsic_config import FAST
from jaxsem.weights.perceptual import load_lpips

GLOBAL, REFERRING, ABLATION = "global", "referring", "ablation"
MAIN = "by mask"
COMPARED = {"f_psnr": ("f-PSNR", "dB", 2), "f_ssim": ("f-SSIM", "", 4), "psnr": ("PSNR", "dB", 2)}
COLUMNS = {
    "bytes": ("bytes", 1),
    "bpp": ("bpp", 4),
    "f_psnr": ("f-PSNR", 2),
    "f_ssim": ("f-SSIM", 4),
    "psnr": ("PSNR", 2),
    "f_lpips": ("f-LPIPS", 4),
    "clip_score": ("CLIP score", 2),
    "clip_frechet": ("Fréchet, CLIP", 4),
}
_PANELS = {"f_psnr": "inside the object: f-PSNR, dB", "psnr": "whole image: PSNR, dB"}
_MARKERS = "sD^vPX"


@dataclass(frozen=True)
class Plan:
    """A row to be measured.

    Attributes:
        name: Its name.
        kind: Which table it is of; the ablation shows the referring row `MAIN` too.
        codec: At its quality, decoding as the row wants it.
        ask: What is asked of each scene; None sends the description alone.
    """

    name: str
    kind: str
    codec: Rsic
    ask: _rsic.Ask | None

    @property
    def identity(self) -> Row:
        """What a row that is there already must have been measured with."""
        guidance = self.codec.config.guidance
        return {
            "row": self.name,
            "kind": self.kind,
            "codec": self.codec.digest.hex(),
            "steps": guidance.steps,
            "recurrences": guidance.recurrences,
        }


def make_plans(codec: Rsic, others: Sequence[tuple[str, Rsic]], steps: Sequence[int]) -> Iterator[Plan]:
    """All rows, those of T by number of steps; the codecs decode as the tables' main rows do.

    Raises:
        InputError: Labels that are alike or the names of other rows, or a T that the codec has no room for.
    """
    plans = [Plan(f"global {k}", GLOBAL, codec.at_quality(k), _rsic.whole) for k in range(codec.qualities)]
    plans += [
        Plan(MAIN, REFERRING, codec, _rsic.by_mask),
        Plan("by box", REFERRING, codec, _rsic.by_box),
        Plan("by class", REFERRING, codec, _rsic.by_label),
        Plan("by phrase", REFERRING, codec, _rsic.by_phrase),
        Plan("without description", ABLATION, codec, _rsic.without_text),
        Plan("without guidance", ABLATION, codec, None),
    ]
    plans += [Plan(label, ABLATION, other, _rsic.by_mask) for label, other in others]
    for count in sorted(set(steps) - {codec.config.guidance.steps}):
        plans.append(Plan(f"T = {count}", ABLATION, codec.decoding(steps=count), _rsic.by_mask))
    names = [plan.name for plan in plans]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two rows would be called {name!r}: give --also another label")
    yield from plans


def measure(plan: Plan, scenes: Sequence[_rsic.Referred], meter: _rsic.Meter) -> Row:
    """One row; without scores where nothing is found in any scene."""
    kept, batch = list(scenes), meter.batch
    if plan.ask is None:
        sizes, images = _rsic.through_text(plan.codec, kept, batch)
    else:
        asked = [(scene, demand) for scene in scenes if (demand := plan.ask(plan.codec, scene)) is not None]
        if not asked:
            return {**plan.identity, "scenes": []}
        kept, demands = map(list, zip(*asked))
        sizes, images = _rsic.through_files(plan.codec, kept, demands, batch)
    return {**plan.identity, **meter.row(kept, sizes, images)}


def compare_all(rows: Sequence[Row]) -> list[Row]:
    """Every referring row that has scores against the global ones."""
    globals_ = [row for row in rows if row["kind"] == GLOBAL]
    return [_rsic.compare(row, globals_, tuple(COMPARED)) for row in rows if row["kind"] == REFERRING and row["scenes"]]


# -- the report -----------------------------------------------------------------------------------------------------------


def print_rows(rows: Sequence[Row], title: str) -> None:
    """A table of rows, with the columns that any of them has."""
    columns = {key: column for key, column in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    lines = [
        [
            row["row"],
            str(len(row["scenes"])),
            *("-" if row.get(key) is None else f"{row[key]:,.{digits}f}" for key, (_, digits) in columns.items()),
        ]
        for row in rows
    ]
    print(f"\n{title}")
    _timing.print_table(["", "images", *(name for name, _ in columns.values())], lines)


def describe(row: Row, compared: Row) -> str:
    """A sentence: what referring mode has over global mode at as many bytes."""
    low, high = compared["range"]
    if not compared["difference"]:
        outside = f"its {row['bytes']:.1f} bytes lie outside of global mode's {low:.1f} to {high:.1f}"
        return f"{row['row']}: {outside}, so nothing is compared"
    parts = [
        f"{name} {compared['difference'][key]:+.{digits}f} {unit}".rstrip()
        for key, (name, unit, digits) in COMPARED.items()
    ]
    return f"{row['row']}, {row['bytes']:.1f} bytes, less global mode interpolated at as many: {', '.join(parts)}"


def print_report(record: dict[str, Any]) -> None:
    """Both tables, the comparisons, and what GEM finds."""
    rows = record["rows"]
    print_rows([row for row in rows if row["kind"] in (GLOBAL, REFERRING)], "referring against global mode")
    named = {row["row"]: row for row in rows}
    for compared in record["comparison"]:
        print(describe(named[compared["row"]], compared))
    whole = record["setting"]["scenes"]
    for name in ("by class", "by phrase"):
        print(f"{name}: GEM finds nothing in {whole - len(named[name]['scenes'])} of {whole} scenes")
    main = dict(named[MAIN], row=f"referring, T = {named[MAIN]['steps']}")
    print_rows([*(row for row in rows if row["kind"] == ABLATION), main], "ablation, referring mode by the mask")
    print(f"Fréchet, CLIP: of {whole} images, which makes it too large; compare it only within this table")
    if gem := record.get("gem"):
        print(f"\nGEM, {gem['count']} objects")
        keys = ("inside", "outside", "nothing", "refused")
        lines = [
            [f"by {name}", *("-" if gem[kind][key] is None else f"{gem[kind][key]:.3f}" for key in keys)]
            for name, kind in (("class", "label"), ("phrase", "phrase"))
        ]
        _timing.print_table(["", "M inside", "M outside", "find nothing", "absent, refused"], lines)


def draw(rows: Sequence[Row], title: str) -> Figure:
    """Scores over bytes: global mode's curve, and a point for each other way to mark the object and each other codec."""
    curve = [row for row in rows if row["kind"] == GLOBAL]
    count, own = len(curve[0]["scenes"]), curve[0]["codec"]
    points = [row for row in rows if row["kind"] == REFERRING or (row["kind"] == ABLATION and row["codec"] != own)]
    with matplotlib.rc_context(rd_plot.STYLE):
        figure = Figure(figsize=(8.4, 3.7), layout="constrained", facecolor="white")
        figure.suptitle(title, x=0.012, ha="left", fontsize=10.5)
        for axes, (key, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items()):
            steps = sorted((row["bytes"], row[key]) for row in curve)
            axes.plot(*zip(*steps), color=rd_plot.PRESET_COLORS[0], marker="o", markersize=3.5, label="global mode")
            for k, row in enumerate(row for row in points if row["scenes"]):
                part = "" if len(row["scenes"]) == count else f" ({len(row['scenes'])} of {count} scenes)"
                name = f"referring, {row['row']}{part}"
                color = rd_plot.PRESET_COLORS[1 + k % (len(rd_plot.PRESET_COLORS) - 1)]
                marker = _MARKERS[k % len(_MARKERS)]
                axes.plot(
                    row["bytes"], row[key], color=color, marker=marker, markersize=6, linestyle="none", label=name
                )
            axes.set_title(label, loc="left", fontsize=9.5, color=rd_plot.INK)
            axes.set_xlabel("bytes of a file, mean")
            axes.grid(color=rd_plot.FAINT, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(length=0)
        figure.axes[0].legend(loc="best", frameon=False, fontsize=8, handlelength=1.6, labelspacing=0.3)
    return figure


# -- command --------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a mistake gives one sentence and the exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("codec", help="a preset of RSIC, or the folder of a run of experiments/rsic_mini.py")
    add("--scenes", type=_timing.positive, default=100, help="test scenes, at least 2 (%(default)s)")
    add("--side", type=_timing.positive, metavar="PIXELS", help="of the scenes (that of the codec's CLIP)")
    add("--also", metavar="LABEL=FOLDER", type=_labelled, action="append", default=[], help="a row of another codec")
    add("--gem", metavar="N", type=_timing.positive, help="look where GEM finds N objects")
    add("--fast", action="store_true", help=f"decode in {FAST['steps']} steps without recurrence")
    add("--steps", type=_timing.positive, help="T of the main rows (the codec's)")
    add("--recurrences", type=_timing.positive, help="how often each step is taken, in all rows (the codec's)")
    table = "T of the ablation (10 30 50)"
    add("--ablate-steps", type=_timing.positive, nargs="*", default=[10, 30, 50], metavar="T", help=table)
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add("--batch", type=_timing.positive, default=16, help="images at a time (%(default)s)")
    add("--lpips", metavar="FILE", type=Path, help="vgg.pth of LPIPS 0.1, for f-LPIPS")
    add("--vgg", metavar="FILE", type=Path, help="torchvision's VGG16, for the same")
    add("--out", metavar="FILE.png", type=Path, help="draw the plot")
    add("--json", metavar="FILE", type=Path, help="keep the results here, and go on from them")
    add("--force", action="store_true", help="replace what is there")
    try:
        _run(parser.parse_args(arguments))
    except JaxsemError as error:
        print(f"rsic_table: {error}", file=sys.stderr)
        return 2
    return 0


def _labelled(text: str) -> tuple[str, str]:
    label, equals, folder = text.partition("=")
    if not (label and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=FOLDER")
    return label, folder


def _run(options: argparse.Namespace) -> None:
    if options.out is not None:
        make_folder(options.out.parent)
        rd_plot.check_suffix(options.out)
        check_output(options.out, options.force or options.json is not None)
    if options.scenes < 2:
        raise InputError("a distance of sets needs at least 2 images: give --scenes 2 or more")
    if (options.lpips is None) != (options.vgg is None):
        raise InputError("f-LPIPS needs both files: give --lpips and --vgg, or neither")
    codec = _load(options.codec, options)
    clip = _rsic.check_gem(codec)
    guidance = codec.config.guidance
    side = options.side or clip.image_size
    setting = {"codec": codec.digest.hex(), "scenes": options.scenes, "side": side, "seed": options.seed}
    setting |= {"steps": guidance.steps, "recurrences": guidance.recurrences, "lpips": options.lpips is not None}
    record = {"benchmark": "rsic_table", **_kept(options.json, setting, options.force), "setting": setting}
    plans = list(
        make_plans(codec, [(name, _load(folder, options)) for name, folder in options.also], options.ablate_steps)
    )
    record |= (about := _timing.machine())
    _timing.print_machine(about)
    scenes = _rsic.referred_scenes("test", options.scenes, side, codec.config.weight_map.stride)
    print(
        f"{codec.name}: {len(scenes)} scenes of {side}x{side}, of the first {scenes[-1].index + 1} those with such an object"
    )
    print(f"T = {guidance.steps}, recurrences: {guidance.recurrences}, seed {options.seed}")
    lpips = None
    if options.lpips is not None:
        module, params = load_lpips(options.vgg, options.lpips, "vgg")
        lpips = module, jax.device_put(params)
    meter, kept = _rsic.Meter(clip, options.batch, lpips), record.get("rows", [])
    record["rows"] = []
    for plan in plans:
        known = [row for row in kept if row.items() >= plan.identity.items()]
        record["rows"].append(known[0] if known else measure(plan, scenes, meter))
        _write(options.json, {**record, "rows": _merged(record["rows"], kept)})
        print(f"  {plan.name}{', as before' if known else ''}", file=sys.stderr, flush=True)
    if options.gem is not None and record.get("gem", {}).get("count") != options.gem:
        record["gem"] = _rsic.measure_gem(codec, options.gem, side)
    record["comparison"] = compare_all(record["rows"])
    _write(options.json, {**record, "rows": _merged(record["rows"], kept)})
    print_report(record)
    if options.out is not None:
        rd_plot.save(draw(record["rows"], f"{codec.name}, {options.scenes} test scenes"), options.out, True)


def _load(source: str, options: argparse.Namespace) -> Rsic:
    codec = jaxsem.load(source)
    if not getattr(codec, "referring", False):
        raise InputError(f"{source} cannot be told what matters: name a preset of RSIC, or the folder of its run")
    changes: dict[str, Any] = dict(FAST) if options.fast else {}
    given = {"steps": options.steps, "recurrences": options.recurrences}
    return codec.decoding(seed=options.seed, **changes | {key: value for key, value in given.items() if value})


def _merged(rows: Sequence[Row], kept: Sequence[Row]) -> list[Row]:
    """The rows of this command, and those of earlier ones that it did not come to."""
    names = {row["row"] for row in rows}
    return [*rows, *(row for row in kept if row["row"] not in names)]


def _write(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        results.write_json(path, record, force=True)


def _kept(path: Path | None, setting: dict[str, Any], force: bool) -> dict[str, Any]:
    if path is None or force or not path.exists():
        return {}
    try:
        found = json.loads(read_bytes(path))
    except ValueError as error:
        raise InputError(f"{path} is not a JSON file of results: name another file") from error
    if not isinstance(found, dict) or found.get("setting") != setting:
        raise InputError(f"{path} holds results of other settings: name another file, or pass --force to begin anew")
    return found


if __name__ == "__main__":
    sys.exit(main())
