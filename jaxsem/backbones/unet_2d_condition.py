"""The U-Net of Stable Diffusion 1.x and 2.x: from a noisy latent, the time and a text's tokens, what the noise is.

```
sample ─ conv_in ─ down_0 ─ down_1 ─ down_2 ─ down_3 ─ middle ─ up_0 ─ up_1 ─ up_2 ─ up_3 ─ out ─▶ prediction
             └─────── skips, 12 of them ───────┘                  └──── each joined where it came from ───┘
            time and context go into every stage
```

The half up to the middle is a module of its own, `UnetEncoder`, and so is the rest. A control branch (ControlNet, DiffBIR) is
another encoder that begins with a copy of its parameters; what it finds is added between the two:

    net, control = UnetCondition(SD21), UnetEncoder(SD21)
    found = control.apply({"params": params["encoder"]}, sample, timesteps, context, hint)
    prediction = net.apply({"params": params}, sample, timesteps, context, found.skips, found.middle)   # after zero convolutions

    states = net.apply({"params": params}, sample, timesteps, context, method="encode")                 # or step by step
    prediction = net.apply({"params": params}, states.add(skips, middle), context, method="decode")

Whether the prediction is the noise or the velocity is for the scheduler to know.

Source: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (CVPR 2022), and the implementation in
diffusers, with whose weights this one agrees; Zhang et al., Adding Conditional Control to Text-to-Image Diffusion Models (ICCV
2023), for the control branch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsem.backbones.diffusers_config import MOST_LAYERS, Fields
from jaxsem.errors import InputError
from jaxsem.nn.attention import check_heads
from jaxsem.nn.diffusion import DownStage, Head, MiddleStage, TimeEmbedding, Typed, UpStage, conv3x3, timestep_embedding

# Whether each kind of block attends to the context.
_DOWN_KINDS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP_KINDS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}

# What changes the result, and the only value of it that is known; also diffusers' default.
_FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}


@dataclass(frozen=True)
class UnetConditionConfig:
    """Sizes of a U-Net; the defaults are those of Stable Diffusion 1.5.

    Attributes:
      in_channels: Of a sample.
      out_channels: Of a prediction.
      widths: Channels at each level, from the sample's own grid down; each level but the last halves it.
      layers: ResNet blocks at each level on the way down; there is one more on the way up.
      down_attention: Whether each level attends to the context on the way down; the middle always does.
      up_attention: The same on the way up, from the coarsest level on.
      heads: Attention heads at each level. diffusers calls them `attention_head_dim`.
      depths: Blocks of each transformer at each level.
      context_width: Channels of the context's tokens.
      groups: Of the normalisations; divides the widths.
      epsilon: Of the normalisations in the ResNet blocks and at the end.
      linear_projection: Whether a checkpoint keeps the transformers' projections as matrices (2.x) or as 1x1 convolutions
        (1.x), which are the same function.
      upcast_attention: Whether attention weights stay float32 while they weigh the values.
      cosine_first: As in `timestep_embedding`.
      frequency_shift: As in `timestep_embedding`.

    Raises:
      InputError: A size below 1, another number of entries than of levels, groups or heads that do not divide a width, or an
        epsilon that is no small number.
    """

    in_channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    down_attention: tuple[bool, ...] = (True, True, True, False)
    up_attention: tuple[bool, ...] = (False, True, True, True)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    depths: tuple[int, ...] = (1, 1, 1, 1)
    context_width: int = 768
    groups: int = 32
    epsilon: float = 1e-5
    linear_projection: bool = False
    upcast_attention: bool = False
    cosine_first: bool = True
    frequency_shift: float = 0.0

    def __post_init__(self) -> None:
        sizes = (*self.widths, *self.heads, *self.depths, self.layers, self.context_width, self.groups)
        if not self.widths or min(*sizes, self.in_channels, self.out_channels) < 1:
            raise InputError(f"a U-Net with no level or a size below 1 in {self}: every size is at least 1")
        for name in ("down_attention", "up_attention", "heads", "depths"):
            if len(getattr(self, name)) != len(self.widths):
                raise InputError(
                    f"{name}={list(getattr(self, name))} for {len(self.widths)} widths: give one for each level"
                )
        if any(width % self.groups for width in self.widths):
            raise InputError(
                f"widths of {list(self.widths)} cannot be split into {self.groups} groups: choose multiples of it"
            )
        for level, (width, heads) in enumerate(zip(self.widths, self.heads)):
            last = level == self.levels - 1
            if last or self.down_attention[level] or self.up_attention[-1 - level]:
                check_heads(width, heads)
        if not 0 < self.epsilon < 1:
            raise InputError(f"an epsilon of {self.epsilon}: it takes a small positive number")
        if self.widths[0] % 2 or not 0 <= self.frequency_shift < self.widths[0] // 2:
            raise InputError(
                f"a first width of {self.widths[0]} with a frequency_shift of {self.frequency_shift}: the time takes an even "
                f"width, and a shift below half of it"
            )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "UnetConditionConfig":
        """The sizes in a `config.json` of diffusers.

        Fields that are absent have diffusers' defaults.

        Raises:
          InputError: It is no config of a UNet2DConditionModel, or holds values that this U-Net cannot have.
        """
        read = Fields(fields, "UNet2DConditionModel")
        read.only(_FIXED, "this U-Net is that of Stable Diffusion 1.x and 2.x")
        widths = read.counts("block_out_channels", cls.widths)
        levels = len(widths)
        down, up = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
        return cls(
            in_channels=read.count("in_channels", 4),
            out_channels=read.count("out_channels", 4),
            widths=widths,
            layers=read.same("layers_per_block", 2, levels, MOST_LAYERS),
            down_attention=read.kinds("down_block_types", down, _DOWN_KINDS, levels),
            up_attention=read.kinds("up_block_types", up, _UP_KINDS, levels),
            heads=read.per_level("attention_head_dim", 8, levels),
            depths=read.per_level("transformer_layers_per_block", 1, levels, MOST_LAYERS),
            context_width=read.same("cross_attention_dim", 1280, levels),
            groups=read.count("norm_num_groups", 32),
            epsilon=read.number("norm_eps", 1e-5),
            linear_projection=read.flag("use_linear_projection", False),
            upcast_attention=read.flag("upcast_attention", False),
            cosine_first=read.flag("flip_sin_to_cos", True),
            frequency_shift=read.number("freq_shift", 0.0),
        )

    @property
    def levels(self) -> int:
        """How many grids there are."""
        return len(self.widths)


class UnetStates(NamedTuple):
    """What the encoder half hands to the other half; a pytree.

    Attributes:
      time: [b, 4 widths[0]], the embedding of the timesteps.
      skips: [b, h, w, c] each, what is joined on the way up, in the order in which it was made.
      middle: [b, h, w, c], what the middle stage gives.
    """

    time: jax.Array
    skips: tuple[jax.Array, ...]
    middle: jax.Array

    def add(self, skips: Sequence[jax.Array] | None = None, middle: jax.Array | None = None) -> "UnetStates":
        """The states with residuals added, as a control branch finds them.

        Args:
          skips: One for each of `skips`; None adds nothing.
          middle: One for `middle`; None adds nothing.

        Raises:
          InputError: Other numbers or shapes of residuals.
        """
        states = self
        if skips is not None:
            if len(skips) != len(self.skips):
                raise InputError(
                    f"{len(skips)} residuals for the {len(self.skips)} skips of this U-Net: give one for each"
                )
            states = states._replace(skips=tuple(map(_sum, self.skips, skips)))
        return states if middle is None else states._replace(middle=_sum(self.middle, middle))


def _sum(state: jax.Array, residual: jax.Array) -> jax.Array:
    if state.shape != residual.shape:
        raise InputError(
            f"a residual of shape {list(residual.shape)} for a state of {list(state.shape)}: give equal ones"
        )
    return state + residual.astype(state.dtype)


# -- halves -----------------------------------------------------------------------------------------------------------


class Half(Typed):
    """What the two halves share: the config, and whether each block is recomputed in the backward pass."""

    config: UnetConditionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def stage(self, level: int, attention: bool) -> dict[str, Any]:
        """What the stages of a level are made with."""
        c = self.config
        return {
            "width": c.widths[level],
            "heads": c.heads[level] if attention else None,
            "depth": c.depths[level],
            "upcast": c.upcast_attention,
            "groups": c.groups,
            "epsilon": c.epsilon,
            "remat": self.remat,
            **self.types,
        }


class UnetEncoder(Half):
    """The half up to the middle stage, with the embedding of the time: alone, the trunk of a control branch.

    Attributes:
      config: Sizes; of another number of `in_channels` where a branch sees more than the sample.
      dtype: Of the computation.
      param_dtype: Of the parameters.
      remat: Whether to recompute each block in the backward pass: less memory, more time.
    """

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timesteps: jax.Array,
        context: Float[Array, "b n d"],
        hint: Float[Array, "b h w w0"] | None = None,
    ) -> UnetStates:
        """Encodes.

        Args:
          sample: A noisy latent; of any size.
          timesteps: [b], integers or floats.
          context: The text's tokens.
          hint: What a ControlNet adds after the first convolution.

        Raises:
          InputError: Arguments of another shape or kind.
        """
        c = self.config
        _check(sample, timesteps, context, c)
        time = timestep_embedding(timesteps, c.widths[0], c.cosine_first, c.frequency_shift).astype(self.dtype)
        time = TimeEmbedding(4 * c.widths[0], name="time", **self.types)(time)
        x = conv3x3(c.widths[0], "conv_in", **self.types)(sample)
        if hint is not None:
            x = _sum(x, hint)
        skips = [x]
        for i in range(c.levels):
            halve = (1, 1) if i < c.levels - 1 else None
            stage = DownStage(layers=c.layers, downsample=halve, name=f"down_{i}", **self.stage(i, c.down_attention[i]))
            skips += stage(skips[-1], time, context)
        middle = MiddleStage(name="middle", **self.stage(-1, True))(skips[-1], time, context)
        return UnetStates(time, tuple(skips), middle)


class UnetDecoder(Half):
    """The half after the middle stage; its first stage is the coarsest."""

    @nn.compact
    def __call__(self, states: UnetStates, context: Float[Array, "b n d"]) -> Float[Array, "b h w o"]:
        """Decodes."""
        c = self.config
        x, skips = states.middle, states.skips
        for i in range(c.levels):
            taken, skips = skips[-c.layers - 1 :], skips[: -c.layers - 1]
            # The grid of the next skip, whose sides may have been odd.
            size = skips[-1].shape[1:3] if skips else None
            kind = self.stage(-1 - i, c.up_attention[i])
            stage = UpStage(layers=c.layers + 1, upsample=bool(skips), name=f"up_{i}", **kind)
            x = stage(x, states.time, context, taken, size)
        return Head(c.out_channels, c.groups, c.epsilon, name="out", **self.types)(x)


# -- the model --------------------------------------------------------------------------------------------------------


class UnetCondition(nn.Module):
    """The U-Net.

    Attributes:
      config: Sizes.
      dtype: Of the computation; the prediction is float32 all the same.
      param_dtype: Of the parameters.
      remat: Whether to recompute each block in the backward pass: less memory, more time.
    """

    config: UnetConditionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Declares the halves."""
        fields = self.config, self.dtype, self.param_dtype, self.remat
        self.encoder, self.decoder = UnetEncoder(*fields), UnetDecoder(*fields)

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timesteps: jax.Array,
        context: Float[Array, "b n d"],
        skips: Sequence[jax.Array] | None = None,
        middle: jax.Array | None = None,
    ) -> Float[Array, "b h w o"]:
        """Predicts.

        Args:
          sample: Noisy latents, of any size.
          timesteps: [b], integers or floats.
          context: The texts' tokens.
          skips: Residuals to add to the skips: diffusers' `down_block_additional_residuals`.
          middle: A residual to add to the middle state: diffusers' `mid_block_additional_residual`.

        Raises:
          InputError: Arguments of another shape or kind.
        """
        return self.decode(self.encode(sample, timesteps, context).add(skips, middle), context)

    def encode(
        self, sample: Float[Array, "b h w c"], timesteps: jax.Array, context: Float[Array, "b n d"]
    ) -> UnetStates:
        """The states between the two halves; arguments as for `__call__`."""
        return self.encoder(sample, timesteps, context)

    def decode(self, states: UnetStates, context: Float[Array, "b n d"]) -> Float[Array, "b h w o"]:
        """The prediction from the states between the two halves."""
        return self.decoder(states, context).astype(jnp.float32)


def _check(sample: jax.Array, timesteps: jax.Array, context: jax.Array, c: UnetConditionConfig) -> None:
    fits = sample.ndim == 4 and sample.shape[-1] == c.in_channels and 0 not in sample.shape
    fits = fits and timesteps.shape == sample.shape[:1]
    fits = fits and context.ndim == 3 and len(context) == len(sample) and context.shape[-1] == c.context_width
    kinds = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (sample, context))
    if not (fits and kinds and 0 not in context.shape):
        shown = ", ".join(f"{x.dtype} {list(x.shape)}" for x in (sample, timesteps, context))
        raise InputError(
            f"this U-Net takes a sample [batch, h, w, {c.in_channels}], timesteps [batch] and a context [batch, n, "
            f"{c.context_width}], the first and the last of floats, not {shown}"
        )


def param_shapes(module: UnetCondition) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    c = module.config
    sample = jax.ShapeDtypeStruct((1, 8, 8, c.in_channels), jnp.float32)
    context = jax.ShapeDtypeStruct((1, 1, c.context_width), jnp.float32)
    timesteps = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), sample, timesteps, context)["params"]


# -- published models -------------------------------------------------------------------------------------------------

SD15 = UnetConditionConfig()
SD21 = UnetConditionConfig(heads=(5, 10, 20, 20), context_width=1024, linear_projection=True, upcast_attention=True)

CONFIGS = {"sd15": SD15, "sd21": SD21}
