"""gRPC, beside REST: the same operations, generated from the same table and the same models.

- `engram.proto` and its stubs are written by `python -m service.rpc.generate`; nobody edits them.
- `contract` says what the messages are, `convert` is the one place where messages and dictionaries meet.
"""
