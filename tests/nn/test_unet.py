"""The U-Net against one written in torch, at sizes that its scales divide and do not divide."""

import dataclasses
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxsem.errors import InputError
from jaxsem.nn.unet import Unet, UnetConfig
from jaxsem.weights.convert import CONV, DECONV, IDENTITY, LINEAR, Entry, Transform, convert

CONFIG = UnetConfig(widths=(4, 6, 10), outputs=3)
ONE_BY_ONE = Transform("1x1", lambda a: LINEAR.forward(a[:, :, 0, 0]), lambda a: LINEAR.inverse(a)[:, :, None, None])
STAT = {"running_mean": "mean", "running_var": "var"}


def images(height=16, width=16, batch=2, channels=3):
    return np.random.RandomState(3).uniform(0, 1, (batch, height, width, channels)).astype(np.float32)


def shapes(config, size=64, channels=3):
    images = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    return jax.eval_shape(Unet(config).init, jax.random.key(0), images)


def run(config, variables, images, **fields):
    return jax.jit(Unet(config, **fields).apply)(variables, images)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def variables():
    """Lively seeded variables of `CONFIG` that need no torch."""
    random = np.random.RandomState(4)

    def draw(path, leaf):
        name = path[-1].key
        normal = random.standard_normal(leaf.shape)
        if name in ("scale", "var"):
            return np.asarray(np.exp(0.3 * normal), np.float32)
        spread = np.sqrt(2 / np.prod(leaf.shape[:-1])) if name == "kernel" else 0.3
        return np.asarray(spread * normal, np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes(CONFIG))


# -- the same network in torch ----------------------------------------------------------------------------------------


def torch_unet(widths, outputs):
    torch = pytest.importorskip("torch")
    nn = torch.nn

    def pair(i, o):
        layers = [m for c in (i, o) for m in (nn.Conv2d(c, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())]
        return nn.Sequential(*layers)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.ModuleList(pair(i, o) for i, o in zip((3, *widths), widths))
            self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for o, i in pairwise(widths))
            self.merge = nn.ModuleList(pair(2 * o, o) for o in widths[:-1])
            self.out = nn.Conv2d(widths[0], outputs, 1)

        def forward(self, x):
            skips = []
            for i, down in enumerate(self.down):
                x = down(nn.functional.max_pool2d(x, 2) if i else x)
                skips.append(x)
            for i in reversed(range(len(widths) - 1)):
                x = self.merge[i](torch.cat([skips[i], self.up[i](x)], 1))
            return self.out(x)

    return Net()


def table(stats):
    """The layout of `torch_unet`: of its parameters, or of its running statistics."""
    for i in (1, 2):
        source, target = "{part:down|merge}.{scale}." + str(3 * i - 2), f"{{part}}_{{scale}}/norm{i}"
        if stats:
            yield from (Entry(f"{source}.{theirs}", f"{target}/{ours}") for theirs, ours in STAT.items())
            continue
        yield Entry("{part:down|merge}.{scale}." + f"{3 * i - 3}.weight", f"{{part}}_{{scale}}/conv{i}/kernel", CONV)
        yield Entry(f"{source}.weight", f"{target}/scale")
        yield Entry(f"{source}.bias", f"{target}/bias")
    if not stats:
        for source, target, transform in (("up.{i}", "up_{i}", DECONV), ("out", "out", ONE_BY_ONE)):
            yield Entry(f"{source}.weight", f"{target}/kernel", transform)
            yield Entry(f"{source}.bias", f"{target}/bias", IDENTITY)


def variables_of(net):
    state = {key: value.numpy() for key, value in net.state_dict().items() if "batches" not in key}
    wanted = shapes(CONFIG)
    return {
        kind: convert(
            list(table(kind == "batch_stats")),
            {key: value for key, value in state.items() if ("running" in key) == (kind == "batch_stats")},
            wanted[kind],
        )
        for kind in ("params", "batch_stats")
    }


@pytest.fixture
def net():
    torch = pytest.importorskip("torch")
    net = torch_unet(CONFIG.widths, CONFIG.outputs).eval()
    random = np.random.RandomState(5)
    for name, value in sorted(net.state_dict().items()):
        if value.ndim:
            normal = torch.from_numpy(random.standard_normal(tuple(value.shape)))
            spread = 0.3 if value.ndim == 1 else (2 / value[0].numel()) ** 0.5
            positive = value.ndim == 1 and name.endswith(("weight", "var"))
            value.copy_(torch.exp(spread * normal) if positive else spread * normal)
    return net


def run_torch(net, images):
    import torch

    with torch.no_grad():
        return net(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()


def test_it_computes_what_torch_does_with_the_running_statistics(net):
    found = run(CONFIG, variables_of(net), images(16, 24))
    want = run_torch(net, images(16, 24))
    assert want.std() > 0.1
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


def test_it_computes_what_torch_does_with_the_statistics_of_the_batch(net):
    apply = jax.jit(Unet(CONFIG).apply, static_argnames=("train", "mutable"))
    before = variables_of(net)
    found, changed = apply(before, images(), train=True, mutable=("batch_stats",))
    np.testing.assert_allclose(found, run_torch(net.train(), images()), rtol=0, atol=1e-5)
    after, before = (flatten_dict(tree["batch_stats"], sep="/") for tree in (variables_of(net), before))
    for name, value in flatten_dict(changed["batch_stats"], sep="/").items():
        # torch multiplies the variance that it keeps by n / (n - 1), n values to a channel.
        n = 2 * 16 * 16 // 4 ** int(name.split("_")[1][0])
        batch = (after[name] - 0.9 * before[name]) / 0.1 * ((n - 1) / n if name.endswith("var") else 1)
        np.testing.assert_allclose((value - 0.9 * before[name]) / 0.1, batch, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("size", [(13, 18), (5, 1), (1, 1)])
def test_other_sizes_are_padded_by_their_edge_and_cropped(net, size):
    small = images(*size)
    whole = np.pad(small, ((0, 0), (0, -size[0] % 4), (0, -size[1] % 4), (0, 0)), mode="edge")
    want = run_torch(net, whole)[:, : size[0], : size[1]]
    np.testing.assert_allclose(run(CONFIG, variables_of(net), small), want, rtol=0, atol=1e-5)


# -- without torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outputs", "parameters"), [(3, 31_037_763), (2, 31_037_698)])
def test_the_classic_one_has_its_number_of_parameters(outputs, parameters):
    """Counted from the published layer list; the paper's table rounds it to 31.04 M."""
    config = UnetConfig(outputs=outputs)
    found = shapes(config)
    assert count(found["params"]) == parameters
    # A mean and a variance to each of two normalisations at five scales down and four up.
    assert count(found["batch_stats"]) == 4 * (sum(config.widths) + sum(config.widths[:-1]))


@pytest.mark.parametrize("size", [(16, 16), (9, 30), (1, 3)])
def test_the_output_is_as_large_as_the_image(variables, size):
    found = jax.eval_shape(Unet(CONFIG).apply, variables, images(*size))
    assert (found.shape, found.dtype) == ((2, *size, 3), jnp.float32)


def test_a_fresh_residual_network_gives_its_input():
    net = Unet(UnetConfig((4, 6), 3, residual=True))
    found, _ = net.init_with_output(jax.random.key(0), images())
    np.testing.assert_array_equal(found, images())


def test_a_residual_network_adds_its_output(variables):
    plain, residual = (run(dataclasses.replace(CONFIG, residual=flag), variables, images()) for flag in (False, True))
    np.testing.assert_allclose(residual, images() + plain, atol=1e-6)


def test_every_parameter_has_a_gradient(variables):
    def loss(params):
        return jnp.square(Unet(CONFIG).apply({**variables, "params": params}, images())).mean()

    for name, gradient in flatten_dict(jax.jit(jax.grad(loss))(variables["params"]), sep="/").items():
        assert float(jnp.abs(gradient).max()) > 1e-7, name


def test_devices_under_pmap_share_their_statistics(variables):
    batch = images(8, 8, batch=8) * np.arange(1, 9, dtype=np.float32)[:, None, None, None]

    def train(batch, axis_name=None):
        net = Unet(CONFIG, axis_name=axis_name)
        return net.apply(variables, batch, train=True, mutable=["batch_stats"])

    whole, stats = jax.jit(train)(batch)
    parts, shared = jax.pmap(lambda part: train(part, "data"), "data", devices=jax.devices()[:2])(
        batch.reshape(2, 4, 8, 8, 3)
    )
    np.testing.assert_allclose(parts.reshape(whole.shape), whole, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-5), shared, stats)


def test_bfloat16_computes_about_the_same(variables):
    exact, rough = (run(CONFIG, variables, images(), dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert rough.dtype == jnp.float32
    assert 0 < np.abs(rough - exact).max() < 0.1 * np.abs(exact).max()


def test_what_does_not_fit_is_refused(variables):
    with pytest.raises(InputError, match=r"widths \[\] and 3 outputs: give one scale or more"):
        UnetConfig(())
    with pytest.raises(InputError, match=r"widths \[4, 0\]"):
        UnetConfig((4, 0))
    with pytest.raises(InputError, match=r"not uint8 of shape \[2, 16, 16, 3\]"):
        Unet(CONFIG).apply(variables, (images() * 255).astype(np.uint8))
    with pytest.raises(InputError, match=r"not float32 of shape \[2, 0, 16, 3\]"):
        Unet(CONFIG).apply(variables, images(0))
    with pytest.raises(InputError, match="3 outputs cannot add them to an image of 4 channels"):
        shapes(UnetConfig((4, 6), 3, residual=True), channels=4)
