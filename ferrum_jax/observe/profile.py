"""Profile events in the Ferrum engine's envelope: one JSON line each, appended to the file in FERRUM_PROFILE_JSONL.

The environment is read at every event. FERRUM_PROFILE_JSONL names the file; if it is unset or empty, an event does
nothing. FERRUM_PROFILE_COMMIT_SHA, _ENV_HASH ("sha256:..."), _MODEL, _CONCURRENCY (>= 1) and _RUNTIME_FLAGS_JSON (an
object) fill the envelope. For a variable that is unset or of another kind, the envelope has null, "sha256:unknown",
"unknown", 1 or {}.

Lines stay whole when threads and processes share a file. A file that cannot be written causes one warning.
"""

import contextlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system: then threads take turns, but processes do not
    fcntl = None


def event(
    name: str,
    *,
    shape: Mapping[str, Any] | None = None,
    stage_us: Mapping[str, float] | None = None,
    graph_enabled: bool = False,
) -> None:
    """Append one event to the file that FERRUM_PROFILE_JSONL names; without it, do nothing.

    Args:
      name: the kind of event, the line's field `event`.
      shape: what was run: JSON values, NumPy or JAX arrays and scalars.
      stage_us: microseconds by stage.
      graph_enabled: whether a CUDA graph was replayed.

    Raises:
      ValueError: a value that JSON cannot hold, such as NaN.

    A file that cannot be written causes one RuntimeWarning and no error. The envelope is that of the Ferrum engine's
    profile events, https://github.com/sizzlecar/ferrum-infer-rs.

    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.environ["FERRUM_PROFILE_JSONL"] = os.path.join(folder, "events.jsonl")
    ...     event("decode", shape={"batch": 32}, stage_us={"route": 6.5})
    ...     print(open(os.environ.pop("FERRUM_PROFILE_JSONL")).read()[:44])
    {"event":"decode","commit_sha":null,"env_has
    """
    path = os.environ.get("FERRUM_PROFILE_JSONL", "")
    if not path.strip():
        return
    fields = {
        "event": name,
        **_envelope(),
        "shape": dict(shape or {}),
        "stage_us": dict(stage_us or {}),
        "graph_enabled": bool(graph_enabled),
    }
    fields["runtime_flags"] = fields.pop("runtime_flags")  # moved to the end
    try:
        line = json.dumps(fields, separators=(",", ":"), allow_nan=False, default=lambda x: x.tolist())
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"event: shape and stage_us of {name!r} must hold JSON values: {error}") from error
    try:
        _append(path, line.encode() + b"\n")
    except OSError as error:
        if path not in _unwritable:
            _unwritable.add(path)
            warnings.warn(f"FERRUM_PROFILE_JSONL: events are lost: {error}", RuntimeWarning, stacklevel=2)


@contextlib.contextmanager
def stages(
    name: str, *, shape: Mapping[str, Any] | None = None, graph_enabled: bool = False
) -> Iterator[Callable[[str], contextlib.AbstractContextManager[None]]]:
    """Measure stages, and write one event at the end: its `stage_us` holds microseconds by stage, in their order.

    JAX runs asynchronously: call `jax.block_until_ready` on a stage's results inside the stage, or only the dispatch is
    timed. The times of a stage that runs several times are added. If the block raises, no event is written.

    Args:
      name, shape, graph_enabled: as for `event`.

    Yields:
      stage(name): a context manager around one stage.

    Raises:
      As `event`.

    >>> with stages("decode", shape={"batch": 32}) as stage:
    ...     with stage("route"):
    ...         pass
    """
    spent: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(part: str) -> Iterator[None]:
        start = time.perf_counter_ns()
        yield
        spent[part] = spent.get(part, 0.0) + (time.perf_counter_ns() - start) / 1e3

    yield stage
    event(name, shape=shape, stage_us=spent, graph_enabled=graph_enabled)


def _envelope() -> dict[str, Any]:
    def get(name: str) -> str:
        return os.environ.get(f"FERRUM_PROFILE_{name}", "").strip()

    env_hash, concurrency = get("ENV_HASH"), get("CONCURRENCY")
    try:
        flags = json.loads(get("RUNTIME_FLAGS_JSON"), parse_constant=_no_constant)
    except ValueError:
        flags = None
    return {
        "commit_sha": get("COMMIT_SHA") or None,
        "env_hash": env_hash if env_hash.startswith("sha256:") else "sha256:unknown",
        "model": get("MODEL") or "unknown",
        "concurrency": max(int(concurrency), 1) if concurrency.isdecimal() else 1,
        "runtime_flags": flags if isinstance(flags, dict) else {},
    }


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_lock = threading.Lock()
_unwritable: set[str] = set()


def _append(path: str, line: bytes) -> None:
    """Append a line as a whole.

    One write to a descriptor opened for appending is usually atomic, but a full disk or some file systems cut it short.
    So writers take turns, and if a write fails half-way, the part that it wrote is removed.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with _lock:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            if fcntl:
                with contextlib.suppress(OSError):  # file systems without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            end, written = os.fstat(file).st_size, 0
            try:
                while written < len(line):
                    written += os.write(file, line[written:])
            except OSError:
                if written:
                    os.ftruncate(file, end)
                raise
        finally:
            os.close(file)  # this also releases the lock
