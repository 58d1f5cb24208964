"""Profile events: the envelope, whole lines from everyone, and files that cannot be written."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax import profile

DEFAULTS = {
    "event": "e",
    "commit_sha": None,
    "env_hash": "sha256:unknown",
    "model": "unknown",
    "concurrency": 1,
    "shape": {},
    "stage_us": {},
    "graph_enabled": False,
    "runtime_flags": {},
}


@pytest.fixture
def file(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("FERRUM_PROFILE")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FERRUM_PROFILE_JSONL", str(tmp_path / "new" / "events.jsonl"))
    return tmp_path / "new" / "events.jsonl"


def events(file):
    text = file.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_the_literal_line(file):
    profile.event("e")
    assert file.read_text() == (
        '{"event":"e","commit_sha":null,"env_hash":"sha256:unknown","model":"unknown","concurrency":1,'
        '"shape":{},"stage_us":{},"graph_enabled":false,"runtime_flags":{}}\n'
    )


def test_values_are_plain_json(file):
    shape = {"batch": np.int32(4), "load": jnp.array([1, 2], jnp.int32), "kind": "packed\n"}
    profile.event("e", shape=shape, stage_us={"route": np.float32(1.5)}, graph_enabled=True)
    profile.event("f")
    first, second = events(file)
    assert first["shape"] == {"batch": 4, "load": [1, 2], "kind": "packed\n"}
    assert (first["stage_us"], first["graph_enabled"], second["event"]) == ({"route": 1.5}, True, "f")


@pytest.mark.parametrize(
    ("variable", "value", "field", "want"),
    [
        ("COMMIT_SHA", "abc", "commit_sha", "abc"),
        ("COMMIT_SHA", " ", "commit_sha", None),
        ("ENV_HASH", "sha256:12", "env_hash", "sha256:12"),
        ("ENV_HASH", "md5:12", "env_hash", "sha256:unknown"),
        ("MODEL", "Qwen/Qwen3-30B-A3B", "model", "Qwen/Qwen3-30B-A3B"),
        ("MODEL", "", "model", "unknown"),
        ("CONCURRENCY", "32", "concurrency", 32),
        ("CONCURRENCY", "0", "concurrency", 1),
        ("CONCURRENCY", "-3", "concurrency", 1),
        ("CONCURRENCY", "many", "concurrency", 1),
        ("RUNTIME_FLAGS_JSON", '{"FERRUM_VLLM_MOE": [1, null]}', "runtime_flags", {"FERRUM_VLLM_MOE": [1, None]}),
        ("RUNTIME_FLAGS_JSON", "[1]", "runtime_flags", {}),
        ("RUNTIME_FLAGS_JSON", "{", "runtime_flags", {}),
        ("RUNTIME_FLAGS_JSON", '{"a": NaN}', "runtime_flags", {}),
    ],
)
def test_the_envelope(file, monkeypatch, variable, value, field, want):
    monkeypatch.setenv(f"FERRUM_PROFILE_{variable}", value)
    profile.event("e")
    (event,) = events(file)
    assert list(event) == list(DEFAULTS)
    assert event == {**DEFAULTS, field: want}
    assert type(event[field]) is type(want)


def test_stages(file):
    with profile.stages("decode", shape={"batch": 2}) as stage:
        for _ in range(2):
            with stage("route"):
                time.sleep(0.01)
        with stage("combine"):
            pass
    (event,) = events(file)
    assert list(event) == list(DEFAULTS)
    assert (event["event"], event["shape"], list(event["stage_us"])) == ("decode", {"batch": 2}, ["route", "combine"])
    assert 2e4 <= event["stage_us"]["route"] < 1e6  # both times, in microseconds
    assert 0 <= event["stage_us"]["combine"] < 1e4
    with pytest.raises(ZeroDivisionError), profile.stages("decode"):
        _ = 1 / 0
    assert len(events(file)) == 1


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
def test_what_json_cannot_hold(file, value):
    with pytest.raises(ValueError, match="shape and stage_us of 'e' must hold JSON values"):
        profile.event("e", shape={"x": value})
    assert not file.exists()


def test_no_file_no_event(file, monkeypatch):
    for value in ("", "  "):
        monkeypatch.setenv("FERRUM_PROFILE_JSONL", value)
        profile.event("e")
    monkeypatch.delenv("FERRUM_PROFILE_JSONL")
    profile.event("e")
    assert not file.exists()


def test_a_file_that_cannot_be_written_is_one_warning(file, tmp_path, monkeypatch):
    monkeypatch.setenv("FERRUM_PROFILE_JSONL", str(tmp_path))  # a folder
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            profile.event("e")
    assert [(w.category, w.filename) for w in caught] == [(RuntimeWarning, __file__)]
    assert str(caught[0].message).startswith("FERRUM_PROFILE_JSONL: events are lost")


def test_a_write_cut_short_is_finished_or_undone(file, monkeypatch):
    profile.event("before")
    write, failing = os.write, False

    def short(descriptor, data):
        if failing and len(data) < 100:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:70])

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(os, "write", short)
        profile.event("in parts")
        failing = True
        profile.event("lost")
    profile.event("after")
    assert [e["event"] for e in events(file)] == ["before", "in parts", "after"]


WRITER = """
import sys, threading
from ferrum_jax import profile

def write(thread):
    for i in range(25):
        profile.event("e", shape={"process": int(sys.argv[1]), "thread": thread, "i": i, "load": [7] * 3000 * (i % 3)})

threads = [threading.Thread(target=write, args=(t,)) for t in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
"""


@pytest.mark.slow
def test_eight_threads_of_four_processes_break_no_line(file):
    root = Path(__file__).parent.parent
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(p)], cwd=root) for p in range(4)]
    assert [w.wait(120) for w in writers] == [0] * 4
    found = events(file)
    assert all(list(event) == list(DEFAULTS) for event in found)
    lines = [tuple(event["shape"][name] for name in ("process", "thread", "i")) for event in found]
    assert sorted(lines) == [(p, t, i) for p in range(4) for t in range(8) for i in range(25)]
