"""What a report writes, and its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.papers.__main__ import main
from benchmarks.papers.report import Report, formatted


@pytest.mark.parametrize(
    ("cell", "printed"),
    [
        (None, "–"),
        ("a|b", r"a\|b"),
        (12345, "12,345"),
        (0.12345, "0.123"),
        (1234.5, "1,234.500"),
        (0.0, "0.000"),
        (0.0001, "1.0e-04"),
        (float("nan"), "–"),
        (float("-inf"), "-∞"),
        ([1.0, 2.0, 3.0], "2.000 ± 1.000"),
        ([0.5], "0.500"),
        ([], "–"),
    ],
)
def test_numbers(cell: object, printed: str) -> None:
    assert formatted(cell) == printed  # type: ignore[arg-type]


def test_a_report_holds_its_head_tables_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("A title", tmp_path / "out", "slug", "quick", [0, 1])
    report.text("Some words.")
    report.table(["name", "value"], [["one", 0.25], ["two", [1.0, 2.0]]], "The values", digits=2)
    figure = Figure()
    figure.subplots().plot([1, 2], [3, 4])
    drawn = report.figure("curve", figure, "A curve")
    report.progress("half way")
    lines = report.write().read_text().splitlines()
    assert lines[0] == "# A title"
    assert "| command | `PAPERS=quick make papers-slug` |" in lines
    assert "| seeds | 0, 1 |" in lines
    assert any(line.startswith("| machine | ") for line in lines)
    assert lines.index("Some words.") < lines.index("**The values**") < lines.index("| one | 0.25 |")
    assert "|---|--:|" in lines
    assert "| two | 1.50 ± 0.71 |" in lines
    assert "![A curve](slug-curve.png)" in lines
    with Image.open(drawn) as image:
        assert image.width > 100
    assert "half way" in capsys.readouterr().out


def test_a_row_that_does_not_fit_its_headers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 cells under 2 headers"):
        Report("t", tmp_path, "s", "quick", 0).table(["a", "b"], [[1]], "c")


@pytest.mark.parametrize(
    ("arguments", "size", "said"),
    [
        (["uhopp"], "quick", "no such paper: uhopp; there are uhop, nonparametric, reclag"),
        (["reclag"], "fast", "PAPERS is quick or full, not fast"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(
    arguments: list[str], size: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["papers", *arguments])
    monkeypatch.setenv("PAPERS", size)
    with pytest.raises(SystemExit):
        main()
    assert said in capsys.readouterr().err


def test_the_command_says_which_data_a_paper_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["papers", "reclag"])
    monkeypatch.setenv("PAPERS", "quick")
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    monkeypatch.setattr("benchmarks.papers.__main__.RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=r"^reclag: Fashion-MNIST: FASHION_MNIST=.* holds no such set"):
        main()
