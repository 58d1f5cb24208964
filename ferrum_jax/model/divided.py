"""The layer over the devices of a mesh, inside a `jax.shard_map` that it opens itself.

A mesh axis divides tokens, experts, or F of the matrices. Where it divides experts and tokens, tokens are exchanged;
where it divides experts alone, each device adds what its experts give. H and F of matrices may also be divided over
axes that divide tokens: such matrices are stored in parts, and gathered before they are used.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from ..core.sharding import explicit_axes, names_of, placed
from ..core.stored import names_of_array, on_leaves, specs_of
from ..core.types import LayerOf, MoESharding
from .arguments import Exchange, Experts
from .local import Settings, local_layer, routing_of
from .spread import exchanged_layer, gathered_layer

Names = tuple[str, ...]

# The gathered matrices are not kept for the gradient, which gathers them again.
_GATHERED = "moe_gathered"


class Division(NamedTuple):
    """The mesh axes that divide the layer.

    mesh: the one over whose axes `manual` the shard_map is opened.
    tokens: those of each axis of x before the last.
    experts, width: those of E and F.
    stored: those of each axis of each of the experts' arrays.
    """

    mesh: Any
    manual: Names
    tokens: tuple[Names, ...]
    experts: Names
    width: Names
    stored: tuple[tuple[Names, ...], ...]

    @property
    def of_tokens(self) -> Names:
        return tuple(name for names in self.tokens for name in names)


def division_of(op: str, sharding: MoESharding | None, x: jax.Array, routing: Any, experts: Experts) -> Division | None:
    """How to divide the layer: as `sharding` says, or else as the types in an Explicit mesh say. None: not at all."""
    if sharding is not None:
        return _by_argument(op, sharding, x, experts)
    meshes = [jax.typeof(a).sharding.mesh for a in jax.tree.leaves((x, routing, experts.arrays))]
    meshes.append(jax.sharding.get_abstract_mesh())  # for arrays that were not put on it
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None:
        return None
    own = [names_of_array(a) for a in experts.arrays]

    def first(letters: str) -> Names:
        """The names of the first of the experts' axes of these letters that is divided."""
        found = zip(itertools.chain(*own), "".join(experts.axes), strict=True)
        return next((names for names, letter in found if names and letter in letters), ())

    return _division(
        mesh, explicit_axes(mesh), names_of(jax.typeof(x).sharding.spec)[:-1], first("E"), first("FG"), own, experts
    )


def _by_argument(op: str, sharding: MoESharding, x: jax.Array, experts: Experts) -> Division:
    if not isinstance(sharding, MoESharding):
        raise TypeError(f"{op}: sharding must be a MoESharding; got {sharding!r}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(f"{op}: sharding needs a mesh around the call, as jax.set_mesh(mesh) makes it")
    tokens = (sharding.tokens,) if isinstance(sharding.tokens, str) else sharding.tokens or ()
    if len(tokens) > x.ndim - 1:
        raise ValueError(
            f"{op}: sharding.tokens must have an entry for each of the {x.ndim - 1} axes of x before the last; "
            f"got {sharding.tokens!r}"
        )
    tokens = names_of((*tokens, *[None] * (x.ndim - 1 - len(tokens))))
    by_letter = dict(zip("EFH", names_of(sharding[1:]), strict=True))
    named = [name for names in (*tokens, *by_letter.values()) for name in names]
    # Axes that divide nothing are manual too, because kernels run only where the compiler divides nothing.
    free = tuple([name for name in mesh.axis_names if name not in mesh.manual_axes])
    if unknown := [name for name in named if name not in free]:
        raise ValueError(f"{op}: sharding must name axes of the mesh, {', '.join(free)}; got {unknown[0]!r}")
    own = [
        tuple(by_letter["F" if a == "G" else a] if len(axes) == 3 or a != "H" else () for a in axes)
        for axes in experts.axes
    ]
    division = _division(mesh, free, tokens, by_letter["E"], by_letter["F"], own, experts)
    _check_sizes(op, division, x, experts)
    return division


def _division(
    mesh: Any, manual: Names, tokens: Any, of_experts: Names, width: Names, own: Any, experts: Experts
) -> Division:
    taken = {*of_experts, *[name for names in tokens for name in names]}
    width = tuple(name for name in width if name not in taken)
    stored = []
    for names, axes in zip(own, experts.axes, strict=True):
        spec: list[Names] = []
        for have, axis in zip(names, axes, strict=True):
            in_parts = tuple(n for n in have if n in taken and n not in of_experts) if len(axes) == 3 else ()
            spec.append(of_experts if axis == "E" else width if axis != "H" and width else in_parts)
        stored.append(tuple(spec))
    return Division(mesh, manual, tuple(tokens), of_experts, width, tuple(stored))


def divided_layer(
    division: Division, x: jax.Array, logits: Any, routed: Any, experts: Experts, settings: Settings, how: Exchange
) -> tuple[jax.Array, jax.Array]:
    """`local_layer` of arrays whose shardings may be any: they are brought to those of the division.

    Also returns how many pairs were dropped, on all devices together.
    """
    place = functools.partial(placed, mesh=division.mesh)
    entries = [names or None for names in division.tokens]
    tokens = PartitionSpec(*entries, None)
    each = zip(experts.names, experts.arrays, experts.axes, division.stored, strict=True)
    specs = [
        specs_of(settings.op, name, array, names, division.mesh, None if experts.interleaved else axes.find("G"))
        for name, array, axes, names in each
    ]
    arrays = jax.tree.map(lambda a, spec: place(a, spec=spec), list(experts.arrays), specs)

    def on_device(x: jax.Array, routing: Any, arrays: list[Any]) -> tuple[jax.Array, jax.Array]:
        logits, routed = routing
        return _on_device(division, settings, how, x, logits, routed, experts.of(_gathered(division, arrays)))

    if division.mesh.manual_axes:
        on_device = jax.checkpoint(on_device)  # else JAX cannot lower its gradient inside another shard_map
    elif any(_parts(division)):
        keep = jax.checkpoint_policies.save_anything_except_these_names(_GATHERED)
        on_device = jax.checkpoint(on_device, policy=keep)
    routing = jax.tree.map(lambda a: place(a, spec=tokens), (logits, routed))
    run = jax.shard_map(
        on_device,
        mesh=division.mesh,
        in_specs=(tokens, jax.tree.map(lambda a: tokens, routing), specs),
        out_specs=(tokens, PartitionSpec()),
        axis_names=set(division.manual),
    )
    out, dropped = run(place(x, spec=tokens), routing, arrays)
    return place(out, spec=jax.typeof(x).sharding.spec), dropped


def _on_device(
    division: Division, settings: Settings, how: Exchange, x: jax.Array, logits: Any, routed: Any, experts: Experts
) -> tuple[jax.Array, jax.Array]:
    """What this device adds to its tokens' results, summed over the devices that have the same tokens."""
    exchanged = tuple(name for name in division.experts if name in division.of_tokens)
    summed = (*[name for name in division.experts if name not in exchanged], *division.width)
    dropped = jnp.zeros((), jnp.int32)
    if division.width:
        experts = _of_this_width(experts, division.width)
    if exchanged == division.experts and exchanged:
        out, dropped = exchanged_layer(x, logits, routed, experts, settings, how, axis_name=exchanged)
        dropped = lax.psum(dropped, division.of_tokens)
    elif division.experts:
        routed = routing_of(logits, settings) if routed is None else routed
        out = gathered_layer(x, routed, experts, settings, axis_name=division.experts, gathered=exchanged)
    else:
        out = local_layer(x, logits, routed, experts, settings)
    out = lax.psum(out.astype(jnp.float32), summed).astype(x.dtype) if summed else out
    return out, dropped


def _of_this_width(experts: Experts, axes: Names) -> Experts:
    """The experts whose F is divided: gate and up are brought together, and one device alone adds the last bias."""
    arrays = [
        _halves_together(a, axes, letters.index("G")) if "G" in letters and not experts.interleaved else a
        for a, letters in _with_axes(experts)
    ]
    experts = experts.of(arrays)
    if experts.down_bias is None:
        return experts
    bias = jnp.where(lax.axis_index(axes) == 0, experts.down_bias, jnp.zeros_like(experts.down_bias))
    return experts._replace(down_bias=bias)


def _halves_together(array: Any, axes: Names, axis: int) -> jax.Array:
    """This device's columns of gate and of up, out of its part of the columns of both, gate's first.

    Of 2D blocks of columns this device, number d, has blocks 2d and 2d + 1. It needs block d of gate and block d of
    up, which is block D + d. So block b goes to device b modulo D, in two steps, each a permutation of the devices.
    """
    array = array.copy() if isinstance(array, LayerOf) else array
    return array if lax.axis_size(axes) == 1 else on_leaves(functools.partial(_exchanged_halves, axes), array, axis)


def _exchanged_halves(axes: Names, array: jax.Array, axis: int) -> jax.Array:
    devices, me = lax.axis_size(axes), lax.axis_index(axes)
    even, odd = jnp.split(array, 2, axis)
    # With an even D, the second half of the devices sends its odd block first: no two blocks of a step then meet.
    late = [devices % 2 == 0 and d >= devices // 2 for d in range(devices)]
    swap = jnp.asarray(late)[me]
    received = []
    for step, block in enumerate([jnp.where(swap, odd, even), jnp.where(swap, even, odd)]):
        to = [(2 * d + (1 - step if late[d] else step)) % devices for d in range(devices)]
        received.append(lax.ppermute(block, axes, list(enumerate(to))))
    # In the first step, devices of even numbers got their block of gate, and the others theirs of up.
    first_is_up = me % 2 == 1
    gate, up = (jnp.where(first_is_up, *pair) for pair in (received[::-1], received))
    return jnp.concatenate([gate, up], axis)


def _gathered(division: Division, arrays: list[Any]) -> list[Any]:
    """The arrays, of which those that are stored in parts are gathered."""

    def whole(array: Any, parts: Any) -> Any:
        if not parts:
            return array
        array = array.copy() if isinstance(array, LayerOf) else array
        for axis, names in parts:
            array = on_leaves(lambda x, axis, n=names: lax.all_gather(x, n, axis=axis, tiled=True), array, axis)
        return checkpoint_name(array, _GATHERED)

    return [whole(a, parts) for a, parts in zip(arrays, _parts(division), strict=True)]


def _parts(division: Division) -> list[list[tuple[int, Names]]]:
    """For each array the axes along which it is to be gathered, and over which mesh axes."""
    divided = ((), division.experts, division.width)
    return [[(axis, n) for axis, n in enumerate(names) if n not in divided] for names in division.stored]


def _check_sizes(op: str, division: Division, x: jax.Array, experts: Experts) -> None:
    """Refuse sizes that the mesh axes do not divide."""
    sizes = dict(zip(experts.axes[len(experts.gate_up)], experts.down.shape, strict=True))
    named = [(f"axis {i} of x", x.shape[i], names, _DECODE) for i, names in enumerate(division.tokens)]
    named += [("E", sizes["E"], division.experts, ""), ("F", sizes["F"], division.width, "")]
    hidden = next((names[axes.index("H")] for axes, names in zip(experts.axes, division.stored, strict=True)), ())
    named += [("H", sizes["H"], hidden, "")]
    for what, size, names, instead in named:
        devices = math.prod(division.mesh.shape[name] for name in names)
        if size % devices:
            axes = " and ".join(map(repr, names))
            raise ValueError(f"{op}: {what} has {size} entries, which {axes} of size {devices} cannot divide{instead}")


_DECODE = "; leave these axes out of sharding.tokens, and each device has all tokens"


def _with_axes(experts: Experts) -> Any:
    return zip(experts.arrays, experts.axes, strict=True)
