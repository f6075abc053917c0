"""GPT-2's checkpoints: every layout gives the same parameters; what does not fit is said."""

import json

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxsem.backbones.gpt2 import GPT2, GPT2_MEDIUM, Gpt2, Gpt2Config, param_shapes
from jaxsem.errors import InputError, WeightsError
from jaxsem.weights.gpt2 import config_from_transformers, load_gpt2, to_transformers

CONFIG = Gpt2Config(width=12, layers=2, heads=3, hidden=20, vocabulary=17, context=9)
SIZES = {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_inner": 20, "vocab_size": 17, "n_positions": 9}


@pytest.fixture(scope="module")
def params():
    random = np.random.RandomState(0)
    shapes = flatten_dict(param_shapes(Gpt2(CONFIG)), sep="/")
    tree = {}
    for path, leaf in shapes.items():
        *folders, name = path.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[name] = random.standard_normal(leaf.shape).astype(np.float32)
    return tree


@pytest.fixture(scope="module")
def state(params):
    return to_transformers(params, CONFIG)


def same(first, second):
    first, second = flatten_dict(first, sep="/"), flatten_dict(second, sep="/")
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def torch_net(kind="GPT2LMHeadModel"):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    return getattr(transformers, kind)(transformers.GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0))


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_what_is_written_loads_again(params, state):
    same(load_gpt2(state, CONFIG)[1], params)


def test_transformers_loads_what_is_written(state):
    net = torch_net()
    torch = pytest.importorskip("torch")
    net.load_state_dict({key: torch.tensor(value) for key, value in state.items()}, strict=True)
    for key, value in net.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[key], err_msg=key)


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "GPT2Model"])
def test_a_folder_that_transformers_wrote_loads_with_its_own_config(tmp_path, kind):
    net = torch_net(kind)
    net.save_pretrained(tmp_path)
    module, found = load_gpt2(tmp_path)
    assert module.config == CONFIG
    body = getattr(net, "transformer", net)
    want = body.h[1].attn.c_attn.weight.detach().numpy()[:, 12:24]
    np.testing.assert_array_equal(found["blocks"]["attention"]["key"]["kernel"][1], want)
    np.testing.assert_array_equal(found["token_embedding"], body.wte.weight.detach().numpy())


@pytest.mark.parametrize("prefix", ["", "transformer.", "module.transformer."])
def test_every_prefix_gives_the_same_parameters(params, state, prefix):
    bare = {key.removeprefix("transformer."): value for key, value in state.items() if key != "lm_head.weight"}
    same(load_gpt2({prefix + key: value for key, value in bare.items()}, CONFIG)[1], params)


def test_the_causal_masks_of_older_files_are_passed_over(params, state):
    masks = {f"transformer.h.{i}.attn.bias": np.tri(9, dtype=np.uint8)[None, None] for i in range(2)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": np.float32(-1e4) for i in range(2)}
    same(load_gpt2(state | masks, CONFIG)[1], params)


def test_parameters_come_in_the_type_asked_for(params, state):
    module, found = load_gpt2(state, CONFIG, "bfloat16", "bfloat16")
    assert (module.dtype, found["positions"].dtype) == ("bfloat16", "bfloat16")
    np.testing.assert_allclose(found["positions"].astype(np.float32), params["positions"], rtol=2**-8)


# -- what does not fit ------------------------------------------------------------------------------------------------


def test_an_output_layer_of_its_own_is_refused(state):
    with pytest.raises(WeightsError, match=r"lm_head\.weight is not wte\.weight again"):
        load_gpt2(state | {"lm_head.weight": state["lm_head.weight"] + 1}, CONFIG)


def test_all_that_does_not_fit_is_listed(state):
    state = dict(state)
    state["transformer.h.1.mlp.c_fc.wieght"] = state.pop("transformer.h.1.mlp.c_fc.weight")
    state["transformer.h.0.attn.c_attn.weight"] = np.zeros((12, 33), np.float32)
    with pytest.raises(WeightsError) as caught:
        load_gpt2(state, CONFIG)
    text = str(caught.value)
    assert "missing: h.1.mlp.c_fc.weight (12, 20)" in text
    assert "surplus: h.1.mlp.c_fc.wieght (12, 20) (did you mean h.1.mlp.c_fc.weight?)" in text
    assert "misshapen: h.0.attn.c_attn.weight[key] is (12, 11), not (12, 12)" in text


def test_fused_weights_that_are_not_three_are_an_error(state):
    with pytest.raises(WeightsError, match=r"c_attn.bias is \(35,\), which is not queries, keys and values"):
        load_gpt2(state | {"transformer.h.0.attn.c_attn.bias": np.zeros(35, np.float32)}, CONFIG)


def test_parameters_of_another_config_are_not_written(params):
    less = {key: value for key, value in params.items() if key != "positions"}
    with pytest.raises(WeightsError) as caught:
        to_transformers({**less, "token_embedding": np.zeros((3, 12)), "head": np.zeros(2)}, CONFIG)
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "head is (2,), not there",
        "positions is missing, not (9, 12)",
        "token_embedding is (3, 12), not (17, 12)",
    ]


def test_a_file_without_sizes_needs_a_config(state, tmp_path):
    with pytest.raises(InputError, match="give a config, or one of gpt2, gpt2-medium"):
        load_gpt2(state)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="give a config"):
        load_gpt2(path)
    with pytest.raises(InputError, match="no published GPT-2 'gpt2-tiny'; there are gpt2, "):
        load_gpt2(state, "gpt2-tiny")


# -- configs ----------------------------------------------------------------------------------------------------------


def test_fields_that_are_absent_have_the_defaults_of_transformers():
    assert config_from_transformers({"model_type": "gpt2"}) == GPT2
    fields = {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16, "n_inner": None, "n_ctx": 1024}
    assert config_from_transformers(fields) == GPT2_MEDIUM


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "one of 'llama', not of 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function='relu', and only 'gelu_new' is known"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True, and only False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False, and only True"),
        ({"n_embd": "768"}, "n_embd='768'; a number from 1 to"),
        ({"n_layer": 10**9}, "n_layer=1000000000; a number from 1 to 1000"),
        ({"n_inner": True}, "n_inner=True; a number"),
        ({"n_head": 7}, "width of 768 cannot be split into 7"),
        ({"layer_norm_epsilon": "0"}, "epsilon='0'"),
    ],
)
def test_configs_of_what_this_is_not_are_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **change}))
    with pytest.raises(WeightsError, match=message) as caught:
        load_gpt2(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
