"""Zero-shot accuracy over the rate: what is measured, on which features, and that nothing is measured twice."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxsem.errors import InputError
from jaxsem.systems import feature_networks
from jaxsem.systems.feature_arrays import FeatureWriter
from jaxsem.systems.feature_networks import Recipe
from jaxsem.systems.zero_shot import class_split

pytestmark = pytest.mark.slow  # runs whole commands

TOOLS = Path(__file__).resolve().parents[2] / "tools"
WIDTH, NAMES = 10, ["ape", "bee", "cow", "dog", "elk"]
CENTRES = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0][: len(NAMES)].astype(np.float32)


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("feature_rates")
    sys.path.remove(str(TOOLS))
    for name in ("feature_rates", "bench_features", "rd_plot"):
        sys.modules.pop(name, None)


def near(numbers):
    """The classes of an image: a list, or one, where -1 is none, as an empty list is."""
    return [n for n in np.atleast_1d(np.asarray(numbers, int)) if n >= 0] or [0]


def write(path, labels, seed, **fields):
    """Features near the centres of their classes; `labels` are one for each, or several."""
    noise = np.random.default_rng(seed).normal(size=(len(labels), WIDTH)) * 0.05
    features = np.array([np.mean([CENTRES[n] for n in near(numbers)], axis=0) for numbers in labels]) + noise
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    single = isinstance(labels[0], int)
    record = {
        "model": "toy",
        "image_size": 8,
        "data": "toy",
        "class_names": NAMES,
        "labels" if single else "classes": labels,
    }
    with FeatureWriter(path, WIDTH, force=True) as writer:
        writer.write(features.astype(np.float32))
        writer.finish({**record, **fields})
    return path


@pytest.fixture
def files(tmp_path):
    """Classes 0 to 4 to train on, 1 to 3 to test, one test image without a class."""
    np.save(tmp_path / "texts.npy", 3 * CENTRES)
    train = write(tmp_path / "train.npy", [n for n in range(5) for _ in range(8)], 1)
    test = write(tmp_path / "test.npy", [1, 2, 3, 3, 2, -1, 1, 2], 2)
    return {"train": train, "test": test, "texts": tmp_path / "texts.npy"}


def run(tool, files, *arguments):
    named = [item for name, path in files.items() for item in (f"--{name}", path)]
    return tool.main([str(argument) for argument in (*named, *arguments)])


def load(tool, files, held_out=None):
    return tool.load(files["train"], files["test"], files["texts"], held_out)


@pytest.fixture
def tiny_networks(monkeypatch):
    for name, size in {"hidden": (6, 5), "residual": 3, "residual_layers": 1}.items():
        monkeypatch.setitem(feature_networks.SMALL, name, size)


# -- the data --------------------------------------------------------------------------------------------------------------


def test_only_classes_of_the_test_data_take_part(tool, files):
    data, _ = load(tool, files)
    assert (data.train.shape, data.test.shape) == ((40, WIDTH), (7, WIDTH))  # without the image that has no class
    np.testing.assert_allclose(data.classes, CENTRES[1:4], atol=1e-6)
    np.testing.assert_array_equal(data.right.argmax(1), [0, 1, 2, 2, 1, 0, 1])
    assert data.shared == 3
    assert data.accuracy(data.test) == 1
    assert data.accuracy(np.roll(data.test, 1, axis=0)) == pytest.approx(1 / 7)  # only the fourth: both are of class 3


def test_any_class_of_the_picture_is_right(tool, files):
    files["test"] = write(files["test"], [[0, 1], [2], [], [4, 2]], 3)
    data, _ = load(tool, files)
    assert data.right.tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert data.accuracy(CENTRES[[1, 2, 4]]) == 1
    assert data.accuracy(CENTRES[[2, 2, 0]]) == pytest.approx(1 / 3)


def test_held_out_classes_are_tested_and_not_trained_on(tool, files):
    files["test"] = write(files["test"], [0, 1, 2, 3, 4, 0, 1, 2], 2)
    _, held = class_split(NAMES, 3)
    data, identity = load(tool, files, held_out=2)
    assert identity["held_out"] == 2
    assert len(data.train) == 24
    np.testing.assert_allclose(data.classes, CENTRES[held], atol=1e-6)
    assert not (data.train @ CENTRES[held].T > 0.7).any()
    assert data.shared == 0


def test_an_image_with_a_held_out_class_among_others_is_in_neither_part(tool, files):
    _, held = class_split(NAMES, 4)
    known, unseen = int((held[0] + 1) % 5), int(held[0])
    pictures = [[known], [unseen], [known, unseen]]
    files["train"], files["test"] = write(files["train"], pictures, 1), write(files["test"], pictures, 2)
    data, _ = load(tool, files, held_out=1)
    assert (len(data.train), len(data.test)) == (1, 1)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("test", {"class_names": NAMES[::-1]}, "different class names"),
        ("train", {"class_names": []}, "train.npy has no classes"),
    ],
)
def test_records_that_do_not_do_are_refused(tool, files, name, fields, message):
    write(files[name], [-1] * 4, 1, **fields)
    with pytest.raises(InputError, match=message):
        load(tool, files)


def test_images_without_a_class_cannot_be_tested_on(tool, files):
    files["test"] = write(files["test"], [-1, -1], 2)
    with pytest.raises(InputError, match=r"0 of .*test\.npy are left"):
        load(tool, files)


def test_texts_of_another_number_are_refused(tool, files, capsys):
    np.save(files["texts"], CENTRES[1:])
    assert run(tool, files) == 2
    assert "with 5 classes need as many texts of the same width, not 4 of 10" in capsys.readouterr().err


# -- measuring -------------------------------------------------------------------------------------------------------------


def test_rows_bound_and_plots(tool, files, tmp_path, capsys):
    json_path, plots = tmp_path / "r.json", tmp_path / "plots"
    arguments = "--rates", 1, 2, "--methods", "SQ", "PQ", "--json", json_path, "--out", plots
    assert run(tool, files, *arguments) == 0
    record = json.loads(json_path.read_text())
    assert record["bound"] == 1
    assert record["counts"] == {"train": 40, "test": 7, "width": 10, "classes": 3, "classes_in_train": 3}
    rows = {(row["name"], row["rate"]): row for row in record["rows"]}
    assert {("SQ, learned levels", 2), ("PQ, 16 codewords", 2)} <= rows.keys()
    printed = capsys.readouterr().out
    for row in rows.values():
        assert row["bits"] == row["rate"]
        assert row["ideal"] > 0
        assert 0.3 <= row["accuracy"] <= 1
        assert f"cosine {row['cosine']:.4f}" in printed
    assert rows["SQ, shared levels", 2]["cosine"] > rows["SQ, shared levels", 1]["cosine"]
    assert Image.open(plots / "rates.png").width > 1000
    assert not (plots / "ablation.png").exists()


def test_what_is_measured_is_not_measured_again(tool, files, tmp_path, monkeypatch):
    arguments = "--methods", "SQ, shared levels", "--json", tmp_path / "r.json", "--out", tmp_path
    assert run(tool, files, "--rates", 1, *arguments) == 0
    first = json.loads((tmp_path / "r.json").read_text())["rows"]
    fitted = []

    def measure(fit, data, seed):
        fitted.append(fit)
        return {name: 0.5 for name in ("bits", "ideal", "accuracy", "cosine", "cosine_low", "fit_seconds")}

    monkeypatch.setattr(tool, "measure", measure)
    assert run(tool, files, "--rates", 1, 2, *arguments) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert len(fitted) == 1
    assert rows[:1] == first
    assert [row["rate"] for row in rows] == [1, 2]


def test_an_interrupted_run_keeps_what_it_has(tool, files, tmp_path, monkeypatch):
    def measure(fit, data, seed, once=[]):  # noqa: B006
        if once:
            raise KeyboardInterrupt
        once.append(fit)
        return {name: 0.5 for name in ("bits", "ideal", "accuracy", "cosine", "cosine_low", "fit_seconds")}

    monkeypatch.setattr(tool, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(tool, files, "--rates", 1, 2, "--methods", "SQ", "--json", tmp_path / "r.json")
    assert len(json.loads((tmp_path / "r.json").read_text())["rows"]) == 1


def test_results_of_other_settings_are_kept_unless_forced(tool, files, tmp_path, capsys):
    arguments = "--rates", 1, "--methods", "SQ, shared levels", "--json", tmp_path / "r.json"
    assert run(tool, files, *arguments) == 0
    before = (tmp_path / "r.json").read_bytes()
    for other in (("--seed", 1), ("--steps", 3), ("--sizes", "paper"), ("--held-out", 2)):
        assert run(tool, files, *arguments, *other) == 2
        assert "results of other data or settings" in capsys.readouterr().err
    np.save(files["texts"], CENTRES[::-1])
    assert run(tool, files, *arguments) == 2
    assert (tmp_path / "r.json").read_bytes() == before
    assert run(tool, files, *arguments, "--force") == 0
    assert (tmp_path / "r.json").read_bytes() != before


def test_a_plot_of_another_run_is_not_overwritten(tool, files, tmp_path, capsys):
    (tmp_path / "rates.png").write_text("mine")
    assert run(tool, files, "--rates", 1, "--methods", "SQ", "--out", tmp_path) == 2
    assert "rates.png exists already" in capsys.readouterr().err
    assert (tmp_path / "rates.png").read_text() == "mine"


@pytest.mark.parametrize("text", ["no JSON", "[1, 2]", '{"rows": []}'])
def test_a_file_of_something_else_is_not_overwritten(tool, files, tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    assert run(tool, files, "--rates", 1, "--methods", "SQ", "--json", tmp_path / "r.json") == 2
    assert (tmp_path / "r.json").read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rates", 0), "bits a dimension above 0"),
        (("--seed", -1), "--seed must be at least 0"),
        (("--methods", "JPEG"), "no method is called 'JPEG'"),
        (("--held-out", 5), "of 5 classes, 1 to 4 are trained on, not 0"),
    ],
)
def test_bad_options_are_refused(tool, files, capsys, arguments, message):
    assert run(tool, files, *arguments) == 2
    assert message in capsys.readouterr().err


def test_the_ablation_cuts_one_latent_in_several_ways(tool, files, tmp_path, capsys, tiny_networks):
    arguments = "--rates", 2.5, "--methods", "SQ", "--ablation", "--channels", 1, "--steps", 1
    assert run(tool, files, *arguments, "--out", tmp_path, "--json", tmp_path / "r.json") == 0
    rows = [row for row in json.loads((tmp_path / "r.json").read_text())["rows"] if row["part"] == "ablation"]
    found = [(row["rate"], row["codeword"], row["codebook"], row["bits"]) for row in rows]
    assert found == [(2.5, 1, 2, 2.5), (2.5, 5, 32, 2.5)]
    assert "PQVAE, 32 codewords of width 5" in capsys.readouterr().out
    assert Image.open(tmp_path / "ablation.png").width > 1000


def test_the_networks_take_the_recipe_and_the_sizes(tool, files, monkeypatch):
    seen = []
    monkeypatch.setattr(tool, "methods", lambda recipe, **sizes: seen.append((recipe, sizes)) or ())
    assert run(tool, files, "--rates", 1, "--steps", 9, "--sizes", "paper") == 0
    assert seen[-1] == (Recipe(steps=9), {"hidden": (512, 256), "residual": 128, "residual_layers": 3})
