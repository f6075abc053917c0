"""A small ConvNeXt of transformers with lively random weights, and the same weights under timm's and open_clip's names."""

import functools
import re

import numpy as np
import pytest

SIZES = {"hidden_sizes": [8, 12, 16], "depths": [2, 1, 3], "num_stages": 3, "patch_size": 4}
PROJECTION, HIDDEN = 10, 14


def import_reference():
    """The packages torch and transformers; skips the test where they are absent."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(2)
    return torch, transformers


@functools.cache
def model(classes=0):
    """A ConvNextModel, or one with a classifier, whose seeded weights make every block change its output by its own size."""
    torch, transformers = import_reference()
    config = transformers.ConvNextConfig(**SIZES, num_labels=classes)
    net = transformers.ConvNextForImageClassification(config) if classes else transformers.ConvNextModel(config)
    random = np.random.RandomState(5)
    with torch.no_grad():
        # The same draws with and without a classifier, whose name comes first.
        for name, value in sorted(net.named_parameters(), key=lambda item: item[0].removeprefix("convnext.")):
            if name.startswith("classifier"):
                continue
            normal = random.standard_normal(tuple(value.shape))
            if value.ndim > 1:
                array = normal / np.sqrt(np.prod(value.shape[1:]))
            else:
                array = 0.3 * normal + (name.endswith("norm.weight") or "layer_scale" in name)
            value.copy_(torch.from_numpy(np.asarray(array, np.float32)))
    return net.eval()


def images(count=2, height=32, width=48) -> np.ndarray:
    """Normalised images, channels last."""
    return np.random.RandomState(1).standard_normal((count, height, width, 3)).astype(np.float32)


def outputs(net, images) -> tuple[np.ndarray, list[np.ndarray]]:
    """The pooled feature, and the features before the first stage and after every one, channels last."""
    torch, _ = import_reference()
    with torch.no_grad():
        found = net(torch.from_numpy(images).permute(0, 3, 1, 2), output_hidden_states=True)
    return found.pooler_output.numpy(), [state.permute(0, 2, 3, 1).numpy() for state in found.hidden_states]


def state_of(net) -> dict[str, np.ndarray]:
    """The state dict as NumPy arrays."""
    return {key: value.numpy() for key, value in net.state_dict().items()}


_TIMM = (
    (r"embeddings\.patch_embeddings", "stem.0"),
    (r"embeddings\.layernorm", "stem.1"),
    (r"encoder\.stages\.(\d)\.downsampling_layer", r"stages.\1.downsample"),
    (r"encoder\.stages\.(\d)\.layers\.(\d)\.dwconv", r"stages.\1.blocks.\2.conv_dw"),
    (r"encoder\.stages\.(\d)\.layers\.(\d)\.layernorm", r"stages.\1.blocks.\2.norm"),
    (r"encoder\.stages\.(\d)\.layers\.(\d)\.pwconv(\d)", r"stages.\1.blocks.\2.mlp.fc\3"),
    (r"encoder\.stages\.(\d)\.layers\.(\d)\.layer_scale_parameter", r"stages.\1.blocks.\2.gamma"),
    (r"layernorm", "head.norm"),
)


def timm_state(net) -> dict[str, np.ndarray]:
    """The weights under timm's names."""
    return {_timm(key): value for key, value in state_of(net).items()}


def _timm(key: str) -> str:
    for pattern, name in _TIMM:
        if match := re.match(pattern, key):
            return match.expand(name) + key[match.end() :]
    raise KeyError(key)


def open_clip_state(net, hidden=False) -> dict[str, np.ndarray]:
    """The weights as the image side of an open_clip model with a projection of one or two layers, and some of the text side's."""
    random, width = np.random.RandomState(6), SIZES["hidden_sizes"][-1]

    def draw(*shape):
        return np.asarray(random.standard_normal(shape) / np.sqrt(width), np.float32)

    state = {f"visual.trunk.{key}": value for key, value in timm_state(net).items()}
    if hidden:
        state["visual.head.mlp.fc1.weight"] = draw(HIDDEN, width)
        state["visual.head.mlp.fc1.bias"] = draw(HIDDEN)
        state["visual.head.mlp.fc2.weight"] = draw(PROJECTION, HIDDEN)
    else:
        state["visual.head.proj.weight"] = draw(PROJECTION, width)
    text = ("positional_embedding", "text_projection", "token_embedding.weight", "ln_final.bias", "attn_mask")
    blocks = ("transformer.resblocks.0.attn.in_proj_weight", "transformer.resblocks.11.mlp.c_fc.bias")
    return state | {key: draw(2, 2) for key in (*text, *blocks)} | {"logit_scale": draw()}
