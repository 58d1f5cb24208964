"""The notebooks as they are stored, and the comparison with what they print now: that it finds what differs."""

import copy
import json
from pathlib import Path

import pytest

from notebooks import VARIES, differences

PATHS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_stored_cells_were_run_in_order_and_none_failed(path):
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [cell["id"] for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]


def stream(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": text}


def shown(kind="execute_result", **data):
    return {"output_type": kind, "data": {name.replace("_", "/"): value for name, value in data.items()}}


def notebook(*outputs, tags=()):
    text = {"cell_type": "markdown", "id": "text", "metadata": {}, "source": "# A notebook"}
    return {
        "cells": [
            text,
            {"cell_type": "code", "id": "first", "metadata": {"tags": [*tags]}, "outputs": [*outputs], "source": "f()"},
        ]
    }


STORED = notebook(
    stream(["two experts\n", "four tokens\n"]),
    shown("display_data", image_png="iVBORw0KGgo=", text_plain="<Figure>"),
    shown(text_plain=["3 rows"], text_html=["<table>", "</table>"]),
)


def changed(cell, output, **values):
    new = copy.deepcopy(STORED)
    new["cells"][cell]["outputs"][output] |= values
    return new


def test_a_changed_line_is_shown():
    (found,) = differences(STORED, changed(1, 0, text="two experts\nfive tokens\n"))
    assert found.splitlines() == [
        "--- stored: cell first, stdout",
        "+++ now",
        "@@ -1,2 +1,2 @@",
        " two experts",
        "-four tokens",
        "+five tokens",
    ]


@pytest.mark.parametrize(
    ("fresh", "part"),
    [
        (changed(1, 2, data={"text/plain": "4 rows", "text/html": "<table></table>"}), "output 2, text/plain"),
        (changed(1, 2, data={"text/plain": "3 rows", "text/html": "<table>1</table>"}), "output 2, text/html"),
        (changed(1, 0, name="stderr"), "stderr"),
        (notebook(*STORED["cells"][1]["outputs"][:2]), "output 2, text/plain"),
        (notebook(*STORED["cells"][1]["outputs"], stream("a warning", "stderr")), "stderr"),
    ],
)
def test_results_tables_streams_and_what_is_missing_count(fresh, part):
    assert any(f"cell first, {part}" in diff.splitlines()[0] for diff in differences(STORED, fresh))


def test_pictures_pieces_of_a_stream_and_cells_that_vary_do_not_count():
    outputs = STORED["cells"][1]["outputs"]
    pieces = notebook(stream("two exp"), outputs[1], stream("erts\nfour tokens\n"), outputs[2])
    picture = changed(1, 1, data={"image/png": "AAAA", "text/plain": "<Figure>"})
    assert differences(STORED, pieces) == differences(STORED, picture) == []
    varies = notebook(stream("12 ms\n"), tags=[VARIES])
    assert differences(varies, notebook(stream("13 ms\n"))) == []
