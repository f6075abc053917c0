"""`jaxsem presets`: what there is."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import jax

from jaxsem.codecs import build_module, param_shapes
from jaxsem.commands import console
from jaxsem.presets import ASSETS, PRESETS, Preset


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
    shapes = param_shapes(build_module(preset.system, config))
    return {
        "name": preset.name,
        "system": preset.system,
        "summary": preset.summary,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "qualities": max(len(config["lambdas"]), 1),
        "weights": preset.weights,
        "bytes": None if preset.weights is None else Path(ASSETS, preset.weights).stat().st_size,
        "sha256": preset.sha256,
        "licence": preset.licence,
        "trained_on": preset.trained_on,
        "recipe": preset.recipe,
        "config": config,
        "results": [dict(zip(("quality", "bpp", "psnr", "ms_ssim"), row, strict=True)) for row in preset.results],
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
            forms = {"quality": "g", "bpp": ".3f", "psnr": ".2f", "ms_ssim": ".4f"}
            lines = [[format(row[name], form) for name, form in forms.items()] for row in record["results"]]
            measured = console.table([("quality", "bpp", "PSNR dB", "MS-SSIM"), *lines], left=0)
            blocks.append(f"{record['name']}, measured on {record['results_on']}\n{measured}")
    return "\n\n".join(blocks)


def _weights(record: dict) -> str:
    return "yours: --weights FILE" if record["bytes"] is None else f"shipped, {record['bytes'] / 1e6:.1f} MB"


def _notes(record: dict) -> str:
    trained = "" if record["trained_on"] == "-" else f"; trained on {record['trained_on']}"
    recipe = f"; recipe {record['recipe']}" if record["recipe"] else ""
    return f"{record['name']}: {record['summary']}{trained}{recipe}"
