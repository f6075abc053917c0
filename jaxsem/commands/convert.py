"""`jaxsem weights`: converts the weights of a codec of images, from CompressAI's files to ours and from ours to CompressAI's."""

from argparse import Namespace
from datetime import date
from pathlib import Path

from jaxsem import presets
from jaxsem.codec import Codec
from jaxsem.codecs import system_of
from jaxsem.codecs.single_rate import at_one_rate
from jaxsem.commands import console
from jaxsem.errors import InputError
from jaxsem.files import check_output
from jaxsem.systems.neck_codec import NeckCodec, save_neck_codec
from jaxsem.weights.compressai import class_of, write_compressai


def run(args: Namespace) -> int:
    """Converts the codec of `args`; returns the exit status."""
    path = presets.weights_path(args.output)
    check_output(path, args.force)
    codec = _open(args.preset, args.weights)
    say = _write_ours(codec, path, args) if args.to == "jaxsem" else _write_theirs(codec, path, args)
    if not args.quiet:
        console.say(f"{path}: {say}")
    return 0


def _open(name: str, weights: str | None) -> Codec:
    preset = presets.PRESETS.get(name)
    features = preset is not None and preset.system == presets.FEATURES
    # A published checkpoint is to be taken as it is, without calibration.
    codec = None if features else presets.load(name, weights=weights, arithmetic=weights and "float")
    if not isinstance(codec, Codec):
        raise InputError(f"{name} is a codec of features; only weights of codecs of images are converted")
    return codec


def _write_ours(codec: Codec, path: Path, args: Namespace) -> str:
    if args.quality is not None:
        codec = presets.freeze(codec.name, *at_one_rate(codec.module, codec.params, args.quality), half=False)
    origin = {"from": Path(args.weights or args.preset).name, "date": date.today().isoformat()}
    if args.quality is not None:
        origin["quality"] = args.quality
    card = {**presets.card_of(args.preset, args.weights), "converted": origin}
    if isinstance(codec, NeckCodec):
        save_neck_codec(codec, path, system_of(codec.module), card, args.force, half=False)
    else:
        presets.save(codec, path, system_of(codec.module), card, args.force)
    ready = "" if codec.exact is not None else f"; jaxsem calibrate {path} gives it exact arithmetic"
    return f"digest {codec.digest.hex()[:12]}{ready}"


def _write_theirs(codec: Codec, path: Path, args: Namespace) -> str:
    if codec.lambdas and args.quality is None:
        raise InputError(
            f"{codec.name} has qualities 0 to {codec.qualities - 1}, and {args.to} has one rate: name one with --quality"
        )
    write_compressai(path, codec.module, codec.params, args.to, args.quality, args.force)
    if args.to == "elicre":
        return "for the Network of ELIC's re-implementation; call its update() after load_state_dict()"
    model = class_of(codec.module.config)
    if model is None:
        return "in CompressAI's keys; none of its own classes fits: load it into one that does, then call its update()"
    return f"for compressai.models.{model}; call its update() after load_state_dict()"
