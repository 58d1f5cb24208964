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
import importlib.metadata
import importlib.resources
import os
import platform
import statistics
import sys
import textwrap
import timeit
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Ops are called through the package, so that what is checked is what a user's import finds.
import ferrum_jax
from ferrum_jax import bench
from ferrum_jax.bench import report, today


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
FLOWS = {"packed rows": "packed", "pair ids": "pair_ids", "ragged_dot": None}


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
    command, devices = vars(parser.parse_args(argv)).values()
    if command == "bench":
        parser.error("bench comes first, and then its own options")
    if command == "grouped":
        return grouped()
    if command == "parallel":
        return parallel(devices)
    layer = SMALL if jax.default_backend() == "cpu" else QWEN3_30B
    if command != "demo":
        info(layer)
    return 0 if command == "info" else demo(layer)


def _table(title: str, rows: Iterable[Sequence[str]]) -> None:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(title)
    for row in rows:
        print(("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip())
    print()


# ---- info


def info(layer: Layer) -> None:
    """Print versions, devices, and which implementation of each op would run on them."""
    own = [("python", platform.python_version()), ("ferrum_jax", ferrum_jax.__version__)]
    others = [(name, report.version(name) or "not installed") for name in ("jax", "jaxlib", "triton", "jax_triton")]
    devices = collections.Counter(d.device_kind for d in jax.devices())
    _table("Here", own + others + [("devices", f"{number} x {kind}") for kind, number in devices.items()])
    rows: list[tuple[str, ...]] = [("op", "runs", "not", "because")]
    last = None
    for op, args in _calls(layer).items():
        (_, taken, *_), *_ = found = list(_which(op, args))
        why = [row[2:] for row in found]
        rows += [(op, taken, "as above", "")] if why == last else found
        last = why
    _table(f"Implementations, for {layer.name}", rows)


def _calls(layer: Layer) -> dict[str, tuple[Any, ...]]:
    """Every op of the library, with arguments as the layer gives them; few tokens where many take two ops."""
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


def _which(op: str, args: tuple[Any, ...]) -> Iterable[tuple[str, ...]]:
    taken, passed_over = ferrum_jax.which(getattr(ferrum_jax, op), *args)
    for reason in dict.fromkeys(passed_over.values()):
        others = ", ".join(name for name in passed_over if passed_over[name] == reason)
        for line in textwrap.wrap(reason, 64):
            yield op, taken, others, line
            op = taken = others = ""


# ---- demo


def demo(layer: Layer) -> int:
    """Run the layer in both flows, time it and check it; the exit status."""
    source, text = _text()
    inputs = _inputs(layer, text)
    ran, times = zip(*(_run(layer, flow, inputs) for flow in FLOWS.values()), strict=True)
    _print_layer(layer, f"pairs of bytes of {source}, {len(text)} bytes", ran[0].routing.expert_ids)
    names = [name for name in times[0] | times[1] if name != WHOLE] + [WHOLE]
    cells = ((name, *(f"{t[name] * 1e3:11.3f}" if name in t else "" for t in times)) for name in names)
    header = ("step", *(f"{flow:>11}" for flow in FLOWS))
    _table("Milliseconds a call, with its dispatch (compiled and warm; median of 9)", [header, *cells])
    return _report([check for flow, r in zip(FLOWS, ran, strict=True) for check in _check(flow, inputs, r)])


def _print_layer(layer: Layer, tokens: str, ids: jax.Array, lines: int = 12) -> None:
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
    _table("Layer", facts)
    order = np.argsort(-load, kind="stable")
    shown = order if e <= 2 * lines else [*order[:lines], *order[-lines:]]
    bars = [f"{e:4} {load[e]:6} {'#' * -(-32 * int(load[e]) // int(load.max())):<32}" for e in shown]
    title = "Load: expert, its pairs" if len(bars) == e else f"Load: the {lines} busiest and {lines} idlest experts"
    _table(title, zip(bars[: len(bars) // 2], bars[len(bars) // 2 :], strict=True))


# ---- inputs: tokens of real text, because only uneven inputs make uneven routing


def _text() -> tuple[str, bytes]:
    """What text comes with the package, and the text: its metadata's README or licence, else its source."""
    texts = {}
    try:
        installed = importlib.metadata.distribution("ferrum_jax")
        if "Description" in installed.metadata:
            texts["the README in the package's metadata"] = installed.metadata["Description"]
        for name in ("licenses/LICENSE", "LICENSE"):
            texts[f"{name} in the package's metadata"] = installed.read_text(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    sources = (file for file in importlib.resources.files("ferrum_jax").iterdir() if file.name.endswith(".py"))
    texts["the package's own source"] = "".join(f.read_text("utf-8") for f in sorted(sources, key=lambda f: f.name))
    return next((source, text.encode()) for source, text in texts.items() if text and text.strip())


def _inputs(layer: Layer, text: bytes) -> tuple[jax.Array, ...]:
    """x[T, H], router[H, E], gate_up[E, H, 2F], down[E, F, H]."""
    _, e, _, h, f, t, _, dtype = layer
    x = jnp.asarray(_embed(text, t, h), dtype)
    shapes = (h, e), (e, h, 2 * f), (e, f, h)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return x, *(jax.random.normal(k, s, dtype) / s[-2] ** 0.5 for k, s in zip(keys, shapes, strict=True))


def _embed(text: bytes, tokens: int, hidden: int, window: int = 4) -> np.ndarray:
    """A token is a pair of bytes, mixed with the ones before it; short text repeats."""
    pairs = np.resize(np.frombuffer(text, np.uint8), (tokens, 2))
    first, second = np.random.default_rng(0).standard_normal((2, 256, hidden), np.float32)
    own = first[pairs[:, 0]] + second[pairs[:, 1]]
    mixed = sum(np.roll(own, back, axis=0) / 2**back for back in range(window))
    return mixed / np.sqrt(np.mean(mixed**2, axis=1, keepdims=True))


# ---- the layer


class Ran(NamedTuple):
    logits: jax.Array
    routing: ferrum_jax.RouterOutput
    out: jax.Array


WHOLE = "the whole layer, one jit"


def _moe(layer: Layer, flow: str | None, inputs: tuple[jax.Array, ...]) -> Ran:
    x, router, gate_up, down = inputs
    logits = _product(x, router)
    routing = ferrum_jax.route_topk_softmax(logits, layer.top_k)
    if flow is None:
        chosen = ferrum_jax.RouterOutput(*today.softmax_top_k(logits, layer.top_k))
        return Ran(logits, chosen, today.ragged_layer(x, logits, gate_up, down, layer.top_k))
    out = ferrum_jax.moe_mlp(x, None, gate_up, down, router_output=routing, flow=flow, block_size=layer.block_size)
    return Ran(logits, routing, out)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _dispatch(x: jax.Array, plan: ferrum_jax.MoePlan) -> jax.Array:
    return ferrum_jax.moe_dispatch(x, plan.packed_token_idx, pairs_by_token=plan.pairs_by_token)


Call = Callable[..., Any]


def _steps(layer: Layer, flow: str, call: Call, inputs: tuple[jax.Array, ...]) -> None:
    """What `moe_mlp` does. `call(name, function, *args)` runs a step."""
    x, router, gate_up, down = inputs
    logits = call("router product", _product, x, router)
    ids, weights = call(
        "route_topk_softmax", functools.partial(ferrum_jax.route_topk_softmax, top_k=layer.top_k), logits
    )
    sizes = {"num_experts": layer.num_experts, "block_size": layer.block_size, "pair_ids": flow == "pair_ids"}
    plan = call("moe_plan", functools.partial(ferrum_jax.moe_plan, **sizes), ids)
    rows, packed = x, flow == "packed"
    if packed:
        rows = call("moe_dispatch", _dispatch, x, plan)
    product = functools.partial(ferrum_jax.grouped_matmul, packed_rows=packed)
    first = functools.partial(product, top_k=1 if packed else layer.top_k, activation="silu")
    rows = call("grouped_matmul, gate and up", first, rows, gate_up, plan)
    rows = call("grouped_matmul, down", product, rows, down, plan)
    if packed:
        combine = functools.partial(ferrum_jax.moe_combine, unique_rows=True)
        call("moe_combine", combine, rows, plan.pairs_by_token, weights)
    else:
        call("weighted_sum_batched", ferrum_jax.weighted_sum_batched, rows.reshape(*ids.shape, -1), weights)


def _timed(function: Call, *args: Any) -> tuple[Any, float]:
    """A function's result under jit, and the median of its times."""
    compiled = jax.jit(function)
    result = jax.block_until_ready(compiled(*args))
    seconds = timeit.repeat(lambda: jax.block_until_ready(compiled(*args)), number=1, repeat=9)
    return result, statistics.median(seconds)


def _run(layer: Layer, flow: str | None, inputs: tuple[jax.Array, ...]) -> tuple[Ran, dict[str, float]]:
    """What the layer under one jit gives, and the times of its steps and of the whole."""
    times: dict[str, float] = {}

    def timed(name: str, function: Call, *args: Any) -> Any:
        result, times[name] = _timed(function, *args)
        return result

    if flow:
        _steps(layer, flow, timed, inputs)
    return timed(WHOLE, functools.partial(_moe, layer, flow), inputs), times


# ---- the grouped product alone


def grouped(rows: int = 1024, width: int = 512) -> int:
    """Time `grouped_matmul` against `jax.lax.ragged_dot` in float32, with many and with few experts."""
    lines = []
    for experts in (128, 8):
        keys = jax.random.split(jax.random.key(experts), 3)
        ids = jax.random.randint(keys[0], (rows, 1), 0, experts)
        plan = ferrum_jax.moe_plan(ids, experts, max(16, rows // experts))
        x, w = jax.random.normal(keys[1], (rows, width)), jax.random.normal(keys[2], (experts, width, width))
        ours, seconds = _timed(ferrum_jax.grouped_matmul, x, w, plan)
        other, ragged = _timed(jax.lax.ragged_dot, x, w, jnp.diff(plan.expert_offsets))
        cells = (f"{ms:.2f}" for ms in (seconds * 1e3, ragged * 1e3, ragged / seconds))
        lines.append((str(experts), *cells, f"{jnp.max(jnp.abs(ours - other)):.1e}"))
    title = f"{rows} rows, {width}x{width}, float32, on {jax.devices()[0].device_kind}: milliseconds, median of 9"
    _table(title, [("experts", "grouped_matmul", "ragged_dot", "times as fast", "largest difference"), *lines])
    return 0


# ---- the layer over several devices


def parallel(devices: int | None = None) -> int:
    """Run the layer with its experts spread over devices, by every exchange, time it and check it; the exit status."""
    any_number = "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", "")
    if any_number:
        wanted = 4 if devices is None else min(max(devices, 1), SMALL.num_experts)
        try:
            jax.config.update("jax_num_cpu_devices", wanted)
        except RuntimeError:  # JAX runs already, with the devices that it has
            any_number = False
    on_gpu, devices = jax.default_backend() == "gpu", jax.device_count() if devices is None else devices
    layer = QWEN3_30B if on_gpu else SMALL
    any_number &= jax.default_backend() == "cpu"
    most = layer.num_experts if any_number else jax.device_count()
    possible = [n for n in range(1, most + 1) if not (layer.num_experts % n or layer.tokens % n)]
    if devices not in possible:
        what = f"they divide {layer.num_experts} experts and {layer.tokens} tokens"
        print(f"--devices must be one of {', '.join(map(str, possible))}: {what}; got {devices}")
        return 2
    source, text = _text()
    x, router, *matrices = inputs = _inputs(layer, text)
    logits = jax.jit(_product)(x, router)
    routing = ferrum_jax.route_topk_softmax(logits, layer.top_k)
    _print_layer(layer, f"pairs of bytes of {source}, {len(text)} bytes", routing.expert_ids)
    spec, kind = jax.sharding.PartitionSpec("expert"), jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((devices,), ("expert",), axis_types=(kind,), devices=jax.devices()[:devices])
    placed = [jax.device_put(a, jax.sharding.NamedSharding(mesh, spec)) for a in (x, logits, *matrices)]
    out, seconds = _timed(functools.partial(ferrum_jax.moe_mlp, top_k=layer.top_k), x, logits, *matrices)
    lines, ran = [("one device", f"{seconds * 1e3:.3f}", "")], {"one device": out}
    balanced = layer.tokens * layer.top_k // devices
    for exchange in (name for name in ferrum_jax.parallel.EXCHANGES if on_gpu or name != "ragged"):
        for capacity in (None, balanced)[: 1 if exchange == "gather" else 2]:
            options = {"axis_name": "expert", "exchange": exchange, "capacity": capacity, "return_dropped": True}

            def run(*args: Any, options: dict[str, Any] = options) -> tuple[jax.Array, jax.Array]:
                out, dropped = ferrum_jax.parallel.moe_mlp(*args, top_k=layer.top_k, **options)
                return out, dropped[None]

            f = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
            (out, dropped), seconds = _timed(f, *placed)
            name = exchange if capacity is None else f"{exchange}, {capacity} rows a device"
            lines.append((name, f"{seconds * 1e3:.3f}", str(jnp.sum(dropped))))
            if capacity is None:
                ran[name] = out
    header = ("exchange", "milliseconds", "pairs dropped")
    _table(f"On {devices} devices, {jax.devices()[0].device_kind} (compiled and warm; median of 9)", [header, *lines])
    return _report([_check(name, inputs, Ran(logits, routing, out))[-1] for name, out in ran.items()])


# ---- checks: a name, the largest error, and the largest of error over bound


def _check(flow: str, inputs: tuple[jax.Array, ...], ran: Ran) -> list[tuple[str, float, float]]:
    # From this run's own logits: those of another program may round otherwise, and so choose otherwise.
    logits, top_k = _f64(ran.logits), ran.routing.expert_ids.shape[-1]
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    weights = np.exp(np.take_along_axis(logits, ids, 1))
    weights /= weights.sum(1, keepdims=True)
    return [
        _compare(f"{flow}: expert ids", ran.routing.expert_ids.astype(jnp.float32), ids, np.zeros(ids.shape)),
        _compare(f"{flow}: expert weights", ran.routing.expert_weights, weights, weights),
        _compare(f"{flow}: layer", ran.out, *_dense(inputs, ids, weights)),
    ]


def _dense(inputs: tuple[jax.Array, ...], ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The layer expert by expert, and how large the terms of each element are.

    The F terms under a row round independently of each other, so their errors add up like the root of the sum of their
    squares. The sum of their magnitudes is some 30 times the row: in bfloat16 that would let any row pass.
    """
    x, (gate_up, down) = _f64(inputs[0]), inputs[2:]
    out, size = np.zeros(x.shape), np.zeros(x.shape)
    for expert in range(len(down)):
        token, choice = np.nonzero(ids == expert)
        gate, up = np.split(x[token] @ _f64(gate_up[expert]), 2, axis=1)
        hidden, matrix, weight = gate / (1 + np.exp(-gate)) * up, _f64(down[expert]), weights[token, choice, None]
        row = hidden @ matrix
        out[token] += weight * row
        size[token] += weight * (np.abs(row) + np.sqrt(hidden**2 @ matrix**2))
    return out, size


def _f64(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32)).astype(np.float64)


def _compare(name: str, got: jax.Array, want: np.ndarray, size: np.ndarray) -> tuple[str, float, float]:
    """The bound: eps^(2/3) * size + tiny. Results that are exact have size 0."""
    kind, error = jnp.finfo(got.dtype), np.abs(_f64(got) - want)
    return name, error.max(), (error / (float(kind.eps) ** (2 / 3) * size + float(kind.tiny))).max()


def _report(checks: Sequence[tuple[str, float, float]]) -> int:
    """Print the checks; the exit status. A NaN fails."""
    rows = [
        (name, "ok" if ratio <= 1 else "FAILED", f"largest error {error:.2g}", f"{ratio:.2g} of its bound")
        for name, error, ratio in checks
    ]
    _table("Checks, against NumPy in float64", rows)
    failed = [f"{name}, {error}, {ratio}" for name, result, error, ratio in rows if result == "FAILED"]
    print("FAILED: " + "; ".join(failed) if failed else "All checks passed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
