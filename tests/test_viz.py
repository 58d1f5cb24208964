"""Pictures, by what their artists hold; drawn without a screen."""

import sys

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_hex

import ferrum_jax as fj
from ferrum_jax import viz

IDS = np.array([[1, 0], [1, 3]], np.int32)
ROUTING = fj.RouterOutput(IDS, np.array([[0.75, 0.25], [0.5, 0.5]], np.float32))


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def labels(ax):
    return ax.get_title(), ax.get_xlabel(), ax.get_ylabel()


def colours(ax):
    return [to_hex(bar.get_facecolor()).upper() for bar in ax.patches]


def test_expert_load():
    ax = viz.expert_load(fj.routing_stats(ROUTING, 4).tokens_per_expert)
    assert [bar.get_height() for bar in ax.patches] == [1, 2, 0, 1]
    assert colours(ax) == list(viz.COLOURS[:4])
    assert ax.lines[0].get_ydata()[0] == 1
    assert [text.get_text() for text in ax.texts] == ["1", "2", "0", "1"]
    assert ax.get_legend().texts[0].get_text() == "mean 1.0"
    assert labels(ax) == ("Load of the experts", "expert", "pairs")


def test_many_experts_share_colours():
    ax = viz.expert_load(np.arange(100))
    assert len(ax.patches) == 100
    assert not ax.texts
    assert colours(ax)[:20] == [viz.COLOURS[i % 8] for i in range(20)]


def test_token_map():
    strays = fj.RouterOutput(np.array([[1, 0], [-1, 4]]), ROUTING.expert_weights)
    for routing, second in ((ROUTING, [None, 0.5, None, 0.5]), (strays, [None] * 4)):
        ax = viz.token_map(routing, 4)
        assert ax.images[0].get_array().T.tolist() == [[0.25, 0.75, None, None], second]
    assert labels(ax) == ("Which experts each token goes to", "token", "expert")
    assert ax.figure.axes[1].get_ylabel() == "weight"


@pytest.mark.parametrize("pair_ids", [False, True])
def test_aligned_table(pair_ids):
    ax = viz.aligned_table(fj.moe_plan(IDS, 4, 2, pair_ids=pair_ids), 4)
    first, second, _, fourth = viz.COLOURS[:4]
    assert colours(ax) == [first, "#FFFFFF", second, second, fourth, *["#FFFFFF"] * 3]
    assert [bar.get_hatch() for bar in ax.patches] == [None, "////", None, None, None, *["////"] * 3]
    assert [text.get_text() for text in ax.texts] == ["0", "1", "3", "-"]
    title, xlabel, _ = labels(ax)
    assert title == "The block-aligned table, blocks of 2: 33% of the live blocks is padding"
    assert "slot" in xlabel


def test_load_heatmap():
    ax = viz.load_heatmap([[2, 0], [1, 1], [0, 0]], rows="step")
    assert ax.images[0].get_array().tolist() == [[2, 0], [1, 1], [0, 0]]
    assert labels(ax) == ("Load of the experts by step", "expert", "step")
    assert ax.figure.axes[1].get_ylabel() == "load / mean load"


def test_draws_on_given_axes():
    _, axes = plt.subplots(2, 2)
    routing = fj.moe_align_block_size(IDS, 4, 2)
    got = [
        viz.expert_load([1, 2], ax=axes[0, 0]),
        viz.token_map(ROUTING, 4, ax=axes[0, 1]),
        viz.aligned_table(routing, 4, ax=axes[1, 0]),
        viz.load_heatmap([[1, 2]], ax=axes[1, 1]),
    ]
    assert got == list(axes.flat)
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: viz.expert_load([[1, 2]]), r"expert_load: tokens_per_expert must be \[E\].*got shape \(1, 2\)"),
        (lambda: viz.load_heatmap([1, 2]), r"load_heatmap: tokens_per_expert must be \[L, E\]"),
        (lambda: viz.token_map(fj.RouterOutput(IDS[None], IDS[None]), 4), r"token_map: router_output.expert_ids must"),
        (lambda: viz.token_map(fj.RouterOutput([[1, 2]], [[1.0]]), 4), r"one shape; got \(1, 2\) and \(1, 1\)"),
        (lambda: viz.aligned_table(fj.MoeRouting(IDS, IDS, 0), 4), r"aligned_table: routing.sorted_token_ids must be"),
        (lambda: viz.aligned_table(fj.MoeRouting([1, 2, 3], [0, 1], 2), 4), r"3 sorted_token_ids must make 2 blocks"),
    ],
)
def test_errors(draw, words):
    with pytest.raises(ValueError, match=words):
        draw()


def test_experts_are_integers():
    with pytest.raises(TypeError, match="expert_ids must hold integers; got float64"):
        viz.token_map(fj.RouterOutput([[1.0]], [[1.0]]), 4)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[viz\]'"):
        viz.expert_load([1])
