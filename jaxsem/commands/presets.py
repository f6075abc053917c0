"""`jaxsem presets`: what there is."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import jax

from jaxsem.backbones import llava
from jaxsem.codecs import build_module, param_shapes
from jaxsem.commands import console
from jaxsem.preset_records import FEATURES, LANGUAGE, NECK, Preset
from jaxsem.presets import ASSETS, PRESETS
from jaxsem.systems import feature_config, transform_neck
from jaxsem.systems.transform_neck import TransformNeck

# What a measured number is called, and its format.
COLUMNS = {
    "quality": ("quality", "g"),
    "bpp": ("bpp", ".3f"),
    "psnr": ("PSNR dB", ".2f"),
    "ms_ssim": ("MS-SSIM", ".4f"),
    "bytes": ("bytes", ".1f"),
    "bpd": ("bits/dimension", ".3f"),
    "cosine": ("cosine", ".4f"),
    "accuracy_before": ("accuracy before", ".3f"),
    "accuracy": ("accuracy", ".3f"),
    "cider_d": ("CIDEr-D", ".3f"),
    "options": ("with options", ".3f"),
    "yes_no": ("yes or no", ".3f"),
    "box": ("boxes", ".3f"),
    "few_shot": ("few-shot", ".3f"),
}


def run(args: Namespace) -> int:
    """Lists the presets; returns the exit status."""
    records = [describe_preset(preset) for preset in PRESETS.values()]
    if args.json:
        console.say_json({"presets": records})
    else:
        console.say(as_text(records))
    return 0


def describe_preset(preset: Preset) -> dict:
    """A preset as plain JSON: with `parameters` counted and `bytes` of the weights (None if not shipped)."""
    config = asdict(preset.config)
    if preset.system == FEATURES:
        shapes, qualities = feature_config.param_shapes(preset.config), len(preset.config.rates)
    elif preset.system == NECK:
        codec = build_module(preset.config.system, asdict(preset.config.codec))
        shapes = {"codec": param_shapes(codec), "neck": transform_neck.param_shapes(TransformNeck(preset.config.neck))}
        qualities = max(len(preset.config.lambdas), 1)
    elif preset.system == LANGUAGE:
        shapes, qualities = llava.param_shapes(llava.Llava(preset.config)), 1
    else:
        shapes, qualities = param_shapes(build_module(preset.system, config)), max(len(preset.config.lambdas), 1)
    return {
        "name": preset.name,
        "system": preset.system,
        "summary": preset.summary,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "qualities": qualities,
        "weights": preset.weights,
        "bytes": None if preset.weights is None else Path(ASSETS, preset.weights).stat().st_size,
        "sha256": preset.sha256,
        "licence": preset.licence,
        "trained_on": preset.trained_on,
        "recipe": preset.recipe,
        "config": config,
        "results": [dict(zip(preset.columns, row, strict=True)) for row in preset.results],
        "results_on": preset.results_on,
    }


def as_text(records: list[dict]) -> str:
    """The presets as a table, and the measured rate-distortion of those that have it."""
    head = ("preset", "licence", "parameters", "qualities", "weights")
    rows = [
        (record["name"], record["licence"], f"{record['parameters']:,}", record["qualities"], _weights(record))
        for record in records
    ]
    blocks = [console.table([head, *rows], left=2)]
    blocks.append("\n".join(_notes(record) for record in records))
    for record in records:
        if record["results"]:
            columns = list(record["results"][0])
            lines = [[format(row[name], COLUMNS[name][1]) for name in columns] for row in record["results"]]
            measured = console.table([[COLUMNS[name][0] for name in columns], *lines], left=0)
            blocks.append(f"{record['name']}, measured on {record['results_on']}\n{measured}")
    return "\n\n".join(blocks)


def _weights(record: dict) -> str:
    return "yours: --weights FILE" if record["bytes"] is None else f"shipped, {record['bytes'] / 1e6:.1f} MB"


def _notes(record: dict) -> str:
    trained = "" if record["trained_on"] == "-" else f"; trained on {record['trained_on']}"
    recipe = f"; recipe {record['recipe']}" if record["recipe"] else ""
    return f"{record['name']}: {record['summary']}{trained}{recipe}"
