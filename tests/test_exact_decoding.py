"""A file decodes to the same symbols on every device, in every batch and under every compiler: `tools/check_exact.py` in small."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxsem import pipeline, presets
from jaxsem.container import pack

pytestmark = pytest.mark.usefixtures("full_compilation")

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
# Compilers may order sums by these; none of them may matter.
OTHER_FLAGS = "--xla_cpu_multi_thread_eigen=false --xla_cpu_max_isa=AVX --xla_cpu_enable_fast_math=true"


@pytest.fixture(scope="module")
def check_exact():
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("check_exact")
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module", params=["elic", "hyperprior"])
def golden(request):
    return GOLDEN / request.param


@pytest.fixture(scope="module")
def samples(check_exact):
    """Photos of the golden ELIC, decoded alone, by arithmetic."""
    codec = presets.load(str(GOLDEN / "elic"))
    photos = [photo[:128, :64] for photo in presets.bundled_photos()]
    return {name: (codec.in_arithmetic(name), check_exact.take_samples(codec.in_arithmetic(name), photos))
            for name in ("exact", "float")}  # fmt: skip


def test_golden_files_decode_for_ever(check_exact, golden):
    figures = check_exact.read_files(golden)
    assert figures == {"files": len(list(golden.glob("*.jsem"))), "files_differing": 0}
    assert figures["files"] >= 3


def test_a_golden_latent_is_the_one_that_was_written(check_exact, golden):
    name, expected = next(iter(json.loads((golden / "expected.json").read_text())["latents"].items()))
    codec = presets.load(str(golden))
    assert check_exact.decoded_digest(codec, (golden / name).read_bytes()) == expected
    other = presets.load(str(golden)).in_arithmetic("float")
    [[result]] = [pipeline.compress_items(other, [presets.bundled_photos()[0][:160, :200]])]
    assert check_exact.decoded_digest(codec, pack(result.item, codec.digest)) != expected


WAYS = [
    "in batches of 32",
    "in batches, backwards",
    "as one program",
    "as matrix products",
    "channels permuted",
    "divided among devices",
    "operands in bfloat16",
    "without compilation",
]
SLOW = ("without compilation", "in batches, backwards", "as one program")


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way in SLOW)) for way in WAYS])
def test_symbols_do_not_depend_on_how_they_are_decoded(check_exact, samples, way):
    count = check_exact.compare(*samples["exact"], check_exact.WAYS[way])
    assert count.photos >= 2
    assert (count.photos_differing, count.tables_differing, count.latent_difference) == (0, 0, 0.0)


def test_no_way_is_left_out(check_exact):
    assert list(check_exact.WAYS) == WAYS


@pytest.mark.parametrize("way", ["in batches of 32", "channels permuted"])
def test_float_arithmetic_does_depend_on_it_so_the_check_can_see(check_exact, samples, way):
    assert check_exact.compare(*samples["float"], check_exact.WAYS[way]).photos_differing > 0


def test_many_tables_and_symbols_are_at_stake(samples):
    _, found = samples["exact"]
    assert len(np.unique(np.concatenate([table.ravel() for table in found[0].tables[1:]]))) > 30
    assert max(np.abs(symbols).max() for symbols in found[0].symbols) > 20


@pytest.mark.parametrize("way", ["operands in bfloat16", "channels permuted"])
def test_the_shipped_preset_is_exact(check_exact, way):
    codec = presets.load("elic-mini")
    assert codec.arithmetic == "exact"
    found = check_exact.take_samples(codec, [presets.bundled_photos()[1][:64, :128]])
    assert len(found) == 4
    assert check_exact.compare(codec, found, check_exact.WAYS[way]).photos_differing == 0


@pytest.mark.slow
def test_files_of_a_process_with_other_flags_are_read_here(check_exact, golden, tmp_path):
    environment = {**os.environ, "XLA_FLAGS": OTHER_FLAGS, "OMP_NUM_THREADS": "1"}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_DISABLE_MOST_OPTIMIZATIONS"):
        environment.pop(name, None)
    command = [sys.executable, ROOT / "tools" / "check_exact.py", golden, "--write", tmp_path, "--photos", "2"]
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = check_exact.read_files(tmp_path)
    assert figures["files"] >= 2
    assert figures["files_differing"] == 0
