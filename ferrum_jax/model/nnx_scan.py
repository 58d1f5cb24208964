"""A scan over stacked Flax NNX blocks that leaves their experts' matrices where they are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..core.types import LayerOf
from .nnx import MoE

_IN_PLACE = ("w_gate_up", "w_gate", "w_up", "w_down", "b_gate_up", "b_gate", "b_up", "b_down")


def scan_layers(body: Callable[[Any, Any], tuple[Any, Any]], blocks: Any, x: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` over the layers of stacked blocks: each `MoE` reads its matrices in place out of the stack.

    Under plain `nnx.scan` a module sees only its layer's slice, which XLA may have to copy for the kernels. Here every
    `MoE` in a block gets a `LayerOf`, and gradients go where they would go without it.

    Args:
      body: (block, x) -> (x, y), called with one layer's block.
      blocks: a module whose variables all have a leading axis of L layers, as `nnx.vmap` makes it.
      x: what goes from layer to layer, any pytree of arrays.

    Returns:
      (x, ys): what the last layer returned, and the ys of all layers along a new first axis. Variables that the body
      changes, such as the counts of `nnx.Rngs`, are changed in `blocks`.

    Raises:
      ValueError: blocks without variables.

    The body may be wrapped in `nnx.remat`. A layer whose `dtype` is not that of its parameters has them cast, which
    copies them.

    >>> import functools
    >>> make = nnx.vmap(lambda key: MoE(16, 4, num_experts=6, top_k=2, rngs=nnx.Rngs(key)))
    >>> blocks = make(jax.random.split(jax.random.key(0), 5))  # five layers
    >>> scan_layers(lambda moe, x: (x + moe(x), None), blocks, jnp.ones((3, 16)))[0].shape
    (3, 16)
    """
    graph, state = nnx.split(blocks)
    leaves = jax.tree.leaves(state)
    if not leaves:
        raise ValueError("scan_layers: blocks must have variables; got none")
    stacks = {path: moe for path, moe in nnx.iter_modules(blocks) if isinstance(moe, MoE)}

    def step(x: Any, inputs: Any) -> Any:
        layer, own = inputs
        before = jax.tree.leaves(own)
        block = nnx.merge(graph, own)
        parameters = [
            (own_parameter, getattr(stacks[path], name))
            for path, moe in nnx.iter_modules(block)
            for name in (_IN_PLACE if isinstance(moe, MoE) else ())
            if (own_parameter := getattr(moe, name)) is not None
        ]
        for parameter, stack in parameters:
            parameter.set_value(LayerOf(stack.get_value(), layer, parameter.get_value()))
        x, y = body(block, x)
        for parameter, _ in parameters:
            parameter.set_value(parameter.get_value().own)
        after = jax.tree.leaves(nnx.state(block))
        changed = [None if new is old else new for old, new in zip(before, after, strict=True)]
        return x, (y, changed)

    x, (ys, changed) = jax.lax.scan(step, x, (jnp.arange(leaves[0].shape[0]), state))
    new = [old if value is None else value for old, value in zip(leaves, changed, strict=True)]
    if any([value is not None for value in changed]):
        nnx.update(blocks, jax.tree.unflatten(jax.tree.structure(state), new))
    return x, ys
