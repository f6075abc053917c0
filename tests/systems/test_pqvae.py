"""PQVAE-shared: sizes, gradients, the loss, bad input, and parity with torch in both directions of the weights."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.errors import InputError, WeightsError
from jaxsem.systems import PAPER, RELEASED, Pqvae, PqvaeConfig, check_features, pqvae_loss
from jaxsem.systems.pqvae import bits_per_dimension, bits_per_image, param_shapes, unit
from jaxsem.weights.pqvae import load_pqvae, to_torch

TINY = PqvaeConfig(width=24, channels=8, hidden=(12, 10), residual=6, residual_layers=1, codeword=4, codebook=5)
STRADDLING = dataclasses.replace(TINY, codeword=5)  # divides 5 * 5 * 8, not 8
FEATURES = np.random.RandomState(0).standard_normal((3, 24)).astype(np.float32)


def params_of(config, seed=0):
    """Random parameters, with biases that are not zero and a codebook near the latent's scale."""
    shapes = param_shapes(Pqvae(config))
    random = np.random.RandomState(seed)
    return jax.tree.map(lambda s: 0.3 * random.standard_normal(s.shape).astype(np.float32), shapes)


@partial(jax.jit, static_argnames=("config", "method"))
def run(config, params, x, method=None):
    return Pqvae(config).apply({"params": params}, x, method=method)


@partial(jax.jit, static_argnames="config")
def gradient_of(config, params, features):
    """The loss with what the model gave, and the gradient."""

    def loss_of(params):
        outputs = Pqvae(config).apply({"params": params}, features)
        return pqvae_loss(config, features, outputs)[0], outputs

    return jax.value_and_grad(loss_of, has_aux=True)(params)


def counted(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_the_published_sizes():
    shapes = param_shapes(Pqvae(RELEASED))
    counts = {name: counted(part) for name, part in shapes.items()}
    assert counts == {"encoder": 5_997_440, "decoder": 5_998_080, "codebook": 64}


@pytest.mark.parametrize(
    ("codeword", "codebook", "bits"), [(16, 4, 400), (16, 8, 600), (10, 4, 640), (25, 64, 768), (128, 65536, 400)]
)
def test_bits_of_the_released_models(codeword, codebook, bits):
    config = PqvaeConfig(codeword=codeword, codebook=codebook)
    assert bits_per_image(config) == pytest.approx(bits)
    assert bits_per_dimension(config) == pytest.approx(bits / 768)


@pytest.mark.parametrize("width", [512, 7])
def test_any_feature_width(width):
    module = Pqvae(dataclasses.replace(TINY, width=width))
    features = jnp.ones((2, width))
    outputs = jax.eval_shape(lambda key: module.init_with_output(key, features)[0], jax.random.key(0))
    assert outputs["x_hat"].shape == (2, width)
    assert outputs["indices"].shape == (2, 50)


def test_a_new_model_starts_with_a_codebook_over_minus_one_to_one():
    module = Pqvae(dataclasses.replace(TINY, codebook=500))
    codebook = jax.jit(lambda key: module.init(key, FEATURES)["params"]["codebook"])(jax.random.key(0))
    assert -1 <= codebook.min() < -0.99
    assert 0.99 < codebook.max() <= 1


@pytest.mark.parametrize("config", [TINY, STRADDLING])
def test_indices_alone_give_what_training_saw(config):
    params = params_of(config)
    outputs = run(config, params, FEATURES)
    indices = run(config, params, FEATURES, "indices_of")
    np.testing.assert_array_equal(indices, outputs["indices"])
    assert len(np.unique(indices)) > 1
    received = run(config, params, indices, "features_of")
    np.testing.assert_allclose(received, outputs["x_hat"], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(received, axis=1), 1, rtol=1e-5)


def test_sub_vectors_are_cut_from_the_latent_with_channels_last():
    params = params_of(TINY)
    by_four = run(TINY, params, FEATURES, "encode")
    by_five = run(STRADDLING, {**params, "codebook": np.zeros((5, 5), np.float32)}, FEATURES, "encode")
    assert (by_four.shape, by_five.shape) == ((3, 50, 4), (3, 40, 5))
    np.testing.assert_allclose(by_four.reshape(3, -1), by_five.reshape(3, -1), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(by_five.reshape(3, 25, 8), axis=-1), 1, rtol=1e-5)


def test_the_length_of_a_feature_does_not_matter():
    once, thrice = (run(TINY, params_of(TINY), scale * FEATURES) for scale in (1, 3))
    np.testing.assert_allclose(once["z"], thrice["z"], atol=1e-5)
    assert float(pqvae_loss(TINY, 3 * FEATURES, once)[0]) == pytest.approx(float(pqvae_loss(TINY, FEATURES, once)[0]))


def test_gradients_pass_the_quantiser_and_reach_every_parameter():
    cosine_only = dataclasses.replace(TINY, codebook_weight=0.0, commitment_weight=0.0)
    _, gradient = gradient_of(cosine_only, params_of(TINY), FEATURES)
    np.testing.assert_array_equal(gradient.pop("codebook"), 0)  # it learns by the codebook term only
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_zero_vector_has_no_direction_and_no_gradient():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(unit(x), [[0, 0], [0.6, 0.8]], rtol=1e-6)
    gradient = jax.grad(lambda x: unit(x).sum())(x)
    np.testing.assert_array_equal(gradient[0], 0)
    np.testing.assert_allclose(gradient[1], [0.032, -0.024], rtol=1e-4)  # (1 - u sum(u)) / 5


def test_the_loss_is_the_weighted_sum_of_its_terms():
    outputs = {
        "x_hat": jnp.array([[0.6, 0.8], [1.0, 0.0]]),
        "indices": jnp.array([[0, 1], [1, 0]]),
        "codebook_loss": jnp.float32(0.3),
        "commitment_loss": jnp.float32(0.5),
    }
    features = jnp.array([[2.0, 0.0], [5.0, 0.0]])
    loss, metrics = pqvae_loss(RELEASED, features, outputs)
    assert float(metrics["cosine"]) == pytest.approx(0.2)
    assert float(loss) == pytest.approx(10 * 0.2 + 0.3 + 0.25 * 0.5)
    assert float(pqvae_loss(PAPER, features, outputs)[0]) == pytest.approx(0.2 + 10 * 0.3 + 0.25 * 0.5)
    assert (float(metrics["usage"]), float(metrics["perplexity"])) == pytest.approx((0.5, 2.0))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codeword": 17}, r"sub-vectors of 17 do not divide a latent of 5\*5\*128 = 3200"),
        ({"codeword": 0}, "codeword is at least 1, not 0"),
        ({"codebook": 1}, "codebook is at least 2, not 1"),
        ({"hidden": (512,)}, "two widths"),
        ({"hidden": (512, 0)}, "both widths of hidden"),
        ({"commitment_weight": -1.0}, "commitment_weight is a finite number of at least 0, not -1.0"),
        ({"cosine_weight": float("nan")}, "cosine_weight"),
    ],
)
def test_sizes_that_cannot_be(fields, message):
    with pytest.raises(InputError, match=message):
        PqvaeConfig(**fields)


def test_good_features_pass_as_float32():
    checked = check_features(FEATURES.astype(np.float16), 24)
    assert checked.dtype == np.float32
    np.testing.assert_array_equal(checked, FEATURES.astype(np.float16))
    assert check_features(jnp.ones((2, 24), jnp.bfloat16), 24).dtype == np.float32


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (FEATURES[:, :20], r"features are \[images, 24\] for this model, not of shape \(3, 20\)"),
        (FEATURES[0], r"not of shape \(24,\)"),
        (np.ones((2, 24), int), "real numbers, not int64"),
        (np.where(np.arange(3)[:, None] == 1, np.nan, FEATURES), "1 of 3 features hold NaN or infinity, the first is"),
        (np.full((2, 24), np.inf), "2 of 2"),
    ],
)
def test_features_that_cannot_be_used(features, message):
    with pytest.raises(InputError, match=message):
        check_features(features, 24)


def test_the_model_refuses_other_widths():
    module, variables = Pqvae(TINY), {"params": params_of(TINY)}
    with pytest.raises(InputError, match=r"\[images, 24\]"):
        module.apply(variables, FEATURES[:, :20])
    with pytest.raises(InputError, match=r"indices are \[images, 50\].*\(1, 40\)"):
        module.apply(variables, jnp.zeros((1, 40), jnp.int32), method="features_of")


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_survive_both_directions():
    params = params_of(TINY)
    _, again = load_pqvae(to_torch(params), TINY)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_checkpoint_of_another_codebook_is_refused():
    state = to_torch(params_of(TINY))
    with pytest.raises(WeightsError, match=r"misshapen: quantize.embedding.weight is \(5, 4\), not \(9, 4\)"):
        load_pqvae(state, dataclasses.replace(TINY, codebook=9))


def test_missing_and_surplus_keys_are_listed():
    state = to_torch(params_of(TINY))
    state["decoder.extra.weight"] = state.pop("encoder.initial_conv2.bias")
    with pytest.raises(WeightsError) as caught:
        load_pqvae(state, TINY)
    assert "missing: encoder.initial_conv2.bias (10,)" in str(caught.value)
    assert "surplus: decoder.extra.weight (10,)" in str(caught.value)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def reference(torch, c):
    """The published networks in torch, from their description; keys as in the released files."""
    nn = torch.nn

    class Stack(nn.Module):
        def __init__(self, conv):
            super().__init__()
            n, r = c.hidden[1], c.residual
            self.stack = nn.ModuleList(nn.Module() for _ in range(c.residual_layers))
            for layer in self.stack:
                wide, thin = conv(n, r, 3, padding=1, bias=False), conv(r, n, 1, bias=False)
                layer.res_block = nn.Sequential(nn.ReLU(), wide, nn.ReLU(), thin)

        def forward(self, x):
            for layer in self.stack:
                x = (x + layer.res_block(x)).relu()
            return x

    class Reference(nn.Module):
        def __init__(self):
            super().__init__()
            first, second = c.hidden
            e = self.encoder = nn.Module()
            e.initial_conv1 = nn.ConvTranspose2d(c.width, first, 3, 2)
            e.initial_conv2 = nn.ConvTranspose2d(first, second, 3, 2, padding=1)
            e.residual_stack = Stack(nn.ConvTranspose2d)
            e.pre_quant_conv = nn.Conv2d(second, c.channels, 3, padding=1)
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(c.codebook, c.codeword)
            d = self.decoder = nn.Module()
            d.post_quant_conv = nn.Conv2d(c.channels, second, 3, padding=1)
            d.residual_stack = Stack(nn.Conv2d)
            d.final_conv1 = nn.Conv2d(second, first, 3, 2, padding=1)
            d.final_conv2 = nn.Conv2d(first, c.width, 3, 2)

        def forward(self, x):
            normalize, e, d = nn.functional.normalize, self.encoder, self.decoder
            unit = normalize(x)
            y = e.initial_conv2(e.initial_conv1(unit[:, :, None, None]).relu()).relu()
            y = normalize(e.pre_quant_conv(e.residual_stack(y))).permute(0, 2, 3, 1)
            z = y.reshape(len(x), -1, c.codeword)
            codebook = self.quantize.embedding.weight
            indices = (z[:, :, None] - codebook).square().sum(-1).argmin(-1)
            z_q = codebook[indices]
            terms = (z_q - z.detach()).square().mean(), (z - z_q.detach()).square().mean()
            y = (z + (z_q - z).detach()).reshape(y.shape).permute(0, 3, 1, 2)
            y = d.final_conv2(d.final_conv1(d.residual_stack(d.post_quant_conv(y))).relu())
            x_hat = normalize(y.flatten(1))
            cosine = 1 - (unit * x_hat).sum(1).mean()
            loss = c.cosine_weight * cosine + c.codebook_weight * terms[0] + c.commitment_weight * terms[1]
            return {"x_hat": x_hat, "z": z, "indices": indices, "loss": loss}

    return Reference()


def written(torch, state):
    return {key: torch.from_numpy(value.copy()) for key, value in state.items()}


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(STRADDLING, residual_layers=2)])
def test_parity_with_torch_of_outputs_loss_and_gradients(torch, config):
    params = params_of(config)
    theirs = reference(torch, config)
    theirs.load_state_dict(written(torch, to_torch(params)), strict=True)
    expected = theirs(torch.from_numpy(FEATURES))
    expected["loss"].backward()

    (loss, outputs), gradient = gradient_of(config, params, FEATURES)
    np.testing.assert_array_equal(outputs["indices"], expected["indices"])
    for name in ("x_hat", "z"):
        np.testing.assert_allclose(outputs[name], expected[name].detach(), atol=1e-5)
    np.testing.assert_allclose(loss, expected["loss"].item(), rtol=1e-5)
    ours = to_torch(gradient)
    for name, value in theirs.named_parameters():
        np.testing.assert_allclose(ours[name], value.grad, atol=1e-5 * max(1, float(value.grad.abs().max())))


def test_a_torch_file_gives_what_torch_gives(torch, tmp_path):
    torch.manual_seed(0)
    theirs = reference(torch, TINY)
    path = tmp_path / "dim_4 size_5.pt"
    torch.save(theirs.state_dict(), path)
    _, params = load_pqvae(path, TINY)
    outputs, expected = run(TINY, params, FEATURES), theirs(torch.from_numpy(FEATURES))
    np.testing.assert_array_equal(outputs["indices"], expected["indices"])
    np.testing.assert_allclose(outputs["x_hat"], expected["x_hat"].detach(), atol=1e-5)
    assert to_torch(params).keys() == theirs.state_dict().keys()
