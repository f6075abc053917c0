"""Llama's and Mistral's checkpoints: every layout gives the same parameters; what does not fit is said."""

import dataclasses
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from jaxsem.backbones.llama import LLAMA_7B, MISTRAL_7B_V02, Llama, LlamaConfig, param_shapes, quantise_weights
from jaxsem.errors import InputError, WeightsError
from jaxsem.nn.llama_block import RopeScaling
from jaxsem.weights.convert import convert
from jaxsem.weights.llama import check_tied, llama_table, load_llama, parse_config, split_kernels, to_transformers

CONFIG = LlamaConfig(width=12, layers=2, heads=3, kv_heads=1, hidden=20, vocabulary=17, context=9)
FIELDS = {
    "model_type": "llama",
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 20,
    "vocab_size": 17,
    "max_position_embeddings": 9,
    "rms_norm_eps": 1e-5,
}
PREFIXES = {
    "old": ("language_model.model.", "language_model.lm_head.weight"),
    "new": ("model.language_model.", "lm_head.weight"),
}


@pytest.fixture(scope="module")
def params():
    random = np.random.RandomState(0)
    shapes = flatten_dict(param_shapes(Llama(CONFIG)))
    return unflatten_dict({path: random.standard_normal(s.shape).astype(np.float32) for path, s in shapes.items()})


@pytest.fixture(scope="module")
def state(params):
    return to_transformers(params, CONFIG)


def same(first, second):
    first, second = flatten_dict(first, sep="/"), flatten_dict(second, sep="/")
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def write(folder, state, fields=FIELDS, parts=1):
    """A folder as the Hub keeps it, its weights in one file or in parts."""
    (folder / "config.json").write_text(json.dumps(fields))
    state = {key: np.ascontiguousarray(value) for key, value in state.items()}
    if parts == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    places = {key: f"model-{i % parts + 1:05}-of-{parts:05}.safetensors" for i, key in enumerate(sorted(state))}
    for name in set(places.values()):
        save_file({key: state[key] for key in places if places[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_what_is_written_loads_again(params, state):
    same(load_llama(state, CONFIG)[1], params)


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_transformers_loads_what_is_written(state, kind):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        **{key: value for key, value in FIELDS.items() if key != "model_type"}
    )
    net = getattr(transformers, f"{kind}ForCausalLM")(config)
    net.load_state_dict({key: torch.tensor(value) for key, value in state.items()}, strict=True)
    for key, value in net.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[key], err_msg=key)


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_a_folder_that_transformers_wrote_loads_with_its_own_config(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    sizes = {key: value for key, value in FIELDS.items() if key != "model_type"}
    net = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    net.save_pretrained(tmp_path, max_shard_size="4kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    module, found = load_llama(tmp_path)
    assert module.config == dataclasses.replace(CONFIG, window=4096 if kind == "Mistral" else None)
    want = net.model.layers[1].self_attn.k_proj.weight.detach().numpy().T
    np.testing.assert_array_equal(found["blocks"]["attention"]["key"]["kernel"][1], want)
    np.testing.assert_array_equal(found["head"], net.lm_head.weight.detach().numpy())


@pytest.mark.parametrize("parts", [1, 3])
def test_a_folder_loads_whole_or_in_parts(tmp_path, params, state, parts):
    module, found = load_llama(write(tmp_path, state, parts=parts))
    assert module == Llama(CONFIG)
    same(found, params)


@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_every_prefix_gives_the_same_parameters(params, state, prefix):
    renamed = {key.replace("model.", prefix, 1): value for key, value in state.items()}
    same(load_llama(renamed, CONFIG)[1], params)


@pytest.mark.parametrize("layout", PREFIXES)
@pytest.mark.parametrize("weights", ["float", "int8"])
def test_the_table_serves_a_part_of_a_larger_model(params, state, layout, weights):
    prefix, head = PREFIXES[layout]
    renamed = {head if key == "lm_head.weight" else key.replace("model.", prefix, 1): state[key] for key in state}
    if weights == "int8":
        renamed = split_kernels(renamed, "LLaVA", prefix)
    shapes = {"language": param_shapes(Llama(CONFIG, weights=weights))}
    found = convert(llama_table(CONFIG, weights, prefix, head, "language/"), renamed, shapes)
    same(found["language"], quantise_weights(params) if weights == "int8" else params)


def test_the_frequencies_of_older_files_are_passed_over(params, state):
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for i in range(2)}
    same(load_llama(state | old, CONFIG)[1], params)


def test_parameters_come_in_the_type_asked_for(params, state):
    module, found = load_llama(state, CONFIG, "bfloat16", "bfloat16")
    assert (module.dtype, found["head"].dtype) == ("bfloat16", "bfloat16")
    np.testing.assert_allclose(found["head"].astype(np.float32), params["head"], rtol=2**-8)


def test_int8_weights_are_those_of_the_float_ones(tmp_path, params, state):
    module, found = load_llama(write(tmp_path, state, parts=2), weights="int8")
    assert module == Llama(CONFIG, weights="int8")
    same(found, quantise_weights(params))


def test_reading_int8_weights_takes_little_more_memory_than_they_do(tmp_path):
    config = dataclasses.replace(CONFIG, width=96, layers=10, hidden=512)
    shapes = flatten_dict(param_shapes(Llama(config)))
    write(
        tmp_path, to_transformers(unflatten_dict({k: np.ones(s.shape, np.float32) for k, s in shapes.items()}), config)
    )
    tracemalloc.start()
    try:
        _, found = load_llama(tmp_path, config, weights="int8")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Beside the result one kernel as float32, its absolute values and its quotient, and what tracing takes.
    result = sum(leaf.nbytes for leaf in flatten_dict(found).values())
    assert peak < result + 4 * 4 * 96 * 512 + 400_000 < 0.6 * sum(4 * s.size for s in shapes.values())


def test_int8_weights_are_made_of_bfloat16_ones(state):
    small = {key: value.astype(ml_dtypes.bfloat16) for key, value in state.items()}
    _, found = load_llama(small, CONFIG, "bfloat16", "bfloat16", "int8")
    wide = {key: value.astype(np.float32) for key, value in small.items()}
    same(found["blocks"]["mlp"], load_llama(wide, CONFIG, weights="int8")[1]["blocks"]["mlp"])
    assert found["blocks"]["norm1"]["scale"].dtype == ml_dtypes.bfloat16


def test_a_tied_output_layer_may_be_missing_or_twice_there(params, state):
    tied = dataclasses.replace(CONFIG, tied=True)
    want = {key: value for key, value in params.items() if key != "head"}
    once = {key: value for key, value in state.items() if key != "lm_head.weight"}
    same(load_llama(once, tied)[1], want)
    same(load_llama(once | {"lm_head.weight": state["model.embed_tokens.weight"]}, tied)[1], want)
    same(load_llama(to_transformers(want, tied), tied)[1], want)


# -- what does not fit ------------------------------------------------------------------------------------------------


def test_a_tied_output_layer_of_its_own_is_refused(state):
    tied = dataclasses.replace(CONFIG, tied=True)
    with pytest.raises(WeightsError, match=r"lm_head\.weight is not embed_tokens\.weight again"):
        load_llama(state, tied)
    with pytest.raises(WeightsError, match=r"LLaVA: lm_head\.weight is not model\.embed_tokens\.weight again"):
        check_tied(state, tied, "LLaVA", "model.")


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_all_that_does_not_fit_is_listed(state, weights):
    state = dict(state)
    state["model.layers.1.mlp.up_proj.wieght"] = state.pop("model.layers.1.mlp.up_proj.weight")
    state["model.layers.0.self_attn.k_proj.weight"] = np.zeros((8, 12), np.float32)
    state["model.layers.0.self_attn.q_proj.bias"] = np.zeros(12, np.float32)
    with pytest.raises(WeightsError) as caught:
        load_llama(state, CONFIG, weights=weights)
    text = str(caught.value)
    assert "surplus: layers.0.self_attn.q_proj.bias (12,)" in text
    if weights == "float":
        assert "missing: layers.1.mlp.up_proj.weight (20, 12)" in text
        assert "misshapen: layers.0.self_attn.k_proj.weight is (8, 12), not (4, 12)" in text
    else:
        assert "missing: layers.1.mlp.up_proj.weight[kernel] (12, 20)" in text
        assert "misshapen: layers.0.self_attn.k_proj.weight[scale] is (8,), not (4,)" in text


@pytest.mark.parametrize("value", [np.zeros((4, 12), np.int8), np.zeros(4, np.float32)], ids=["integers", "a vector"])
def test_a_kernel_that_cannot_be_quantised_is_listed_by_its_own_name(state, value):
    with pytest.raises(WeightsError, match=r"surplus: layers\.0\.self_attn\.k_proj\.weight \(4"):
        load_llama(state | {"model.layers.0.self_attn.k_proj.weight": value}, CONFIG, weights="int8")


def test_a_kernel_that_is_no_number_is_named(state):
    broken = state["model.layers.1.mlp.down_proj.weight"].copy()
    broken[0, 0] = np.nan
    with pytest.raises(WeightsError, match=r"the state dict: layers\.1\.mlp\.down_proj\.weight: .* holds inf or NaN"):
        load_llama(state | {"model.layers.1.mlp.down_proj.weight": broken}, CONFIG, weights="int8")


def test_int8_parameters_are_not_written(params):
    with pytest.raises(WeightsError, match=r"surplus: blocks/attention/key/scale \(2, 4\)"):
        to_transformers(quantise_weights(params), CONFIG)


def test_a_part_that_is_missing_is_named(tmp_path, state):
    (write(tmp_path, state, parts=3) / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"lacks model-00002-of-00003\.safetensors"):
        load_llama(tmp_path)


def test_a_file_without_sizes_needs_a_config(state):
    with pytest.raises(InputError, match="give a config, or one of llama-2-7b"):
        load_llama(state)
    with pytest.raises(InputError, match="no published Llama 'llama-4'; there are llama-2-7b"):
        load_llama(state, "llama-4")
    with pytest.raises(InputError, match="no 'int4' weights"):
        load_llama(state, CONFIG, weights="int4")


# -- configs ----------------------------------------------------------------------------------------------------------


def test_the_text_configs_of_llava_are_completed_by_the_defaults():
    vicuna = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    assert parse_config(vicuna) == dataclasses.replace(LLAMA_7B, vocabulary=32064)
    mistral = {
        "model_type": "mistral",
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32064,
    }
    assert parse_config(mistral) == dataclasses.replace(MISTRAL_7B_V02, vocabulary=32064)
    assert parse_config({**mistral, "head_dim": 128}) == parse_config(mistral)


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_fields_that_are_absent_have_the_defaults_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, f"{kind}Config")()
    assert parse_config({"model_type": kind.lower()}) == parse_config(theirs.to_dict())


def test_positions_are_read_as_written_before_and_since_transformers_5():
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    old = {"model_type": "llama", "rope_theta": 500000, "rope_scaling": {"rope_type": "llama3", **rope}}
    new = {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **rope}}
    assert parse_config(old) == parse_config(new)
    assert parse_config(new).rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert parse_config(new).rope_base == 500000.0
    oldest = {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert parse_config(oldest).rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "one of 'gpt2', not of 'llama' or 'mistral'"),
        ({"model_type": ["llama"]}, r"one of \['llama'\]"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', and only 'silu' is known"),
        ({"attention_bias": True}, "attention_bias=True, and only False"),
        ({"mlp_bias": 3}, "mlp_bias=3, and only False"),
        (
            {"quantization_config": {"quant_method": "awq", "x": "y" * 999}},
            "quantization_config={'quant_method': 'awq'",
        ),
        ({"hidden_size": "12"}, "hidden_size='12'; a number from 1 to"),
        ({"hidden_size": 13}, "width of 13 cannot be split into 3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000; a number from 1 to 1000"),
        ({"num_attention_heads": 0}, "num_attention_heads=0; a number"),
        ({"num_key_value_heads": 2}, "3 heads of queries cannot share 2"),
        ({"intermediate_size": True}, "intermediate_size=True; a number"),
        ({"vocab_size": 1e4}, "vocab_size=10000.0; a number"),
        ({"vocab_size": None}, "vocab_size=None; a number"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings=1099511627776; a number"),
        ({"head_dim": 5}, "heads of 5 channels cannot turn"),
        ({"head_dim": -4}, "head_dim=-4; a number"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0; a number"),
        ({"rms_norm_eps": "0"}, "epsilon='0'"),
        ({"rms_norm_eps": float("nan")}, "epsilon=nan"),
        ({"tie_word_embeddings": "yes"}, "tied='yes'"),
        ({"rope_theta": None}, "rope_theta=None; a number above 1"),
        ({"rope_theta": 10**400}, "rope_theta=1000"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, and only 1"),
        ({"rope_scaling": "linear"}, "its positions are 'linear', and only one plain object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "only one plain object"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "scaled by 'yarn', and only"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"scaled by \['linear'\], and only"),
        ({"rope_scaling": {"type": "linear"}}, "factor=None; it takes a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor=inf"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low=None; it takes a number"),
    ],
)
def test_configs_of_what_this_is_not_are_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps({**FIELDS, **change}))
    with pytest.raises(WeightsError, match=message) as caught:
        load_llama(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert len(str(caught.value)) < 800
