"""`jaxsem caption`: a sentence about what a `.jsem` file shows, from its feature alone."""

from argparse import Namespace

from jaxsem.cache import enable_compilation_cache
from jaxsem.commands import console
from jaxsem.commands.console import Failures
from jaxsem.commands.feature_inputs import read_all
from jaxsem.commands.weights import Finder
from jaxsem.systems.feature_tasks import caption


def run(args: Namespace) -> int:
    """Captions the files of `args`; returns the exit status."""
    enable_compilation_cache()
    finder, failures, rows = Finder(args.preset, args.weights, args.clip), Failures(), []
    for named in read_all(args.files, finder, failures):
        for name, text in zip(named.names, caption(named.codec, named.features, args.beams), strict=True):
            rows.append({"file": name, "caption": text})
            if not args.json:
                console.say(f"{name}: {text}")
    if args.json:
        console.say_json({"files": rows, "failed": failures.as_json()})
    return failures.report(len(rows))
