"""One module for each `jaxsem` command, with `run(args) -> exit status`; `jaxsem.cli` parses the arguments."""
