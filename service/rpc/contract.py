"""What the messages of gRPC are, told from the operations' pydantic models by way of their JSON schemas.

Rules:
- A request has the path's parameters first, then the body's fields. A reply is the model of that name.
- What JSON leaves open is a `Value`: unions of types, and whatever a caller may choose freely.
- Where absent is not the same as empty or 0, a message tells them apart: `optional` for scalars; for lists and maps a
  message around them. A request's empty map, and its empty list where an empty one would be refused, count as absent.
- An array of float32 (`"format": "float"` in the schema) is a `Vector`; text that is base64 is `bytes`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from service.app.schemas import MemoryInput, ProblemDetails
from service.rpc.methods import METHODS, NULLS, Method

Schema = Mapping[str, Any]

SCALARS = {"string": "string", "integer": "int64", "number": "double", "boolean": "bool"}
ELEMENTS = {"items": "a list", "entries": "a map", "value": "a value that may be null"}
"""The one field of a message that is there to tell absent from empty; see `convert.py`."""

NULLS_ABOUT = "names of fields that are null, where null is not the same as absent"
OWN = ("Value", "Struct", "ValueList", "Vector", "Empty")
"""Messages written by hand in `generate.py`."""

NAMED_ELSEWHERE = (MemoryInput, ProblemDetails)
"""What a schema refers to without holding it, or what is sent beside replies."""


@dataclass(frozen=True)
class MessageField:
    label: str  # "", "optional" or "repeated"
    type: str
    name: str
    about: str = ""


@dataclass(frozen=True)
class Message:
    """`choice`: the name of the oneof that all fields but the first `always` are in; it is the discriminator."""

    name: str
    about: str
    fields: tuple[MessageField, ...]
    choice: str | None = None
    always: int = 0


@dataclass(frozen=True)
class Call:
    name: str
    about: str
    request: str
    reply: str


@dataclass
class Contract:
    calls: list[Call] = field(default_factory=list)
    messages: dict[str, Message] = field(default_factory=dict)


def contract() -> Contract:
    return _Builder().build()


class _Builder:
    def __init__(self) -> None:
        asked = [method.request for method in METHODS.values() if method.request is not None]
        replies = [method.reply for method in METHODS.values() if method.reply is not None]
        models: list[Any] = list(dict.fromkeys([*asked, *replies, *NAMED_ELSEWHERE]))
        mode: JsonSchemaMode = "validation"
        found, definitions = TypeAdapter.json_schemas(
            [(model, mode, TypeAdapter(model)) for model in models], ref_template="{model}"
        )
        self._definitions: dict[str, Schema] = definitions["$defs"]
        self._names: dict[Any, str] = {model: str(found[model, mode]["$ref"]) for model in models}
        if long := [name for name in self._definitions if "__" in name]:
            raise ValueError(f"two models have one name: {', '.join(long)}")
        self._asked = set(self._reachable([{"$ref": self._names[model]} for model in asked]))
        self._alone = set(_outside_unions(list(self._definitions.values())))
        self._contract = Contract()

    def build(self) -> Contract:
        for method in METHODS.values():
            self._call(method)
        self._message("ProblemDetails")
        return self._contract

    def _call(self, method: Method) -> None:
        name = f"{method.rpc}Request"
        path = tuple(MessageField("", "string", parameter) for parameter in method.path)
        body = Message(name, "", ())
        if method.request is not None:
            body = self._made(name, self._definitions[self._names[method.request]], True)
        if clash := {each.name for each in path} & {each.name for each in body.fields}:
            raise ValueError(f"{method.name}: {', '.join(clash)} is of the path and of the body")
        nulls = (MessageField("repeated", "string", NULLS, NULLS_ABOUT),) if method.nulls else ()
        self._add(Message(name, body.about, (*path, *body.fields, *nulls), body.choice, len(path)))
        reply = "Empty" if method.reply is None else self._message(self._names[method.reply])
        sent = f"stream {name}" if method.client_streams else name
        answered = f"stream {reply}" if method.server_streams else reply
        self._contract.calls.append(Call(method.rpc, method.about, sent, answered))

    def _add(self, message: Message) -> None:
        if message.name in self._contract.messages or message.name in OWN:
            raise ValueError(f"there are two messages {message.name}")
        if [f.name for f in message.fields if f.name in ELEMENTS] == [
            f.name for f in message.fields
        ] and message.fields:
            raise ValueError(f"{message.name}: the one field {message.fields[0].name} means something else here")
        self._contract.messages[message.name] = message

    def _message(self, name: str) -> str:
        """The message of a model, made on first use."""
        if name not in self._contract.messages:
            self._contract.messages[name] = Message(name, "", ())  # models may hold themselves
            made = self._made(name, self._definitions[name], name in self._asked)
            del self._contract.messages[name]
            self._add(made)
        return name

    def _made(self, name: str, schema: Schema, asked: bool) -> Message:
        about = str(schema.get("description", ""))
        if "discriminator" in schema:
            choice = str(schema["discriminator"]["propertyName"])
            variants = schema["discriminator"]["mapping"].items()
            fields = [
                MessageField("", self._variant(str(model), choice), tag)
                for tag, model in sorted(variants, key=lambda item: _position(schema, item[1]))
            ]
            return Message(name, about, tuple(fields), choice)
        required = schema.get("required", ())
        fields = [
            self._field(name, key, value, key in required, asked) for key, value in schema.get("properties", {}).items()
        ]
        return Message(name, about, tuple(fields))

    def _variant(self, model: str, choice: str) -> str:
        """A member of a union, without the field that says which it is: the oneof does. One that is also something by
        itself keeps it.
        """
        name = self._message(model)
        if name in self._alone:
            return name
        message = self._contract.messages[name]
        kept = tuple(f for f in message.fields if f.name != choice)
        self._contract.messages[name] = Message(name, message.about, kept)
        return name

    def _field(self, owner: str, name: str, schema: Schema, required: bool, asked: bool) -> MessageField:
        about = str(schema.get("description", ""))
        schema, nullable = _without_null(schema)
        nullable = nullable or ("default" in schema and schema["default"] is None)
        values = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
        if values and all(isinstance(value, str) for value in values):
            about = "; ".join(part for part in (about, " | ".join(values)) if part)
        label, kind = self._type(name, schema)
        if label == "repeated":
            absent = nullable or not (asked or required or "default" in schema)
            if absent and not (asked and schema.get("minItems", 0) > 0):
                return MessageField("", self._around("items", label, kind), name, about)
        elif label == "map":
            kind = f"map<string, {kind}>"
            if (nullable or not required) and not asked:
                return MessageField("", self._around("entries", "", kind), name, about)
            label = ""
        elif kind in (*SCALARS.values(), "bytes"):
            label = "optional" if asked or nullable or not required else ""
        return MessageField(label, kind, name, about)

    def _type(self, name: str, schema: Schema) -> tuple[str, str]:
        """(label, type): the label is `repeated`, `map` or nothing."""
        if "$ref" in schema:
            model = str(schema["$ref"]).rpartition("/")[2]
            definition = self._definitions[model]
            if "discriminator" in definition or "properties" in definition:
                return "", self._message(model)
            return self._type(name, definition)
        if "discriminator" in schema:
            return "", self._union(name, schema)
        kind = schema.get("type")
        if kind == "string" and schema.get("contentEncoding") == "base64":
            return "", "bytes"
        if kind in SCALARS:
            return "", SCALARS[kind]
        if "anyOf" in schema and {part.get("type") for part in schema["anyOf"]} == {"string"}:
            return "", "string"
        if kind == "array":
            return self._array(name, schema)
        if kind == "object":
            return self._map(name, schema)
        return "", "Value"

    def _array(self, name: str, schema: Schema) -> tuple[str, str]:
        items = schema.get("items")
        if items is None and len({str(_kind(part)) for part in schema.get("prefixItems", ())}) == 1:
            items = schema["prefixItems"][0]
        if not items:
            return "", "Value"
        if items.get("format") == "float":
            return "", "Vector"
        element, nullable = _without_null(items)
        label, kind = self._type(name.removesuffix("s"), element)
        if label or (nullable and kind in (*SCALARS.values(), "bytes")):
            return "repeated", "Value"
        return "repeated", self._around("value", "", kind) if nullable else kind

    def _map(self, name: str, schema: Schema) -> tuple[str, str]:
        values = list(schema.get("patternProperties", {}).values())
        values += [schema["additionalProperties"]] if isinstance(schema.get("additionalProperties"), dict) else []
        if len(values) != 1:
            return "", "Struct"
        value, nullable = _without_null(values[0])
        label, kind = self._type(name.removesuffix("s"), value)
        if kind == "Value" and not label:
            return "", "Struct"
        if label or (nullable and kind in SCALARS.values()):
            return "map", "Value"
        return "map", self._around("value", "", kind) if nullable else kind

    def _union(self, name: str, schema: Schema) -> str:
        """The message of a union that has no model of its own, named after the field that has it."""
        made = self._made(_camel(name), schema, True)
        known = self._contract.messages.get(made.name)
        if known is None:
            self._add(made)
        elif known != made:
            raise ValueError(f"two unions would be named {made.name}")
        return made.name

    def _around(self, element: str, label: str, kind: str) -> str:
        """The message around a list, a map or a value that may be absent."""
        inner = re.sub(r"map<string, (\w+)>", r"\1", kind)
        name = {"items": f"{_capital(inner)}List", "entries": f"{_capital(inner)}Map", "value": f"Maybe{inner}"}[
            element
        ]
        if name not in OWN:
            about = f"{ELEMENTS[element].capitalize()}, where absent is not the same as empty."
            self._contract.messages[name] = Message(name, about, (MessageField(label, kind, element),))
        return name

    def _reachable(self, schemas: list[Schema]) -> Iterator[str]:
        seen: set[str] = set()
        waiting: list[Any] = list(schemas)
        while waiting:
            part = waiting.pop()
            if isinstance(part, Mapping):
                reference = part.get("$ref")
                if isinstance(reference, str) and (name := reference.rpartition("/")[2]) not in seen:
                    seen.add(name)
                    yield name
                    waiting.append(self._definitions[name])
                waiting += part.values()
            elif isinstance(part, list):
                waiting += part


def _outside_unions(schemas: list[Any]) -> Iterator[str]:
    """The models that are referred to otherwise than as one of a union's."""
    while schemas:
        part = schemas.pop()
        if isinstance(part, Mapping):
            if isinstance(part.get("$ref"), str):
                yield str(part["$ref"]).rpartition("/")[2]
            schemas += [value for key, value in part.items() if not (key == "oneOf" and "discriminator" in part)]
        elif isinstance(part, list):
            schemas += part


def _position(schema: Schema, model: str) -> int:
    return [part.get("$ref") for part in schema["oneOf"]].index(model)


def _kind(schema: Schema) -> tuple[object, object]:
    return schema.get("type"), schema.get("$ref")


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _capital(kind: str) -> str:
    return kind[0].upper() + kind[1:]


def _without_null(schema: Schema) -> tuple[Schema, bool]:
    """The schema without null among its alternatives, and whether it was there."""
    parts = schema.get("anyOf")
    if parts is None:
        return schema, False
    rest = [part for part in parts if part.get("type") != "null"]
    others = {key: value for key, value in schema.items() if key != "anyOf"}
    if len(rest) == 1:
        return {**others, **rest[0]}, len(rest) < len(parts)
    return {**others, "anyOf": rest}, len(rest) < len(parts)
