"""The `jaxsem` command: its arguments, and how mistakes reach the user. The work is in `jaxsem.commands`.

Exit status: 0 all is well; 1 some of many files failed; 2 nothing was done, for the reason in the sentence on standard
error; 130 interrupted; 141 the reader of standard output went away.
"""

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from jaxsem.commands import console
from jaxsem.errors import JaxsemError
from jaxsem.version import __version__

DEFAULT_PRESET = "elic-mini"
_IMAGE_FORMATS = ("png", "webp", "tiff", "bmp", "ppm", "jpg", "avif")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: The arguments, without the program's name; those of this process by default.

    Returns:
      The exit status; see the module's docstring.
    """
    args = build_parser().parse_args(argv)
    _silence_libraries()
    try:
        status = importlib.import_module(f"jaxsem.commands.{args.command}").run(args)
        console.flush()
        return status
    except JaxsemError as error:
        console.complain(str(error))
        return 2
    except MemoryError:
        console.complain("the memory does not suffice: compress or decompress smaller images, or fewer at a time")
        return 2
    except KeyboardInterrupt:
        console.complain("interrupted; what was finished before is complete, and nothing is half-written")
        return 130
    except BrokenPipeError:
        console.forget_output()
        return 141


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; a command's name in `args.command` is its module in `jaxsem.commands`."""
    parser = argparse.ArgumentParser(
        prog="jaxsem",
        description="Compress images with learned codecs. `jaxsem COMMAND --help` tells more about each command.",
    )
    parser.add_argument("--version", action="version", version=f"jaxsem {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        _demo,
        _compress,
        _decompress,
        _info,
        _eval,
        _train,
        _calibrate,
        _weights,
        _features,
        _classify,
        _caption,
        _refer,
        _ask,
        _complexity,
        _presets,
    ):
        add(commands)
    return parser


def _command(commands, name: str, module: str, summary: str, details: str = "") -> argparse.ArgumentParser:
    description = f"{summary[0].upper()}{summary[1:]}. {details}".strip()
    parser = commands.add_parser(name, help=summary, description=description)
    parser.set_defaults(command=module)
    return parser


def _demo(commands) -> None:
    parser = _command(
        commands,
        "demo",
        "demo",
        "compress bundled photos and write a page with pictures and a table",
        "Nothing is downloaded and nothing is opened; the last line names the page.",
    )
    parser.add_argument("--out", metavar="DIR", default="jaxsem-demo", help="folder of the page (default: %(default)s)")
    _add_force(parser)
    _add_quiet(parser)


def _compress(commands) -> None:
    parser = _command(
        commands,
        "compress",
        "compress",
        "compress photos to .jsem files",
        "Each photo gets a .jsem file beside it, or in the folder OUT, where the tree of a given folder is mirrored. A "
        "bad photo among many does not stop the others; the exit status is then 1.",
    )
    add = parser.add_argument
    add("photos", metavar="PHOTO", nargs="+", help="a photo, a folder (all photos below it), or - for standard input")
    add("-o", "--output", metavar="OUT", help="a file for one photo, a folder for many, or - for standard output")
    add("--archive", metavar="FILE", help="write all photos to this one file instead")
    _add_weights(parser, f"the codec: a preset, a folder of weights or a Hugging Face id (default: {DEFAULT_PRESET})")
    quality = "0 gives the smallest file; fractions are allowed (default: the middle of the preset's range)"
    add("--quality", metavar="Q", type=float, help=quality)
    _add_arithmetic(parser)
    _add_clip(parser)
    _add_demands(parser)
    _add_force(parser)
    _add_quiet(parser)
    add("--json", action="store_true", help="print the results as JSON")


def _add_demands(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "what matters",
        "For codecs of RSIC, which can be told. Marks may be repeated, and end in @WEIGHT, from 0 to 1.",
    )

    def mark(option: str, metavar: str, text: str) -> None:
        group.add_argument(option, metavar=metavar, action="append", default=[], help=text)

    mark("--refer", "PHRASE", "what deserves more bits, in words")
    mark("--refer-box", "X,Y,W,H", "a box that does, in pixels")
    mark("--refer-mask", "FILE", "a mask that does: a picture of the same size, white there, or bool in a .npy file")
    mark("--refer-click", "X,Y", "what is around a pixel")
    group.add_argument("--background", metavar="WEIGHT", type=float, help="weight of all else (default: 0)")
    levels = "levels of weights that are told apart, 1 to 8 (default: the preset's)"
    group.add_argument("--levels", metavar="N", type=int, help=levels)
    group.add_argument("--text", metavar="TEXT", help='the description; "" for none (default: one is written)')
    _add_diffusion(group)


def _decompress(commands) -> None:
    parser = _command(
        commands,
        "decompress",
        "decompress",
        "bring images back from .jsem files",
        "Each image gets a PNG beside its file, or in the folder OUT; the images of an archive get the names that it "
        "holds, in a folder of the archive's name. The codec is found by the digest in the file.",
    )
    add = parser.add_argument
    add("files", metavar="FILE", nargs="+", help="a .jsem file or archive, a folder of them, or - for standard input")
    output = "a file for one image (its suffix chooses the format), a folder for many, or - for standard output"
    add("-o", "--output", metavar="OUT", help=output)
    add("--format", choices=_IMAGE_FORMATS, default="png", help="where OUT does not choose it (default: %(default)s)")
    _add_weights(parser, "the codec, where the file's own is not among the shipped presets")
    _add_decoding(parser)
    _add_force(parser)
    _add_quiet(parser)
    add("--json", action="store_true", help="print the results as JSON")


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how images are drawn", "For files of codecs that decode by a diffusion model.")
    add = group.add_argument
    add("--steps", metavar="N", type=int, help="of the sampler (default: the preset's)")
    add("--recurrences", metavar="N", type=int, help="how often each step is taken (default: the preset's)")
    add("--gamma", metavar="X", type=float, help="how strongly the file's latents pull (default: the preset's)")
    add("--scale", metavar="X", type=float, help="of classifier-free guidance (default: the preset's)")
    add("--seed", metavar="N", type=int, help="of the noise (default: 0, so that a decode repeats)")
    add("--fast", action="store_true", help="few steps, each taken once")
    _add_clip(group)
    _add_diffusion(group)


def _add_diffusion(group: argparse._ArgumentGroup) -> None:
    text = "diffusion model of a codec that comes without: a folder or Hugging Face id of diffusers"
    group.add_argument("--diffusion", metavar="FOLDER", help=text)


def _info(commands) -> None:
    summary = "tell what .jsem files hold: sizes by section, bits per pixel, quality, preset"
    add = _command(commands, "info", "info", summary).add_argument
    add("files", metavar="FILE", nargs="+", help="a .jsem file or archive, a folder of them, or - for standard input")
    add("--json", action="store_true", help="print JSON instead of tables")


def _eval(commands) -> None:
    parser = _command(
        commands,
        "eval",
        "evaluate",
        "measure a codec on a data set",
        "Every image is compressed to the bytes of a .jsem file and decompressed from them; rates count whole files.",
    )
    add = parser.add_argument
    add("preset", metavar="PRESET", help="a preset, a folder of weights or a Hugging Face id")
    add(
        "--data",
        metavar="SPEC",
        required=True,
        help="a folder, tfds:name/split, scenes:split, or a FILE.npy of `jaxsem features`",
    )
    add("--weights", metavar="FILE", help="weights for a preset that comes without")
    add("--quality", metavar="Q", type=float, nargs="+", help="qualities to measure (default: all whole ones)")
    add("--limit", metavar="N", type=_positive, help="use the first N images only")
    _add_arithmetic(parser)
    _add_clip(parser)
    add("--json", metavar="FILE", help="write the record, with rows by image, to FILE; - is standard output")
    _add_force(parser)
    _add_quiet(parser)


def _train(commands) -> None:
    parser = _command(
        commands,
        "train",
        "train",
        "train a codec by a recipe",
        "Checkpoints, metrics and weights go to the folder DIR; a run that was interrupted is resumed from there.",
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="name of a recipe in experiments/, or a path to one")
    add("--workdir", metavar="DIR", help="folder of the run (default: runs/NAME, after the recipe)")
    overrides = "change a setting of the recipe; may be repeated"
    add("--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides", help=overrides)
    add("--quick", action="store_true", help="a tiny run that shows that everything works")
    _add_quiet(parser)


def _calibrate(commands) -> None:
    parser = _command(
        commands,
        "calibrate",
        "calibrate",
        "give a codec exact arithmetic, so that its files decode on every device",
        "Writes a weights file of ours, also from a published checkpoint. Calibration runs the codec on a few photos; share "
        "the file that it writes, for another run on another device may choose other units.",
    )
    add = parser.add_argument
    add("preset", metavar="PRESET", help="a preset, a folder of weights or a Hugging Face id")
    add("--weights", metavar="FILE", help="weights for a preset that comes without: ours, or a CompressAI checkpoint")
    add("--data", metavar="SPEC", help="photos, a folder or tfds:name/split (default: the bundled ones)")
    add("--limit", metavar="N", type=_positive, default=12, help="use the first N photos (default: %(default)s)")
    add("-o", "--output", metavar="OUT", required=True, help="the file, or a folder for model.safetensors")
    _add_force(parser)
    _add_quiet(parser)


def _weights(commands) -> None:
    parser = _command(
        commands,
        "weights",
        "convert",
        "convert weights of image codecs, CompressAI's to ours and ours to CompressAI's",
        "Networks and densities stay as they are, and nothing is run. What goes to CompressAI is a safetensors file with its keys: "
        "load_state_dict(safetensors.torch.load_file(OUT)), then update().",
    )
    add = parser.add_argument
    add("preset", metavar="PRESET", help="a preset, a folder or file of weights, or a Hugging Face id")
    add("--weights", metavar="FILE", help="weights for a preset that comes without: ours, or a CompressAI checkpoint")
    layouts = "ours, CompressAI's, or that of ELIC's re-implementation (default: %(default)s)"
    add("--to", choices=("jaxsem", "compressai", "elicre"), default="jaxsem", help=layouts)
    add("--quality", metavar="Q", type=float, help="of a codec of several rates, the one to keep: others have one only")
    add("-o", "--output", metavar="OUT", required=True, help="the file, or a folder for model.safetensors")
    _add_force(parser)
    _add_quiet(parser)


def _features(commands) -> None:
    parser = _command(
        commands,
        "features",
        "features",
        "write the CLIP features of a data set to one array",
        "FILE.npy gets a unit feature for each image, and FILE.json beside it says what they are: model, file names, labels. All "
        "devices share each batch. A bad image among many is left out; the exit status is then 1.",
    )
    add = parser.add_argument
    add(
        "data",
        metavar="DATA",
        help="a folder of photos (its sub-folders are classes), tfds:name/split, or scenes:split",
    )
    add("-o", "--output", metavar="FILE.npy", required=True, help="the array")
    clip = parser.add_mutually_exclusive_group()
    clip.add_argument("--clip", metavar="CLIP", help="a folder of weights, a Hugging Face id, or a file of weights")
    preset = "the preset whose CLIP to take (default: %(default)s)"
    clip.add_argument("--preset", metavar="NAME", default="pqvae-mini", help=preset)
    add("--clip-config", metavar="NAME", help="sizes for a file of weights, such as ViT-L/14@336px")
    add("--batch", metavar="N", type=_positive, help="images a batch, over all devices (default: by the device)")
    add("--limit", metavar="N", type=_positive, help="use the first N images only")
    add("--half", action="store_true", help="store float16 instead of float32")
    _add_force(parser)
    _add_quiet(parser)


def _classify(commands) -> None:
    parser = _command(
        commands,
        "classify",
        "classify",
        "tell which of some classes the features in .jsem files show",
        "Zero-shot: any labels will do. For files of --preset pqvae-mini or of another codec of features.",
    )
    add = parser.add_argument
    add("files", metavar="FILE", nargs="+", help="a .jsem file or archive, a folder of them, or - for standard input")
    add("--labels", metavar="A,B,...", help="the classes, separated by commas")
    add("--labels-file", metavar="FILE", help="the classes, one on each line")
    add(
        "--template",
        metavar="TEXT",
        action="append",
        help="a prompt with {} for the class; may be repeated, and is averaged",
    )
    add("--top", metavar="N", type=_positive, default=3, help="how many classes to show (default: %(default)s)")
    _add_feature_codec(parser)


def _caption(commands) -> None:
    parser = _command(
        commands,
        "caption",
        "caption",
        "write a sentence about what the features in .jsem files show",
        "For files of --preset pqvae-mini or of another codec of features with a captioner.",
    )
    add = parser.add_argument
    add("files", metavar="FILE", nargs="+", help="a .jsem file or archive, a folder of them, or - for standard input")
    add("--beams", metavar="N", type=_positive, default=1, help="captions searched in parallel (default: %(default)s)")
    _add_feature_codec(parser)


def _refer(commands) -> None:
    parser = _command(
        commands,
        "refer",
        "refer",
        "find what a phrase refers to in a picture, from compressed features of its regions",
        "Regions are areas of like colour, which serves pictures as plain as our scenes; for photos give --sam, --box or --masks.",
    )
    add = parser.add_argument
    add("image", metavar="IMG", help="a picture")
    add("phrase", metavar="PHRASE", help="such as 'the small green cross'")
    add("--sam", metavar="SAM", help="find regions with SAM: a folder of weights, a Hugging Face id or a checkpoint")
    add("--box", metavar="L,T,R,B", action="append", help="a region, in pixels; may be repeated")
    add("--masks", metavar="FILE.npy", help="regions: bool [r, height, width], or a label map")
    add(
        "--in-place",
        action="store_true",
        help="encode regions where they are, not as crops, so that size and place count",
    )
    add("--original", action="store_true", help="use features as they are, without compression, to compare")
    add("--quality", metavar="Q", type=float, help="of the features (default: the lowest)")
    add("-o", "--output", metavar="OUT", help="write the picture with all but the region darkened")
    _add_force(parser)
    _add_feature_codec(parser)


def _ask(commands) -> None:
    parser = _command(
        commands,
        "ask",
        "ask",
        "answer questions about a picture or a .jsem file",
        "A file of a codec with a transform-neck is read without decoding its image; of other codecs the image is decoded first.",
    )
    add = parser.add_argument
    add("input", metavar="FILE", help="a picture or a .jsem file")
    add("question", metavar="QUESTION", nargs="+", help="such as 'How many objects are there?'")
    add(
        "--model",
        metavar="MODEL",
        default="llava-mini",
        help="a preset, or a folder or id of LLaVA (default: %(default)s)",
    )
    add("--options", metavar="TEXT", nargs="+", help="choose the likeliest of these instead of writing freely")
    add("--reconstruct", action="store_true", help="decode the image, and show the model that")
    add("--max-tokens", metavar="N", type=_positive, default=64, help="longest answer (default: %(default)s)")
    add("--int8", action="store_true", help="for a published model: hold its language part in 8 bits")
    _add_weights(parser, "the codec, where the file's own is not among the shipped presets")
    add("--json", action="store_true", help="print JSON")


def _add_feature_codec(parser: argparse.ArgumentParser) -> None:
    _add_weights(parser, "the codec, where the file's own is not among the shipped presets")
    _add_clip(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_clip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clip", metavar="CLIP", help="for --preset pqvae: a folder or Hugging Face id of CLIP")


def _complexity(commands) -> None:
    parser = _command(
        commands,
        "complexity",
        "complexity",
        "count parameters and operations of the transform-neck and of what it saves",
        "Table 3 of the paper, counted from the modules themselves; nothing is computed.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _presets(commands) -> None:
    parser = _command(commands, "presets", "presets", "list the presets: sizes, licence, measured rate-distortion")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_weights(parser: argparse.ArgumentParser, summary: str) -> None:
    parser.add_argument("--preset", metavar="NAME", help=summary)
    parser.add_argument("--weights", metavar="FILE", help="weights file for the preset, or a codec of its own")


def _add_arithmetic(parser: argparse.ArgumentParser) -> None:
    summary = "what tables are decided in: exact for files that decode on every device (default: exact, if calibrated)"
    parser.add_argument("--arithmetic", choices=("exact", "float"), help=summary)


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace existing files")


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _silence_libraries() -> None:
    """Keeps the notes of JAX and XLA (no accelerator found, a cache entry not written) from a user's terminal."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("jax").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*persistent compilation cache.*")


if __name__ == "__main__":
    sys.exit(main())
