"""What the ops return: named results, which pass through every transformation of JAX and through jax.export."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Self

import jax
from jax import export

PACKED, PAIR_IDS = KINDS = "packed", "pair_ids"


class RouterOutput(NamedTuple):
    """expert_ids[..., K] int32, best first; expert_weights[..., K] float32."""

    expert_ids: jax.Array
    expert_weights: jax.Array


class _Table:
    """What the tables share: a pytree whose leaves are arrays, and whose static part are facts about them.

    A fact that is None is not known, and not checked. Making a table checks nothing: JAX also makes tables of other
    objects than arrays.
    """

    facts: ClassVar[tuple[str, ...]]

    def __iter__(self) -> Iterator[Any]:
        """The arrays, in the order of the fields."""
        return iter([getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.facts])  # type: ignore[arg-type]

    def untyped(self) -> Self:
        """The same arrays without the facts: what `jax.lax.cond` and a loop's carry need for tables of two origins."""
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


def _register(table: type[_Table]) -> None:
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
export.register_namedtuple_serialization(RouterOutput, serialized_name="ferrum_jax.RouterOutput")
