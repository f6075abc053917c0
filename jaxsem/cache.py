"""JAX's persistent compilation cache: what one process has compiled, the next one loads."""

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> Path | None:
    """Lets this process keep its compiled programs for later ones; the command line calls it, a library user may.

    The folder is `JAX_COMPILATION_CACHE_DIR` if that is set, else `$XDG_CACHE_HOME/jaxsem/jax`, else
    `~/.cache/jaxsem/jax`. Every program is kept, however quick to compile or small, for a codec consists of many such;
    JAX's environment variables for these limits win. Call it before the first computation.

    Returns:
      The folder, or None if it cannot be written: then every process compiles for itself, and all else works.
    """
    folder = Path(jax.config.jax_compilation_cache_dir or _default_folder())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            return None
    except (OSError, ValueError):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for setting, value in (
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        if setting.upper() not in os.environ:
            jax.config.update(setting, value)
    return folder


def _default_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home, "jaxsem", "jax")
