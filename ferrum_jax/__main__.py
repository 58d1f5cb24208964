"""`python -m ferrum_jax`: what is installed, what would run here, and one Mixture-of-Experts layer, timed and checked.

The layer is `moe_mlp` in both data flows: rows packed by expert, added back with `moe_combine`; and rows in pair order,
added back with `weighted_sum_batched`. Beside it stands the same layer through `jax.lax.ragged_dot`. All results are
compared with NumPy in float64. `python -m ferrum_jax grouped` times `grouped_matmul` against `ragged_dot` alone,
`python -m ferrum_jax bench` the main ops against what one would write in JAX today, and `python -m ferrum_jax parallel
--devices N` spreads the layer's experts over N devices.
"""

import argparse
import collections
import functools
import os
import platform
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Ops are called through the package, so that what is checked is what a user's import finds.
import ferrum_jax
from ferrum_jax import bench
from ferrum_jax.bench import products, text, today
from ferrum_jax.bench.exact import Ran, checks, print_checks
from ferrum_jax.bench.report import print_table, version
from ferrum_jax.bench.timing import timed


class Layer(NamedTuple):
    name: str
    num_experts: int
    top_k: int
    hidden: int
    expert_width: int
    tokens: int
    block_size: int
    dtype: Any


QWEN3_30B = Layer("the shape of Qwen3-30B-A3B", 128, 8, 2048, 768, 4096, 128, jnp.bfloat16)
SMALL = Layer("a small layer for a CPU", 32, 4, 256, 128, 512, 16, jnp.float32)
COMMANDS = ("info", "demo", "grouped", "parallel", "bench")


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m ferrum_jax",
        description="What would run here, does it work, and how fast is it?",
        epilog="bench has options of its own: python -m ferrum_jax bench --help",
    )
    parser.add_argument("command", nargs="?", choices=COMMANDS, help="one part; default: info, demo")
    parser.add_argument("--devices", type=int, help="for `parallel`; default: all there are, on a CPU 4")
    if argv[:1] == ["bench"]:
        return bench.main(argv[1:])
    args = parser.parse_args(argv)
    if args.command == "bench":
        parser.error("bench comes first, and then its own options")
    if args.command == "grouped":
        return products.main()
    if args.command == "parallel":
        return parallel(args.devices)
    layer = SMALL if jax.default_backend() == "cpu" else QWEN3_30B
    if args.command != "demo":
        info(layer)
    return 0 if args.command == "info" else demo(layer)


# ---- info


def info(layer: Layer) -> None:
    """Print versions, devices, and which implementation of each op would run on them."""
    own = [("python", platform.python_version()), ("ferrum_jax", ferrum_jax.__version__)]
    others = [(name, version(name) or "not installed") for name in ("jax", "jaxlib", "triton", "jax_triton")]
    devices = collections.Counter(d.device_kind for d in jax.devices())
    print_table("Here", own + others + [("devices", f"{number} x {kind}") for kind, number in devices.items()])
    rows: list[tuple[str, ...]] = [("op", "runs", "not", "because")]
    last = None
    for op, args in _calls(layer).items():
        found = list(_implementations(op, args))
        taken, why = found[0][1], [row[2:] for row in found]
        rows += [(op, taken, "as above", "")] if why == last else found
        last = why
    print_table(f"Implementations, for {layer.name}", rows)


def _calls(layer: Layer) -> dict[str, tuple[Any, ...]]:
    """Every op of the library, with arguments as the layer gives them.

    `moe_route_plan` gets only a few tokens: with many, it runs as two other ops.
    """
    _, e, k, h, f, t, block, dtype = layer
    x, rows, slots, w = (jax.ShapeDtypeStruct(s, dtype) for s in ((t, h), (t * k, h), (t, k, h), (e, h, 2 * f)))
    ids, index = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((t, k), (t * k,)))
    logits, few, weights = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((t, e), (16, e), (t, k)))
    return {
        "route_topk": (logits, k),
        "route_topk_softmax": (logits, k),
        "moe_build_pairs_by_token": (ids, e),
        "moe_align_block_size": (ids, e, block),
        "moe_align_block_size_pair_ids": (ids, e, block),
        "moe_plan": (ids, e, block),
        "moe_route_plan": (few, k, block),
        "moe_dispatch": (x, index),
        "moe_combine": (rows, ids, weights),
        "weighted_sum_batched": (slots, weights),
        "grouped_matmul": (rows, w, jax.eval_shape(lambda ids: ferrum_jax.moe_plan(ids, e, block), ids)),
    }


def _implementations(op: str, args: tuple[Any, ...]) -> Iterator[tuple[str, ...]]:
    """Lines of the table: the op, what it would run, what it would not, and why. Long reasons take several lines."""
    taken, passed_over = ferrum_jax.which(getattr(ferrum_jax, op), *args)
    for reason in dict.fromkeys(passed_over.values()):
        others = ", ".join(name for name in passed_over if passed_over[name] == reason)
        for line in textwrap.wrap(reason, 64):
            yield op, taken, others, line
            op = taken = others = ""


# ---- demo

FLOWS = {"packed rows": "packed", "pair ids": "pair_ids", "ragged_dot": None}
WHOLE = "the whole layer, one jit"


def demo(layer: Layer) -> int:
    """Run the layer in every flow, time it and check it; the exit status."""
    source, words = text.read()
    inputs = _inputs(layer, words)
    ran, times = zip(*(_run(layer, flow, inputs) for flow in FLOWS.values()), strict=True)
    _print_layer(layer, f"pairs of bytes of {source}, {len(words)} bytes", ran[0].routing.expert_ids)
    names = [name for name in times[0] | times[1] if name != WHOLE] + [WHOLE]
    cells = ((name, *(f"{t[name] * 1e3:11.3f}" if name in t else "" for t in times)) for name in names)
    header = ("step", *(f"{flow:>11}" for flow in FLOWS))
    print_table("Milliseconds a call, with its dispatch (compiled and warm; median of 9)", [header, *cells])
    return print_checks([check for flow, r in zip(FLOWS, ran, strict=True) for check in checks(flow, inputs, r)])


def _inputs(layer: Layer, words: bytes) -> tuple[jax.Array, ...]:
    """x[T, H], router[H, E], gate_up[E, H, 2F], down[E, F, H]."""
    _, e, _, h, f, t, _, dtype = layer
    shapes = (h, e), (e, h, 2 * f), (e, f, h)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    matrices = (jax.random.normal(k, s, dtype) / s[-2] ** 0.5 for k, s in zip(keys, shapes, strict=True))
    return jnp.asarray(text.embed(words, t, h), dtype), *matrices


def _print_layer(layer: Layer, tokens: str, ids: jax.Array, lines: int = 12) -> None:
    """Print what the layer is, and how many pairs each expert has: all experts, or the busiest and the idlest."""
    name, e, k, h, f, t, block, dtype = layer
    plan = ferrum_jax.moe_plan(ids, e, block)
    load, slots = np.diff(np.asarray(plan.expert_offsets)), int(plan.total_tokens_post_pad)
    facts = (
        ("shape", f"T={t} E={e} K={k} H={h} F={f}, blocks of {block}, {jnp.dtype(dtype).name}: {name}"),
        ("tokens", tokens),
        ("imbalance", f"{load.max() / load.mean():.2f} (pairs of the busiest expert / mean of all)"),
        ("unused", f"{np.sum(load == 0)} of {e} experts"),
        ("padding", f"{1 - load.sum() / slots:.1%} of the {slots} slots in live blocks"),
    )
    print_table("Layer", facts)
    shown, title = np.argsort(-load, kind="stable"), "Load: expert, its pairs"
    if e > 2 * lines:
        shown, title = [*shown[:lines], *shown[-lines:]], f"Load: the {lines} busiest and {lines} idlest experts"
    bars = [f"{e:4} {load[e]:6} {'#' * -(-32 * int(load[e]) // int(load.max())):<32}" for e in shown]
    print_table(title, zip(bars[: len(bars) // 2], bars[len(bars) // 2 :], strict=True))


def _run(layer: Layer, flow: str | None, inputs: tuple[jax.Array, ...]) -> tuple[Ran, dict[str, float]]:
    """What the layer gives under one jit, and the seconds of its steps and of the whole."""
    seconds: dict[str, float] = {}

    def call(name: str, function: Callable[..., Any], *args: Any) -> Any:
        result, seconds[name] = timed(function, *args)
        return result

    if flow:
        _steps(layer, flow == "packed", call, inputs)
    return call(WHOLE, functools.partial(_moe, layer, flow), inputs), seconds


def _moe(layer: Layer, flow: str | None, inputs: tuple[jax.Array, ...]) -> Ran:
    """The whole layer in one of the flows; None is the one through `ragged_dot`."""
    x, router, gate_up, down = inputs
    logits = _logits(x, router)
    if flow is None:
        routing = ferrum_jax.RouterOutput(*today.softmax_top_k(logits, layer.top_k))
        return Ran(logits, routing, today.ragged_layer(x, logits, gate_up, down, layer.top_k))
    routing = ferrum_jax.route_topk_softmax(logits, layer.top_k)
    out = ferrum_jax.moe_mlp(x, None, gate_up, down, router_output=routing, flow=flow, block_size=layer.block_size)
    return Ran(logits, routing, out)


def _steps(layer: Layer, packed: bool, call: Callable[..., Any], inputs: tuple[jax.Array, ...]) -> None:
    """The steps of `moe_mlp`, one by one. `call(name, function, *args)` runs a step."""
    x, router, gate_up, down = inputs
    logits = call("router product", _logits, x, router)
    route = functools.partial(ferrum_jax.route_topk_softmax, top_k=layer.top_k)
    ids, weights = call("route_topk_softmax", route, logits)
    make_plan = functools.partial(
        ferrum_jax.moe_plan, num_experts=layer.num_experts, block_size=layer.block_size, pair_ids=not packed
    )
    plan = call("moe_plan", make_plan, ids)
    rows = call("moe_dispatch", _dispatch, x, plan) if packed else x
    top_k = 1 if packed else layer.top_k
    first = functools.partial(ferrum_jax.grouped_matmul, top_k=top_k, activation="silu")
    rows = call("grouped_matmul, gate and up", first, rows, gate_up, plan)
    rows = call("grouped_matmul, down", ferrum_jax.grouped_matmul, rows, down, plan)
    if packed:
        combine = functools.partial(ferrum_jax.moe_combine, unique_rows=True)
        call("moe_combine", combine, rows, plan.pairs_by_token, weights)
    else:
        call("weighted_sum_batched", ferrum_jax.weighted_sum_batched, rows.reshape(*ids.shape, -1), weights)


def _logits(x: jax.Array, router: jax.Array) -> jax.Array:
    return jnp.matmul(x, router, preferred_element_type=jnp.float32)


def _dispatch(x: jax.Array, plan: ferrum_jax.MoePlan) -> jax.Array:
    return ferrum_jax.moe_dispatch(x, plan.packed_token_idx, pairs_by_token=plan.pairs_by_token)


# ---- the layer over several devices


def parallel(devices: int | None = None) -> int:
    """Run the layer with its experts spread over devices, by every exchange, time it and check it; the exit status."""
    any_number = _set_cpu_devices(devices)
    layer = QWEN3_30B if jax.default_backend() == "gpu" else SMALL
    devices = jax.device_count() if devices is None else devices
    most = layer.num_experts if any_number else jax.device_count()
    possible = [n for n in range(1, most + 1) if not (layer.num_experts % n or layer.tokens % n)]
    if devices not in possible:
        what = f"they divide {layer.num_experts} experts and {layer.tokens} tokens"
        print(f"--devices must be one of {', '.join(map(str, possible))}: {what}; got {devices}")
        return 2
    source, words = text.read()
    x, router, *matrices = inputs = _inputs(layer, words)
    logits = jax.jit(_logits)(x, router)
    routing = ferrum_jax.route_topk_softmax(logits, layer.top_k)
    _print_layer(layer, f"pairs of bytes of {source}, {len(words)} bytes", routing.expert_ids)
    out, seconds = timed(functools.partial(ferrum_jax.moe_mlp, top_k=layer.top_k), x, logits, *matrices)
    lines, ran = [("one device", f"{seconds * 1e3:.3f}", "")], {"one device": out}
    for name, capacity, out, dropped, seconds in _exchanged(layer, devices, (x, logits, *matrices)):
        lines.append((name, f"{seconds * 1e3:.3f}", str(dropped)))
        if capacity is None:  # with a capacity, pairs may be dropped, and the result is another
            ran[name] = out
    header = ("exchange", "milliseconds", "pairs dropped")
    title = f"On {devices} devices, {jax.devices()[0].device_kind} (compiled and warm; median of 9)"
    print_table(title, [header, *lines])
    return print_checks([checks(name, inputs, Ran(logits, routing, out))[-1] for name, out in ran.items()])


def _set_cpu_devices(devices: int | None) -> bool:
    """Give the CPU as many devices as are asked for. False where their number cannot be chosen."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return False
    try:
        wanted = 4 if devices is None else min(max(devices, 1), SMALL.num_experts)
        jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:  # JAX has started, with the devices that it has
        return False
    return jax.default_backend() == "cpu"


def _exchanged(layer: Layer, devices: int, args: tuple[jax.Array, ...]) -> Iterable[tuple[Any, ...]]:
    """The layer by every exchange, without a capacity and with an even share: its name, capacity, result, how many
    pairs were dropped, and the seconds."""
    spec, kind = jax.sharding.PartitionSpec("expert"), jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((devices,), ("expert",), axis_types=(kind,), devices=jax.devices()[:devices])
    placed = [jax.device_put(arg, jax.sharding.NamedSharding(mesh, spec)) for arg in args]
    even_share = layer.tokens * layer.top_k // devices

    def layer_by(exchange: str, capacity: int | None, *local: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, dropped = ferrum_jax.parallel.moe_mlp(
            *local,
            top_k=layer.top_k,
            axis_name="expert",
            exchange=exchange,
            capacity=capacity,
            return_dropped=True,
        )
        return out, dropped[None]

    for exchange in ferrum_jax.parallel.EXCHANGES:
        if exchange == "ragged" and jax.default_backend() != "gpu":
            continue  # XLA has this collective for GPUs only
        for capacity in (None,) if exchange == "gather" else (None, even_share):
            run = functools.partial(layer_by, exchange, capacity)
            (out, dropped), seconds = timed(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec), *placed)
            name = exchange if capacity is None else f"{exchange}, {capacity} rows a device"
            yield name, capacity, out, jnp.sum(dropped), seconds


if __name__ == "__main__":
    sys.exit(main())
