"""The notebook of the class: executed as a reader would, and, in small, with every test run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "walkthrough.ipynb"

SMALLER = {
    '"rounds": 1,': '"rounds": 1, "refine.window": 8, "train.batch_size": 8,',
    '"lesson.prompts": 400': '"lesson.prompts": 48',
    '"lesson.held_out": 200': '"lesson.held_out": 8',
    '"heldout", 200, 2': '"heldout", 8, 2',
    "longer_first[:100], longer_first[100:]": "longer_first[:8], longer_first[8:]",
    "recipe.lesson.seed_pairs, recipe.seed": "16, recipe.seed",
}
"""The same cells on less of everything."""


def cells(kind: str) -> Iterator[dict[str, Any]]:
    """The notebook's cells of one kind."""
    notebook = msgspec.json.decode(NOTEBOOK.read_bytes())
    return (cell for cell in notebook["cells"] if cell["cell_type"] == kind)


def printed(cell: dict[str, Any]) -> str:
    """What a cell wrote."""
    return "".join(text for output in cell["outputs"] for text in output.get("text", []))


def test_every_cell_runs_in_small(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="the lesson needs torch or mlx")
    monkeypatch.setenv("MPLBACKEND", "agg")
    source = "\n\n".join("".join(cell["source"]) for cell in cells("code"))
    for large, small in SMALLER.items():
        assert large in source
        source = source.replace(large, small)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    exec(compile(source, str(NOTEBOOK), "exec"), {"__name__": "walkthrough"})
    said = capsys.readouterr().out
    assert said.count("first loss 0.6931") == 2, "every training stage begins at ln 2"
    assert "margins at the first step: 0.0" in said


def test_the_outputs_on_the_page_are_whole() -> None:
    codes = list(cells("code"))
    assert [cell["execution_count"] for cell in codes] == list(range(1, len(codes) + 1)), "executed once, from the top"
    assert sum(output["output_type"] == "display_data" for cell in codes for output in cell["outputs"]) == 3
    assert not [output for cell in codes for output in cell["outputs"] if output["output_type"] == "error"]
    assert not re.search(r"/(home|root|tmp|work|Users)/", "".join(printed(cell) for cell in codes))
    assert sum("**" in (text := "".join(cell["source"])) and "<details>" in text for cell in cells("markdown")) >= 4


@pytest.mark.long
@pytest.mark.loopback
def test_it_executes_as_a_notebook_and_prints_what_the_page_shows(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("torch", reason="the lesson needs torch or mlx")
    notebook = nbformat.read(NOTEBOOK, 4)
    before = [printed(cell) for cell in cells("code")]
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    after = ["".join(o.get("text", "") for o in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    # The number of threads rounds differently: the first parts are the same to the digit, the win rate to a few points.
    assert after[1:3] == before[1:3]
    rates = [[float(found) for found in re.findall(r"win rate +([\d.]+)", "".join(texts))] for texts in (before, after)]
    assert len(rates[0]) == 3
    assert rates[1] == pytest.approx(rates[0], abs=4.0)
