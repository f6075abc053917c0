"""Small CLIPs of transformers with lively random weights, and the same weights under OpenAI's names."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from jaxsem.backbones.clip_inputs import load_tokenizer

VISION = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 8,
    "image_size": 32,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": 99,
    "max_position_embeddings": 12,
    "bos_token_id": 97,
    "eos_token_id": 98,
}
PROJECTION = 20
MERGES = ["c a", "ca t</w>", "r e", "re d</w>", "s t", "st a", "sta r</w>"]
VOCABULARY = 512 + len(MERGES) + 2


def import_reference():
    """The packages torch and transformers; skips the test where they are absent."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(2)
    return torch, transformers


def config(activation="quick_gelu", **text):
    """A CLIPConfig of transformers."""
    _, transformers = import_reference()
    return transformers.CLIPConfig(
        vision_config={**VISION, "hidden_act": activation},
        text_config={**TEXT, "hidden_act": activation, **text},
        projection_dim=PROJECTION,
    )


def lively(model):
    """The model in evaluation mode with seeded weights under which every layer changes its output by its own size."""
    torch, _ = import_reference()
    random = np.random.RandomState(5)
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            normal = random.standard_normal(tuple(value.shape))
            if "norm" in name:
                array = 0.2 * normal + name.endswith("weight")
            elif name.endswith(
                ("_proj.weight", "projection.weight", "fc1.weight", "fc2.weight", "patch_embedding.weight")
            ):
                array = normal / np.sqrt(np.prod(value.shape[1:]))
            else:
                array = 0.5 * normal
            value.copy_(torch.from_numpy(np.asarray(array, np.float32)))
    return model.eval()


@functools.cache
def model(activation="quick_gelu", **text):
    """The CLIPModel of `config`."""
    _, transformers = import_reference()
    return lively(transformers.CLIPModel(config(activation, **text)))


def images(count=3, height=32, width=32) -> np.ndarray:
    """Normalised images, channels last."""
    return np.random.RandomState(1).standard_normal((count, height, width, 3)).astype(np.float32)


def texts() -> np.ndarray:
    """Start, some ids, end, and the end again as padding."""
    ids = np.random.RandomState(2).randint(0, 97, (4, 12)).astype(np.int32)
    ids[:, 0] = 97
    for row, end in enumerate((11, 5, 8, 2)):
        ids[row, end:] = 98
    return ids


def outputs(net, pixels, ids, **options) -> SimpleNamespace:
    """Features, hidden states and logits of a CLIPModel as NumPy arrays."""
    torch, _ = import_reference()
    with torch.no_grad():
        found = net(
            torch.from_numpy(ids).long(),
            torch.from_numpy(pixels).permute(0, 3, 1, 2),
            output_hidden_states=True,
            **options,
        )
    vision, text = found.vision_model_output, found.text_model_output
    return SimpleNamespace(
        image=vision.pooler_output.numpy(),
        text=text.pooler_output.numpy(),
        image_states=np.stack([state.numpy() for state in vision.hidden_states]),
        text_states=np.stack([state.numpy() for state in text.hidden_states]),
        logits=found.logits_per_image.numpy(),
    )


def state_of(net) -> dict[str, np.ndarray]:
    """The state dict as NumPy arrays."""
    return {key: value.numpy() for key, value in net.state_dict().items()}


def openai_state(net) -> dict[str, np.ndarray]:
    """The weights under the names and in the layout of OpenAI's CLIP."""
    state = state_of(net)
    theirs = {
        "logit_scale": state["logit_scale"],
        "text_projection": state["text_projection.weight"].T,
        "visual.proj": state["visual_projection.weight"].T,
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        theirs[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        theirs[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        theirs[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for tower, prefix in (("vision", "visual."), ("text", "")):
            for i in range((VISION if tower == "vision" else TEXT)["num_hidden_layers"]):
                layer, block = f"{tower}_model.encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
                fused = [state[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"]
                theirs[f"{block}attn.in_proj_{kind}"] = np.concatenate(fused)
                theirs[f"{block}attn.out_proj.{kind}"] = state[f"{layer}self_attn.out_proj.{kind}"]
                theirs[f"{block}mlp.c_fc.{kind}"] = state[f"{layer}mlp.fc1.{kind}"]
                theirs[f"{block}mlp.c_proj.{kind}"] = state[f"{layer}mlp.fc2.{kind}"]
                theirs[f"{block}ln_1.{kind}"] = state[f"{layer}layer_norm1.{kind}"]
                theirs[f"{block}ln_2.{kind}"] = state[f"{layer}layer_norm2.{kind}"]
    return theirs


def text_encoder(activation):
    """A text tower as pipelines of Stable Diffusion have it, of 77 tokens of `write_tokenizer`'s."""
    _, transformers = import_reference()
    fields = {**TEXT, "vocab_size": VOCABULARY, "max_position_embeddings": 77, "eos_token_id": 2}
    return lively(transformers.CLIPTextModel(transformers.CLIPTextConfig(**fields, hidden_act=activation)))


def write_tokenizer(folder, pad):
    """As the folders of Stable Diffusion have it: the special tokens in a file of their own, which decides."""
    (folder.parent / "merges").write_text("\n".join(["#version", *MERGES]))
    words = load_tokenizer(folder.parent / "merges")
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(words.get_vocab()))
    (folder / "merges.txt").write_text("\n".join(["#version", *MERGES]) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>", **special}
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": pad}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
