"""`jaxsem weights`: a CompressAI file to ours and back, one rate of several, and what it refuses."""

import compressai_reference as reference
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxsem import presets
from jaxsem.presets import Preset
from jaxsem.weights.compressai import load_compressai, write_compressai

NAME = "scale-hyperprior"


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A file of CompressAI's keys for the preset `tiny`."""
    preset = Preset("tiny", NAME, reference.CONFIGS[NAME], "a test")
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "tiny": preset})
    path = tmp_path / "theirs.safetensors"
    write_compressai(path, *load_compressai(reference.random_state_dict(NAME), NAME, reference.CONFIGS[NAME]))
    return path


def test_there_and_back(command, theirs, tmp_path):
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    status, out, err = command("weights", "tiny", "--weights", theirs, "-o", ours)
    assert (status, err) == (0, "")
    codec = presets.load(str(ours))
    assert codec.arithmetic == "float"
    assert codec.digest.hex()[:12] in out.decode()
    assert f"jaxsem calibrate {ours}" in out.decode()
    assert presets.card_of(str(ours))["converted"]["from"] == "theirs.safetensors"

    status, out, err = command("weights", ours, "--to", "compressai", "-o", back)
    assert (status, err) == (0, "")
    assert "compressai.models.ScaleHyperprior(8, 12); call its update()" in out.decode()
    expected, actual = load_file(theirs), load_file(back)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith("quantiles"):  # the tails are found anew, the medians stay
            np.testing.assert_array_equal(actual[key][..., 1], value[..., 1])
        else:
            np.testing.assert_array_equal(actual[key], value, err_msg=key)


def test_one_rate_of_several(command, tiny_preset, tmp_path):
    one, theirs = tmp_path / "one.safetensors", tmp_path / "theirs.safetensors"
    status, _, err = command("weights", tiny_preset, "--quality", 0.5, "-o", one, "-q")
    assert (status, err) == (0, "")
    codec = presets.load(str(one))
    assert (codec.lambdas, codec.exact) == ((), None)
    assert presets.card_of(str(one))["converted"]["quality"] == 0.5

    status, out, _ = command("weights", tiny_preset, "--quality", 0.5, "--to", "compressai", "-o", theirs)
    assert status == 0
    assert "none of its own classes fits" in out.decode()
    kernel = load_file(theirs)["g_a.13.weight"]
    np.testing.assert_allclose(kernel.transpose(2, 3, 1, 0), codec.params["g_a"]["layers_13"]["kernel"], rtol=1e-6)
    status, out, _ = command("weights", one, "--to", "elicre", "-o", theirs, "--force")
    assert status == 0
    assert "cc_transforms.0.0.weight" in load_file(theirs)


def test_mistakes_are_one_sentence(command, theirs, tiny_preset, tmp_path):
    new = tmp_path / "new.safetensors"

    def refused(*arguments):
        status, out, err = command("weights", *arguments)
        assert (status, out, err.count("\n"), new.exists()) == (2, b"", 1, False)
        return err

    assert "qualities 0 to 1, and compressai has one rate: name one with --quality" in refused(
        tiny_preset, "--to", "compressai", "-o", new
    )
    assert "qualities 0 to 1, not 7" in refused(tiny_preset, "--quality", 7, "-o", new)
    assert "has one rate" in refused("tiny", "--weights", theirs, "--quality", 0, "-o", new)
    assert "'compressai', not 'elicre'" in refused("tiny", "--weights", theirs, "--to", "elicre", "-o", new)
    assert "codec of features" in refused("pqvae-mini", "-o", new)
    assert "exists already" in refused("tiny", "--weights", theirs, "-o", theirs)
    assert "surplus" in refused("bmshj2018-factorized", "--weights", theirs, "-o", new)
