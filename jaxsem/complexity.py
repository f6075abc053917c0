"""What a network costs: its parameters, and the multiplications it takes, by formula and as XLA counts them.

    decoder = module_complexity(Elic(ElicConfig()), y_hat, quality, method="synthesize")     # shapes alone will do
    kmac_per_pixel(decoder.textbook_macs, 256, 256)                                         # 254.97

Nothing is computed and no parameter is made: functions are traced on shapes.

A multiply-accumulate (MAC) here is one of a matrix product or a convolution; what else a network does (biases, activations,
normalisation, softmax, resampling) is left out, as in published tables. There are two counts. `macs` are those that the program
does, whatever it multiplies. `textbook_macs` are those of the layers as they are written down: without the products with zeros
that a transposed convolution puts between its inputs or, computed as jaxsem does (`jaxsem.nn.ops.transposed_taps`), into its
kernel. Products with the zeros around an image count in both.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from jaxsem.errors import InputError

# What multiplies in ways that a jaxpr does not tell.
_OPAQUE = ("pallas_call", "ragged_dot_general", "shard_map", "ffi_call")


@dataclass(frozen=True)
class Complexity:
    """What a function costs.

    Attributes:
      parameters: Numbers in its parameters.
      macs: Multiply-accumulates that the program does.
      textbook_macs: Those without the products with zeros of transposed convolutions and masked kernels.
      flops_xla: All floating-point operations, as XLA counts them in the program before it optimises it: a MAC is two, and what
        `macs` leaves out counts, but products with zeros around an image or between its pixels do not. Of branches the longest
        counts. None where the back-end does not say.
    """

    parameters: int
    macs: int
    textbook_macs: int
    flops_xla: float | None


def complexity(fn: Callable[..., Any], params: Any, *inputs: Any, loop_steps: int | None = None) -> Complexity:
    """What `fn(params, *inputs)` costs.

    Args:
      fn: A traceable function.
      params: Its parameters, all of which are counted: a tree of arrays or shapes (`jax.ShapeDtypeStruct`), or flax's variables, of
        which the collection "params" is counted.
      *inputs: Its other arguments: trees of arrays or shapes.
      loop_steps: Steps to count for each loop whose length is not known before it runs (`lax.while_loop`); None will do where no
        such loop has a matrix product or convolution in it, and lets XLA count one step.

    Raises:
      InputError: A loop of unknown length multiplies and `loop_steps` is None, or a kernel's insides cannot be seen.
    """
    counted = params["params"] if isinstance(params, Mapping) and "params" in params else params
    traced = jax.make_jaxpr(fn)(params, *inputs)
    macs, textbook = _macs(traced.jaxpr, _Zeros.of_arguments(traced), loop_steps)
    flops = _xla_flops(traced)
    if flops is not None:
        flops += _xla_correction(traced.jaxpr, loop_steps)
    return Complexity(sum(leaf.size for leaf in jax.tree.leaves(counted)), macs, round(textbook), flops)


def module_complexity(
    module: nn.Module,
    *inputs: Any,
    method: str | Callable[..., Any] | None = None,
    loop_steps: int | None = None,
    **options: Any,
) -> Complexity:
    """What a method of a flax module costs, and the parameters that it needs.

    Args:
      module: The module.
      *inputs: The method's arguments: trees of arrays or shapes.
      method: The method, or its name; None is `__call__`.
      loop_steps: See `complexity`.
      **options: The method's other arguments, as they are.

    Raises:
      InputError: See `complexity`.
    """

    def init(key: jax.Array, *inputs: Any) -> Any:
        return module.init(key, *inputs, method=method, **options)

    def apply(variables: Any, *inputs: Any) -> Any:
        return module.apply(variables, *inputs, method=method, **options)

    variables = jax.eval_shape(init, jax.random.key(0), *inputs)
    return complexity(apply, {"params": {}, **variables}, *inputs, loop_steps=loop_steps)


def kmac_per_pixel(macs: int, height: int, width: int) -> float:
    """Thousands of multiply-accumulates to a pixel of an image of this size.

    Raises:
      InputError: An image without pixels.
    """
    if height < 1 or width < 1:
        raise InputError(f"an image of {height}x{width} has no pixels to count by: give its height and width")
    return macs / (1000 * height * width)


# -- multiply-accumulates ---------------------------------------------------------------------------------------------

_Macs = tuple[int, Fraction]  # done, and by the textbook


def _macs(jaxpr: Jaxpr, zeros: "_Zeros", loop_steps: int | None) -> _Macs:
    done, textbook = 0, Fraction(0)
    for eqn in jaxpr.eqns:
        more = _macs_of(eqn, zeros, loop_steps)
        done, textbook = done + more[0], textbook + more[1]
    return done, textbook


def _macs_of(eqn: JaxprEqn, zeros: "_Zeros", loop_steps: int | None) -> _Macs:
    name = eqn.primitive.name
    if name in _OPAQUE:
        raise InputError(
            f"the multiplications inside a {name} cannot be counted: count a version of the function without it"
        )
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        done = math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        return done, Fraction(done)
    if name == "conv_general_dilated":
        return _macs_of_convolution(eqn, zeros)
    parts = [_macs(inner, zeros.inside(eqn, inner, consts), loop_steps) for inner, consts in _inner(eqn)]
    if not parts:
        return 0, Fraction(0)
    if name == "cond":
        return max(parts)
    done, textbook = (sum(counts) for counts in zip(*parts, strict=True))
    times = _steps(eqn, loop_steps) if done else 1
    return times * done, times * textbook


def _macs_of_convolution(eqn: JaxprEqn, zeros: "_Zeros") -> _Macs:
    p, (image, kernel), out = eqn.params, (var.aval.shape for var in eqn.invars), eqn.outvars[0].aval.shape
    lhs, rhs, result = p["dimension_numbers"]
    # A kernel's in-channels are those of one group already.
    done = math.prod(out) * math.prod(kernel) // kernel[rhs[0]]
    textbook = Fraction(done)
    for axis, dilation in enumerate(p["lhs_dilation"]):
        if dilation > 1 and image[lhs[2 + axis]]:
            # Where each tap of each output lies, and whether that is an input or a zero between two of them.
            first = np.arange(out[result[2 + axis]]) * p["window_strides"][axis] - p["padding"][axis][0]
            taps = np.arange(kernel[rhs[2 + axis]]) * p["rhs_dilation"][axis]
            hits = (first[:, None] + taps) % dilation == 0
            textbook *= Fraction(int(hits.sum()), max(hits.size, 1))
    known = zeros.known(eqn.invars[1])
    if known is not None and known.values.size:
        textbook *= Fraction(int(np.count_nonzero(known.values)), known.values.size)
    return done, textbook


def _inner(eqn: JaxprEqn) -> Iterator[tuple[Jaxpr, tuple[Any, ...]]]:
    """The jaxprs inside an equation, with their constants."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr, tuple(item.consts)
            elif isinstance(item, Jaxpr):
                yield item, ()


def _steps(eqn: JaxprEqn, loop_steps: int | None) -> int:
    """How often the insides of an equation run."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name != "while":
        return 1
    if loop_steps is None:
        raise InputError("a loop that multiplies stops when its own condition says: give loop_steps, how many to count")
    return loop_steps


# -- zeros in kernels -------------------------------------------------------------------------------------------------


class _Known(NamedTuple):
    """What a variable is, as far as it does not depend on the arguments.

    Attributes:
      values: Where `exact`, its values; else zero where the variable is zero whatever the arguments.
      exact: Whether nothing depends on the arguments.
    """

    values: np.ndarray
    exact: bool


# What moves entries about or multiplies them: a zero stays one, and no other entry becomes one.
_MOVES = {"broadcast_in_dim", "convert_element_type", "copy", "neg", "reshape", "rev", "squeeze", "transpose"}
_MOVES |= {"concatenate", "dynamic_slice", "gather", "mul", "pad", "select_n", "slice"}
_CONTROL = ("scan", "while", "cond")


class _Zeros:
    """Which entries of a jaxpr's variables are zero by construction; worked out on demand, for kernels."""

    def __init__(self, jaxpr: Jaxpr, inputs: Mapping[Var, Callable[[], _Known | None]]) -> None:
        self._inputs = inputs
        self._makers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}

    @classmethod
    def of_arguments(cls, traced: ClosedJaxpr) -> "_Zeros":
        """Of a whole function, of whose arguments nothing is known."""
        return cls(traced.jaxpr, _constants(traced.jaxpr, traced.consts))

    def inside(self, eqn: JaxprEqn, inner: Jaxpr, consts: tuple[Any, ...]) -> "_Zeros":
        """Of a jaxpr inside an equation, with what is known of its operands here."""
        operands = list(eqn.invars)
        if eqn.primitive.name == "cond":
            operands = operands[1:]
        elif eqn.primitive.name == "scan":
            operands = operands[: eqn.params["num_consts"]]  # the others change from step to step
        elif len(operands) != len(inner.invars):
            operands = []
        outer = {var: (lambda o=operand: self.known(o)) for var, operand in zip(inner.invars, operands)}
        return _Zeros(inner, {**outer, **_constants(inner, consts)})

    def known(self, var: Var | Literal) -> _Known | None:
        """What is known of a variable; None is nothing, and that no entry need be zero."""
        if isinstance(var, Literal):
            return _Known(np.asarray(var.val), True)
        if var in self._inputs:
            return self._inputs[var]()
        eqn = self._makers.get(var)
        if eqn is None or eqn.primitive.name in _CONTROL:
            return None
        for inner, consts in _inner(eqn):
            if (len(inner.invars), len(inner.outvars)) != (len(eqn.invars), len(eqn.outvars)):
                return None
            return self.inside(eqn, inner, consts).known(inner.outvars[eqn.outvars.index(var)])
        return self._apply(eqn) if len(eqn.outvars) == 1 else None

    def _apply(self, eqn: JaxprEqn) -> _Known | None:
        """What an equation makes of what is known of its operands."""
        operands = [self.known(var) for var in eqn.invars]
        exact = all(known is not None and known.exact for known in operands)
        if not exact:
            numbers = [jnp.issubdtype(var.aval.dtype, jnp.floating) for var in eqn.invars]
            # Of the places and conditions that an operand may hold, all must be known.
            told = all(number or (known is not None and known.exact) for known, number in zip(operands, numbers))
            dense = all(known is None for known, number in zip(operands, numbers) if number)
            if eqn.primitive.name not in _MOVES or dense or not told:
                return None
        values = [
            jnp.ones(var.aval.shape, var.aval.dtype) if known is None else jnp.asarray(known.values)
            for var, known in zip(eqn.invars, operands)
        ]
        return _Known(np.asarray(eqn.primitive.bind(*values, **eqn.params)), exact)


def _constants(jaxpr: Jaxpr, consts: Any) -> dict[Var, Callable[[], _Known]]:
    return {
        var: (lambda c=const: _Known(np.asarray(c), True)) for var, const in zip(jaxpr.constvars, consts, strict=True)
    }


# -- XLA's count ------------------------------------------------------------------------------------------------------


def _xla_flops(traced: ClosedJaxpr) -> float | None:
    """Operations in the program of a jaxpr, as XLA counts them: the body of a loop once."""
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in traced.in_avals]
    found = jax.jit(jaxpr_as_fun(traced)).lower(*shapes).cost_analysis()
    return None if found is None else float(found.get("flops", 0.0))


def _xla_correction(jaxpr: Jaxpr, loop_steps: int | None) -> float:
    """What XLA's count lacks: it sees the body of a loop once, or as often as it is written out."""
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = list(_inner(eqn))
        lacks = [_xla_correction(body, loop_steps) for body, _ in inner]
        if eqn.primitive.name == "cond":
            total += max(lacks)
        elif eqn.primitive.name in ("scan", "while"):
            steps, seen = _steps_and_seen(eqn, loop_steps)
            body = sum(_xla_flops(ClosedJaxpr(body, consts)) or 0.0 for body, consts in inner)
            total += (steps - seen) * body + steps * sum(lacks)
        else:
            total += sum(lacks)
    return total


def _steps_and_seen(eqn: JaxprEqn, loop_steps: int | None) -> tuple[int, int]:
    """Steps of a loop, and how many of them its program has in a row."""
    if eqn.primitive.name == "while":
        return (1 if loop_steps is None else loop_steps), 1
    steps = eqn.params["length"]
    unroll = min(eqn.params["unroll"], steps)
    return steps, unroll + (steps % unroll if unroll else 0)
