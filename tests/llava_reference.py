"""Small random LLaVA models of transformers, and the configs that we read for them."""

import numpy as np
import pytest

from jaxsem.weights.llava import parse_config

SIDE, IMAGE, STOP = 28, 60, 2
POINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 14,
}
TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": STOP,
    "pad_token_id": 0,
}


def reference(kind="Llava", **changes):
    """A seeded torch model ("Llava" or "LlavaNext") in which every layer matters, and our config of it."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = {"vision_config": VISION, "text_config": TEXT, "image_token_index": IMAGE, "image_seq_length": 4}
    if kind == "LlavaNext":
        fields["image_grid_pinpoints"] = POINTS
    theirs = getattr(transformers, f"{kind}Config")(**{**fields, **changes})
    net = getattr(transformers, f"{kind}ForConditionalGeneration")(theirs).eval()
    liven(net)
    return net, parse_config(theirs.to_dict())


def liven(net) -> None:
    """Draws all weights so that what enters a layer leaves it in about its own size, changed."""
    import torch

    random = np.random.RandomState(5)
    with torch.no_grad():
        for name, value in sorted(net.named_parameters()):
            array = random.standard_normal(tuple(value.shape))
            if "norm" in name:
                array = 0.2 * array + name.endswith("weight")
            elif name.endswith("weight") and "embed" not in name:
                array /= np.sqrt(array[0].size)
            value.copy_(torch.from_numpy(array.astype(np.float32)))


def state_of(net) -> dict[str, np.ndarray]:
    """The state dict as arrays."""
    return {key: value.numpy() for key, value in net.state_dict().items()}


def channels_first(images):
    """A torch tensor of images [..., h, w, 3]."""
    import torch

    return torch.from_numpy(np.moveaxis(np.asarray(images, np.float32), -1, -3).copy())
