"""What a small language model still understands at which rate: figures 3 and 4 of papers/2, on scenes.

    jaxsem train experiments/transform_neck_mini.py
    python tools/neck_curves.py runs/transform-neck-mini --json neck.json --out neck.png
    python tools/neck_curves.py runs/transform-neck-mini --also "TIC=runs/neck-tic" --json codecs.json --out codecs.png

The folder is that of a run of the recipe. The pictures of test scenes go through these, each at every quality of its codec, and the
language model answers questions of four kinds about what comes out; their files' real bytes are the rate.

    reconstruction     d1's codec, decoded, and shown to the model as any image
    post-processing    decoded, through the U-Net that was trained with the surrogate loss (where the run has one)
    d1, d2, d3         latents through the neck of that scenario

`--also LABEL=FOLDER` adds d1 of another run under its label, and its codec's reconstruction where that is another codec: the
ablations of figure 6. Few-shot classification compares the image tower's features instead (`jaxsem.tasks.nearest`). PSNR is that
of decoded images. With `--json`, every record is kept at once, and the same command goes on where it was stopped.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _timing
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import rd_plot
from matplotlib.figure import Figure

import jaxsem
from jaxsem import results, tasks
from jaxsem.backbones.clip import Clip
from jaxsem.codec import Codec
from jaxsem.container import unpack
from jaxsem.data.scenes import SceneConfig
from jaxsem.errors import InputError, JaxsemError
from jaxsem.files import check_output, make_folder, read_bytes
from jaxsem.metrics.psnr import psnr
from jaxsem.neck_recipe import load_post_processing
from jaxsem.pipeline import decode_latents
from jaxsem.systems.clip_model import ClipModel, filled
from jaxsem.systems.mllm import Mllm
from jaxsem.systems.neck_codec import SCENARIOS, NeckCodec, Reader
from jaxsem.tasks.nearest import NearestExample

SCORES = {
    "caption_cider_d": "captions: CIDEr-D",
    "options_accuracy": "questions with options: accuracy",
    "yes_no_accuracy": "yes or no: accuracy",
    "box_accuracy": "referring expressions: IoU ≥ 0.5",
    "few_shot_accuracy": "5-way 1-shot: accuracy",
    "psnr": "decoded image: PSNR, dB",
}
COLORS = {
    "reconstruction": "#8d949c",
    "post-processing": "#c79a2e",
    "d1": "#1f5fbf",
    "d2": "#4f9a6a",
    "d3": "#7b3fa0",
}
_MORE = ("#c2352b", "#0f8a80", "#b0651d", "#d16ba5", "#5a6b1e")  # of other runs
_BATCH = 32


@dataclass(frozen=True)
class Way:
    """One way from a file to the language model.

    Attributes:
        name: Its name.
        codec: What compresses.
        decoded: Whether the image is decoded.
        answerer: Who answers questions, from images or files.
        features: The image tower's features of images or files, for few-shot.
    """

    name: str
    codec: Codec
    decoded: bool
    answerer: Any
    features: Callable[[list[Any]], np.ndarray]


class Shown:
    """A language model that sees images through something else than its own tower alone; an answerer of `jaxsem.tasks`.

    Args:
        model: The language model.
        encode: Gives visual tokens [n, width] of each image.
    """

    def __init__(self, model: Mllm, encode: Callable[[list[np.ndarray]], list[np.ndarray]]):
        self.name, self._model, self._encode = model.name, model, encode

    def answer(self, inputs: Sequence[Any], prompts: Sequence[str]) -> list[str]:
        """As `Mllm.answer`."""
        return self._model.answer(self._encode(list(inputs)), prompts)

    def score(self, inputs: Sequence[Any], prompts: Sequence[str], options: Any) -> np.ndarray:
        """As `Mllm.score`."""
        return self._model.score(self._encode(list(inputs)), prompts, options)


def find_ways(folder: Path, model: Mllm, clip: ClipModel) -> Iterator[Way]:
    """The paths that a run's folder has weights for.

    Raises:
        InputError: It has none of d1.
    """
    necks = {name: folder / f"{name}.safetensors" for name in SCENARIOS}
    if not necks["d1"].is_file():
        raise InputError(f"{folder} has no d1.safetensors: it is no folder of a finished run of a neck recipe")
    codec = jaxsem.load(str(necks["d1"]))
    yield Way("reconstruction", codec, True, model, lambda images: clip.encode_images(images, _BATCH))
    if (folder / "post_processing" / "done").exists():
        run = _post_processing(folder, clip)
        encode = lambda images: [np.asarray(row)[1:] for row in _in_batches(lambda x: run(x)["tokens"], images)]  # noqa: E731
        features = lambda images: np.stack(_in_batches(lambda x: run(x)["feature"], images))  # noqa: E731
        yield Way("post-processing", codec, True, Shown(model, encode), features)
    for name, path in necks.items():
        if path.is_file():
            each = jaxsem.load(str(path))
            yield Way(name, each, False, Reader(each, model), _neck_features(each, clip))


def other_ways(label: str, folder: Path, main: Codec, model: Mllm, clip: ClipModel) -> Iterator[Way]:
    """What another run adds: its d1, and the reconstruction of a codec that is not the main run's.

    Raises:
        InputError: It has no d1.
    """
    path = folder / "d1.safetensors"
    if not path.is_file():
        raise InputError(f"{folder} has no d1.safetensors: it is no folder of a finished run of a neck recipe")
    codec = jaxsem.load(str(path))
    if codec.digest != main.digest:
        yield Way(f"{label}, reconstruction", codec, True, model, lambda images: clip.encode_images(images, _BATCH))
    yield Way(label, codec, False, Reader(codec, model), _neck_features(codec, clip))


def _post_processing(folder: Path, clip: ClipModel) -> Callable[[np.ndarray], dict[str, jax.Array]]:
    student, variables = load_post_processing(folder)
    run = jax.jit(lambda variables, params, x: student.apply(variables, x.astype(jnp.float32) / 255.0, params))
    return lambda images: run(variables, clip.params, images)


def _neck_features(codec: NeckCodec, clip: ClipModel) -> Callable[[list[bytes]], np.ndarray]:
    def encode(neck: Any, params: Any, y_hat: jax.Array) -> jax.Array:
        tokens = codec.neck.apply({"params": neck}, y_hat)

        def rest(module: Clip, tokens: jax.Array) -> jax.Array:
            return module.image_feature(module.vision.run_layers(tokens, codec.neck.config.bypassed))

        return clip.module.apply({"params": params}, tokens, method=rest)

    run = jax.jit(encode)

    def features(files: list[bytes]) -> np.ndarray:
        latents = decode_latents(codec, [unpack(file).items[0] for file in files], _BATCH)
        return np.stack(_in_batches(lambda y: run(codec.neck_params, clip.params, y), latents))

    return features


def _in_batches(run: Callable[[np.ndarray], jax.Array], things: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Rows of what a compiled function gives of batches of one size."""
    rows: list[np.ndarray] = []
    for start in range(0, len(things), _BATCH):
        part = np.stack(things[start : start + _BATCH])
        rows.extend(np.asarray(run(filled(part, _BATCH)))[: len(part)])
    return rows


# -- measuring ------------------------------------------------------------------------------------------------------------


def measure(way: Way, quality: int, asked: list[tasks.Example], shots: list[tasks.Example]) -> dict[str, Any]:
    """Rate and scores of one way at one quality."""
    codec = way.codec.at_quality(quality)
    decompress = (lambda files: jaxsem.decompress(codec, list(files))) if way.decoded else None

    def sent(examples: list[tasks.Example]) -> list[tasks.Example]:
        return tasks.transmit(examples, lambda images: jaxsem.compress(codec, list(images)), decompress)

    record = tasks.evaluate(way.answerer, sent(asked), prompts=tasks.PLAIN, batch=_BATCH, name=way.name)
    nearest = NearestExample(way.name, way.features)
    few = tasks.evaluate(nearest, sent(shots), prompts=tasks.PLAIN, batch=_BATCH, name=way.name)
    images = list({example.picture.name: example.picture.value for example in asked}.values())
    again = jaxsem.decompress(codec, jaxsem.compress(codec, images))
    row = {key: value for key, value in record["results"][0].items() if key in SCORES or key == "bpp"}
    row["few_shot_accuracy"] = few["results"][0]["few_shot_accuracy"]
    row["psnr"] = float(np.mean([psnr(one, other) for one, other in zip(images, again, strict=True)]))
    return row


def bound(model: Mllm, clip: ClipModel, asked: list[tasks.Example], shots: list[tasks.Example]) -> dict[str, float]:
    """The scores without compression."""
    found = tasks.evaluate(model, asked, prompts=tasks.PLAIN, batch=_BATCH)["results"][0]
    nearest = NearestExample("image", lambda images: clip.encode_images(images, _BATCH))
    few = tasks.evaluate(nearest, shots, prompts=tasks.PLAIN, batch=_BATCH)["results"][0]
    return {**{key: found[key] for key in SCORES if key in found}, "few_shot_accuracy": few["few_shot_accuracy"]}


def draw(rows: Sequence[dict[str, Any]], best: dict[str, float], title: str) -> Figure:
    """One panel a task: score over the rate, one line a path, and the score without compression."""
    with matplotlib.rc_context(rd_plot.STYLE):
        figure = Figure(figsize=(10.2, 6.0), layout="constrained", facecolor="white")
        figure.suptitle(title, x=0.012, ha="left", fontsize=10.5)
        names = list(dict.fromkeys(row["path"] for row in rows))
        more = iter(np.resize(_MORE, len(names)))
        colors = {name: COLORS.get(name) or next(more) for name in names}
        for axes, (key, label) in zip(figure.subplots(2, 3).ravel(), SCORES.items()):
            for name in names:
                if key == "psnr" and name == "post-processing":
                    continue  # its images are for the model's eyes
                points = sorted((row["bpp"], row[key]) for row in rows if row["path"] == name)
                style = "--" if name.endswith("reconstruction") else "-"
                line = {"linestyle": style, "marker": "o", "markersize": 3.5, "linewidth": 1.6}
                axes.plot(*zip(*points), label=name, color=colors[name], **line)
            if key in best:
                axes.axhline(best[key], color=rd_plot.INK, linewidth=0.9, linestyle=(0, (4, 3)), label="not compressed")
            axes.set_title(label, loc="left", fontsize=9.5, color=rd_plot.INK)
            axes.set_xlabel("bits per pixel, real bytes")
            axes.grid(color=rd_plot.FAINT, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(length=0)
        lines, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=min(len(labels), 7), frameon=False, fontsize=8.5)
    return figure


# -- command --------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a mistake gives one sentence and the exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a run of experiments/transform_neck_mini.py")
    parser.add_argument(
        "--model", default="llava-mini", help="the language model: a preset or a weights file (%(default)s)"
    )
    parser.add_argument(
        "--clip", default="pqvae-mini", help="whose tower it is: a preset of CLIP features (%(default)s)"
    )
    parser.add_argument(
        "--also", metavar="LABEL=FOLDER", type=_labelled, action="append", default=[], help="add d1 of another run"
    )
    parser.add_argument("--scenes", type=_timing.positive, default=300, help="test scenes (%(default)s)")
    parser.add_argument("--episodes", type=_timing.positive, default=500, help="of few-shot (%(default)s)")
    parser.add_argument("--qualities", type=int, nargs="+", help="of the codecs (all)")
    parser.add_argument("--out", metavar="FILE.png", type=Path, help="draw the plots")
    parser.add_argument("--json", metavar="FILE", type=Path, help="keep the results here, and go on from them")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    try:
        _run(parser.parse_args(arguments))
    except JaxsemError as error:
        print(f"neck_curves: {error}", file=sys.stderr)
        return 2
    return 0


def _labelled(text: str) -> tuple[str, Path]:
    label, equals, folder = text.partition("=")
    if not (label and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=FOLDER")
    return label, Path(folder)


def _run(options: argparse.Namespace) -> None:
    if options.out is not None:
        make_folder(options.out.parent)
        rd_plot.check_suffix(options.out)
        check_output(options.out, options.force or options.json is not None)
    setting = {"scenes": options.scenes, "episodes": options.episodes, "model": str(options.model)}
    kept = _kept(options.json, setting, options.force)
    about = _timing.machine()
    _timing.print_machine(about)
    model, clip = jaxsem.load_mllm(options.model), jaxsem.load(options.clip).clip
    config = SceneConfig("seen")
    asked = tasks.scene_examples("test", range(options.scenes), config, clip.image_size)
    shots = tasks.few_shot_scenes("test", options.episodes, size=clip.image_size)
    record = {"benchmark": "neck_curves", "setting": setting, **about, "rows": kept.get("rows", [])}
    record["bound"] = kept.get("bound") or bound(model, clip, asked, shots)
    _say("not compressed", record["bound"])
    ways = list(find_ways(options.folder, model, clip))
    for label, folder in options.also:
        ways += other_ways(label, folder, ways[0].codec, model, clip)
    for way in ways:
        for quality in options.qualities or range(way.codec.qualities):
            known = [row for row in record["rows"] if (row["path"], row["quality"]) == (way.name, quality)]
            if not known:
                known = [{"path": way.name, "quality": quality, **measure(way, quality, asked, shots)}]
                record["rows"] += known
            if options.json is not None:
                results.write_json(options.json, record, force=True)
            _say(f"{way.name}, quality {quality}", known[0])
    if options.out is not None:
        title = f"{options.scenes} test scenes, {len(asked):,} questions; {options.episodes} few-shot episodes"
        rd_plot.save(draw(record["rows"], record["bound"], title), options.out, True)


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


def _say(name: str, row: dict[str, Any]) -> None:
    figures = "  ".join(f"{key} {row[key]:.3f}" for key in ("bpp", *SCORES) if key in row)
    print(f"{name:26} {figures}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
