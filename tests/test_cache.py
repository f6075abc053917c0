import os
import subprocess
import sys
from pathlib import Path

CODE = """
import sys
import jaxsem, jax
print(jaxsem.enable_compilation_cache())
jax.jit(lambda x: x + 1)(1.0)
"""


def run(**environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", CODE],
        capture_output=True, text=True, timeout=120, check=True, env={**kept, **environment},
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.strip()


def test_programs_are_kept_in_the_users_cache(tmp_path):
    assert run(XDG_CACHE_HOME=str(tmp_path)) == str(tmp_path / "jaxsem" / "jax")
    assert any((tmp_path / "jaxsem" / "jax").iterdir())


def test_home_is_the_default(tmp_path):
    assert run(HOME=str(tmp_path)) == str(tmp_path / ".cache" / "jaxsem" / "jax")


def test_jaxs_own_setting_wins(tmp_path):
    chosen = tmp_path / "chosen"
    assert run(XDG_CACHE_HOME=str(tmp_path / "x"), JAX_COMPILATION_CACHE_DIR=str(chosen)) == str(chosen)
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_is_no_error(tmp_path):
    Path(tmp_path, "file").write_text("")
    assert run(XDG_CACHE_HOME=str(tmp_path / "file")) == "None"
