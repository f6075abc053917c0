"""What all tests share: eight simulated devices, a compilation cache that outlives the run, and the shared data."""

import os
from pathlib import Path

# Both must be set before JAX is imported, which is why they stand here and not in a fixture.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
_cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_home / "jaxsem" / "test-compilations"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# XLA at its lowest level takes a third less of the suite's time: tests run each program a few times. What programs compute must
# not depend on it; the tests that look at that set it back (`full_compilation`).
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# The shapes in the signatures of these are checked at every call that a test makes.
_CHECKED = ("data.batching", "data.photos", "nn.ops", "quantize", "shapes", "training")
install_import_hook([f"jaxsem.{name}" for name in _CHECKED], "beartype.beartype")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder `shared/data` beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data in {folder}")
    return folder


@pytest.fixture(scope="module")
def full_compilation():
    """XLA as users run it, for a module of tests."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def one_device(monkeypatch):
    """Trainings on one device: for a checkpoint on eight, Orbax compiles a slice of every array."""
    import jax

    from jaxsem.training import sharding, stages

    one = sharding.make_mesh(devices=jax.devices()[:1])
    for module in (sharding, stages):
        monkeypatch.setattr(module, "make_mesh", lambda: one)


@pytest.fixture(scope="session")
def tiny_codec():
    """A variable-rate ELIC of a few thousand random parameters: everything works, nothing looks good."""
    from jaxsem import calibration, presets
    from jaxsem.codecs import Elic, ElicConfig, init_params

    config = ElicConfig((8, 8, 8), 16, 8, (4, 12), (8, 8), lambdas=(0.001, 0.01))
    module = Elic(config)
    params = init_params(module, 1)
    # Random transforms give latents near zero; larger ones exercise the tables and the escapes.
    params["gain_y"]["forward"] = params["gain_y"]["forward"] + 4.0
    params["gain_z"]["forward"] = params["gain_z"]["forward"] + 2.0
    codec = presets.freeze("tiny", module, params)
    return calibration.calibrate(codec, presets.bundled_photos())


@pytest.fixture(scope="session")
def noise_photo():
    """A function (height, width, seed) -> uint8 image with structure at several scales."""
    import numpy as np

    def make(height, width, seed=0):
        rng = np.random.default_rng(seed)
        image = np.zeros((height, width, 3))
        for step in (1, 4, 16, 64):
            coarse = rng.normal(0, 20 + step / 2, (-(-height // step), -(-width // step), 3))
            image += coarse.repeat(step, 0).repeat(step, 1)[:height, :width]
        return np.clip(image + 128, 0, 255).astype(np.uint8)

    return make


@pytest.fixture(scope="session")
def tiny_preset(tiny_codec, tmp_path_factory) -> str:
    """The folder of `tiny_codec`'s weights file, as `--preset` takes it."""
    from jaxsem import presets

    folder = tmp_path_factory.mktemp("presets") / "tiny"
    folder.mkdir()
    presets.save(tiny_codec, folder, "elic", {})
    return str(folder)


@pytest.fixture
def command(capsysbinary):
    """Runs the `jaxsem` command in this process: `command("info", path)` gives the exit status, its output and its errors."""
    from jaxsem.cli import main

    def run(*arguments) -> tuple[int, bytes, str]:
        capsysbinary.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse, on --help and on misuse
            status = exit.code
        out, err = capsysbinary.readouterr()
        return status, out, err.decode()

    return run
