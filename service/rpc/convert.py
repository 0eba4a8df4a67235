"""Messages to dictionaries of the API's shape and back, by descriptor: the one place where the two meet.

Rules:
- What a message is made of is looked up once and kept as a function; values of vectors never become Python's floats on
  the way in.
- `asked` (a request): what is absent is left out, so that the models' defaults apply, and a field that nobody knows is
  refused. Else (a reply): what is absent is None.
- Nothing here brings torch, nor pydantic: a client reads replies by the same functions.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from datetime import date
from functools import cache, partial
from typing import Any

import numpy as np
import orjson
from google.protobuf.unknown_fields import UnknownFieldSet

from service.errors import InvalidRequest, MalformedBody
from service.rpc.messages import message

Make = Callable[[Any], Any]

DEPTH_MAX = 16  # of a Value in messages; protobuf reads 100 messages deep, and a level of JSON takes three
AROUND = ("items", "entries", "value")  # the one field of a message that is there to tell absent from empty
INT64, UINT64 = 2**63, 2**64

Value = message("Value")
ValueList = message("ValueList")
Struct = message("Struct")
Vector = message("Vector")


# --- to messages ------------------------------------------------------------------------------------------------------


def to_message(name: str, body: Mapping[str, Any]) -> Any:
    """The message of that name with `body`'s fields; None is absent, but in a `Value`.

    Raises `InvalidRequest` for a field that it has not and for a value of another type, naming it.
    """
    return _to(message(name).DESCRIPTOR.full_name)(body)


@cache
def _to(full_name: str) -> Make:
    made = message(full_name.rpartition(".")[2])
    descriptor = made.DESCRIPTOR
    own: dict[Any, Make] = {Value: value, Struct: struct, Vector: vector}
    if made in own:
        return own[made]
    around = _around(descriptor)
    if around is not None:
        inside = _to_field(around)
        return lambda body: made(**{around.name: body if body is None or inside is None else inside(body)})
    fields = {field.name: _later(field) for field in descriptor.fields}
    choice = _choice(descriptor)
    open_ = {field.name for field in descriptor.fields if _holds_anything(field)}  # a null is one of their values

    def build(body: Any) -> Any:
        if not isinstance(body, Mapping):
            raise InvalidRequest(f"is an object, not {_shown(body)}")
        if choice is not None:
            body = _chosen(choice, body)
        given = {}
        for name, content in body.items():
            if content is None and name not in open_:
                continue
            try:
                convert = fields[name]()
                given[name] = content if convert is None else convert(content)
            except KeyError:
                raise InvalidRequest(f"{name}: is not a field of this request") from None
            except InvalidRequest as error:
                raise InvalidRequest(_joined(name, error.detail)) from None
        return made(**given)

    return build


def _later(field: Any) -> Callable[[], Make | None]:
    """A field's conversion, found when it is first needed: messages may hold themselves."""
    return cache(lambda: _to_field(field))


def _to_field(field: Any) -> Make | None:
    """None: as it is."""
    if _is_map(field):
        inner = _to_element(field.message_type.fields_by_name["value"])
        return _mapping(inner)
    inner = _to_element(field)
    return _listed(inner) if _is_repeated(field) else inner


def _to_element(field: Any) -> Make | None:
    if field.message_type is not None:
        return _to(field.message_type.full_name)
    if field.type == field.TYPE_BYTES:
        return _bytes
    if field.type == field.TYPE_BOOL:
        return _bool
    if field.type == field.TYPE_STRING:
        return _string
    return _whole if field.cpp_type == field.CPPTYPE_INT64 else _number


def _listed(inner: Make | None) -> Make:
    def build(items: Any) -> list[Any]:
        if isinstance(items, str | bytes | Mapping) or not hasattr(items, "__iter__"):
            raise InvalidRequest(f"is a list, not {_shown(items)}")
        if inner is None:
            return list(items)
        made = []
        for position, item in enumerate(items):
            try:
                made.append(inner(item))
            except InvalidRequest as error:
                raise InvalidRequest(_joined(str(position), error.detail)) from None
        return made

    return build


def _mapping(inner: Make | None) -> Make:
    def build(items: Any) -> dict[str, Any]:
        if not isinstance(items, Mapping):
            raise InvalidRequest(f"is an object, not {_shown(items)}")
        made = {}
        for key, item in items.items():
            if not isinstance(key, str):
                raise InvalidRequest(f"a name is a text, not {_shown(key)}")
            try:
                made[key] = item if inner is None else inner(item)
            except InvalidRequest as error:
                raise InvalidRequest(_joined(key, error.detail)) from None
        return made

    return build


def value(content: Any, depth: int = 0) -> Any:
    """Anything JSON can hold as a `Value`."""
    if content is None:
        return Value(null_value=True)
    if isinstance(content, bool):
        return Value(bool_value=content)
    if isinstance(content, str):
        return Value(string_value=_string(content))
    if isinstance(content, int):
        if -INT64 <= content < INT64:
            return Value(int_value=content)
        if 0 < content < UINT64:
            return Value(uint_value=content)
        raise InvalidRequest("a whole number has at most 64 bits")
    if isinstance(content, float):
        return Value(double_value=content)
    if depth >= DEPTH_MAX:
        return Value(json_value=_dump(content))
    if isinstance(content, Mapping):
        return Value(struct_value=struct(content, depth))
    if isinstance(content, list | tuple):
        return Value(list_value=ValueList(items=[value(item, depth + 1) for item in content]))
    return value(orjson.loads(_dump(content)), depth)


def struct(content: Any, depth: int = 0) -> Any:
    if not isinstance(content, Mapping):
        raise InvalidRequest(f"is an object, not {_shown(content)}")
    made = Struct()
    fields = made.fields
    for key, item in content.items():
        if not isinstance(key, str):
            raise InvalidRequest(f"a name is a text, not {_shown(key)}")
        fields[_text(key)].CopyFrom(value(item, depth + 1))
    return made


def vector(values: Any) -> Any:
    """A list of numbers, or an array of one axis."""
    if not isinstance(values, np.ndarray | list | tuple):
        raise InvalidRequest("a vector is a list of numbers")
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        raise InvalidRequest("a vector is a list of numbers") from None
    if array.ndim != 1 or array.dtype.kind not in "fiu":
        raise InvalidRequest("a vector is a list of numbers")
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, which the engine refuses with a code
        return Vector(f4=array.astype("<f4").tobytes())


def _text(content: str) -> str:
    try:
        content.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("the text holds half of a surrogate pair, which is no character") from None
    return content


def _bytes(content: Any) -> bytes:
    """Bytes, or text that is base64, as replies have it."""
    if isinstance(content, str):
        try:
            return base64.b64decode(content, validate=True)
        except ValueError:
            raise InvalidRequest("not valid base64") from None
    if not isinstance(content, bytes | bytearray | memoryview):
        raise InvalidRequest(f"are bytes, not {_shown(content)}")
    return bytes(content)


def _bool(content: Any) -> bool:
    if not isinstance(content, bool | np.bool_):
        raise InvalidRequest(f"is true or false, not {_shown(content)}")
    return bool(content)


def _whole(content: Any) -> int:
    number = _number(content)
    if number != number // 1 or not -INT64 <= number < INT64:
        raise InvalidRequest(f"is a whole number of at most 64 bits, not {_shown(content)}")
    return int(number)


def _number(content: Any) -> Any:
    if isinstance(content, bool | str) or not hasattr(content, "__float__"):
        raise InvalidRequest(f"is a number, not {_shown(content)}")
    return content


def _string(content: Any) -> str:
    if isinstance(content, date):
        return content.isoformat()  # as in JSON; a datetime is a date
    if not isinstance(content, str):
        raise InvalidRequest(f"is a text, not {_shown(content)}")
    return content if content.isascii() else _text(content)


def _dump(content: Any) -> bytes:
    try:
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"has no form in JSON: {error}") from None


def _chosen(choice: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    """The member of a union that the discriminator names, under the field of that name."""
    tag = body.get(choice.name)
    fields = {field.name for field in choice.fields}
    if tag not in fields:
        tags = ", ".join(repr(field.name) for field in choice.fields)
        said = f"is one of {tags}, not {tag!r}" if choice.name in body else "is missing"
        raise InvalidRequest(f"{choice.name}: {said}")
    beside = {field.name for field in choice.containing_type.fields} - fields
    inside = {key: content for key, content in body.items() if key != choice.name and key not in beside}
    return {str(tag): inside, **{key: content for key, content in body.items() if key in beside}}


# --- to dictionaries --------------------------------------------------------------------------------------------------


def to_dict(found: Any, *, asked: bool) -> dict[str, Any]:
    """Raises `MalformedBody`, and in a request `InvalidRequest` for a field that this server does not know."""
    body: dict[str, Any] = _from(found.DESCRIPTOR.full_name, asked)(found)
    return body


@cache
def _from(full_name: str, asked: bool) -> Make:
    own: dict[Any, Make] = {Value: plain, Struct: _plain_struct, Vector: _array if asked else _floats}
    if (made := message(full_name.rpartition(".")[2])) in own:
        return own[made]
    descriptor = made.DESCRIPTOR
    around = _around(descriptor)
    if around is not None:
        inside = _from_field(around, asked)
        if _is_repeated(around):
            return lambda found: inside(getattr(found, around.name))
        return lambda found: inside(getattr(found, around.name)) if found.HasField(around.name) else None
    choice = _choice(descriptor)
    convert = _request(descriptor) if asked else _reply(descriptor)
    return convert if choice is None else _undone(choice, convert)


def _request(descriptor: Any) -> Make:
    fields = {field.name: cache(lambda field=field: _from_field(field, True)) for field in descriptor.fields}

    def build(found: Any) -> dict[str, Any]:
        if len(UnknownFieldSet(found)):
            raise InvalidRequest(f"{descriptor.name} has a field that this server does not know")
        return {field.name: fields[field.name]()(content) for field, content in found.ListFields()}

    return build


def _reply(descriptor: Any) -> Make:
    fields = [(f.name, f.has_presence, cache(lambda f=f: _from_field(f, False))) for f in descriptor.fields]

    def build(found: Any) -> dict[str, Any]:
        return {
            name: None if presence and not found.HasField(name) else convert()(getattr(found, name))
            for name, presence, convert in fields
        }

    return build


def _undone(choice: Any, convert: Make) -> Make:
    """A union's member beside its discriminator, as JSON has it."""

    def build(found: Any) -> dict[str, Any]:
        made: dict[str, Any] = convert(found)
        tag = found.WhichOneof(choice.name)
        for field in choice.fields:
            inside = made.pop(field.name, None)
            if field.name == tag:
                made = {**made, **inside, choice.name: tag}
        return made

    return build


def _from_field(field: Any, asked: bool) -> Make:
    if _is_map(field):
        inner = _from_element(field.message_type.fields_by_name["value"], asked)
        return _by_name if inner is None else partial(_each_value, inner)
    inner = _from_element(field, asked)
    if _is_repeated(field):
        return list if inner is None else partial(_each, inner)
    return inner or _same


def _each(inner: Make, found: Any) -> list[Any]:
    return [inner(item) for item in found]


def _each_value(inner: Make, found: Any) -> dict[str, Any]:
    """By name: protobuf's maps have no order of their own, and a collection's spaces do."""
    return {key: inner(found[key]) for key in sorted(found)}


def _by_name(found: Any) -> dict[str, Any]:
    return {key: found[key] for key in sorted(found)}


def _from_element(field: Any, asked: bool) -> Make | None:
    return None if field.message_type is None else _from(field.message_type.full_name, asked)


def plain(found: Any) -> Any:
    """What a `Value` holds. Raises `MalformedBody` where its JSON is none."""
    kind = found.WhichOneof("kind")
    if kind == "struct_value":
        return _plain_struct(found.struct_value)
    if kind == "list_value":
        return [plain(item) for item in found.list_value.items]
    if kind in (None, "null_value"):
        return None
    if kind == "json_value":
        try:
            return orjson.loads(found.json_value)
        except orjson.JSONDecodeError as error:
            raise MalformedBody(f"a json_value is not JSON: {error}") from None
    return getattr(found, kind)


def _plain_struct(found: Any) -> dict[str, Any]:
    fields = found.fields
    return {key: plain(fields[key]) for key in fields}


def _array(found: Any) -> Any:
    """Float32 over the message's own bytes; the bytes where they are none, which the models refuse by name."""
    return found.f4 if len(found.f4) % 4 else np.frombuffer(found.f4, "<f4")


def _floats(found: Any) -> list[float]:
    values: list[float] = np.frombuffer(found.f4, "<f4").tolist()
    return values


# --- of descriptors ---------------------------------------------------------------------------------------------------


def _same(found: Any) -> Any:
    return found


def _is_repeated(field: Any) -> bool:
    said = getattr(field, "is_repeated", None)  # since protobuf 6.31, which then warns of `label`
    return bool(field.label == field.LABEL_REPEATED if said is None else said)


def _is_map(field: Any) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _holds_anything(field: Any) -> bool:
    of = field.message_type
    return of is not None and of.full_name == Value.DESCRIPTOR.full_name and not _is_repeated(field)


def _around(descriptor: Any) -> Any:
    """The one field of a message around a list, a map or a value that may be absent; None in all others."""
    fields = descriptor.fields
    return fields[0] if len(fields) == 1 and fields[0].name in AROUND else None


def _choice(descriptor: Any) -> Any:
    """The oneof whose name is the discriminator of a union. (`optional` makes oneofs too, of one field.)"""
    real = [oneof for oneof in descriptor.oneofs if not oneof.name.startswith("_")]
    return real[0] if real else None


def _joined(name: str, detail: str) -> str:
    """`cue` and `text: is a text` are `cue.text: is a text`; a sentence without a place follows a colon."""
    head, colon, _ = detail.partition(":")
    place = bool(colon) and " " not in head
    return f"{name}.{detail}" if place else f"{name}: {detail}"


def _shown(content: object) -> str:
    return f"{type(content).__name__} {repr(content)[:60]}"
