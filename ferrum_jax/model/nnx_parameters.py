"""The parameters of the NNX module as `MoEParams`: taken in, given out, and quantised in place."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ..core.quantized import QuantizedMatrices
from ..core.sharding import names_of
from ..core.stored import specs_of
from ..ops.quantize import quantize
from .layouts import AXES, MoEParams
from .nnx_variables import Quantized
from .parameters import halves, joined

HALVES = {"w_gate_up": ("w_gate", "w_up"), "b_gate_up": ("b_gate", "b_up")}  # where F is divided


def attributes_of(moe: Any, name: str) -> list[str]:
    """The attributes that hold a parameter: one, or none, or one for gate and one for up."""
    return [attribute for attribute in (name, *HALVES.get(name, ())) if getattr(moe, attribute) is not None]


def params_of(moe: Any) -> MoEParams:
    """All parameters. Gate and up become one."""
    return MoEParams(**{name: joined([getattr(moe, a).get_value() for a in attributes_of(moe, name)]) for name in AXES})


def load_params(moe: Any, params: MoEParams) -> None:
    """Take these parameters, cast to the module's dtypes, to where its own parameters are."""
    wrong = []
    for name, value in params._asdict().items():
        parts = [getattr(moe, attribute) for attribute in attributes_of(moe, name)]
        have = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts)) if parts else None
        got = None if value is None else tuple(value.shape)
        wrong += [] if have == got else [f"{name} must be {have}; got {got}"]
    if wrong:
        raise ValueError("MoE: params do not fit the layer: " + "; ".join(wrong))
    for name, value in params._asdict().items():
        attributes = attributes_of(moe, name)
        for attribute, array in zip(attributes, halves(value, len(attributes)), strict=True):
            variable = getattr(moe, attribute)
            array = jax.device_put(array.astype(variable.dtype), _where(attribute, variable.get_value(), array))
            if isinstance(array, QuantizedMatrices):
                setattr(moe, attribute, Quantized(array))
            elif isinstance(variable, Quantized):
                setattr(moe, attribute, nnx.Param(array))
            else:
                variable.set_value(array)


def _where(name: str, own: Any, array: Any) -> Any:
    """The shardings, for `jax.device_put`, of what takes the place of the module's own array."""
    first = own.values if isinstance(own, QuantizedMatrices) else own
    where = first.sharding if getattr(first, "committed", True) else None
    if not isinstance(where, NamedSharding):
        return where
    names = names_of(where.spec)
    names = (*names, *[()] * (first.ndim - len(names)))
    names = (*names[:-2], names[-1], names[-2]) if isinstance(own, QuantizedMatrices) else names
    specs = specs_of("MoE", name, array, names, where.mesh)
    if isinstance(first, jax.ShapeDtypeStruct):
        return specs  # its mesh is abstract and has no devices; the mesh that is set has them
    return jax.tree.map(
        lambda spec: NamedSharding(where.mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def quantize_experts(moe: Any, format: str, **how: Any) -> None:
    """Round the experts' matrices in place."""
    new = {}
    for attribute in (*attributes_of(moe, "w_gate_up"), *attributes_of(moe, "w_down")):
        matrices = getattr(moe, attribute).get_value()
        if isinstance(matrices, QuantizedMatrices):
            raise ValueError(f"MoE: {attribute} is quantised already, in format {matrices.format!r}")
        new[attribute] = quantize(matrices, format, parts=2 if attribute == "w_gate_up" else 1, **how)
    for attribute, matrices in new.items():
        setattr(moe, attribute, Quantized(matrices))
