"""Pictures of a routing, with matplotlib: pip install '.[viz]' from a clone. Each function returns the Axes it drew on.

Experts take turns with the colours of Okabe and Ito, which the colour-blind can tell apart,
https://jfly.uni-koeln.de/color/. Loads are drawn in matplotlib's cividis. Every picture can be read without colours.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.settings import as_int

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#0072B2", "#D55E00", "#999999")


def expert_load(tokens_per_expert: Any, *, ax: "Axes | None" = None) -> "Axes":
    """Draw a bar for each expert, as high as its number of pairs, and a line at the mean.

    Args:
      tokens_per_expert: [E] integers, such as `routing_stats(...).tokens_per_expert`.
      ax: where to draw; default: a new figure.

    Returns:
      The Axes: one bar an expert.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: an array that is not [E], E >= 1.

    >>> len(expert_load([4, 0, 2]).patches)
    3
    """
    load = _array("expert_load", "tokens_per_expert", tokens_per_expert, "[E]")
    axes = _new_axes(min(5 + load.size / 16, 12), 3) if ax is None else ax
    experts, mean = np.arange(load.size), load.mean()
    axes.bar(experts, load, width=0.85, color=_colours(experts), edgecolor="#444444", linewidth=0.5)
    axes.axhline(mean, color="black", linestyle="--", linewidth=1, label=f"mean {mean:.1f}")
    if load.size <= 32:
        style = {"ha": "center", "fontsize": 8, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.3}}
        for expert, pairs in zip(experts, load, strict=True):
            axes.annotate(str(pairs), (expert, pairs), (0, 3), textcoords="offset points", **style)
    axes.set(title="Load of the experts", xlabel="expert", ylabel="pairs", xlim=(-0.7, load.size - 0.3))
    axes.set_ylim(0, max(load.max(), 1) * 1.25)  # room for the legend
    _whole_ticks(axes.xaxis, axes.yaxis)
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def token_map(router_output: Any, num_experts: int, *, ax: "Axes | None" = None) -> "Axes":
    """Draw which tokens go to which experts: a column a token, a row an expert, and the weight where they meet.

    Args:
      router_output: expert_ids[T, K] and expert_weights[T, K]; an id outside [0, E) is not drawn.
      num_experts: E, >= 1.
      ax: where to draw; default: a new figure.

    Returns:
      The Axes: one image [E, T] of weights, masked where a token does not go to an expert.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError, ValueError: arrays that are not [T, K], or are empty; an E that is no int or < 1.

    >>> from ferrum_jax import RouterOutput
    >>> token_map(RouterOutput(np.array([[0, 2]]), np.array([[0.7, 0.3]])), 3).images[0].get_array().tolist()
    [[0.7], [None], [0.3]]
    """
    num_experts = as_int("token_map", "num_experts", num_experts)
    ids = _array("token_map", "router_output.expert_ids", router_output.expert_ids, "[T, K]")
    weights = _array("token_map", "router_output.expert_weights", router_output.expert_weights, "[T, K]")
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"token_map: router_output.expert_ids must hold integers; got {ids.dtype}")
    if ids.shape != weights.shape:
        raise ValueError(f"token_map: ids and weights must have one shape; got {ids.shape} and {weights.shape}")
    tokens = len(ids)
    there = np.zeros((num_experts, tokens))
    chosen = np.zeros((num_experts, tokens), bool)
    for t, k in zip(*np.nonzero((ids >= 0) & (ids < num_experts)), strict=True):
        there[ids[t, k], t] += weights[t, k]
        chosen[ids[t, k], t] = True
    axes = _new_axes(min(5 + tokens / 10, 12), min(2.2 + num_experts / 8, 8)) if ax is None else ax
    image = axes.imshow(
        np.ma.masked_array(there, ~chosen), aspect="auto", interpolation="nearest", cmap="cividis_r", vmin=0
    )
    axes.set_facecolor("#F2F2F2")
    _whole_ticks(axes.xaxis, axes.yaxis)
    axes.set(title="Which experts each token goes to", xlabel="token", ylabel="expert")
    axes.figure.colorbar(image, ax=axes, label="weight", pad=0.02)
    return axes


def aligned_table(routing: Any, num_pairs: int, *, ax: "Axes | None" = None) -> "Axes":
    """Draw the block-aligned table as a strip of slots, coloured by expert. Padding and the tail are white.

    They are also hatched, unless there are too many slots for that.

    Args:
      routing: MoeRouting or MoePlan of one slice: sorted_token_ids[S], block_ids[B].
      num_pairs: P; a slot that holds it is padding.
      ax: where to draw; default: a new figure.

    Returns:
      The Axes: one bar a slot; the label over a block is its expert, and "-" over the tail.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError, ValueError: arrays that are not [S] and [B], or are empty; a P that is no int or negative.

    >>> import ferrum_jax
    >>> len(aligned_table(ferrum_jax.upload_moe_routing([0, 2, 1, 2], [0, 1], 4), 2).patches)
    4
    """
    num_pairs = as_int("aligned_table", "num_pairs", num_pairs, 0)
    slots = _array("aligned_table", "routing.sorted_token_ids", routing.sorted_token_ids, "[S]")
    blocks = _array("aligned_table", "routing.block_ids", routing.block_ids, "[B]")
    size, rest = divmod(slots.size, blocks.size)
    if rest or not size:
        raise ValueError(f"aligned_table: {slots.size} sorted_token_ids must make {blocks.size} blocks of one size")
    owner = np.repeat(blocks, size)
    live = (slots < num_pairs) & (owner >= 0)
    axes = _new_axes(min(4 + slots.size / 10, 14), 2) if ax is None else ax
    bars = axes.bar(np.arange(slots.size), 1, 1, color=np.where(live, _colours(owner), "white"), linewidth=0.3)
    for bar, filled in zip(bars, live, strict=True):
        if slots.size <= 400:  # with more slots, the edges would cover the bars
            bar.set(edgecolor="white" if filled else "#888888", hatch=None if filled else "////")
    middle = np.arange(blocks.size) * size + (size - 1) / 2
    step = -(-blocks.size // 48)
    for x, expert in list(zip(middle, blocks, strict=True))[::step]:
        axes.annotate(str(expert) if expert >= 0 else "-", (x, 1), (0, 3), textcoords="offset points", ha="center")
    axes.vlines(np.arange(blocks.size + 1) * size - 0.5, 0, 1.08, color="black", linewidth=1 if step == 1 else 0.3)
    padding = np.mean(~live[owner >= 0]) if np.any(owner >= 0) else 0
    axes.set_title(f"The block-aligned table, blocks of {size}: {padding:.0%} of the live blocks is padding", pad=16)
    axes.set(xlabel="slot (above: the expert that owns the block)", xlim=(-0.6, slots.size - 0.4), ylim=(0, 1.1))
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return axes


def load_heatmap(tokens_per_expert: Any, *, rows: str = "layer", ax: "Axes | None" = None) -> "Axes":
    """Draw a heat map of the load over layers or steps: each expert's load over the mean of its row; 1 is the mean.

    Args:
      tokens_per_expert: [L, E] integers, such as `routing_stats(...).tokens_per_expert` of stacked routings.
      rows: the name of a row: "layer", "step", ...
      ax: where to draw; default: a new figure.

    Returns:
      The Axes: one image [L, E] of load / mean load of the row.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: an array that is not [L, E], both >= 1.

    >>> load_heatmap([[2, 0], [1, 1]]).images[0].get_array().tolist()
    [[2.0, 0.0], [1.0, 1.0]]
    """
    load = _array("load_heatmap", "tokens_per_expert", tokens_per_expert, "[L, E]")
    relative = load / np.maximum(load.mean(axis=1, keepdims=True), np.finfo(float).tiny)
    axes = _new_axes(min(5 + load.shape[1] / 12, 12), min(2 + len(load) / 6, 8)) if ax is None else ax
    image = axes.imshow(relative, aspect="auto", interpolation="nearest", cmap="cividis", vmin=0)
    _whole_ticks(axes.xaxis, axes.yaxis)
    axes.set(title=f"Load of the experts by {rows}", xlabel="expert", ylabel=rows)
    axes.figure.colorbar(image, ax=axes, label="load / mean load", pad=0.02)
    return axes


def benchmark(report: Any, *, axes: "Sequence[Axes] | None" = None) -> "list[Axes]":
    """Draw times over T, both logarithmic: a panel for each op and model, a line for each way, a dashed floor.

    Args:
      report: what `python -m ferrum_jax bench --json FILE` writes, loaded.
      axes: where to draw, one for each op and model in order; default: a new figure.

    Returns:
      The list of Axes.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: the report has no time; too few `axes`.

    >>> row = {"op": "moe_plan", "model": "qwen3", "way": "xla", "T": 16, "us": 9.0, "floor_us": 1.0}
    >>> report = {"device": "a GPU", "date": "today", "versions": {"jax": "0"}, "rows": [row]}
    >>> [line.get_label() for line in benchmark(report)[0].lines]
    ['xla', 'floor']
    """
    timed = [row for row in report["rows"] if row["us"] is not None]
    panels = list(dict.fromkeys((row["op"], row["model"]) for row in timed))
    if not timed or (axes is not None and len(axes) < len(panels)):
        got = "no time" if not timed else f"{len(panels)} panels and {len(axes or ())} axes"
        raise ValueError(f"benchmark: report must have times, and axes one for each op and model; got {got}")
    title = f"{report['device']}, jax {report['versions']['jax']}, {report['date']}"
    drawn = _grid(len(panels), title) if axes is None else list(axes)
    for ax, (op, model) in zip(drawn, panels, strict=False):
        here = [row for row in timed if (row["op"], row["model"]) == (op, model)]
        ours = ("xla", "triton", "pallas", "default")  # they come first, so their colours are the same in all panels
        ways = dict.fromkeys(row["way"] for row in here)
        for way in ways:
            i = [*ours, *(other for other in ways if other not in ours)].index(way)
            times = sorted((row["T"], row["us"]) for row in here if row["way"] == way)
            ax.plot(*zip(*times, strict=True), color=COLOURS[i % len(COLOURS)], marker="osD^vP*X"[i % 8], label=way)
        floor = sorted({(row["T"], row["floor_us"]) for row in here})
        ax.plot(*zip(*floor, strict=True), color="black", linestyle="--", linewidth=1, label="floor")
        ax.set(title=f"{op}, {model}", xlabel="tokens", ylabel="microseconds", xscale="log", yscale="log")
        ax.set_xticks([t for t, _ in floor], [str(t) for t, _ in floor])
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    return drawn[: len(panels)]


def _grid(panels: int, title: str) -> "list[Axes]":
    columns = min(panels, 4)
    rows = -(-panels // columns)
    first = _new_axes(4 * columns, 3 * rows)
    figure = first.figure
    first.remove()
    figure.suptitle(title)
    return [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def _new_axes(width: float, height: float) -> "Axes":
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("ferrum_jax.viz draws with matplotlib: pip install '.[viz]' from a clone") from error
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _array(function: str, name: str, values: Any, shape: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != shape.count(",") + 1 or not array.size:
        raise ValueError(f"{function}: {name} must be {shape}, and not empty; got shape {array.shape}")
    return array


def _colours(experts: np.ndarray) -> np.ndarray:
    return np.asarray(COLOURS)[experts % len(COLOURS)]


def _whole_ticks(*axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 4, 5, 8, 10]))
