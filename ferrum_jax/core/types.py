"""What the ops return, named results, and `LayerOf`. They pass through JAX's transformations and through jax.export."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import export

from .quantized import QuantizedMatrices, is_qarray

PACKED, PAIR_IDS = "packed", "pair_ids"  # the kinds of block-aligned tables: what a live slot holds


class RouterOutput(NamedTuple):
    """expert_ids[..., K] int32, best first; expert_weights[..., K] float32."""

    expert_ids: jax.Array
    expert_weights: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class LayerOf:
    """One layer's matrices or biases, read in place out of the stack of all layers, without a copy.

    `moe_mlp`, `grouped_matmul`, `ragged_dot`, `parallel.moe_mlp` and `nnx.MoE` take it where matrices or biases go. Its
    values are those of stack[layer].

    stack: [L, E, H, N], the matrices of L layers, an array or `QuantizedMatrices`; of biases [L, E, N].
    layer: an int, or an int32 scalar that may be traced. Outside [0, L) it is clamped.
    own: [E, H, N], stack[layer] itself, as `jax.lax.scan` hands it to its body. Its values are never read, except those
        of biases, which are small. The gradient goes to it, and the stack is a constant. Without it the gradient goes
        to the stack, and each layer's gradient is an array of the stack's size.

    >>> import jax, jax.numpy as jnp, ferrum_jax
    >>> stacks = jnp.ones((6, 3, 4, 12)), jnp.ones((6, 3, 6, 4))  # six layers
    >>> @jax.jit
    ... def model(x, logits, stacks):
    ...     def block(x, inputs):
    ...         layer, own = inputs
    ...         matrices = [ferrum_jax.LayerOf(stack, layer, a) for stack, a in zip(stacks, own)]
    ...         return x + ferrum_jax.moe_mlp(x, logits, *matrices, top_k=2), None
    ...     return jax.lax.scan(block, x, (jnp.arange(6), stacks))[0]
    >>> model(jnp.ones((5, 4)), jnp.ones((5, 3)), stacks).shape
    (5, 4)
    """

    stack: Any
    layer: Any
    own: Any = None

    facts: ClassVar[tuple[str, ...]] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one layer's array."""
        return (self.stack.shape if is_quantized(self.stack) else jnp.shape(self.stack))[1:]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.stack.dtype

    def astype(self, dtype: Any) -> Any:
        """Itself, if it has this dtype or is quantised; else a copy of the layer's array, cast."""
        if isinstance(self.stack, QuantizedMatrices):
            return dataclasses.replace(self, stack=self.stack.astype(dtype), own=None)
        return self if self.dtype == dtype else self.copy().astype(dtype)

    def copy(self) -> Any:
        """One layer's array or quantised matrices: `own` if it is given, else a copy out of the stack."""
        if self.own is not None:
            return self.own
        layer = jnp.clip(self.layer, 0, self.stack.shape[0] - 1)
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), self.stack)


def is_quantized(matrices: Any) -> bool:
    """Whether these matrices, or the stack that they are a layer of, are quantised."""
    stored = matrices.stack if isinstance(matrices, LayerOf) else matrices
    return isinstance(stored, QuantizedMatrices) or is_qarray(stored)


Axes = str | tuple[str, ...] | None


class MoESharding(NamedTuple):
    """Which mesh axes divide a layer, for `moe_mlp` in a mesh of Auto axes, where arrays' types do not say it.

    Each is a mesh axis, several, or None. Along axes that are not named all devices compute the same.

    tokens: as in a PartitionSpec, an entry for each axis of x before the last; a bare name stands for the first one's.
    experts: E of the matrices. An axis that divides tokens too exchanges tokens; with one that does not, each device
        computes its own experts for its tokens, and results are added up.
    width: F of the matrices, with one sum over the axis for each call.
    hidden: H of the matrices, which are gathered before they are used, and whose gradients are scattered.

    >>> import jax, jax.numpy as jnp, ferrum_jax
    >>> sharding = ferrum_jax.MoESharding(tokens="data", experts="data", width="model")
    >>> with jax.set_mesh(jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)):
    ...     args = jnp.ones((5, 4)), jnp.ones((5, 3)), jnp.ones((3, 4, 12)), jnp.ones((3, 6, 4))
    ...     jax.jit(lambda *args: ferrum_jax.moe_mlp(*args, top_k=2, sharding=sharding))(*args).shape
    (5, 4)
    """

    tokens: Axes | tuple[Axes, ...] = None
    experts: Axes = None
    width: Axes = None
    hidden: Axes = None


class _Table:
    """What all tables share. A table is a pytree: its arrays are the leaves, the facts about them are static.

    A fact that is None is unknown, and nobody checks it. Making a table checks nothing, because JAX also makes tables
    of objects that stand for arrays.
    """

    facts: ClassVar[tuple[str, ...]]

    def __iter__(self) -> Iterator[Any]:
        """The arrays, in the order of the fields."""
        return iter([getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.facts])  # type: ignore[arg-type]

    def untyped(self) -> Self:
        """The same arrays without the facts, for `jax.lax.cond` and loop carries, where tables' facts may differ."""
        return type(self)(*self)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenPairs(_Table):
    """pairs_by_token[..., T, K], packed_token_idx[..., P], expert_offsets[..., E+1], all int32.

    num_experts: E; top_k: K. Unpacks into the arrays.
    """

    pairs_by_token: jax.Array
    packed_token_idx: jax.Array
    expert_offsets: jax.Array
    num_experts: int | None = None
    top_k: int | None = None
    facts = "num_experts", "top_k"


@dataclasses.dataclass(frozen=True, eq=False)
class MoeRouting(_Table):
    """sorted_token_ids[..., S], block_ids[..., S/block_size], total_tokens_post_pad[...], all int32.

    kind: what live slots hold, "packed" rows or "pair_ids"; num_experts: E; top_k: K; block_size: slots in a block.
    Unpacks into the arrays. MoeRouting(sorted_token_ids, block_ids, total_tokens_post_pad) takes tables made elsewhere.
    """

    sorted_token_ids: jax.Array
    block_ids: jax.Array
    total_tokens_post_pad: jax.Array
    kind: str | None = None
    num_experts: int | None = None
    top_k: int | None = None
    block_size: int | None = None
    facts = "kind", "num_experts", "top_k", "block_size"


@dataclasses.dataclass(frozen=True, eq=False)
class MoePlan(_Table):
    """The arrays of TokenPairs, then those of MoeRouting, and the facts of MoeRouting. Unpacks into the arrays."""

    pairs_by_token: jax.Array
    packed_token_idx: jax.Array
    expert_offsets: jax.Array
    sorted_token_ids: jax.Array
    block_ids: jax.Array
    total_tokens_post_pad: jax.Array
    kind: str | None = None
    num_experts: int | None = None
    top_k: int | None = None
    block_size: int | None = None
    facts = "kind", "num_experts", "top_k", "block_size"

    @property
    def routing(self) -> MoeRouting:
        """The block-aligned tables alone."""
        facts = {name: getattr(self, name) for name in self.facts}
        return MoeRouting(self.sorted_token_ids, self.block_ids, self.total_tokens_post_pad, **facts)


def _register(table: Any) -> None:
    arrays = [f.name for f in dataclasses.fields(table) if f.name not in table.facts]  # type: ignore[arg-type]
    jax.tree_util.register_dataclass(table, arrays, table.facts)
    export.register_pytree_node_serialization(
        table,
        serialized_name=f"ferrum_jax.{table.__name__}",
        serialize_auxdata=lambda facts: json.dumps(facts).encode(),
        deserialize_auxdata=lambda data: tuple(json.loads(data)),
    )


_register(TokenPairs)
_register(MoeRouting)
_register(MoePlan)
_register(LayerOf)
export.register_namedtuple_serialization(RouterOutput, serialized_name="ferrum_jax.RouterOutput")
