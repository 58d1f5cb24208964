"""`ragged_dot`: the grouped product of rows that already stand by group, as `jax.lax.ragged_dot` takes them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from ..core.primitive import define
from ..core.settings import as_bool, one_of
from ..core.sharding import explicit_axes, names_of, placed, spec_of
from ..core.signature import checked
from ..core.stored import names_of_array, specs_of
from ..kernels import IMPLEMENTATIONS
from .grouped import as_activations, as_dtype, as_precision
from .grouped_ops import Matrices, product
from .table_sizes import aligned_rows, usual_block_size

_OP = "ragged_dot"  # the name in errors


def ragged_dot(
    lhs: jax.Array,
    rhs: Matrices,
    group_sizes: jax.Array,
    *,
    group_offset: jax.Array | int | None = None,
    transpose_rhs: bool = False,
    preferred_element_type: Any = None,
    precision: str | lax.Precision | None = None,
    activations: str | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply each row by its group's matrix: `jax.lax.ragged_dot`, with an offset as in megablox' gmm.

    The first group_sizes[0] rows of lhs are group 0's, the next group_sizes[1] are group 1's, and so on. Rows past the
    last group are 0 in the result. With a `group_offset` o, rhs holds the matrices of groups o to o + G - 1 only: the
    rows of all other groups are 0 in the result.

    The work is that of the rows that have a matrix. Products are added in float32. Rows without a matrix and matrices
    of groups without rows are never read, in the result and in every gradient, so they may hold NaN. The gradients of
    both are 0. Every operand may be mapped by vmap, alone or with others.

    In an Explicit mesh the product runs in a `jax.shard_map` that it opens, as lhs and rhs are sharded. Along axes over
    M each device multiplies its own rows, of whichever groups they are. Along others over G, each device multiplies the
    rows of its own groups; along others over H, it multiplies its part of each row; in both cases the results are added
    up, for H in float32. Along others over N each device has its own columns. What an axis divides besides is gathered:
    the matrices where one axis divides them and the rows, and the sizes.

    Args:
      lhs: [..., M, H] float16, bfloat16 or float32, rows by group.
      rhs: [..., G, H, N] of lhs's dtype, G >= 1. A leading axis of size 1 is shared by the batch, not copied. Or a
        `LayerOf` of [G, H, N], which serves the whole batch. Or `QuantizedMatrices`, as in `grouped_matmul`.
      group_sizes: [..., G] of any integer dtype; with a `group_offset` [..., A], the sizes of all groups, A >= G. A
        negative size counts as 0. Sizes that add up to more than M are cut off at M.
      group_offset: [...] of any integer dtype, without leading axes a scalar. It may be out of range: there are no
        groups before the first and after the last. None: rhs holds all groups.
      transpose_rhs: rhs is [..., G, N, H], and each row is multiplied by the transposed matrix.
      preferred_element_type: the result's dtype, float16, bfloat16 or float32; default: lhs's.
      precision: of float32 operands, in this product and its gradients, as in `grouped_matmul`.
      activations: as in `grouped_matmul`. Where an Explicit mesh divides H, a device rounds its part of each row.
      implementation: None (see `which`), "xla", "triton" or "pallas", of the product and of the table that it reads;
        with "pallas", which has no kernel of tables, the table is made as with None.

    Returns:
      [..., M, N]. Rows without a matrix are 0.

    Raises:
      TypeError: an argument of another dtype, a `transpose_rhs` that is no bool.
      ValueError: ranks or shapes that do not fit, no groups, sizes of fewer groups than rhs holds, or without an offset
        of more, M past int32, an unknown `precision`, `activations` or `implementation`, `activations` without "fp8"
        matrices, quantised matrices whose blocks an Explicit mesh would cut.
      NotImplementedError: the implementation asked for cannot run here; the message says why.

    The offset is that of https://github.com/jax-ml/jax, jax/experimental/pallas/ops/tpu/megablox.

    >>> import jax.numpy as jnp
    >>> x, w = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[[10.0]], [[20.0]]])
    >>> ragged_dot(x, w, jnp.array([2, 1])).tolist()
    [[10.0], [20.0], [60.0]]
    >>> ragged_dot(x, w, jnp.array([1, 1, 1]), group_offset=1).tolist()
    [[0.0], [20.0], [60.0]]
    """
    one_of(_OP, "implementation", implementation, (None, *IMPLEMENTATIONS))
    transposed = as_bool(_OP, "transpose_rhs", transpose_rhs)
    matrices, groups = "G,N,H" if transposed else "G,H,N", "G" if group_offset is None else "A"
    arguments = f"lhs: rows[M,H], rhs: matrices[{matrices}], group_sizes: counts[{groups}], group_offset?: counts[]"
    lhs, rhs, group_sizes, offset = checked(_OP, arguments, lhs, rhs, group_sizes, group_offset)
    held = rhs.shape[-3]
    if not held:
        raise ValueError(f"{_OP}: rhs must hold at least one group, G >= 1; got shape {rhs.shape}")
    if group_sizes.shape[-1] < held:
        raise ValueError(
            f"{_OP}: group_sizes must have the sizes of all groups, at least the {held} of rhs; "
            f"got shape {group_sizes.shape}"
        )
    run = functools.partial(
        _product,
        transpose_rhs=transposed,
        dtype=as_dtype(_OP, preferred_element_type, lhs.dtype),
        precision=as_precision(_OP, precision, lhs.dtype),
        activations=as_activations(_OP, activations, rhs),
        implementation=implementation,
    )
    if offset is None:
        offset = jnp.zeros((1,) * (lhs.ndim - 2), jnp.int32)
    division = _division_of(lhs, rhs, transposed)
    if division is not None:
        return _on_shards(division, run, lhs, rhs, group_sizes, offset)
    return run(lhs, rhs, group_sizes, offset)


def _product(
    lhs: jax.Array,
    rhs: Matrices,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    *,
    implementation: str | None,
    **settings: Any,
) -> jax.Array:
    num_rows = lhs.shape[-2]
    tables = align_groups.bind(
        group_sizes,
        group_offset,
        num_rows=num_rows,
        num_groups=rhs.shape[-3],
        block_size=usual_block_size(num_rows, group_sizes.shape[-1]),
        implementation=None if implementation == "pallas" else implementation,
    )
    settings |= {"top_k": 1, "activation": None, "packed_rows": True, "implementation": implementation}
    return product(lhs, rhs, *tables, **settings)


class _Division(NamedTuple):
    """The mesh; its axes over which the shard_map is opened; those that divide rows, groups, H and columns."""

    mesh: Any
    manual: tuple[str, ...]
    rows: tuple[str, ...]
    groups: tuple[str, ...]
    contracted: tuple[str, ...]
    columns: tuple[str, ...]
    transposed: bool

    def of_matrices(self) -> tuple[tuple[str, ...], ...]:
        of_matrix = (self.columns, self.contracted) if self.transposed else (self.contracted, self.columns)
        return self.groups, *of_matrix


def _division_of(lhs: jax.Array, rhs: Matrices, transposed: bool) -> _Division | None:
    """How the types of both in an Explicit mesh divide the product; None: not at all."""
    (*lead, rows, of_lhs), (*others, groups, h, n) = names_of_array(lhs), names_of_array(rhs)
    h, n = (n, h) if transposed else (h, n)
    of_batch = {name for names in (*lead, *others) for name in names}
    taken = set(of_batch)

    def free(names: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple([name for name in names if name not in taken])
        taken.update(names)
        return names

    rows = free(rows)
    divided = rows, free(groups), free(of_lhs) or free(h), free(n)
    if not any(divided):
        return None
    meshes = [jax.typeof(a).sharding.mesh for a in jax.tree.leaves((lhs, rhs))]
    mesh = next(mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types)
    # Axes that divide nothing are manual too, because kernels run only where the compiler divides nothing.
    manual = tuple([name for name in explicit_axes(mesh) if name not in of_batch])
    return _Division(mesh, manual, *divided, transposed)


def _on_shards(division: _Division, run: Any, lhs: jax.Array, rhs: Matrices, *groups: Any) -> jax.Array:
    """`run` on each shard, with its rows' overlap with each of its groups."""
    mesh, axes, rows, of_groups, contracted, columns, _ = division
    all_rows, all_groups, dtype = lhs.shape[-2], rhs.shape[-3], run.keywords["dtype"]
    if contracted:
        run = functools.partial(run, dtype="float32")

    def on_shard(lhs: jax.Array, rhs: Matrices, group_sizes: jax.Array, group_offset: jax.Array) -> jax.Array:
        if rows:
            offsets = _group_offsets(group_sizes, all_rows) - lax.axis_index(rows) * lhs.shape[-2]
            group_sizes = jnp.diff(jnp.clip(offsets, 0, lhs.shape[-2]))
        if of_groups:  # the offset is clipped, so that nothing overflows
            own = lax.axis_index(of_groups) * rhs.shape[-3]
            group_offset = jnp.clip(group_offset, -all_groups, group_sizes.shape[-1]) + own
        out = run(lhs, rhs, group_sizes, group_offset)
        return lax.psum(out, (*of_groups, *contracted)).astype(dtype) if of_groups or contracted else out

    def spec(array: Any, *own: tuple[str, ...]) -> PartitionSpec:
        """That of an array whose last axes are divided so. Its leading axes keep what divides them."""
        return spec_of((*names_of(jax.typeof(array).sharding.spec)[: array.ndim - len(own)], *own))

    def manual(spec: PartitionSpec) -> PartitionSpec:
        return spec_of([[n for n in names if n in axes] for names in names_of(spec)])

    of_rhs = division.of_matrices()
    of_rhs = *names_of_array(rhs)[: rhs.ndim - 3], *of_rhs
    specs = [spec(lhs, rows, contracted), specs_of(_OP, "rhs", rhs, of_rhs, mesh)]
    specs += [spec(x, *[()] * min(x.ndim, 1)) for x in groups]
    args = jax.tree.map(lambda x, spec: placed(x, mesh, spec), [lhs, rhs, *groups], specs)
    on_shards = jax.shard_map(
        jax.checkpoint(on_shard),  # else JAX cannot lower its gradient inside another shard_map
        mesh=mesh,
        in_specs=tuple(jax.tree.map(manual, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))),
        out_specs=spec_of((*[()] * (lhs.ndim - 2), rows, columns)),
        axis_names=set(axes),
    )
    return on_shards(*args)


def _group_offsets(group_sizes: jax.Array, num_rows: int) -> jax.Array:
    """Where each group's rows begin in [0, num_rows], and where the last ones end: [..., G] -> [..., G+1]."""
    sizes = jnp.clip(group_sizes, 0, num_rows).astype(jnp.uint32)
    # Sums past 2^32 wrap. They come after a sum past num_rows, which the maximum keeps.
    ends = lax.cummax(lax.cumsum(sizes, sizes.ndim - 1), sizes.ndim - 1)
    ends = jnp.minimum(ends, num_rows).astype(jnp.int32)
    return jnp.concatenate([jnp.zeros_like(ends[..., :1]), ends], axis=-1)


def _groups_meaning(
    group_sizes: jax.Array, group_offset: jax.Array, *, num_rows: int, num_groups: int, block_size: int
) -> tuple[jax.Array, ...]:
    # The offset is clipped before it is added to, so that nothing overflows.
    first = jnp.clip(group_offset, -num_groups, group_sizes.size)
    held = jnp.clip(first + jnp.arange(num_groups + 1, dtype=jnp.int32), 0, group_sizes.size)
    offsets = _group_offsets(group_sizes, num_rows).at[held].get(mode="promise_in_bounds")
    counts = jnp.diff(offsets)
    blocks = -(-counts // block_size)
    end = lax.cumsum(blocks)
    block = jnp.arange(aligned_rows(num_rows, num_groups, block_size) // block_size, dtype=jnp.int32)
    # A block's owner is the number of groups whose blocks end at or before it.
    owner = lax.cumsum(jnp.zeros(block.size + 1, jnp.int32).at[end].add(1))[:-1]
    live = block < end[-1]
    first = (end - blocks).at[owner].get(mode="clip")
    position = ((block - first) * block_size)[:, None] + jnp.arange(block_size, dtype=jnp.int32)[None]
    row = offsets.at[owner].get(mode="clip")[:, None] + position
    filled = live[:, None] & (position < counts.at[owner].get(mode="clip")[:, None])
    slots = jnp.where(filled, row, num_rows).reshape(-1)
    return slots, jnp.where(live, owner, -1), end[-1] * block_size


def _group_table_sizes(sizes: dict[str, int], num_rows: int, num_groups: int, block_size: int) -> dict[str, int]:
    slots = aligned_rows(num_rows, num_groups, block_size)
    return {"S": slots, "B": slots // block_size}


# The block-aligned table of rows that stand by group, for `num_groups` groups from `group_offset` on. Slots hold these
# groups' rows, and `num_rows` in padding. A block's expert is its group, counted from the offset.
align_groups = define(
    "align_groups",
    "group_sizes: counts[G], group_offset: counts[] -> ids[S], ids[B], ids[]",
    _groups_meaning,
    sizes=_group_table_sizes,
)
