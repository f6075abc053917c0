"""The torch reader: what torch 2.13.0 wrote, and files that mean harm.

`zip.pt` and `legacy.pt` hold `example(torch)`, written by `python tests/weights/test_torch_files.py`.
"""

import collections
import io
import pickle
import time
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxsem.errors import InputError, WeightsError
from jaxsem.weights.torch_files import Opaque, read_torch, state_dict_of

FOLDER = Path(__file__).parent
FILES = ["zip.pt", "legacy.pt"]


def example(torch):
    """A checkpoint of a trainer with all that is hard: shared, strided, empty, scalar, odd types, counters."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict with metadata
    state["weight"] = base[1:3, 1:4]
    state["bias"] = torch.tensor([0.5, -2.0], dtype=torch.bfloat16)
    return {
        "state_dict": state,
        "shared": [base, base.T[::2], base.flatten()[5:6]],
        "types": (base[0].half(), base[0].double(), torch.tensor([True, False]), torch.tensor(-7), torch.zeros(0, 3)),
        "parameter": torch.nn.Parameter(base[0, :2].clone()),
        "trainer": {"epoch": 3, "lr": 1e-4, "name": "mse", "none": None, "milestones": collections.Counter([2, 5, 5])},
        "device": torch.device("cpu"),
        "size": base.shape,
    }


@pytest.mark.parametrize("name", FILES)
def test_everything_arrives(name):
    tree, base = read_torch(FOLDER / name), np.arange(24, dtype=np.float32).reshape(4, 6)
    np.testing.assert_array_equal(tree["state_dict"]["weight"], base[1:3, 1:4])
    assert tree["state_dict"]["bias"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tree["state_dict"]["bias"].astype(np.float32), [0.5, -2.0])
    for actual, expected in zip(tree["shared"], (base, base.T[::2], base.ravel()[5:6]), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert np.shares_memory(tree["shared"][0], tree["shared"][1])
    half, double, flags, scalar, empty = tree["types"]
    assert (half.dtype, double.dtype, flags.tolist(), int(scalar)) == (np.float16, np.float64, [True, False], -7)
    assert (scalar.shape, scalar.dtype, empty.shape) == ((), np.int64, (0, 3))
    np.testing.assert_array_equal(tree["parameter"], base[0, :2])
    assert tree["trainer"] == {"epoch": 3, "lr": 1e-4, "name": "mse", "none": None, "milestones": {2: 1, 5: 2}}
    assert tree["device"] == Opaque("torch.device")
    assert tree["size"] == (4, 6)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_torch_writes_and_we_read(tmp_path, legacy, protocol):
    torch = pytest.importorskip("torch")
    path = tmp_path / "file.pth.tar"
    expected = example(torch)
    torch.save(expected, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    tree = read_torch(path)
    for actual, tensor in zip(tree["shared"] + list(tree["types"]), expected["shared"] + list(expected["types"])):
        np.testing.assert_array_equal(actual, tensor.numpy())


def test_state_dict_of_takes_the_dict_or_its_item():
    tree = read_torch(FOLDER / "zip.pt")
    assert list(state_dict_of(tree)) == ["weight", "bias"]
    assert list(state_dict_of(tree["state_dict"])) == ["weight", "bias"]


@pytest.mark.parametrize("tree", [[1], {}, {"epoch": 3}, {"state_dict": {"a": "text"}}])
def test_what_is_no_state_dict_is_said(tree):
    with pytest.raises(WeightsError, match=r"state dict|state_dict"):
        state_dict_of(tree)


# -- harm ----------------------------------------------------------------------------------------------------


class Storage:
    """Pickles as torch's persistent id of a float32 storage named "0"."""


class Pickler(pickle._Pickler):
    def persistent_id(self, obj):
        return ("storage", Global("torch", "FloatStorage"), "0", "cpu", 4) if isinstance(obj, Storage) else None

    def save(self, obj, *args, **kwargs):
        if isinstance(obj, Global):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, *args, **kwargs)


Global = collections.namedtuple("Global", "module name")
Call = collections.namedtuple("Call", "function arguments")


def tensor(shape, strides, offset=0):
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, (Storage(), offset, shape, strides, False, None))


def pickled(content) -> bytes:
    stream = io.BytesIO()
    Pickler(stream, 2).dump(content)
    return stream.getvalue()


def write_zip(path, data: bytes, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())
    return path


def refused(path, match):
    start = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(WeightsError, match=match) as caught:
        read_torch(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.perf_counter() - start < 20
    assert peak < 400e6
    assert "\n" not in str(caught.value)


def test_the_hand_made_files_are_good_but_for_their_harm(tmp_path):
    path = write_zip(tmp_path / "good.pt", pickled({"a": tensor((2, 2), (1, 2))}))
    np.testing.assert_array_equal(read_torch(path)["a"], [[0, 2], [1, 3]])


@pytest.mark.parametrize(
    "name", ["os system", "builtins eval", "torch.hub load", "torch.nn.modules.conv Conv2d", "posix x"]
)
def test_code_is_refused_by_name_and_never_run(tmp_path, name):
    marker = tmp_path / "was_run"
    call = Call(Global(*name.split()), (f"touch {marker}",))
    refused(write_zip(tmp_path / "bad.pt", pickled({"a": call})), f"names {name.replace(' ', '.')}, which is code")
    assert not marker.exists()


@pytest.mark.parametrize(("shape", "strides", "offset"), [
    ((5,), (1,), 0),
    ((2, 2), (3, 2), 0),
    ((1,), (1,), 4),
    ((10**12,), (0,), 0),
    ((2,), (-1,), 3),
    ((1,), (1,), -1),
    ((2, 2), (1,), 0),
    ((2**40, 2**40, 0), (1, 1, 1), 0),
    ((1,) * 40, (1,) * 40, 0),
    (("x",), (1,), 0),
])  # fmt: skip
def test_tensors_outside_their_storage_are_refused(tmp_path, shape, strides, offset):
    refused(write_zip(tmp_path / "bad.pt", pickled({"a": tensor(shape, strides, offset)})), "damaged or cut short")


def test_lists_that_hold_each_other_many_times_are_built_once(tmp_path):
    nested = ["x"]
    for _ in range(50):
        nested = [nested, nested]
    path = write_zip(tmp_path / "bomb.pt", pickled(nested))
    start = time.perf_counter()
    read_torch(path)
    assert time.perf_counter() - start < 5


def test_a_list_that_holds_itself_is_refused(tmp_path):
    endless = []
    endless.append(endless)
    refused(write_zip(tmp_path / "bad.pt", pickled(endless)), "nests its data more than 64 levels deep")


def test_a_tuple_as_key_is_refused(tmp_path):
    refused(write_zip(tmp_path / "bad.pt", pickled({(1, 2): 3})), "a tuple as key")


def test_lengths_are_not_trusted(tmp_path):
    refused(write_zip(tmp_path / "bad.pt", b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"abc."), "damaged")
    refused(write_zip(tmp_path / "bad.pt", b"\x80\x02r\xff\xff\xff\x7f."), "damaged")


def test_endless_work_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxsem.weights.torch_pickle.MAX_OPCODES", 1000)
    refused(write_zip(tmp_path / "bad.pt", b"\x80\x02]" + b"N0" * 2000 + b"."), "opcode POP|more than 1000 steps")
    refused(write_zip(tmp_path / "bad.pt", b"\x80\x02" + b"N" * 2000 + b"."), "more than 1000 steps")
    pairs = Call(Global("collections", "OrderedDict"), ([["a", 1]] * 300,))
    refused(write_zip(tmp_path / "bad.pt", pickled([pairs] * 4)), "more than 1000 steps")


def test_compressed_archives_are_refused(tmp_path):
    path = write_zip(tmp_path / "bad.pt", pickled({"a": "x" * 10**6}), zipfile.ZIP_DEFLATED)
    refused(path, "compressed or overlapping")


def test_torchscript_and_foreign_archives_are_named(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/constants.pkl", b"")
    refused(path, "TorchScript")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"hello")
    refused(path, r"without data\.pkl")


@pytest.mark.parametrize(
    "content", [b"", b"P", b"PK", b"\x89PNG\r\n", b"\x80\x02" * 50, b"not a checkpoint " * 9, bytes(999)]
)
def test_foreign_files_are_refused(tmp_path, content):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    refused(path, "no torch file, or is damaged")


def test_a_missing_file_is_the_callers_mistake(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_torch(tmp_path / "none.pt")


@pytest.mark.filterwarnings("ignore:.*invalid escape sequence")  # from pickletools, on text of protocol 0
@pytest.mark.parametrize("name", FILES)
def test_cut_and_flipped_files_give_an_error_or_arrays(tmp_path, name):
    """Never another exception, and never a hang."""
    good, path = (FOLDER / name).read_bytes(), tmp_path / name
    random, errors = np.random.RandomState(0), 0
    for trial in range(300):
        bad = bytearray(good)
        if trial % 3 == 0:
            bad = bad[: random.randint(len(bad))]
        else:
            for place in random.randint(len(bad), size=1 + trial % 4):
                bad[place] = random.randint(256)
        path.write_bytes(bad)
        try:
            read_torch(path)
        except WeightsError:
            errors += 1
    assert errors > 100


if __name__ == "__main__":
    import torch

    torch.manual_seed(0)
    torch.save(example(torch), FOLDER / "zip.pt")
    torch.save(example(torch), FOLDER / "legacy.pt", _use_new_zipfile_serialization=False)
