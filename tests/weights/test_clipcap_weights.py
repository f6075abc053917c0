"""ClipCap's checkpoints: parity with the published class in torch, both directions, and what does not fit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.backbones.gpt2 import Gpt2Config
from jaxsem.errors import InputError, WeightsError
from jaxsem.systems.clipcap import ClipCap, ClipCapConfig, caption, clipcap_loss, param_shapes
from jaxsem.weights.clipcap import load_clipcap, to_torch

GPT2 = Gpt2Config(width=32, layers=2, heads=4, hidden=128, vocabulary=61, context=40)
MLP = ClipCapConfig(feature_width=20, prefix=3, gpt2=GPT2)
TRANSFORMER = dataclasses.replace(MLP, mapper="transformer", prefix=4, clip_length=5, layers=3, heads=8)
CONFIGS = pytest.mark.parametrize("config", [MLP, TRANSFORMER], ids=["mlp", "transformer"])

FEATURES = 3 * np.random.RandomState(0).standard_normal((3, 20)).astype(np.float32)
LENGTHS = np.array([7, 4, 1])
MASK = np.arange(7) < LENGTHS[:, None]
# Zero is the authors' padding, so it is no word of these captions.
TOKENS = np.where(MASK, np.random.RandomState(1).randint(1, 61, MASK.shape), 0).astype(np.int32)


@pytest.fixture
def torch():
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(2)
    return torch


# -- the published class, from its description ------------------------------------------------------------------------


def attention(torch, layer, x, heads):
    """Multi-head attention with one projection for keys and values, the keys first."""
    query, (key, value) = layer.to_queries(x), layer.to_keys_values(x).chunk(2, -1)
    split = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value)]
    weights = (split[0] @ split[1].mT / split[0].shape[-1] ** 0.5).softmax(-1)
    return layer.project((weights @ split[2]).transpose(1, 2).flatten(2))


def mlp_mapper(torch, c):
    nn, size = torch.nn, c.prefix * c.gpt2.width
    mapper = nn.Module()
    mapper.model = nn.Sequential(nn.Linear(c.feature_width, size // 2), nn.Tanh(), nn.Linear(size // 2, size))
    mapper.forward = mapper.model.forward
    return mapper


def transformer_mapper(torch, c):
    nn, w = torch.nn, c.gpt2.width
    mapper = nn.Module()
    mapper.linear = nn.Linear(c.feature_width, c.clip_length * w)
    mapper.prefix_const = nn.Parameter(torch.randn(c.prefix, w))
    mapper.transformer = nn.Module()
    mapper.transformer.layers = nn.ModuleList(nn.Module() for _ in range(c.layers))
    for layer in mapper.transformer.layers:
        layer.norm1, layer.norm2 = nn.LayerNorm(w), nn.LayerNorm(w)
        layer.attn, layer.mlp = nn.Module(), nn.Module()
        layer.attn.to_queries = nn.Linear(w, w, bias=False)
        layer.attn.to_keys_values = nn.Linear(w, 2 * w, bias=False)
        layer.attn.project = nn.Linear(w, w)
        layer.mlp.fc1, layer.mlp.fc2 = nn.Linear(w, 2 * w), nn.Linear(2 * w, w)

    def forward(features):
        x = mapper.linear(features).unflatten(1, (c.clip_length, w))
        x = torch.cat([x, mapper.prefix_const.expand(len(x), -1, -1)], 1)
        for layer in mapper.transformer.layers:
            x = x + attention(torch, layer.attn, layer.norm1(x), c.heads)
            x = x + layer.mlp.fc2(layer.mlp.fc1(layer.norm2(x)).relu())
        return x[:, c.clip_length :]

    mapper.forward = forward
    return mapper


def reference(torch, c):
    """The model with seeded weights under which features, places and every layer change the words."""
    import transformers

    torch.manual_seed(0)
    g = c.gpt2
    sizes = {"vocab_size": g.vocabulary, "n_positions": g.context, "n_embd": g.width, "n_layer": g.layers}
    model = torch.nn.Module()
    model.gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, n_head=g.heads, n_inner=g.hidden))
    model.clip_project = {"mlp": mlp_mapper, "transformer": transformer_mapper}[c.mapper](torch, c)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name or ".ln_" in name or name.endswith("bias"):
                value.add_(0.2 * torch.randn_like(value))
            elif "gpt" in name:
                value.mul_(40 if "wpe" in name or "wte" in name else 8)
    return model.eval()


def logits_of(torch, c, model, features, tokens, mask=None):
    """All logits, those of the prefix included."""
    prefix = model.clip_project(features).reshape(-1, c.prefix, c.gpt2.width)
    embeddings = torch.cat([prefix, model.gpt.transformer.wte(tokens)], 1)
    return model.gpt(inputs_embeds=embeddings, attention_mask=mask).logits


def state_of(model):
    return {key: value.numpy().copy() for key, value in model.state_dict().items()}


@functools.partial(jax.jit, static_argnames="module")
def loss_and_gradient(module, params, features, tokens, mask):
    """The loss, the logits, and the gradient."""

    def loss_of(params):
        logits = module.apply({"params": params}, features, tokens, mask)
        return clipcap_loss(logits, tokens, mask)[0], logits

    return jax.value_and_grad(loss_of, has_aux=True)(params)


# -- parity -----------------------------------------------------------------------------------------------------------


@CONFIGS
def test_the_mapper_is_the_published_one(torch, config):
    model = reference(torch, config)
    module, params = load_clipcap(state_of(model), config)
    with torch.no_grad():
        expected = model.clip_project(torch.from_numpy(FEATURES)).reshape(3, config.prefix, 32)
    found = jax.jit(functools.partial(module.apply, method="prefix"))({"params": params}, FEATURES)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


@CONFIGS
def test_logits_loss_and_gradients_are_those_of_the_published_model(torch, config):
    model = reference(torch, config)
    module, params = load_clipcap(state_of(model), config)
    features, tokens = torch.from_numpy(FEATURES), torch.from_numpy(TOKENS).long()
    seen = torch.from_numpy(np.pad(MASK, ((0, 0), (config.prefix, 0)), constant_values=True)).float()
    expected = logits_of(torch, config, model, features, tokens, seen)[:, config.prefix - 1 : -1]
    (loss, found), gradient = loss_and_gradient(module, params, FEATURES, TOKENS, MASK)
    np.testing.assert_allclose(found[MASK], expected.detach().numpy()[MASK], atol=1e-4, rtol=1e-4)

    theirs = torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens.flatten(), ignore_index=0)
    theirs.backward()
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-5)
    written = to_torch(gradient, config)
    for name, value in model.named_parameters():
        scale = max(1, float(value.grad.abs().max()))
        np.testing.assert_allclose(written[name], value.grad, atol=1e-5 * scale, err_msg=name)


@CONFIGS
def test_captions_are_those_of_a_loop_over_the_published_model(torch, config):
    """Every word from all before it, at once; the nucleus of 0.8 leaves the likeliest word the likeliest."""
    model = reference(torch, config)
    tokens = torch.zeros(3, 0, dtype=torch.long)
    with torch.no_grad():
        for _ in range(8):
            logits = logits_of(torch, config, model, torch.from_numpy(FEATURES), tokens)[:, -1]
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    module, params = load_clipcap(state_of(model), config)
    found = caption(module, params, FEATURES, max_new_tokens=8, stop=())
    np.testing.assert_array_equal(found.tokens, tokens.numpy())
    assert len(np.unique(found.tokens)) > 4


# -- both directions --------------------------------------------------------------------------------------------------


@functools.cache
def params_of(config):
    random = np.random.RandomState(0)
    return jax.tree.map(lambda s: random.standard_normal(s.shape).astype(np.float32), param_shapes(ClipCap(config)))


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@CONFIGS
def test_weights_survive_both_directions(config):
    params = params_of(config)
    same(load_clipcap(to_torch(params, config), config)[1], params)


@CONFIGS
def test_what_is_written_has_the_keys_of_the_published_class(torch, config):
    model = reference(torch, config)
    state = to_torch(params_of(config), config)
    model.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in state.items()}, strict=True)


def test_a_torch_file_with_masks_and_a_wrapper_loads(torch, tmp_path):
    """Files of older versions of transformers hold the causal masks, and those of several devices begin with `module.`."""
    params = params_of(MLP)
    state = {f"module.{key}": torch.from_numpy(value.copy()) for key, value in to_torch(params, MLP).items()}
    for i in range(GPT2.layers):
        state[f"module.gpt.transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 40, 40, dtype=torch.uint8).tril()
        state[f"module.gpt.transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    path = tmp_path / "coco_weights.pt"
    torch.save(state, path)
    module, found = load_clipcap(path, MLP)
    assert module.config == MLP
    same(found, params)


def test_the_type_of_parameters_can_be_chosen():
    module, params = load_clipcap(to_torch(params_of(MLP), MLP), MLP, jnp.bfloat16, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert module.dtype == jnp.bfloat16


# -- what does not fit ------------------------------------------------------------------------------------------------


def test_missing_and_surplus_keys_of_both_parts_are_listed_in_one_error():
    state = to_torch(params_of(TRANSFORMER), TRANSFORMER)
    layer = "clip_project.transformer.layers.1"
    state[f"{layer}.attn.projekt.bias"] = state.pop(f"{layer}.attn.project.bias")
    state["extra.weight"] = np.zeros(3, np.float32)
    del state["gpt.transformer.h.1.mlp.c_fc.bias"]
    with pytest.raises(WeightsError) as caught:
        load_clipcap(state, TRANSFORMER)
    text = str(caught.value)
    assert f"missing: {layer}.attn.project.bias (32,)" in text
    assert f"surplus: {layer}.attn.projekt.bias (32,) (did you mean {layer}.attn.project.bias?)" in text
    assert "surplus: extra.weight (3,)" in text
    assert "its gpt2, keys without 'gpt.': the state dict does not fit the model: 1 missing" in text
    assert "missing: h.1.mlp.c_fc.bias (128,)" in text


def test_the_other_mapper_is_refused():
    state = to_torch(params_of(TRANSFORMER), TRANSFORMER)
    with pytest.raises(WeightsError, match=r"missing: clip_project.model.0.weight \(48, 20\)"):
        load_clipcap(state, MLP)


def test_another_width_of_features_is_refused():
    state = to_torch(params_of(MLP), MLP)
    with pytest.raises(WeightsError, match=r"misshapen: clip_project.model.0.weight is \(48, 20\), not \(48, 24\)"):
        load_clipcap(state, dataclasses.replace(MLP, feature_width=24))


def test_keys_and_values_that_are_not_two_are_an_error():
    state = to_torch(params_of(TRANSFORMER), TRANSFORMER)
    state["clip_project.transformer.layers.0.attn.to_keys_values.weight"] = np.zeros((63, 32), np.float32)
    with pytest.raises(WeightsError, match=r"to_keys_values.weight is \(63, 32\), which is not keys and values"):
        load_clipcap(state, TRANSFORMER)


def test_a_missing_file_is_told_by_its_name(tmp_path):
    with pytest.raises(InputError, match=r"coco_weights\.pt"):
        load_clipcap(tmp_path / "coco_weights.pt", MLP)
