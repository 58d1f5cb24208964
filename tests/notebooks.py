"""Run notebooks, and compare the text that they print with the text that is stored in them.

    python tests/notebooks.py notebooks/*.ipynb              # print what differs; the exit status is 1 if anything does
    python tests/notebooks.py --update notebooks/one.ipynb   # and store the fresh outputs, pictures too

Compared are the streams, and the text and HTML of results and displays. Pictures are not, nor are cells with the tag
"varies": those whose text depends on the clock, on versions, or on what lies on the machine. It needs
`pip install '.[notebooks]'` from the repository, and runs on the CPU.
"""

import argparse
import difflib
import importlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

Notebook = dict[str, Any]
VARIES = "varies"


def differences(stored: Notebook, fresh: Notebook) -> list[str]:
    """A diff for each code cell whose text is not the same in both."""
    found = []
    for old, new in zip(_code_cells(stored), _code_cells(fresh), strict=True):
        if VARIES in old["metadata"].get("tags", ()):
            continue
        before, after = _text(old), _text(new)
        for part in before | after:
            lines = (text.get(part, "").splitlines() for text in (before, after))
            diff = list(difflib.unified_diff(*lines, f"stored: cell {old['id']}, {part}", "now", lineterm=""))
            found += ["\n".join(diff)] if diff else []
    return found


def _code_cells(notebook: Notebook) -> Iterator[Notebook]:
    return (cell for cell in notebook["cells"] if cell["cell_type"] == "code")


def _text(cell: Notebook) -> dict[str, str]:
    """A cell's text by where it stands. A stream is one text, in however many pieces it came."""
    text: dict[str, str] = {}
    shown = 0
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            text[output["name"]] = text.get(output["name"], "") + _joined(output["text"])
            continue
        shown += 1
        for kind in ("text/plain", "text/html"):
            if kind in output.get("data", ()):
                text[f"output {shown}, {kind}"] = _joined(output["data"][kind])
    return text


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def execute(path: pathlib.Path) -> Notebook:
    """The notebook with fresh outputs. A cell that raises is an error."""
    import nbclient  # so that the rest of this file needs nothing
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    metadata = notebook["metadata"].copy()  # to which the client adds the version of Python
    run = {"timeout": 600, "record_timing": False, "coalesce_streams": True, "extra_arguments": ["--log-level=ERROR"]}
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}, **run).execute()
    return notebook | {"metadata": metadata}


def write(notebook: Notebook, path: pathlib.Path) -> None:
    import nbformat

    nbformat.write(nbformat.from_dict(notebook), path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=pathlib.Path)
    parser.add_argument("--update", action="store_true", help="store the fresh outputs")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    importlib.import_module("matplotlib.font_manager")  # or its first import, which takes long, says so in a notebook
    failed = False
    for path in options.notebooks:
        stored = json.loads(path.read_text("utf-8"))
        try:
            fresh = execute(path)
        except Exception as error:
            print(f"{path}: {error}")
            failed = True
            continue
        found = differences(stored, fresh)
        print(f"{path}: {'differs' if found else 'as stored'}", *found, sep="\n", flush=True)
        if options.update:
            write(fresh, path)
        failed |= bool(found) and not options.update
    return failed


if __name__ == "__main__":
    sys.exit(main())
