"""Files of perceptual metrics: all kinds give the same parameters; what does not fit is said."""

import numpy as np
import perceptual_reference as reference
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from jaxsem.backbones import alexnet, inception, vgg
from jaxsem.backbones.alexnet import AlexNetConfig
from jaxsem.backbones.inception import Inception, InceptionConfig
from jaxsem.backbones.vgg import Vgg, VggConfig
from jaxsem.errors import InputError, WeightsError
from jaxsem.metrics.dists import Dists
from jaxsem.metrics.lpips import Lpips
from jaxsem.weights.convert import invert
from jaxsem.weights.perceptual import (
    alexnet_table,
    inception_table,
    load_alexnet,
    load_dists,
    load_inception,
    load_lpips,
    load_vgg,
    vgg_table,
)

ALEX = AlexNetConfig(reference.ALEX_WIDTHS)
VGG = VggConfig(reference.VGG_WIDTHS, reference.VGG_DEPTHS)
L2 = VggConfig(reference.VGG_WIDTHS, reference.VGG_DEPTHS, "l2")
NARROW = InceptionConfig(narrow=reference.NARROW)


def same(first, second):
    first, second = flatten_dict(first, sep="/"), flatten_dict(second, sep="/")
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def alphas():
    channels = 3 + sum(reference.VGG_WIDTHS)
    random = np.random.RandomState(4)
    return {name: random.uniform(0, 1, (1, channels, 1, 1)).astype(np.float32) for name in ("alpha", "beta")}


def save_torch(state, path, wrap=lambda tensor: tensor):
    torch = reference.import_torch()
    torch.save({key: wrap(torch.tensor(value)) for key, value in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def vgg_state():
    return reference.state_of(reference.vgg())


@pytest.fixture(scope="module")
def alex_state():
    return reference.state_of(reference.alexnet())


@pytest.fixture(scope="module")
def inception_state():
    return reference.state_of(reference.inception())


# -- where parameters go ----------------------------------------------------------------------------------------------


def test_vggs_layers_are_counted_with_relus_and_pools(vgg_state):
    module, params = load_vgg(vgg_state, VGG)
    assert module == Vgg(VGG)
    for name, at in {"conv1_1": 0, "conv1_2": 2, "conv2_1": 5, "conv3_3": 14, "conv4_1": 17, "conv5_3": 28}.items():
        np.testing.assert_array_equal(params[name]["kernel"], vgg_state[f"features.{at}.weight"].transpose(2, 3, 1, 0))
        np.testing.assert_array_equal(params[name]["bias"], vgg_state[f"features.{at}.bias"])


def test_both_pools_take_the_same_file(vgg_state):
    same(load_vgg(vgg_state, L2)[1], load_vgg(vgg_state, VGG)[1])


def test_lpips_keeps_the_weights_beside_the_network(alex_state, vgg_state):
    for config, state, load in ((ALEX, alex_state, load_alexnet), (VGG, vgg_state, load_vgg)):
        lins = reference.draw_lins(config.widths)
        module, params = load_lpips(state, lins, config)
        assert module == Lpips(config)
        same(params["network"], load(state, config)[1])
        for i in range(5):
            np.testing.assert_array_equal(params[f"channel_weights_{i}"], lins[f"lin{i}.model.1.weight"].ravel())


def test_dists_keeps_alpha_and_beta_beside_the_network(vgg_state):
    module, params = load_dists(vgg_state, alphas(), L2)
    assert module == Dists(L2)
    same(params["network"], load_vgg(vgg_state, L2)[1])
    for name, value in alphas().items():
        np.testing.assert_array_equal(params[name], value.ravel())


def test_inceptions_layers_keep_their_names(inception_state):
    module, params = load_inception(inception_state, NARROW)
    assert module == Inception(NARROW)
    for ours, theirs in (
        (("stem_1a_3x3",), "Conv2d_1a_3x3"),
        (("mixed_5b", "branch_pool"), "Mixed_5b.branch_pool"),
        (("mixed_6e", "branch7x7dbl_5"), "Mixed_6e.branch7x7dbl_5"),
        (("mixed_7c", "branch3x3dbl_3b"), "Mixed_7c.branch3x3dbl_3b"),
    ):
        layer = params
        for name in ours:
            layer = layer[name]
        kernel = inception_state[f"{theirs}.conv.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(layer["conv"]["kernel"], kernel)
        np.testing.assert_array_equal(layer["norm"]["scale"], inception_state[f"{theirs}.bn.weight"])
        np.testing.assert_array_equal(layer["norm"]["mean"], inception_state[f"{theirs}.bn.running_mean"])
        np.testing.assert_array_equal(layer["norm"]["variance"], inception_state[f"{theirs}.bn.running_var"])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_parameters_have_the_shapes_and_the_type_asked_for(dtype, vgg_state, alex_state, inception_state):
    for load, state, config, shapes in (
        (load_vgg, vgg_state, VGG, vgg.param_shapes),
        (load_alexnet, alex_state, ALEX, alexnet.param_shapes),
        (load_inception, inception_state, NARROW, inception.param_shapes),
    ):
        module, params = load(state, config, param_dtype=dtype)
        wanted, found = flatten_dict(shapes(module), sep="/"), flatten_dict(params, sep="/")
        assert {name: (leaf.shape, leaf.dtype) for name, leaf in found.items()} == {
            name: (leaf.shape, np.dtype(dtype)) for name, leaf in wanted.items()
        }


def test_tables_lead_back_to_the_files(vgg_state, alex_state, inception_state):
    """All but classifiers and counters."""
    for state, load, config, table in (
        (vgg_state, load_vgg, VGG, vgg_table(VGG)),
        (alex_state, load_alexnet, ALEX, alexnet_table()),
        (inception_state, load_inception, NARROW, inception_table()),
    ):
        written = invert(table, load(state, config)[1])
        kept = {key for key in state if not key.startswith(("classifier.", "fc.")) and "tracked" not in key}
        assert written.keys() == kept
        for key, value in written.items():
            np.testing.assert_array_equal(value, state[key], err_msg=key)


# -- files ------------------------------------------------------------------------------------------------------------


def test_torch_files_and_safetensors_give_the_same(tmp_path, vgg_state):
    lins = reference.draw_lins(VGG.widths)
    files = save_torch(vgg_state, tmp_path / "vgg16-397923af.pth"), save_torch(lins, tmp_path / "vgg.pth")
    _, wanted = load_lpips(vgg_state, lins, VGG)
    same(load_lpips(*files, VGG)[1], wanted)
    for state, name in ((vgg_state, "network"), (lins, "lins")):
        save_file(state, tmp_path / f"{name}.safetensors")
    same(load_lpips(tmp_path / "network.safetensors", tmp_path / "lins.safetensors", VGG)[1], wanted)


def test_the_weights_of_dists_may_be_saved_as_parameters(tmp_path, vgg_state):
    torch = reference.import_torch()
    path = save_torch(alphas(), tmp_path / "weights.pt", torch.nn.Parameter)
    same(load_dists(vgg_state, path, L2)[1], load_dists(vgg_state, alphas(), L2)[1])


def test_an_inception_without_counters_and_behind_a_wrapper_loads(tmp_path, inception_state):
    bare = {f"module.{key}": value for key, value in inception_state.items() if "tracked" not in key}
    path = save_torch(bare, tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    same(load_inception(path, NARROW)[1], load_inception(inception_state, NARROW)[1])


# -- what does not fit ------------------------------------------------------------------------------------------------


def test_one_error_lists_what_does_not_fit_in_both_files(alex_state):
    state = {key: value for key, value in alex_state.items() if key != "features.3.bias"}
    state["features.1.running_mean"] = np.zeros(3, np.float32)
    lins = reference.draw_lins((6, 8, 10, 12, 15)) | {"lin5.model.1.weight": np.zeros((1, 4, 1, 1), np.float32)}
    with pytest.raises(WeightsError) as error:
        load_lpips(state, lins, ALEX)
    assert str(error.value).splitlines() == [
        "the state dict does not fit the model: 1 missing, 2 surplus, 1 misshapen",
        "  missing: features.3.bias (8,)",
        "  surplus: features.1.running_mean (3,)",
        "  surplus: lin5.model.1.weight (1, 4, 1, 1)",
        "  misshapen: lin4.model.1.weight is (1, 15, 1, 1), not (1, 14, 1, 1)",
    ]


def test_errors_name_both_files(tmp_path, vgg_state):
    lins = reference.draw_lins(VGG.widths)
    del lins["lin2.model.1.weight"]
    paths = save_torch(vgg_state, tmp_path / "vgg16.pth"), save_torch(lins, tmp_path / "lins.pth")
    with pytest.raises(WeightsError, match=r"vgg16\.pth with .*lins\.pth does not fit .*1 missing") as error:
        load_lpips(*paths, VGG)
    assert "missing: lin2.model.1.weight (1, 8, 1, 1)" in str(error.value)


def test_the_other_network_is_refused(alex_state, vgg_state):
    with pytest.raises(WeightsError, match=r"misshapen: features\.0\.weight is \(6, 3, 11, 11\), not \(4, 3, 3, 3\)"):
        load_vgg(alex_state, VGG)
    with pytest.raises(WeightsError, match=r"surplus: features\.2\.weight"):
        load_alexnet(vgg_state, ALEX)


def test_one_file_given_twice_is_refused(vgg_state):
    with pytest.raises(
        WeightsError, match=r"both hold classifier\.0\.bias: give the network and the metric's own weights"
    ):
        load_dists(vgg_state, vgg_state, L2)


def test_dists_without_beta_says_so(vgg_state):
    with pytest.raises(WeightsError, match=r"missing: beta \(1, 43, 1, 1\)"):
        load_dists(vgg_state, {"alpha": alphas()["alpha"]}, L2)


@pytest.mark.parametrize("mark", ["AuxLogits.conv0.conv.weight", "fc.bias"])
def test_torchvisions_inception_is_refused(inception_state, mark):
    """It differs from FID's in nothing else that a file shows."""
    state = inception_state | {mark: np.zeros(1000, np.float32)}
    with pytest.raises(WeightsError, match="is torchvision's InceptionV3, whose features give another FID"):
        load_inception(state, NARROW)


def test_an_inception_that_is_cut_short_is_listed(inception_state):
    state = {key: value for key, value in inception_state.items() if not key.startswith("Mixed_7c.branch_pool")}
    with pytest.raises(WeightsError, match="5 missing") as error:
        load_inception(state, NARROW)
    assert "missing: Mixed_7c.branch_pool.bn.running_var (12,)" in str(error.value)


def test_integers_are_no_weights(vgg_state):
    state = vgg_state | {"features.0.bias": np.zeros(4, np.int64)}
    with pytest.raises(WeightsError, match=r"of another kind: features\.0\.bias is int64, not float32"):
        load_vgg(state, VGG)


def test_names_and_files_that_do_not_exist_are_refused(tmp_path, vgg_state):
    with pytest.raises(InputError, match="there is no LPIPS 'squeeze'; there are alex, vgg"):
        load_lpips(vgg_state, {}, "squeeze")
    with pytest.raises(InputError, match=r"nothing\.pth is neither a folder nor an id"):
        load_vgg(tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(WeightsError, match=r"text\.pth is no torch file"):
        load_inception(tmp_path / "text.pth")
