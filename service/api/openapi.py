"""`python -m service.api.openapi` writes openapi/openapi.json, so that a change of the contract is seen in review."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from service.api.app import create_app

PATH = Path(__file__).resolve().parents[2] / "openapi" / "openapi.json"


def document() -> dict[str, Any]:
    return create_app(None).openapi()


def text() -> str:
    return json.dumps(document(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    PATH.write_text(text())
    sys.stdout.write(f"wrote {PATH}\n")
