"""The examples of docs/encoders that need nothing but the installation, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "encoders"
EXPECTED = {"README": "'sentence'", "pixels": "noise\n", "pixel_text": "noise\n", "sentence": "b\n", "bridge": "cat\n"}


@pytest.mark.parametrize("page", EXPECTED)
def test_its_example_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})
    assert EXPECTED[page] in capsys.readouterr().out
