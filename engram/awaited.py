"""`python -m engram.awaited` writes `engram/async_client.py`: `client.py` with everything awaited.

Both are shells around `asking`, method by method the same, and each must be typed for whoever uses it. So that nobody
writes the second, it is written from the first, and a test holds them equal.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
PATH = FOLDER / "async_client.py"
WORDS = {
    "Client": "AsyncClient",
    "Collection": "AsyncCollection",
    "Iterator": "AsyncIterator",
    "Transport": "AsyncTransport",
    "__enter__": "__aenter__",
    "__exit__": "__aexit__",
    "open_transport": "open_async_transport",
    "run": "run_async",
}
METHODS = re.compile(r"^    def (?!(?:__init__|with_options|collection)\()", re.M)  # these wait for nothing
CALLS = re.compile(r"(self\.(?:_do|close|_transport\.close)\(|(?<=return )run_async\()")

HEAD = '''"""The client, awaited, method by method. Written from `client.py` by `python -m engram.awaited`.

What would hold up the event loop is done in threads: reading pictures, and all of an engine in this process.
"""'''


def text() -> str:
    source = (FOLDER / "client.py").read_text()
    _, _, code = source.partition('"""\n\nfrom __future__')
    for word, awaited in WORDS.items():
        code = re.sub(rf"\b{word}\b", awaited, code)
    code = METHODS.sub("    async def ", code)
    code = CALLS.sub(r"await \1", code)
    code = code.replace("yield from memories", "for memory in memories:\n                yield memory")
    return _tidy(HEAD + "\n\nfrom __future__" + code)


def _tidy(code: str) -> str:
    for command in (["check", "--fix-only", "--quiet", "--select", "I"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(PATH), "-"]
        code = subprocess.run(ruff, input=code, capture_output=True, text=True, check=True).stdout
    return code


if __name__ == "__main__":
    PATH.write_text(text())
    sys.stdout.write(f"wrote {PATH}\n")
