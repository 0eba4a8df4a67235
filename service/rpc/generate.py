"""`python -m service.rpc.generate` writes engram.proto and its descriptor from the operations and their models.

Rules:
- A field keeps the number that the proto beside this file gives it. A new one takes the next; one that is gone, or has
  another type, leaves its number reserved.
- Nothing is written by hand but the messages in `HEAD`.
"""

from __future__ import annotations

import re
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from service.rpc.contract import Contract, Message, MessageField, contract

PROTO = Path(__file__).with_name("engram.proto")
DESCRIPTOR = Path(__file__).with_name("engram.binpb")
COMMENT_WIDTH = 108

HEAD = """\
// Written by `python -m service.rpc.generate`: change the models, not this file.

syntax = "proto3";

package engram.v1;

// Values of float32, packed little-endian: four bytes each.
message Vector {
  bytes f4 = 1;
}

// Anything JSON can hold. Whole numbers stay whole numbers.
message Value {
  oneof kind {
    bool null_value = 1;
    bool bool_value = 2;
    int64 int_value = 3;
    uint64 uint_value = 4;  // above what int64 holds
    double double_value = 5;
    string string_value = 6;
    ValueList list_value = 7;
    Struct struct_value = 8;
    bytes json_value = 9;  // JSON: what is nested deeper than protobuf reads
  }
}

message ValueList {
  repeated Value items = 1;
}

message Struct {
  map<string, Value> fields = 1;
}

message Empty {
}
"""


@dataclass
class Numbers:
    """The numbers of one message: by name and type, and those that are taken."""

    of: dict[str, tuple[str, int]] = field(default_factory=dict)
    reserved: set[int] = field(default_factory=set)

    def take(self, each: MessageField) -> int:
        known = self.of.get(each.name)
        if known is not None and known[0] == each.type:
            return known[1]
        number = max((*self.reserved, *(taken for _, taken in self.of.values())), default=0) + 1
        if known is not None:
            self.reserved.add(known[1])
        self.of[each.name] = (each.type, number)
        return number


def numbers_in(proto: str) -> dict[str, Numbers]:
    """What a proto that was written here has given."""
    found: dict[str, Numbers] = {}
    current = Numbers()
    for line in proto.splitlines():
        if opened := re.match(r"message (\w+) {", line):
            current = found.setdefault(opened[1], Numbers())
        elif taken := re.match(r"\s+reserved (.+);", line):
            current.reserved |= {int(number) for number in taken[1].split(", ")}
        elif given := re.match(r"\s+(?:optional |repeated )?(map<.+>|[\w.]+) (\w+) = (\d+);", line):
            current.of[given[2]] = (given[1], int(given[3]))
    return found


def text(of: Contract, former: str) -> str:
    """The proto; `former` is the one whose numbers are kept."""
    numbers = numbers_in(former)
    parts = [HEAD]
    rpcs = []
    for call in of.calls:
        signature = f"rpc {call.name}({call.request}) returns ({call.reply});"
        rpcs.append(f"{_comment(call.about, '  ')}  {signature}\n")
    parts.append("service Engram {\n" + "\n".join(rpcs) + "}\n")
    parts += [_message(message, numbers.get(message.name, Numbers())) for message in of.messages.values()]
    return "\n".join(parts)


def _message(message: Message, numbers: Numbers) -> str:
    names = {each.name for each in message.fields}
    lines = []
    for position, each in enumerate(message.fields):
        indent = "  "
        if message.choice and position >= message.always:
            lines += [f"  oneof {message.choice} {{\n"] if position == message.always else []
            indent = "    "
        label = f"{each.label} " if each.label else ""
        lines.append(f"{_comment(each.about, indent)}{indent}{label}{each.type} {each.name} = {numbers.take(each)};\n")
    lines += ["  }\n"] if message.choice else []
    gone = sorted(numbers.reserved | {number for name, (_, number) in numbers.of.items() if name not in names})
    lines += [f"  reserved {', '.join(map(str, gone))};\n"] if gone else []
    return f"{_comment(message.about, '')}message {message.name} {{\n{''.join(lines)}}}\n"


def _comment(about: str, indent: str) -> str:
    paragraphs = [" ".join(paragraph.split()) for paragraph in about.split("\n\n")] if about else []
    lines = [line for paragraph in paragraphs for line in (*textwrap.wrap(paragraph, COMMENT_WIDTH), "")][:-1]
    return "".join(f"{indent}// {line}".rstrip() + "\n" for line in lines)


def descriptor(proto: str) -> bytes:
    """The proto compiled: a serialised `FileDescriptorSet`."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        source, compiled = Path(folder, PROTO.name), Path(folder, DESCRIPTOR.name)
        source.write_text(proto)
        if code := protoc.main(["", f"-I{folder}", f"--descriptor_set_out={compiled}", PROTO.name]):
            raise SystemExit(code)
        return compiled.read_bytes()


def main() -> None:
    proto = text(contract(), PROTO.read_text() if PROTO.exists() else "")
    PROTO.write_text(proto)
    DESCRIPTOR.write_bytes(descriptor(proto))
    sys.stdout.write(f"wrote {PROTO} and {DESCRIPTOR.name}\n")


if __name__ == "__main__":
    main()
