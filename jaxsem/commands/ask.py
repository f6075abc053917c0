"""`jaxsem ask`: answers to questions about a picture, or about a `.jsem` file whose image is never decoded."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsem.cache import enable_compilation_cache
from jaxsem.commands import console
from jaxsem.commands.weights import Finder
from jaxsem.container import MAGIC, unpack
from jaxsem.data.images import read_image
from jaxsem.errors import FormatError, InputError
from jaxsem.files import read_bytes
from jaxsem.pipeline import decompress
from jaxsem.presets import load_mllm
from jaxsem.systems.feature_codec import FeatureCodec
from jaxsem.systems.mllm import Mllm
from jaxsem.systems.neck_codec import Reader

DEFAULT_MODEL = "llava-mini"


def run(args: Namespace) -> int:
    """Answers the questions of `args`; returns the exit status."""
    if not all(question.strip() for question in args.question):
        raise InputError("a question is empty: write what to ask, such as 'How many objects are there?'")
    enable_compilation_cache()
    data = read_bytes(args.input)
    options = {"weights": "int8"} if args.int8 else {}
    if data.startswith(MAGIC):
        answers, path = _ask_file(args, data, options)
    else:
        answers, path = _ask(load_mllm(args.model, **options), read_image(data), args), "image"
    if args.json:
        rows = [{"question": q, "answer": a} for q, a in zip(args.question, answers, strict=True)]
        console.say_json({"file": args.input, "path": path, "answers": rows})
    else:
        for answer in answers:
            console.say(answer)
    return 0


def _ask_file(args: Namespace, data: bytes, options: dict[str, Any]) -> tuple[list[str], str]:
    """The answers, and how the model saw the file: through the neck where the codec has one, or the decoded image."""
    file = unpack(data)
    if len(file.items) != 1:
        raise FormatError(f"{args.input} is an archive of {len(file.items)} images: ask about one file")
    codec = Finder(args.preset, args.weights).codec_for(file)
    if isinstance(codec, FeatureCodec):
        raise InputError(f"{args.input} holds a CLIP feature, which no language model reads: see jaxsem caption")
    model = load_mllm(args.model, **options)
    if getattr(codec, "neck", None) is not None and not args.reconstruct:
        return _ask(Reader(codec, model), data, args), "neck"
    [image] = decompress(codec, [data])
    return _ask(model, image, args), "reconstruction"


def _ask(model: Mllm | Reader, seen: np.ndarray | bytes, args: Namespace) -> list[str]:
    questions: Sequence[str] = args.question
    if not args.options:
        return model.answer([seen] * len(questions), questions, max_new_tokens=args.max_tokens)
    scores = model.score([seen] * len(questions), questions, [args.options] * len(questions))
    return [args.options[int(best)] for best in scores.argmax(axis=1)]
