"""Checkpoints of TIC's authors: the rules of its keys, and the buffers that its code expects beside the parameters.

The layers have flat names: convolutions `g_a0.weight`, groups of Swin blocks `g_a1.residual_group.blocks.0.attn.qkv.weight`, and
so on through `g_a6`, `h_a4`, `h_s4` and `g_s6`. The factorised prior and the coder's tables are CompressAI's (version 1.1): see
`jaxsem.weights.compressai_layouts`.
"""

from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from jaxsem.codecs.tic import CONTEXT_SIDE, TicConfig
from jaxsem.nn.swin import gather_windows, relative_positions
from jaxsem.weights.convert import CONV, DECONV, LINEAR, Entry, Ignored, Transform

# Sides of the maps, for patches of 256 pixels, for which the authors' code keeps masks; others it computes when met.
_SIDES = (128, 64, 32, 16, 8)
_GROUPS = {"g_a1": 0, "g_a3": 1, "g_a5": 2, "h_a1": 3, "h_a3": 4, "h_s1": 4, "h_s3": 3, "g_s1": 2, "g_s3": 1, "g_s5": 0}
_MASKED = -100.0


def tic_rules() -> Iterator[Entry | Ignored]:
    """The rules of TIC's keys but for the factorised prior's and the coder's tables."""
    yield from _layer("{net:g_a|h_a}{i}", "{net}/layers_{i}", CONV)
    yield from _layer("{net:g_s}{i}", "{net}/layers_{i}", DECONV)
    yield from _layer("{net:h_s}{i:0|2}", "{net}/layers_{i}", DECONV)
    yield from _layer("h_s4", "h_s/layers_4", CONV)
    yield from swin_rules("{net:g_a|h_a|h_s|g_s}{i}.residual_group", "{net}/layers_{i}")
    context = "context_prediction"
    yield from _attention(context, f"{context}/attention")
    yield from _norms_and_mlp(context, context)
    yield from _layer(f"{context}.proj", f"{context}/proj", LINEAR)
    yield from _layer("entropy_parameters.{i}", "entropy_parameters/layers_{i}/conv", CONV)


def swin_rules(source: str, target: str) -> Iterator[Entry | Ignored]:
    """The rules of a `SwinBlocks` at `target`, whose published blocks are `source.blocks.0` and so on."""
    block, ours = f"{source}.blocks.{{block}}", f"{target}/blocks[{{block}}]"
    yield from _norms_and_mlp(block, ours)
    yield from _attention(f"{block}.attn", f"{ours}/attention")
    yield from _layer(f"{block}.attn.proj", f"{ours}/attention/proj", LINEAR)
    yield Ignored(f"{block}.attn_mask", "the mask of shifted windows at the training size, a constant")


def tic_buffers(state: Mapping[str, np.ndarray], config: TicConfig) -> dict[str, np.ndarray]:
    """The buffers that belong to written parameters: indices of relative positions and masks of shifted windows."""
    buffers: dict[str, np.ndarray] = {}
    for key in state:
        name, _, part = key.rpartition(".")
        if part != "relative_position_bias_table":
            continue
        group = _GROUPS.get(name.partition(".")[0])
        window = CONTEXT_SIDE if group is None else config.windows[group]
        buffers[f"{name}.relative_position_index"] = relative_positions(window).astype(np.int64)
        if group is not None:
            block = name.removesuffix(".attn")
            if int(block.rpartition(".")[2]) % 2 and window > 1:
                buffers[f"{block}.attn_mask"] = _shift_mask(_SIDES[group], window)
    return buffers


def _shift_mask(side: int, window: int) -> np.ndarray:
    _, seen = gather_windows(jnp.zeros((1, side, side, 1)), window, window // 2)
    return np.where(np.asarray(seen), np.float32(0), np.float32(_MASKED))


def _attention(source: str, target: str) -> Iterator[Entry | Ignored]:
    yield from _layer(f"{source}.qkv", f"{target}/qkv", LINEAR)
    yield Entry(f"{source}.relative_position_bias_table", f"{target}/bias_table")
    yield Ignored(f"{source}.relative_position_index", "rows of the bias table for each pair of tokens, a constant")


def _norms_and_mlp(source: str, target: str) -> Iterator[Entry]:
    for i in (1, 2):
        yield Entry(f"{source}.norm{i}.weight", f"{target}/norm{i}/scale")
        yield Entry(f"{source}.norm{i}.bias", f"{target}/norm{i}/bias")
        yield from _layer(f"{source}.mlp.fc{i}", f"{target}/mlp/fc{i}", LINEAR)


def _layer(source: str, target: str, transform: Transform) -> Iterator[Entry]:
    yield Entry(f"{source}.weight", f"{target}/kernel", transform)
    yield Entry(f"{source}.bias", f"{target}/bias")
