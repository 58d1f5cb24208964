"""The layer's arguments, checked."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..core.quantized import QuantizedMatrices
from ..core.settings import as_bool, as_int, one_of
from ..core.signature import Signature, Term, checked, parse
from ..core.types import PACKED, PAIR_IDS, LayerOf, is_quantized
from ..ops.activations import ACTIVATIONS
from ..ops.grouped_ops import Matrices
from ..ops.routing import as_pair
from .exchange import EXCHANGES
from .presets import Preset

FLOWS = (PACKED, PAIR_IDS)


class Experts(NamedTuple):
    """A layer's matrices and biases.

    gate_up, gate_up_bias: one array for gate and up, or one for each. Without biases `gate_up_bias` is empty.
    interleaved: gate and up alternate in their one array; otherwise they are its halves.
    transpose_rhs: the matrices are [E, 2F, H] and [E, H, F].
    """

    gate_up: tuple[Matrices, ...]
    down: Matrices
    gate_up_bias: tuple[Any, ...]
    down_bias: Any
    interleaved: bool
    transpose_rhs: bool

    @property
    def number(self) -> int:
        return self.down.shape[0]

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The matrices, then the biases that there are."""
        down_bias = () if self.down_bias is None else (self.down_bias,)
        return *self.gate_up, self.down, *self.gate_up_bias, *down_bias

    @property
    def axes(self) -> tuple[str, ...]:
        """A letter for each axis of `arrays`; "G" are the 2F entries of gate and up in one array."""
        width = "G" if len(self.gate_up) == 1 else "F"
        gate_up, down = (f"E{width}H", "EHF") if self.transpose_rhs else (f"EH{width}", "EFH")
        down_bias = () if self.down_bias is None else ("EH",)
        return *[gate_up] * len(self.gate_up), down, *[f"E{width}"] * len(self.gate_up_bias), *down_bias

    @property
    def names(self) -> tuple[str, ...]:
        """What the caller calls each of `arrays`."""
        marks = [""] if len(self.gate_up) == 1 else ["[0]", "[1]"]
        biases = [f"b_gate_up{mark}" for mark in marks[: len(self.gate_up_bias)]]
        return *[f"w_gate_up{mark}" for mark in marks], "w_down", *biases, *["b_down"] * (self.down_bias is not None)

    def of(self, arrays: Sequence[Any]) -> "Experts":
        """The same with other arrays, in the order of `arrays`."""
        parts, number = list(arrays), len(self.gate_up)
        biases = parts[number + 1 : number + 1 + len(self.gate_up_bias)]
        down_bias = None if self.down_bias is None else parts[-1]
        return self._replace(
            gate_up=tuple(parts[:number]), down=parts[number], gate_up_bias=tuple(biases), down_bias=down_bias
        )


def checked_settings(op: str, activation: Any, flow: Any, block_size: Any) -> Any:
    """Check the settings that can be checked without arrays. Return the activation as a function."""
    if not callable(activation) and activation not in list(ACTIVATIONS):  # a list, for values that cannot be hashed
        choices = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{op}: activation must be a function or one of {choices}; got {activation!r}")
    one_of(op, "flow", flow, (None, *FLOWS))
    if block_size is not None:
        as_int(op, "block_size", block_size)
    return activation if callable(activation) else ACTIVATIONS[activation]


class Exchange(NamedTuple):
    """How tokens are exchanged, as `parallel.moe_mlp` explains it."""

    by: str | None = None
    capacity: int | None = None
    chunks: int = 1


def checked_exchange(op: str, exchange: Any, capacity: Any, chunks: Any, return_dropped: Any) -> Exchange:
    """These settings, checked. Whoever limits the capacity has to look at what is dropped."""
    one_of(op, "exchange", exchange, (None, *EXCHANGES))
    return_dropped = as_bool(op, "return_dropped", return_dropped)
    if capacity is not None:
        capacity = as_int(op, "capacity", capacity)
        if not return_dropped:
            raise ValueError(f"{op}: capacity may drop pairs; pass return_dropped=True to get their count too")
    return Exchange(exchange, capacity, as_int(op, "chunks", chunks))


def checked_experts(
    op: str, w_gate_up: Any, w_down: Any, b_gate_up: Any, b_down: Any, interleaved: Any, transpose_rhs: Any
) -> Experts:
    """The matrices and biases, each checked against the others."""
    interleaved = as_bool(op, "interleaved", interleaved)
    transpose_rhs = as_bool(op, "transpose_rhs", transpose_rhs)
    gate_up, biases = _parts(op, "w_gate_up", w_gate_up), _parts(op, "b_gate_up", b_gate_up)
    if biases and len(biases) != len(gate_up):
        raise TypeError(f"{op}: b_gate_up must be a pair if w_gate_up is one, and only then")
    if interleaved and len(gate_up) == 2:
        raise ValueError(f"{op}: interleaved must be False with a pair (w_gate, w_up)")
    if len({type(part) if isinstance(part, LayerOf | QuantizedMatrices) else None for part in gate_up}) == 2:
        raise TypeError(
            f"{op}: w_gate_up must be a pair of arrays, of QuantizedMatrices or of LayerOf, not of two kinds"
        )
    width, mark = ("G", [""]) if len(gate_up) == 1 else ("F", ["[0]", "[1]"])
    shape, down_shape = (("E", width, "H"), ("E", "H", "F")) if transpose_rhs else (("E", "H", width), ("E", "F", "H"))
    terms = [
        *[Term(f"w_gate_up{i}", "matrices", shape) for i in mark],
        Term("w_down", "matrices", down_shape),
        *[Term(f"b_gate_up{i}", "biases", ("E", width)) for i in mark if biases],
        Term("b_down", "biases", ("E", "H"), optional=True),
    ]
    arrays = checked(op, Signature(tuple(terms), ()), *gate_up, w_down, *biases, b_down)
    for term, array in zip(terms, arrays, strict=True):
        if array is not None and array.ndim != len(term.axes):
            axes = ", ".join(term.axes).replace("G", "2F")
            raise ValueError(f"{op}: {term.name} must be [{axes}], without leading axes; got shape {array.shape}")
    first, down = arrays[0], arrays[len(gate_up)]
    if not first.shape[0]:
        raise ValueError(f"{op}: {terms[0].name} must hold at least one expert, E >= 1; got shape {first.shape}")
    have, need = first.shape[shape.index(width)], (3 - len(gate_up)) * down.shape[down_shape.index("F")]
    if have != need:
        raise ValueError(
            f"{op}: w_gate_up must have {need} entries along axis {shape.index(width)}, 2F of w_down; "
            f"got shape {first.shape}"
        )
    biases = tuple(map(_small, arrays[len(gate_up) + 1 : -1]))
    return Experts(tuple(arrays[: len(gate_up)]), down, biases, _small(arrays[-1]), interleaved, transpose_rhs)


def _parts(op: str, name: str, arrays: Any) -> tuple[Any, ...]:
    """The arrays of gate and up: one, two, or for None none."""
    if not isinstance(arrays, tuple | list):
        return () if arrays is None else (arrays,)
    if len(arrays) != 2:
        raise TypeError(f"{op}: {name} must be one array, or a pair of arrays; got {len(arrays)} entries")
    return tuple(arrays)


def _small(bias: Any) -> Any:
    """A bias as an array. It is small, so one that stands in a stack is copied."""
    return bias.copy() if isinstance(bias, LayerOf) else bias


def checked_tokens(
    op: str, experts: Experts, top_k: Any, x: Any, router_logits: Any, router_output: Any, devices: int | None = None
) -> tuple[Any, ...]:
    """The tokens and their routing: x, router_logits or None, and (expert_ids, expert_weights) or None.

    devices: over how many devices the experts are spread; `experts` are those of one of them.
    """
    if (router_logits is None) == (router_output is None):
        got = "neither" if router_logits is None else "both"
        raise ValueError(f"{op}: give one of router_logits (with top_k) and router_output; got {got}")
    routed = (None, None) if router_output is None else as_pair(op, router_output)
    x, logits, ids, weights = checked(op, _TOKENS, x, router_logits, *routed)
    first, axis = experts.gate_up[0], 2 if experts.transpose_rhs else 1
    name = experts.names[0]
    if first.shape[axis] != x.shape[-1]:
        raise ValueError(
            f"{op}: {name} must have {x.shape[-1]} entries along axis {axis}, H of x; got shape {first.shape}"
        )
    for name, array in zip(experts.names, experts.arrays, strict=True):
        if not is_quantized(array) and array.dtype != x.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of x, {x.dtype}; got {array.dtype}")
    name, other = ("router_output", ids) if logits is None else ("router_logits", logits)
    if other.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{op}: {name} must have the axes {x.shape[:-1]} of x before its last; got shape {other.shape}"
        )
    if logits is not None:
        number = experts.number * (devices or 1)
        if logits.shape[-1] != number:
            whose = "" if devices is None else f": {devices} devices times the {experts.number} of each"
            raise ValueError(
                f"{op}: router_logits must have {number} entries along axis -1, E of w_gate_up{whose}; "
                f"got shape {logits.shape}"
            )
        if top_k is None:
            raise TypeError(f"{op}: top_k must be an int with router_logits; got None")
        return x, logits, None
    if ids.shape != weights.shape:
        raise ValueError(
            f"{op}: router_output must hold ids and weights of one shape; got {ids.shape} and {weights.shape}"
        )
    if top_k is not None and as_int(op, "top_k", top_k, 0) != ids.shape[-1]:
        raise ValueError(f"{op}: top_k must be that of router_output, {ids.shape[-1]}; got {top_k}")
    return x, None, (ids, weights)


_TOKENS = parse("x: rows[T,H], router_logits?: logits[T,E], expert_ids?: ids[T,K], expert_weights?: weights[T,K]")


def preset_of(op: str, preset: Preset | None, settings: dict[str, Any]) -> Preset:
    """The preset with these settings in place of its own, or one of these settings alone."""
    fields = {field.name for field in dataclasses.fields(Preset)}
    if unknown := settings.keys() - fields:
        raise TypeError(f"{op}: settings must be fields of Preset, {', '.join(sorted(fields))}; got {sorted(unknown)}")
    if preset is not None:
        return dataclasses.replace(preset, **settings)
    if missing := {"num_experts", "top_k"} - settings.keys():
        raise TypeError(f"{op}: {' and '.join(sorted(missing))} must be given, or a preset")
    return Preset(**settings)
