"""The table of operations is the OpenAPI document's: same names, methods, paths, bodies and replies, none of either
alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from service.api.openapi import document
from service.app.operations import OPERATIONS, STREAMS

# Of the server itself rather than of what it keeps: for load balancers and Prometheus, at no version of the API.
SYSTEM = {"livez", "readyz", "get_metrics"}


def documented() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    for path, methods in document()["paths"].items():
        for method, described in methods.items():
            yield described["operationId"], method.upper(), path, described


def test_the_table_has_every_operation_of_the_document_and_no_other() -> None:
    told = {name: (method, path) for name, method, path, _ in documented() if name not in SYSTEM}
    assert told == {route.name: (route.method, route.path) for route in (*OPERATIONS.values(), *STREAMS.values())}
    assert not OPERATIONS.keys() & STREAMS.keys()
    assert all(name == route.name for name, route in (OPERATIONS | STREAMS).items())


def test_the_table_names_the_schemas_of_the_document() -> None:
    for name, method, _, described in documented():
        if name not in OPERATIONS:
            continue
        operation = OPERATIONS[name]
        if operation.request is not None and method in ("GET", "DELETE"):
            queried = {part["name"] for part in described.get("parameters", ()) if part["in"] == "query"}
            assert queried == set(operation.request.model_fields), name
        else:
            body = described.get("requestBody", {}).get("content", {}).get("application/json", {})
            assert schema(body) == (operation.request and operation.request.__name__), name
        [success] = [code for code in described["responses"] if code in ("200", "201", "204")] or ["202"]
        reply = described["responses"][success].get("content", {}).get("application/json", {})
        assert schema(reply) == (operation.reply and operation.reply.__name__), name


def schema(content: dict[str, Any]) -> str | None:
    """The name of the schema that a body refers to."""
    found: str | None = content.get("schema", {}).get("$ref")
    return found and found.rpartition("/")[2]
