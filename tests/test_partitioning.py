"""Plain jit over sharded arrays: each device computes its shards, and nothing is gathered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPS, Size, finite_args, rng
from compiled import h200s, needs_pjrt, on_h200
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ferrum_jax

SIZE = Size(8, 8, 4, 16)
BY_NAME = {op.name: op for op in OPS}
T, H, HEAD, NONE = P("d"), P(None, "d"), P(None, None, "d"), P()

# op, whether under vmap, the operands' specs, and the collectives of its values and of its gradients
CASES = [
    ("route_topk_softmax", False, (T,), [], []),
    ("route_topk_softmax", True, (T,), [], []),
    ("moe_combine", False, (NONE, T, T), [], None),  # whose gradient to the rows needs every token
    ("moe_combine", False, (H, NONE, NONE), [], ["all-reduce"]),
    ("moe_combine", True, (T, T, T), [], []),
    ("moe_combine-repeated", True, (HEAD, NONE, NONE), [], ["all-reduce"]),
    ("moe_dispatch-pairs", False, (H, NONE, NONE), [], []),
    ("moe_dispatch", True, (T, T), [], []),
    ("weighted_sum_batched", False, (T, T), [], []),
    ("weighted_sum_batched", False, (HEAD, NONE), [], ["all-reduce"]),
    ("grouped_matmul", True, (T, NONE, T, T, T), [], ["all-reduce"]),
    ("grouped_matmul", False, (NONE, HEAD, NONE, NONE, NONE), [], ["all-reduce"]),
    ("grouped_matmul-pair_ids", False, (H, H, NONE, NONE, NONE), ["all-reduce"], []),
    ("moe_plan", True, (T,), [], None),
]


def collectives(f, *args):
    program = jax.jit(f).lower(*args).compile().as_text()
    names = "all-gather|all-to-all|reduce-scatter|all-reduce|collective-permute"
    return re.findall(rf"= .*? ({names})(?:-start)?\(", program)


def mesh_of(devices, kind=AxisType.Auto):
    return jax.make_mesh((devices,), ("d",), axis_types=(kind,))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
@pytest.mark.parametrize(("name", "mapped", "specs", "collected", "by_gradient"), CASES)
def test_shards_are_computed_where_they_are(name, mapped, specs, collected, by_gradient, kind):
    op, mesh = BY_NAME[name], mesh_of(4, kind)
    slices = [finite_args(op, rng(name, i), SIZE) for i in range(4 if mapped else 1)]
    args = list(slices[0])
    if name.startswith("grouped"):
        args[1] = np.ascontiguousarray(np.pad(args[1], ((0, 0), (0, 0), (0, -args[1].shape[2] % 4))))
    if mapped:
        args = [np.stack([s[i] for s in slices]) for i in range(len(args))]
    shared = [1] if name == "grouped_matmul" and mapped else []
    args = [a[0] if i in shared else a for i, a in enumerate(args)]

    def f(*args):
        run = functools.partial(op.results, size=SIZE)
        return jax.vmap(run, [None if i in shared else 0 for i in range(len(args))])(*args) if mapped else run(*args)

    def loss(*args):
        (out,) = (r for r in f(*args) if jnp.issubdtype(r.dtype, jnp.floating))
        return jnp.sum(jnp.sin(out))

    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, specs, strict=True)]
    for g, w in zip(jax.jit(f)(*placed), f(*args), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
    assert collectives(f, *placed) == collected
    if by_gradient is not None:
        gradient = jax.grad(loss, op.floats)
        for g, w in zip(jax.jit(gradient)(*placed), gradient(*args), strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
        assert [c for c in collectives(gradient, *placed) if c != "all-reduce"] == []
