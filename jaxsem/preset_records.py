"""What presets there are: one frozen record each."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from jaxsem.backbones.autoencoder_kl import AutoencoderKlConfig
from jaxsem.backbones.clip_config import VIT_L14, VIT_L14_336, ClipConfig, TextConfig, VisionConfig
from jaxsem.backbones.gpt2 import Gpt2Config
from jaxsem.backbones.llama import LlamaConfig
from jaxsem.backbones.llava_config import LlavaConfig
from jaxsem.backbones.unet_2d_condition import UnetConditionConfig
from jaxsem.codecs import (
    ElicConfig,
    FactorizedConfig,
    HyperpriorConfig,
    JointConfig,
    ScaleHyperpriorConfig,
    TicConfig,
)
from jaxsem.codecs.hsvlc import HsvlcConfig
from jaxsem.data.questions import MARKS, question_words
from jaxsem.data.words import WordTokenizer
from jaxsem.diffusion.schedule import STABLE_DIFFUSION
from jaxsem.systems.clipcap import ClipCapConfig
from jaxsem.systems.feature_config import FeatureConfig
from jaxsem.systems.pqvae import RELEASED, PqvaeConfig
from jaxsem.systems.rsic_config import RsicConfig
from jaxsem.systems.transform_neck import NeckCodecConfig, NeckConfig
from jaxsem.systems.weight_map import WeightMapConfig

FEATURES = "pqvae"  # the system of codecs of CLIP features
LANGUAGE = "llava"  # that of multimodal language models
NECK = "transform-neck"  # that of image codecs with a neck
REFERRING = "rsic"  # that of codecs that are told what matters; all others are image codecs
_IMAGE_COLUMNS = ("quality", "bpp", "psnr", "ms_ssim")
_NECK_COLUMNS = ("quality", "bpp", "psnr", "cider_d", "options", "yes_no", "box", "few_shot")
_NECK_RESULTS_ON = "100 test scenes, 200 few-shot episodes, 2-core x86, 2026-11-21"


@dataclass(frozen=True)
class Preset:
    """What a preset is and where it comes from.

    Attributes:
      name: Its name.
      system: The codec family.
      config: The family's config.
      summary: One line for people.
      weights: File in `assets/`, or None: the weights are not shipped and come from a file or folder.
      sha256: Of that file, in hexadecimal.
      licence: Of the weights.
      trained_on: Data and date.
      recipe: The file in `experiments/` that trains it.
      results: Measured rows, written by `jaxsem eval`.
      columns: What the numbers of a row are.
      results_on: The data, hardware and date of `results`.
    """

    name: str
    system: str
    config: Any
    summary: str
    weights: str | None = None
    sha256: str | None = None
    licence: str = "-"
    trained_on: str = "-"
    recipe: str | None = None
    results: tuple[tuple[float, ...], ...] = field(default=())
    results_on: str = "-"
    columns: tuple[str, ...] = _IMAGE_COLUMNS


_MINI_RATE = PqvaeConfig(width=192, channels=32, hidden=(96, 48), residual=32, residual_layers=2)
PQVAE_MINI = FeatureConfig(
    ClipConfig(
        VisionConfig(
            width=128, layers=4, heads=4, hidden=512, patch=16, image_size=128, activation="gelu", stem=(24, 48, 64)
        ),
        TextConfig(
            width=128, layers=2, heads=4, hidden=512, vocabulary=len(WordTokenizer()), context=40, activation="gelu"
        ),
        projection=192,
    ),
    tuple(replace(_MINI_RATE, codeword=width, codebook=size) for width, size in ((16, 4), (16, 16), (8, 32))),
    ClipCapConfig(
        feature_width=192,
        prefix=4,
        gpt2=Gpt2Config(width=128, layers=3, heads=4, hidden=512, vocabulary=len(WordTokenizer()), context=48),
        normalise=True,
    ),
)

_QUESTION_WORDS = len(WordTokenizer(question_words(), MARKS))
LLAVA_MINI = LlavaConfig(
    PQVAE_MINI.clip.vision,
    LlamaConfig(
        width=128, layers=4, heads=4, kv_heads=2, hidden=352, vocabulary=_QUESTION_WORDS, context=512, tied=True
    ),
    image_token=_QUESTION_WORDS,
    feature_layer=-1,
)

_SCENES_CODEC = ElicConfig(
    widths=(24, 48, 64),
    latent=64,
    hyper=32,
    groups=(8, 8, 16, 32),
    context=(48, 32),
    lambdas=(0.00002, 0.00005, 0.00012, 0.0003),
)
NECK_MINI = NeckCodecConfig("elic", _SCENES_CODEC, NeckConfig(64, PQVAE_MINI.clip.vision, (8, 8), bypassed=1, blocks=2))

RSIC_MINI = RsicConfig(
    AutoencoderKlConfig(
        latent_channels=8, widths=(16, 32, 64, 96), layers=1, groups=8, scaling_factor=1.0, middle_attention=False
    ),
    UnetConditionConfig(
        in_channels=8,
        out_channels=8,
        widths=(40, 80, 120),
        layers=1,
        down_attention=(False, True, True),
        up_attention=(True, True, False),
        heads=(4, 4, 4),
        depths=(1, 1, 1),
        context_width=PQVAE_MINI.clip.text.width,
        groups=8,
    ),
    HsvlcConfig(
        latent=8, width=48, channels=(16, 16, 16, 16), condition=16, hidden=24, prior=32, map_stride=2, pixels=64
    ),
    WeightMapConfig(stride=16, levels=8),
    STABLE_DIFFUSION,
)


def _neck_mini(scenario: str, summary: str, sha256: str, results: tuple[tuple[float, ...], ...]) -> Preset:
    name = "transform-neck-mini" + ("" if scenario == "d1" else f"-{scenario}")
    return Preset(
        name,
        NECK,
        replace(NECK_MINI, scenario=scenario),
        summary,
        weights=f"{name}.safetensors",
        sha256=sha256,
        licence="Apache-2.0",
        trained_on="scenes of the 48 seen classes, 2026-11-21",
        recipe="experiments/transform_neck_mini.py",
        columns=_NECK_COLUMNS,
        results=results,
        results_on=_NECK_RESULTS_ON,
    )


_PRESETS = (
    Preset(
        name="elic-mini",
        system="elic",
        config=ElicConfig(
            widths=(32, 64, 96),
            latent=128,
            hyper=64,
            groups=(8, 8, 16, 32, 64),
            context=(96, 64),
            lambdas=(0.0003, 0.001, 0.0035, 0.012),
        ),
        summary="ELIC's layout, small: four rates from one set of weights",
        weights="elic-mini.safetensors",
        sha256="bfb2b48413ceff972e7f8d3bdf166abe4a4064aff7af45270ceda7dfc831a082",
        licence="non-commercial research",
        trained_on="1,294 photos of BSDS500 and imagenet-sample-images, 2026-11-20",
        recipe="experiments/elic_mini.py",
        results=(
            (0, 0.0686, 23.70, 0.8627),
            (1, 0.1403, 25.75, 0.9166),
            (2, 0.2524, 27.34, 0.9474),
            (3, 0.3971, 28.19, 0.9623),
        ),
        results_on="50 photos of COCO train2017, 2-core x86, 2026-11-20",
    ),
    Preset(
        name="pqvae-mini",
        system=FEATURES,
        config=PQVAE_MINI,
        summary="PQVAE-shared with a small CLIP and captioner for scenes: classify, caption, refer",
        weights="pqvae-mini.safetensors",
        sha256="dc8fa26c21e875d5bf47c25a4f4689882343bf6fec3f7f443abd9956713c0dd0",
        licence="Apache-2.0",
        trained_on="scenes of the 48 seen classes, 2026-11-21",
        recipe="experiments/pqvae_mini.py",
        columns=("quality", "bytes", "bpd", "cosine", "accuracy_before", "accuracy"),
        results=(
            (0, 18.14, 0.298, 0.9855, 0.983, 0.979),
            (1, 22.47, 0.478, 0.9897, 0.983, 0.982),
            (2, 35.47, 1.019, 0.9937, 0.983, 0.984),
        ),
        results_on="1,600 scenes of one object of the 16 unseen classes, 2-core x86, 2026-11-21",
    ),
    Preset(
        name="llava-mini",
        system=LANGUAGE,
        config=LLAVA_MINI,
        summary="A small LLaVA that answers questions about scenes: jaxsem ask",
        weights="llava-mini.safetensors",
        sha256="24005f02cfffce91e391df72816797b6b896e686aaad9b7ef495ef660ffcd697",
        licence="Apache-2.0",
        trained_on="scenes of the 48 seen classes and questions about them, 2026-11-21",
        recipe="experiments/llava_mini.py",
        columns=("cider_d", "options", "yes_no", "box"),
        results=((2.341, 0.746, 0.950, 0.381),),
        results_on="100 test scenes, not compressed, 2-core x86, 2026-11-21",
    ),
    _neck_mini(
        "d1",
        "ELIC for scenes at the lowest rates, and a neck from its latents into llava-mini's tower: jaxsem ask FILE.jsem",
        "5c7dcd8e775f448a0d2a2de3ea54143bf1f383b755d7c3a2606832a1b3c38a40",
        (
            (0, 0.0129, 22.22, 1.018, 0.525, 0.653, 0.218, 0.675),
            (1, 0.017, 24.07, 1.338, 0.611, 0.739, 0.272, 0.755),
            (2, 0.0239, 26.03, 1.624, 0.651, 0.803, 0.307, 0.845),
            (3, 0.0357, 27.92, 1.743, 0.661, 0.833, 0.327, 0.895),
        ),
    ),
    _neck_mini(
        "d2",
        "The same, codec and neck trained together, for people and the model",
        "c9ba4a5ba40488149029862d3b88c873f97f371ff51405e5a2cee670476c2a7d",
        (
            (0, 0.0174, 23.97, 1.285, 0.589, 0.771, 0.284, 0.845),
            (1, 0.0246, 25.8, 1.568, 0.663, 0.823, 0.304, 0.895),
            (2, 0.0343, 27.52, 1.666, 0.653, 0.837, 0.327, 0.89),
            (3, 0.0503, 28.98, 1.759, 0.681, 0.837, 0.319, 0.875),
        ),
    ),
    _neck_mini(
        "d3",
        "The same, for the model alone",
        "04eb778d822c1bf26f8abda87c9b544095f56f913ecb3c9960f21d1e6fb5a104",
        (
            (0, 0.0161, 22.32, 1.124, 0.581, 0.733, 0.292, 0.81),
            (1, 0.0222, 23.66, 1.461, 0.644, 0.793, 0.288, 0.875),
            (2, 0.0309, 24.77, 1.652, 0.658, 0.845, 0.327, 0.88),
            (3, 0.0457, 25.8, 1.723, 0.666, 0.853, 0.3, 0.875),
        ),
    ),
    Preset(
        "pqvae",
        FEATURES,
        FeatureConfig(VIT_L14_336, (RELEASED,)),
        "PQVAE-shared as released (400 bits); your `dim_16 size_4.pt` and CLIP ViT-L/14@336",
    ),
    Preset(
        "transform-neck",
        NECK,
        NeckCodecConfig("elic", ElicConfig(), NeckConfig(320, VIT_L14.vision, (16, 16))),
        "ELIC and the neck into CLIP ViT-L/14 at 224; your d1_1 ... d3_4 of its authors, for images of 256x256",
    ),
    Preset("elic", "elic", ElicConfig(), "ELIC at its published size; weights from a file of yours"),
    Preset("elic-official", "elic", ElicConfig(variant="official"), "ELIC as CompressAI's Elic2022Official"),
    Preset("mbt2018", "joint", JointConfig(), "Joint autoregressive prior, qualities 1 to 4, N=M=192"),
    Preset(
        "mbt2018-wide", "joint", JointConfig(192, 320), "Joint autoregressive prior, qualities 5 to 8, N=192, M=320"
    ),
    Preset("tic", "tic", TicConfig(), "TIC, qualities 1 to 4, N=128, M=192; your file of its authors' code"),
    Preset("tic-wide", "tic", TicConfig(192, 320), "TIC, qualities 5 to 8, N=192, M=320"),
    Preset("hyperprior", "hyperprior", HyperpriorConfig(), "Mean-scale hyperprior (mbt2018-mean), N=128, M=192"),
    Preset(
        "hyperprior-wide",
        "hyperprior",
        HyperpriorConfig(192, 320),
        "Mean-scale hyperprior, qualities 5 to 8, N=192, M=320",
    ),
    Preset(
        "bmshj2018-factorized",
        "factorized",
        FactorizedConfig(),
        "Factorised prior, qualities 1 to 5, N=128, M=192",
    ),
    Preset(
        "bmshj2018-factorized-wide",
        "factorized",
        FactorizedConfig(192, 320),
        "Factorised prior, qualities 6 to 8, N=192, M=320",
    ),
    Preset(
        "bmshj2018-hyperprior",
        "scale-hyperprior",
        ScaleHyperpriorConfig(),
        "Scale hyperprior, qualities 1 to 5, N=128, M=192",
    ),
    Preset(
        "bmshj2018-hyperprior-wide",
        "scale-hyperprior",
        ScaleHyperpriorConfig(192, 320),
        "Scale hyperprior, qualities 6 to 8, N=192, M=320",
    ),
)
PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _PRESETS})
