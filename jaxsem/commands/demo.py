"""`jaxsem demo`: a page with pictures and a table, from bundled photos."""

from argparse import Namespace
from pathlib import Path

from jaxsem.cache import enable_compilation_cache
from jaxsem.demo import run_demo


def run(args: Namespace) -> int:
    """Writes the page; returns the exit status."""
    enable_compilation_cache()
    run_demo(Path(args.out), quiet=args.quiet, force=args.force)
    return 0
