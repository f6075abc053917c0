"""`jaxsem train`: trains by a recipe."""

from argparse import Namespace

from jaxsem.cache import enable_compilation_cache
from jaxsem.commands import console


def run(args: Namespace) -> int:
    """Trains by the recipe of `args`; returns the exit status."""
    from jaxsem.recipes import run_recipe  # loads optimisers and checkpoints, which no other command needs

    enable_compilation_cache()
    weights = run_recipe(args.recipe, args.workdir, args.overrides, args.quick, args.quiet)
    if not args.quiet:
        console.say(f"the weights are in {weights}: use them with --preset {weights}")
    return 0
