"""What all tests share: eight simulated devices, a compilation cache that outlives the run, and the shared data."""

import os
from pathlib import Path

# Both must be set before JAX is imported, which is why they stand here and not in a fixture.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
_cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_home / "jaxsem" / "test-compilations"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder `shared/data` beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data in {folder}")
    return folder
