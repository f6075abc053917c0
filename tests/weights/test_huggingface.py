"""Folders, ids and files of the Hugging Face Hub; files that are damaged or mean harm."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxsem.errors import InputError, WeightsError
from jaxsem.weights.huggingface import find, read_config, read_safetensors, read_state_dict

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.array([1.5, -2], ml_dtypes.bfloat16),
    "c.ids": np.array([[7]], np.int64),
    "d": np.array(3.0, np.float16),
    "e.empty": np.zeros((0, 4), np.float32),
}


def same(found, wanted=ARRAYS):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value)
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape)


def raw(header, data=b"", length=None) -> bytes:
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_parts(folder, suffix="safetensors"):
    """`ARRAYS` in two parts and their index, as transformers names them."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    keys = list(ARRAYS)
    places = {key: f"{stem}-0000{1 + (i > 1)}-of-00002.{suffix}" for i, key in enumerate(keys)}
    for name in set(places.values()):
        save_file({key: ARRAYS[key] for key in keys if places[key] == name}, folder / name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 60}, "weight_map": places}))
    return index, places


# -- what is read -----------------------------------------------------------------------------------------------------


def test_one_file_is_read_from_its_folder_and_by_itself(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors", {"format": "pt"})
    same(read_state_dict(tmp_path))
    same(read_state_dict(str(tmp_path / "model.safetensors")))


def test_arrays_are_mapped_not_copied(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    array = read_safetensors(tmp_path / "model.safetensors")["a.weight"]
    assert not array.flags.owndata
    assert not array.flags.writeable


def test_float8_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw({"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, b"\x38\xc0"))
    np.testing.assert_array_equal(read_safetensors(path)["x"].astype(np.float32), [1, -2])


def test_parts_are_put_together(tmp_path):
    write_parts(tmp_path)
    same(read_state_dict(tmp_path))


def test_a_torch_file_and_its_parts_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "c.ids": torch.tensor([[7]])}
    torch.save(state, tmp_path / "pytorch_model.bin")
    wanted = {key: ARRAYS[key] for key in state}
    same(read_state_dict(tmp_path), wanted)
    (tmp_path / "pytorch_model.bin").unlink()
    for i, key in enumerate(state):
        torch.save({key: state[key]}, tmp_path / f"part-{i}.bin")
    places = {key: f"part-{i}.bin" for i, key in enumerate(state)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    same(read_state_dict(tmp_path), wanted)


def test_safetensors_are_taken_before_a_torch_file(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    same(read_state_dict(tmp_path))


def test_a_config_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert read_config(tmp_path) == {"model_type": "clip"}


# -- what is not there ------------------------------------------------------------------------------------------------


def test_a_folder_without_weights_or_config_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"holds neither model.safetensors or pytorch_model.bin nor their parts"):
        read_state_dict(tmp_path)
    with pytest.raises(InputError, match=r"holds no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("source", ["nowhere", "./no/such/folder", "a/b@", "a b/c"])
def test_a_path_that_is_neither_folder_nor_id_is_an_error(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is neither a folder nor an id of the Hugging Face Hub"):
        read_config(source)


def test_a_part_that_is_missing_is_named(tmp_path):
    _, places = write_parts(tmp_path)
    (tmp_path / places["d"]).unlink()
    with pytest.raises(
        WeightsError, match=r"lacks model-00002-of-00002.safetensors, which model.safetensors.index.json"
    ):
        read_state_dict(tmp_path)


def test_parts_that_hold_other_keys_than_the_index_says_are_an_error(tmp_path):
    index, places = write_parts(tmp_path)
    del places["a.weight"]
    places["new"] = places["b.weight"]
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(WeightsError, match=r"they differ in a\.weight, new"):
        read_state_dict(tmp_path)


# -- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of one repository, and what was asked of it."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    folder, asked = tmp_path / "cache", []
    folder.mkdir()

    def download(repository, name, revision=None):
        asked.append((repository, name, revision))
        if repository != "jax/clip":
            raise OSError(f"401 Client Error. {repository} is not a repository\nand much more")
        if name == "offline.json":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network")
        if not (folder / name).exists():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return folder, asked


def test_an_id_is_read_from_the_hub(hub):
    folder, asked = hub
    write_parts(folder)
    same(read_state_dict("jax/clip@v1.0"))
    names = ["model.safetensors", "model.safetensors.index.json"]
    assert asked[:2] == [("jax/clip", name, "v1.0") for name in names]
    assert len(asked) == 4


def test_a_file_that_the_hub_lacks_is_told_from_a_hub_that_cannot_be_asked(hub):
    assert find("jax/clip", "config.json") is None
    with pytest.raises(
        InputError, match=r"offline.json cannot be fetched .* not in the cache and the Hub cannot be reached"
    ):
        find("jax/clip", "offline.json")
    with pytest.raises(
        InputError, match=r"jax/clop is no local folder .*\(401 Client Error\): check the name"
    ) as caught:
        read_config("jax/clop")
    assert "\n" not in str(caught.value)


# -- damaged and hostile files ----------------------------------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        raw({"x": ENTRY}, b"\0" * 8, length=1 << 62),
        raw({"x": ENTRY}, b"\0" * 7),
        raw({"x": ENTRY}, b"\0" * 9),
        raw({"x": {**ENTRY, "shape": [3]}}, b"\0" * 8),
        raw({"x": {**ENTRY, "shape": [-2]}}, b"\0" * 8),
        raw({"x": {**ENTRY, "shape": [1 << 40, 1 << 40]}}, b"\0" * 8),
        raw({"x": {**ENTRY, "data_offsets": [8, 0]}}, b"\0" * 8),
        raw({"x": {**ENTRY, "dtype": "F33"}}, b"\0" * 8),
        raw({"x": {**ENTRY, "dtype": "C64", "shape": [1]}}, b"\0" * 8),
        raw({"x": ENTRY, "y": ENTRY}, b"\0" * 8),
        raw({"x": 3}, b"\0" * 8),
        raw(b"[" * 100_000),
        raw(b"not json"),
        b"PK\x03\x04 a zip file",
    ],
    ids=lambda data: f"{len(data)} bytes {data[8:40]!r}",
)
def test_files_that_are_no_safetensors_are_an_error(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(
        WeightsError, match=r"model.safetensors is no safetensors file, or is damaged or cut short"
    ) as caught:
        read_state_dict(tmp_path)
    assert "\n" not in str(caught.value)


def test_every_cut_of_a_file_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(ARRAYS, path)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(WeightsError, match="cut short"):
            read_safetensors(path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/part.bin", "", ".."])
def test_an_index_cannot_reach_out_of_its_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(WeightsError, match="which is not a file beside it"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON file"),
        ("[" * 100_000, "is no JSON file"),
        ("[]", "holds a list, not a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"x": 3}}', "has no weight_map"),
    ],
)
def test_an_index_that_is_none_is_an_error(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=message):
        read_state_dict(tmp_path)


def test_a_torch_file_that_runs_code_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin"):
        read_state_dict(tmp_path)
