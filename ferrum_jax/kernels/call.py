"""What is known of one call of an op when its kernel is chosen."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .targets import HOPPER


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an op.

    operands: abstract values by the signature's operand names; None for an operand that is left out.
    sizes: sizes by the signature's axis letters, and the broadcast leading axes, a tuple, under "...".
    params: the op's static parameters, without `implementation`.
    devices: over how many devices the compiler divides the program. Inside shard_map it is 1.
    made_of_ops: the op can also run as several other ops.
    capability: the compute capability that is compiled for, 90 for 9.0.
    """

    op: str
    operands: Mapping[str, Any]
    sizes: Mapping[str, Any]
    params: Mapping[str, Any]
    devices: int = 1
    made_of_ops: bool = False
    capability: int = HOPPER

    @property
    def given(self) -> list[Any]:
        """The operands that are not left out, in the signature's order."""
        return [x for x in self.operands.values() if x is not None]

    @property
    def symbolic(self) -> bool:
        """Whether a size or a parameter is a symbol of `jax.export`, so that it is not known as a number."""
        from jax import export

        return any(map(export.is_symbolic_dim, (*(n for x in self.given for n in x.shape), *self.params.values())))
