"""Small SAMs of transformers with lively random weights, and the same weights under Meta's names."""

import functools
import re

import numpy as np
import pytest

SIZE, PATCH, GRID = 64, 8, 8
VISION = {
    "hidden_size": 24,
    "mlp_dim": 56,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "global_attn_indexes": [2, 5],
    "window_size": 3,  # does not divide the grid
    "patch_size": PATCH,
    "image_size": SIZE,
    "output_channels": 32,
    "num_pos_feats": 16,
}
PROMPTS = {"hidden_size": 32, "image_size": SIZE, "patch_size": PATCH, "mask_input_channels": 16}
DECODER = {"hidden_size": 32, "mlp_dim": 40, "num_attention_heads": 2, "iou_head_depth": 4, "iou_head_hidden_dim": 20}


def import_reference():
    """The packages torch and transformers; skips the test where they are absent."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(2)
    return torch, transformers


@functools.cache
def model():
    """A SamModel in evaluation mode whose seeded weights make every layer change its output by its own size."""
    torch, transformers = import_reference()
    config = transformers.SamConfig(vision_config=VISION, prompt_encoder_config=PROMPTS, mask_decoder_config=DECODER)
    net = transformers.SamModel(config)
    random = np.random.RandomState(5)
    with torch.no_grad():
        for name, value in sorted(net.named_parameters()):
            normal = random.standard_normal(tuple(value.shape))
            if "norm" in name:
                array = 0.2 * normal + name.endswith("weight")
            elif name == "mask_decoder.upscale_conv1.bias":
                # A pixel that is nearly constant over its 8 channels would have no normalised value to compare.
                array = random.permutation(np.linspace(-2, 2, len(value)))
            elif "positional" in name:
                array = normal
            elif "upscale_conv" in name and value.ndim == 4:
                array = normal / np.sqrt(value.shape[0])
            elif name.endswith("weight") and value.ndim > 1 and "embed.weight" not in name and "token" not in name:
                array = normal / np.sqrt(np.prod(value.shape[1:]))
            else:
                array = 0.5 * normal
            if "q_proj" in name or "k_proj" in name:
                array = (
                    0.5 * array
                )  # sharper attention is so ill-conditioned that float32 itself errs by more than 1e-5
            value.copy_(torch.from_numpy(np.asarray(array, np.float32)))
    net.tie_weights()
    return net.eval()


def pixels(count=2) -> np.ndarray:
    """Normalised pixels, channels last."""
    return np.random.RandomState(1).standard_normal((count, SIZE, SIZE, 3)).astype(np.float32)


def embeddings(count=2) -> np.ndarray:
    """Embeddings of images, channels last."""
    return np.random.RandomState(4).standard_normal((count, GRID, GRID, 32)).astype(np.float32)


def prompts(batch=2, count=3, points=2) -> dict[str, np.ndarray]:
    """Points with labels of all kinds that transformers knows, boxes, and a mask for every image."""
    random = np.random.RandomState(2)
    corners = random.uniform(0, SIZE / 2, (batch, count, 2))
    labels = np.resize([1, 0, 1, -1, -10, 1], (batch, count, points))
    return {
        "points": random.uniform(0, SIZE, (batch, count, points, 2)).astype(np.float32),
        "labels": labels.astype(np.int32),
        "boxes": np.concatenate([corners, corners + SIZE / 3], axis=-1).astype(np.float32),
        "masks": 3 * random.standard_normal((batch, 1, 4 * GRID, 4 * GRID)).astype(np.float32),
    }


def tensors(given) -> dict:
    """Prompts as transformers takes them: by its names, or None."""
    torch, _ = import_reference()
    names = ("points", "labels", "boxes", "masks")
    return {f"input_{name}": torch.from_numpy(given[name]) if name in given else None for name in names}


def first(array):
    """A torch image, channels first, from channels last."""
    torch, _ = import_reference()
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def state_of(net) -> dict[str, np.ndarray]:
    """The state dict as NumPy arrays."""
    return {key: value.numpy() for key, value in net.state_dict().items()}


# -- Meta's names -----------------------------------------------------------------------------------------------------

_MASKS = {"conv1": "0", "layer_norm1": "1", "conv2": "3", "layer_norm2": "4", "conv3": "6"}
_META = (
    (r"^shared_image_embedding\.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^image_encoder\.layers\.", "image_encoder.blocks."),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"neck\.(\w+)", lambda match: f"neck.{['conv1', 'layer_norm1', 'conv2', 'layer_norm2'].index(match[1])}"),
    (r"\.point_embed\.", ".point_embeddings."),
    (r"\.mask_embed\.(\w+)", lambda match: f".mask_downscaling.{_MASKS[match[1]]}"),
    (r"upscale_conv1", "output_upscaling.0"),
    (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"(_mlps\.\d|_head)\.layers\.(\d)", lambda match: f"{match[1]}.layers.{int(match[2]) + 1}"),
    (r"proj_in", "layers.0"),
    (r"_mlps\.(\d)\.proj_out", r"_mlps.\1.layers.2"),
    (r"_head\.proj_out", f"_head.layers.{DECODER['iou_head_depth'] - 1}"),
    (r"layer_norm", "norm"),
)


def meta_state(net) -> dict[str, np.ndarray]:
    """The state dict as Meta writes it."""
    renamed = {}
    for key, value in state_of(net).items():
        if key == "prompt_encoder.shared_embedding.positional_embedding":
            continue
        for pattern, name in _META:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed
