"""Small networks of diffusers with lively random weights, and their feature maps, channels last."""

import functools

import clip_reference
import numpy as np
import pytest

VAE = {
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
FLUX = VAE | {
    "latent_channels": 6,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
# As Stable Diffusion 1: projections are convolutions, and all levels have as many heads.
SD1 = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
# As 2: projections are matrices, and every level has its heads. More than one block to a transformer, and another layout.
SD2 = {
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": [1, 2, 4],
    "cross_attention_dim": 20,
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 2, 2],
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "upcast_attention": True,
    "in_channels": 5,
}
FIELDS = {"vae": VAE, "flux": FLUX, "sd1": SD1, "sd2": SD2}
DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def import_reference():
    """The packages torch and diffusers; skips the test where they are absent."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.set_num_threads(2)
    return torch, diffusers


@functools.cache
def model(name):
    """A network of `FIELDS` in evaluation mode whose seeded weights make every layer change its output by its own size."""
    torch, diffusers = import_reference()
    kind = diffusers.AutoencoderKL if name in ("vae", "flux") else diffusers.UNet2DConditionModel
    net = kind(**FIELDS[name]).requires_grad_(False).eval()
    random = np.random.RandomState(7)
    for key, value in sorted(net.named_parameters()):
        normal = random.standard_normal(tuple(value.shape))
        if value.ndim > 1:
            array = normal / np.sqrt(np.prod(value.shape[1:]))
        else:
            array = 0.2 * normal + (key.endswith("weight") and "norm" in key)
        value.copy_(torch.from_numpy(np.asarray(array, np.float32)))
    return net


def text_encoder():
    """The text tower that fits "sd1"."""
    return clip_reference.text_encoder("quick_gelu")


def write_pipeline(folder):
    """Writes a whole pipeline of "vae" and "sd1" as diffusers does, and gives its folder back."""
    _, diffusers = import_reference()
    for part, name in (("vae", "vae"), ("unet", "sd1")):
        model(name).save_pretrained(folder / part)
    text_encoder().save_pretrained(folder / "text_encoder")
    clip_reference.write_tokenizer(folder / "tokenizer", "<|endoftext|>")
    diffusers.DDIMScheduler(**DDIM, steps_offset=1, set_alpha_to_one=False).save_pretrained(folder / "scheduler")
    return folder


def config(name) -> dict:
    """The fields of the network's config.json."""
    return dict(model(name).config) | {"_class_name": type(model(name)).__name__}


def state_of(net) -> dict[str, np.ndarray]:
    """The state dict as NumPy arrays."""
    return {key: value.numpy() for key, value in net.state_dict().items()}


def some(*shape, seed=0, scale=1.0) -> np.ndarray:
    """Seeded normal numbers."""
    return (scale * np.random.RandomState(seed).standard_normal(shape)).astype(np.float32)


def first(array):
    """A torch tensor, channels first where it is a feature map, from channels last."""
    torch, _ = import_reference()
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1) if array.ndim == 4 else array))


def last(tensor) -> np.ndarray:
    """The inverse of `first`."""
    array = tensor.detach().numpy()
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


def close(found, want, atol=1e-5):
    """Whether a lively reference is met."""
    want = last(want)
    assert found.shape == want.shape
    assert want.std() > 0.05
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=atol)
