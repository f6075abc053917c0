"""`python -m jaxsem` is the `jaxsem` command."""

import sys

from jaxsem.cli import main

if __name__ == "__main__":
    sys.exit(main())
