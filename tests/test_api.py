import subprocess
import sys
import time

import pytest

import jaxsem

HEAVY = ("tensorflow", "torch", "orbax", "grain", "matplotlib", "tensorflow_datasets", "transformers")


@pytest.mark.parametrize("name", jaxsem.__all__)
def test_every_public_name_is_there(name):
    assert getattr(jaxsem, name) is not None
    assert name in dir(jaxsem)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        jaxsem.nope  # noqa: B018


def test_importing_and_using_the_api_loads_nothing_heavy():
    code = (
        "import sys, jaxsem; [getattr(jaxsem, n) for n in jaxsem.__all__]; import jaxsem.commands.compress; "
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_import_is_quick():
    def once() -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import jaxsem"], check=True, timeout=60)
        return time.perf_counter() - begin

    assert min(once() for _ in range(3)) < 1.5
