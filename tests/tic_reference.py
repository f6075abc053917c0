"""TIC in torch, written from the description of its layers: functions over a state dict with the published names.

No package of the authors can be installed, so this is the other side of the parity tests. It computes windows as they do, with a
rolled map and -100 on the logits, and like theirs knows only maps that the windows divide.
"""

import functools

import numpy as np
import pytest

from jaxsem.codecs.tic import TicConfig

# Odd depths, as an earlier version of the published code has them; windows that divide the maps of `SIZE`.
CONFIG = TicConfig(8, 12, (1, 2, 3, 1, 2), (1, 2, 4, 2, 4), (4, 4, 4, 2, 2), context_heads=4)
SIZE = (64, 128)
CONTEXT = "context_prediction"
# The groups of Swin blocks on their way; and every convolution: kernel, stride, in, out, whether it is transposed.
GROUPS = {"g_a1": 0, "g_a3": 1, "g_a5": 2, "h_a1": 3, "h_a3": 4, "h_s1": 4, "h_s3": 3, "g_s1": 2, "g_s3": 1, "g_s5": 0}
CONVS = {
    **{
        "g_a0": (5, 2, "3", "n", 0),
        "g_a2": (3, 2, "n", "n", 0),
        "g_a4": (3, 2, "n", "n", 0),
        "g_a6": (3, 2, "n", "m", 0),
    },
    **{
        "g_s0": (3, 2, "m", "n", 1),
        "g_s2": (3, 2, "n", "n", 1),
        "g_s4": (3, 2, "n", "n", 1),
        "g_s6": (5, 2, "n", "3", 1),
    },
    **{"h_a0": (3, 1, "m", "n", 0), "h_a2": (3, 2, "n", "n", 0), "h_a4": (3, 2, "n", "n", 0)},
    **{"h_s0": (3, 2, "n", "n", 1), "h_s2": (3, 2, "n", "n", 1), "h_s4": (3, 1, "n", "2m", 0)},
}


def import_torch():
    """The package torch; skips the test where it is absent."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(2)
    return torch


# -- the published layout, no torch needed ------------------------------------------------------------------------------


def parameter_shapes(config: TicConfig = CONFIG) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by their published names; the prior's are those of CompressAI 1.1."""
    n, m = config.channels, config.latent
    widths, shapes = {"3": 3, "n": n, "m": m, "2m": 2 * m}, {}

    def linear(name, inside, outside, *kernel):
        shapes.update({f"{name}.weight": (outside, inside, *kernel), f"{name}.bias": (outside,)})

    def halves(name, attention, width, heads, window):
        for norm in ("norm1", "norm2"):
            shapes.update({f"{name}.{norm}.weight": (width,), f"{name}.{norm}.bias": (width,)})
        linear(f"{name}.mlp.fc1", width, 4 * width)
        linear(f"{name}.mlp.fc2", 4 * width, width)
        linear(f"{attention}.qkv", width, 3 * width)
        shapes[f"{attention}.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)

    for name, (size, _, inside, outside, transposed) in CONVS.items():
        linear(name, widths[inside], widths[outside], size, size)
        if transposed:
            shapes[f"{name}.weight"] = (widths[inside], widths[outside], size, size)
    for name, k in GROUPS.items():
        for i in range(config.depths[k]):
            block = f"{name}.residual_group.blocks.{i}"
            halves(block, f"{block}.attn", n, config.heads[k], config.windows[k])
            linear(f"{block}.attn.proj", n, n)
    halves(CONTEXT, CONTEXT, m, config.context_heads, 5)
    linear(f"{CONTEXT}.proj", m, 2 * m)
    for i, (inside, outside) in {0: (4 * m, 10 * m // 3), 2: (10 * m // 3, 8 * m // 3), 4: (8 * m // 3, 2 * m)}.items():
        linear(f"entropy_parameters.{i}", inside, outside, 1, 1)
    ends = [1, 3, 3, 3, 3, 1]
    for i in range(5):
        shapes[f"entropy_bottleneck._matrix{i}"] = (n, ends[i + 1], ends[i])
        shapes[f"entropy_bottleneck._bias{i}"] = (n, ends[i + 1], 1)
        if i < 4:
            shapes[f"entropy_bottleneck._factor{i}"] = (n, ends[i + 1], 1)
    return {**shapes, "entropy_bottleneck.quantiles": (n, 1, 3)}


def buffer_shapes(config: TicConfig = CONFIG) -> dict[str, tuple[int, ...]]:
    """Shapes of the buffers beside them; masks are kept for patches of 256 pixels, tables are those of no `update()` yet."""
    shapes = {f"{CONTEXT}.relative_position_index": (25, 25)}
    for name, k in GROUPS.items():
        tokens, side = config.windows[k] ** 2, (128, 64, 32, 16, 8)[k]
        for i in range(config.depths[k]):
            block = f"{name}.residual_group.blocks.{i}"
            shapes[f"{block}.attn.relative_position_index"] = (tokens, tokens)
            if i % 2:
                shapes[f"{block}.attn_mask"] = (side**2 // tokens, tokens, tokens)
    for name in ("entropy_bottleneck", "gaussian_conditional"):
        shapes |= {f"{name}.{part}": (0,) for part in ("_offset", "_quantized_cdf", "_cdf_length")}
        shapes[f"{name}.likelihood_lower_bound.bound"] = (1,)
    shapes |= {"entropy_bottleneck.target": (3,), "gaussian_conditional.scale_table": (0,)}
    return {**shapes, "gaussian_conditional.scale_bound": (1,), "gaussian_conditional.lower_bound_scale.bound": (1,)}


@functools.cache
def random_state_dict() -> dict[str, np.ndarray]:
    """Seeded parameters under which every layer changes its output by its own size, and buffers of zeros."""
    random, state = np.random.RandomState(11), {}
    for key, shape in parameter_shapes().items():
        normal = random.standard_normal(shape)
        if "norm" in key:
            value = 0.2 * normal + key.endswith("weight")
        elif "bias_table" in key:
            value = normal
        elif key.endswith(".weight"):
            value = normal / np.sqrt(np.prod(shape[1:]))
        else:
            value = 0.3 * normal
        state[key] = value.astype(np.float32)
    return {**state, **{key: np.zeros(shape, np.float32) for key, shape in buffer_shapes().items()}}


# -- the networks, in torch -----------------------------------------------------------------------------------------------


class Reference:
    """The networks; maps are [b, c, h, w] torch tensors."""

    def __init__(self):
        torch = self.torch = import_torch()
        self.state = {key: torch.from_numpy(value) for key, value in random_state_dict().items()}

    def run(self, net, x):
        """One of g_a, g_s, h_a and h_s on an array [b, h, w, c], the same way out."""
        functional = self.torch.nn.functional
        x = self.torch.from_numpy(np.moveaxis(x, -1, 1).copy())
        for name in sorted(name for name in (*CONVS, *GROUPS) if name.startswith(net)):
            if name in GROUPS:
                x = self.group(name, x)
                continue
            size, stride, _, _, transposed = CONVS[name]
            weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
            if transposed:
                x = functional.conv_transpose2d(x, weight, bias, stride, size // 2, output_padding=1)
            else:
                x = functional.conv2d(x, weight, bias, stride, size // 2)
        return np.moveaxis(x.numpy(), 1, -1)

    def group(self, name, x):
        """x + blocks(x)."""
        k = GROUPS[name]
        y = x.permute(0, 2, 3, 1)
        for i in range(CONFIG.depths[k]):
            shift = CONFIG.windows[k] // 2 if i % 2 else 0
            y = self.block(f"{name}.residual_group.blocks.{i}", y, CONFIG.heads[k], CONFIG.windows[k], shift)
        return x + y.permute(0, 3, 1, 2)

    def block(self, name, x, heads, window, shift):
        """One Swin block on [b, h, w, c]."""
        torch = self.torch
        _, height, width, channels = x.shape
        y = torch.roll(self.norm(f"{name}.norm1", x), (-shift, -shift), (1, 2))
        mask = None
        if shift:
            label = torch.zeros(1, height, width, 1)
            edges = slice(0, -window), slice(-window, -shift), slice(-shift, None)
            for number, (rows, columns) in enumerate((r, c) for r in edges for c in edges):
                label[:, rows, columns] = number
            label = self.windows(label, window)[..., 0]
            mask = -100.0 * (label[:, None, :] != label[:, :, None]).float()
        y = self.attention(f"{name}.attn", self.windows(y, window), heads, window, mask)
        y = self.linear(f"{name}.attn.proj", y)
        y = y.reshape(-1, height // window, width // window, window, window, channels)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
        return self.mlp(name, x + torch.roll(y, (shift, shift), (1, 2)))

    def windows(self, x, window):
        """[b, h, w, c] to [b * windows, window², c]."""
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // window, window, width // window, window, channels)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, channels)

    def attention(self, name, x, heads, window, mask=None):
        """Attention in windows with the bias of relative positions, before any projection."""
        torch = self.torch
        count, tokens, width = x.shape
        qkv = self.linear(f"{name}.qkv", x).reshape(count, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        logits = (width // heads) ** -0.5 * qkv[0] @ qkv[1].transpose(-2, -1)
        table = self.state[f"{name}.relative_position_bias_table"].reshape(2 * window - 1, 2 * window - 1, heads)
        at = torch.arange(tokens)
        down = at[:, None] // window - at // window + window - 1
        right = at[:, None] % window - at % window + window - 1
        logits = logits + table[down, right].permute(2, 0, 1)
        if mask is not None:
            logits = logits.reshape(-1, len(mask), heads, tokens, tokens) + mask[:, None]
            logits = logits.reshape(count, heads, tokens, tokens)
        return (torch.softmax(logits, -1) @ qkv[2]).transpose(1, 2).reshape(x.shape)

    def context(self, window):
        """The causal attention module on an array [n, 5, 5, m], to [n, 2 m]."""
        torch = self.torch
        x = torch.from_numpy(window.reshape(len(window), 25, -1).copy())
        x = x * (torch.arange(25) < 12).float()[:, None]
        y = self.attention(CONTEXT, self.norm(f"{CONTEXT}.norm1", x), CONFIG.context_heads, 5)
        y = self.mlp(CONTEXT, (y + x).sum(1))
        return self.linear(f"{CONTEXT}.proj", y).numpy()

    def parameters(self, psi, context):
        """Scale and mean of arrays [n, 2 m] and [n, 2 m]."""
        torch = self.torch
        x = torch.from_numpy(np.concatenate([psi, context], -1))
        for i in (0, 2, 4):
            x = torch.nn.functional.gelu(x) if i else x
            x = x @ self.state[f"entropy_parameters.{i}.weight"][:, :, 0, 0].T
            x = x + self.state[f"entropy_parameters.{i}.bias"]
        return tuple(half.numpy() for half in x.chunk(2, -1))

    def mlp(self, name, x):
        """x + mlp(norm2(x))."""
        y = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x))
        return x + self.linear(f"{name}.mlp.fc2", self.torch.nn.functional.gelu(y))

    def norm(self, name, x):
        return self.torch.nn.functional.layer_norm(
            x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        )

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]
