"""`jaxsem classify`: the class of what a `.jsem` file shows, from its feature alone."""

from argparse import Namespace

from jaxsem.cache import enable_compilation_cache
from jaxsem.commands import console
from jaxsem.commands.console import Failures
from jaxsem.commands.feature_inputs import read_all, read_labels
from jaxsem.commands.weights import Finder
from jaxsem.systems.feature_tasks import classify


def run(args: Namespace) -> int:
    """Classifies the files of `args`; returns the exit status."""
    labels = read_labels(args.labels, args.labels_file)
    enable_compilation_cache()
    finder, failures, rows = Finder(args.preset, args.weights, args.clip), Failures(), []
    for named in read_all(args.files, finder, failures):
        found = classify(named.codec, named.features, labels, args.template or None)
        for name, ranking in zip(named.names, found, strict=True):
            best = ranking[: args.top]
            rows.append({"file": name, "labels": [{"label": label, "probability": share} for label, share in best]})
            if not args.json:
                console.say(f"{name}: " + ", ".join(f"{label} {100 * share:.1f} %" for label, share in best))
    if args.json:
        console.say_json({"files": rows, "failed": failures.as_json()})
    return failures.report(len(rows))
