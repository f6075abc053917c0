"""The table and the benchmark of RSIC, with the toy codec: what is compared with what, and that nothing is measured twice."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_rsic import toy_rsic

from jaxsem.backbones.vgg import VggConfig
from jaxsem.container import Item, byte_counts, pack, unpack
from jaxsem.data.scenes import refer, sample_scene
from jaxsem.entropy.texts import pack_text, unpack_text
from jaxsem.metrics.lpips import Lpips
from jaxsem.metrics.masked import f_lpips
from jaxsem.systems.rsic_coding import CAPTION

pytestmark = pytest.mark.slow  # runs whole commands

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SIDE, SCENES = 32, 3
SMALL = ("--scenes", str(SCENES), "--side", str(SIDE), "--batch", "2", "--ablate-steps", "2", "3")


@pytest.fixture(scope="module")
def tools():
    """`tools(name)` imports a tool."""
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module
    sys.path.remove(str(TOOLS))
    for name in ("rsic_table", "bench_rsic", "bench_clip", "_rsic", "rd_plot", "_timing"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def table(tools):
    return tools("rsic_table")


@pytest.fixture(scope="module")
def measure(tools):
    return tools("_rsic")


@pytest.fixture(scope="module")
def codec():
    return toy_rsic()


@pytest.fixture
def loaded(table, codec, monkeypatch):
    """The toy is the codec of every name but "blind", which has no CLIP, and "plain", which is no RSIC."""
    others = {"blind": dataclasses.replace(codec, clip=None), "plain": object()}
    monkeypatch.setattr(table.jaxsem, "load", lambda name: others.get(name, codec))


@pytest.fixture(scope="module")
def measured(table, codec, tmp_path_factory):
    """The command, what it wrote, and the plot's path."""
    folder = tmp_path_factory.mktemp("table")
    command = ["toy", *SMALL, "--gem", "6", "--also", "again=toy"]
    command += ["--json", str(folder / "table.json"), "--out", str(folder / "table.png")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table.jaxsem, "load", lambda name: codec)
        assert table.main(command) == 0
    return command, json.loads((folder / "table.json").read_text()), folder / "table.png"


@pytest.fixture(scope="module")
def rows(measured):
    return {row["row"]: row for row in measured[1]["rows"]}


# -- pure pieces ----------------------------------------------------------------------------------------------------------


def test_equal_bytes_lie_between_two_points_of_a_curve(measure):
    curve = [(300, 26.0), (100, 20.0), (200, 24.0)]
    assert measure.at_bytes(curve, 150) == 22.0
    assert measure.at_bytes(curve, 275) == 25.5
    assert [measure.at_bytes(curve, size) for size in (100, 300)] == [20.0, 26.0]


@pytest.mark.parametrize("size", [99.9, 300.1])
def test_no_curve_goes_on_beyond_its_ends(measure, size):
    assert measure.at_bytes([(100, 20.0), (300, 26.0)], size) is None
    assert measure.at_bytes([], size) is None


def test_more_bytes_reach_no_less_than_fewer(measure):
    curve = [(100, 20.0), (200, 24.0), (300, 22.0), (400, 26.0), (400, 25.0)]
    assert measure.at_bytes(curve, 250) == 24.0
    assert measure.at_bytes(curve, 350) == 25.0
    assert measure.at_bytes(curve, 400) == 26.0


def test_the_first_object_that_fills_a_cell_is_chosen(measure):
    labels = np.zeros((32, 32), np.uint8)
    labels[9:15, 9:15] = 1  # large, and no cell of 8 whole
    labels[16:24, 8:24] = 2
    labels[8:16, 16:24] = 3
    assert measure.choose_object(labels, 8) == 1
    labels[8:16, 8:16] = 1
    assert measure.choose_object(labels, 8) == 0


def test_an_object_at_the_border_alone_is_not_chosen(measure):
    labels = np.zeros((32, 32), np.uint8)
    labels[:5] = 1
    assert measure.choose_object(labels, 4) is None
    assert measure.choose_object(np.zeros((32, 32), np.uint8), 4) is None


def test_a_row_is_compared_over_the_scenes_that_it_has(measure):
    def level(sizes, scores):
        return {"scenes": [0, 1, 2], "each": {"bytes": sizes, "f_psnr": scores}}

    curve = [level([100, 100, 900], [20.0, 22.0, 90.0]), level([200, 300, 900], [30.0, 28.0, 90.0])]
    row = {"row": "by phrase", "scenes": [0, 1], "bytes": 175.0, "f_psnr": 26.5}
    found = measure.compare(row, curve, ("f_psnr",))
    assert found["range"] == [100.0, 250.0]
    assert (found["global"], found["difference"]) == ({"f_psnr": 25.0}, {"f_psnr": 1.5})
    assert measure.compare({**row, "bytes": 260.0}, curve, ("f_psnr",))["difference"] == {}


# -- scenes ---------------------------------------------------------------------------------------------------------------


def test_every_scene_has_an_object_that_fills_a_cell(measure):
    scenes = measure.referred_scenes("test", 8, 128, 16)
    assert len({scene.index for scene in scenes}) == 8
    for scene in scenes:
        assert scene.mask.reshape(8, 16, 8, 16).all(axis=(1, 3)).any()
        box = scene.box
        assert scene.mask[box.y : box.y + box.height, box.x : box.x + box.width].sum() == scene.mask.sum()
        thing = sample_scene("test", scene.index, measure.SEEN)
        assert scene.phrase == refer(thing)[scene.place][0].text
        assert scene.label == thing.objects[scene.place].name


def test_the_share_of_weight_inside_is_that_of_the_masks(measure, codec, monkeypatch):
    scenes = [scene for half in ("valid", "test") for scene in measure.referred_scenes(half, 3, SIDE, 4)]

    def levels_of(codec, image, words):
        """The cells that the object fills; nothing of words that are not its own."""
        [scene] = [scene for scene in scenes if (scene.image == image).all()]
        if words not in (scene.label, scene.phrase):
            return None
        return np.uint8(7) * scene.mask.reshape(8, 4, 8, 4).all(axis=(1, 3))

    monkeypatch.setattr(measure, "levels_of", levels_of)
    found = measure.measure_gem(codec, 6, SIDE)
    for kind in ("label", "phrase"):
        assert found[kind]["outside"] == 0
        assert 0 < found[kind]["inside"] < 1
        assert (found[kind]["nothing"], found[kind]["refused"]) == (0, 1)
        assert 1 <= found[kind]["absent"] <= 6


def test_a_description_alone_is_a_file_and_draws_an_image(measure, codec):
    scenes = measure.referred_scenes("test", 3, SIDE, 4)
    sizes, images = measure.through_text(codec, scenes, 2)
    for scene, size in zip(scenes, sizes, strict=True):
        file = pack(Item(SIDE, SIDE, {CAPTION: pack_text(scene.caption)}), codec.digest)
        assert unpack_text(unpack(file).items[0].sections[CAPTION]) == scene.caption
        assert size == len(file)
    assert [image.shape for image in images] == [(SIDE, SIDE, 3)] * 3
    _, alone = measure.through_text(codec, scenes[2:], 2)
    np.testing.assert_allclose(alone[0].astype(int), images[2], atol=1)
    _, other = measure.through_text(codec.decoding(seed=1), scenes, 2)
    assert (other[0] != images[0]).any()


# -- the table ------------------------------------------------------------------------------------------------------------


def test_every_row_is_there_with_its_columns(table, rows, measured):
    assert list(rows) == [
        *(f"global {k}" for k in range(8)),
        *("by mask", "by box", "by class", "by phrase", "without description", "without guidance", "again", "T = 3"),
    ]
    columns = set(table.COLUMNS) - {"f_lpips"}
    every = rows["by mask"]["scenes"]
    assert len(every) == SCENES
    for name, row in rows.items():
        assert row.keys() >= columns
        # A phrase may find nothing in a scene, which its row then leaves out.
        assert set(row["scenes"]) <= set(every) if name in ("by class", "by phrase") else row["scenes"] == every
        assert row["bpp"] == pytest.approx(8 * row["bytes"] / SIDE**2)
        assert row["f_psnr"] == pytest.approx(np.mean(row["each"]["f_psnr"]))
    assert measured[2].stat().st_size > 10_000
    assert [found["row"] for found in measured[1]["comparison"]] == ["by mask", "by box", "by class", "by phrase"]
    assert measured[1]["gem"]["count"] == 6


def test_the_ablation_changes_what_it_says(rows):
    mask = rows["by mask"]
    same = {key: value for key, value in mask.items() if key not in ("row", "kind")}
    assert {key: value for key, value in rows["again"].items() if key not in ("row", "kind")} == same
    assert rows["T = 3"]["each"]["bytes"] == mask["each"]["bytes"]
    assert rows["T = 3"]["each"]["psnr"] != mask["each"]["psnr"]
    for name in ("without description", "without guidance"):
        assert all(less < more for less, more in zip(rows[name]["each"]["bytes"], mask["each"]["bytes"], strict=True))


def test_bytes_are_those_of_files(measure, codec, rows):
    scenes = measure.referred_scenes("test", SCENES, SIDE, 4)
    files = measure.jaxsem.compress(codec, [s.image for s in scenes], 2, [measure.by_box(codec, s) for s in scenes])
    assert rows["by box"]["each"]["bytes"] == [sum(byte_counts(file).values()) for file in files]


def test_nothing_is_measured_twice(table, loaded, measured, monkeypatch, capsys):
    command, record, _ = measured
    path = Path(command[command.index("--json") + 1])
    monkeypatch.setattr(table._rsic, "measure_gem", None)
    once = []
    again = table.measure
    monkeypatch.setattr(table, "measure", lambda plan, *rest: once.append(plan.name) or again(plan, *rest))
    assert table.main(command) == 0
    assert once == []
    kept = [row for row in record["rows"] if row["row"] not in ("global 2", "T = 3")]
    path.write_text(json.dumps({**record, "rows": kept}))
    assert table.main(command) == 0
    assert once == ["global 2", "T = 3"]
    out = capsys.readouterr().out
    assert "by class: GEM finds nothing in 0 of 3 scenes" in out
    assert "without guidance" in out


def test_a_phrase_that_finds_nothing_is_left_out(table, measure, codec, rows):
    blind = dataclasses.replace(codec, least_peak=1.0)
    scenes = measure.referred_scenes("test", 2, SIDE, 4)
    meter = measure.Meter(codec.clip, 2)
    row = table.measure(table.Plan("by phrase", table.REFERRING, blind, measure.by_phrase), scenes, meter)
    assert row["scenes"] == []
    assert [found["row"] for found in table.compare_all([*list(rows.values())[:9], row])] == ["by mask"]
    found = measure.measure_gem(blind, 4, SIDE)
    for kind in ("label", "phrase"):
        assert (found[kind]["nothing"], found[kind]["inside"], found[kind]["refused"]) == (1, None, 1)


def test_f_lpips_is_a_column_where_its_network_is_given(measure, codec):
    module = Lpips(VggConfig(widths=(4, 4, 4, 4, 4)))
    scenes = measure.referred_scenes("test", 2, SIDE, 4)
    images = [255 - scene.image for scene in scenes]
    params = jax.jit(module.init)(jax.random.key(0), images[0], images[0])["params"]
    row = measure.Meter(codec.clip, 2, (module, params)).row(scenes, [5, 7], images)
    found = [float(f_lpips(module, params, s.image, image, s.mask)) for s, image in zip(scenes, images, strict=True)]
    assert (row["each"]["f_lpips"], row["bytes"]) == (pytest.approx(found), 6)
    assert min(found) > 0


def test_bytes_outside_of_the_curve_are_said_to_be(table):
    row = {"row": "by box", "bytes": 90.0}
    text = table.describe(row, {"range": [100.0, 200.0], "global": {}, "difference": {}})
    assert text == "by box: its 90.0 bytes lie outside of global mode's 100.0 to 200.0, so nothing is compared"
    text = table.describe(row, {"range": [80.0, 200.0], "difference": {"f_psnr": 1.234, "f_ssim": -0.01, "psnr": -2.0}})
    assert "f-PSNR +1.23 dB, f-SSIM -0.0100, PSNR -2.00 dB" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plain"], "cannot be told what matters"),
        (["blind"], "has no CLIP"),
        (["toy", "--scenes", "1"], "at least 2 images"),
        (["toy", "--lpips", "vgg.pth"], "give --lpips and --vgg"),
        (["toy", "--also", "by mask=toy"], "two rows would be called 'by mask'"),
        (["toy", "--also", "one=plain"], "plain cannot be told"),
        (["toy", "--ablate-steps", "9"], "take 1 to 4 steps"),
        (["toy", "--side", "30"], "not divided by cells of 4"),
        (["toy", "--out", "plot.txt"], "needs a name that ends in"),
    ],
)
def test_what_makes_no_table_is_refused(table, loaded, capsys, arguments, message):
    assert table.main([arguments[0], *SMALL, *arguments[1:]]) == 2
    assert message in capsys.readouterr().err


def test_results_of_other_settings_are_not_mixed(table, loaded, measured, tmp_path, capsys):
    command = measured[0]
    assert table.main([*command, "--seed", "1"]) == 2
    assert "results of other settings" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text("{")
    assert table.main(["toy", *SMALL, "--json", str(tmp_path / "broken.json")]) == 2
    assert "not a JSON file" in capsys.readouterr().err


# -- the benchmark --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tools):
    return tools("bench_rsic")


def test_numbers_compile_nothing_and_operations_are_counted(bench, tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert bench.main(["--quick", "--batch", "1", "2", "--json", str(path)]) == 0
    one, two = json.loads(path.read_text())["batches"]
    assert (one["batch"], two["batch"]) == (1, 2)
    assert one["compiled"] == two["compiled"] == 0
    assert two["gflop"]["pair"] == pytest.approx(2 * one["gflop"]["pair"], rel=0.02)
    assert 0 < one["gflop"]["gradient"] < one["gflop"]["pair"]
    assert set(one["image_seconds"]) == {"default", "fast"}
    assert "with / without gradients" in capsys.readouterr().out


def test_a_codec_is_timed_with_its_own_networks(bench, codec, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.jaxsem, "load", lambda name: {"toy": codec}.get(name, object()))
    path = tmp_path / "figures.json"
    assert bench.main(["toy", "--quick", "--batch", "2", "--steps", "3", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert (found["networks"], found["side"], found["modes"]["default"]) == ("toy-rsic", 16, [3, 2])
    assert bench.main(["other"]) == 2
    assert "name a codec of RSIC" in capsys.readouterr().err
    assert bench.main(["toy", "--size", "sd15"]) == 2
    assert "leave out --size sd15" in capsys.readouterr().err


def test_without_the_gradient_there_is_nothing_to_pull(bench, codec, monkeypatch):
    monkeypatch.setattr(bench.jaxsem, "load", lambda name: codec.decoding(gamma=30000.0))
    pulled = bench.Decoder(bench.preset_parts("toy", np.float32), 2)
    monkeypatch.setattr(bench.jaxsem, "load", lambda name: codec.decoding(gamma=0.0))
    free = bench.Decoder(bench.preset_parts("toy", np.float32), 2)
    np.testing.assert_allclose(pulled.latents(2, 1, gradient=False), free.latents(2, 1), atol=1e-5)
    assert np.abs(pulled.latents(2, 1) - free.latents(2, 1)).max() > 1e-3


def test_the_full_size_fits_together(bench, monkeypatch):
    monkeypatch.setattr(bench, "random_params", lambda shapes: shapes)  # no memory
    parts = bench.random_parts("sd15", *bench.SIZES["sd15"], jax.numpy.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(parts.params["unet"])) == 859_520_964
    assert {leaf.dtype for leaf in jax.tree.leaves(parts.params["unet"])} == {np.dtype(jax.numpy.bfloat16)}

    def images(params):
        return bench.Decoder(dataclasses.replace(parts, params=params), 1).images(2, 2)

    assert jax.eval_shape(images, parts.params).shape == (1, 512, 512, 3)
