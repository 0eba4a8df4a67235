"""What each operation needs of the key that asks for it, by its name: that of its route, and of its RPC.

An operation that is not here needs admin on everything; a test finds it.
"""

from __future__ import annotations

from collections.abc import Mapping

from service.app.access import Need

# What these answer is found out only by looking: the engine asks again, of the collection it finds.
ANYWHERE = (
    "list_encoders", "list_collections", "list_operations", "get_operation", "cancel_operation", "retry_operation",
)  # fmt: skip
READ = (
    "get_collection",
    "get_diagnostics",
    "size",
    "list_kernels",
    "list_payload_indexes",
    "list_snapshots",
    "get_snapshot",
    "get_snapshot_schedule",
)
RECALL = ("recall", "get_memories", "get_memory", "get_content", "scroll", "count", "export", "get_snapshot_content")
WRITE = ("store", "import_rows", "patch_memory", "delete_memories", "delete_memory")
ADMIN = (
    "create_collection",
    "delete_collection",
    "train",
    "reencode",
    "retire_kernel",
    "put_payload_index",
    "delete_payload_index",
    "create_snapshot",
    "put_snapshot_content",
    "delete_snapshot",
    "put_snapshot_schedule",
    "delete_snapshot_schedule",
    "restore_snapshot",
)
KEYS = ("create_key", "list_keys", "revoke_key")

UNDECLARED = Need("admin", "everything")

NEEDS: Mapping[str, Need] = {
    **dict.fromkeys(ANYWHERE, Need("read", "anywhere")),
    **dict.fromkeys((*READ, *RECALL), Need("read")),
    **dict.fromkeys(WRITE, Need("write")),
    **dict.fromkeys(ADMIN, Need("admin")),
    **dict.fromkeys(KEYS, Need("admin", "everything")),
    "get_metrics": Need("read", "everything"),  # it names every collection and key
}


def need_of(operation: str) -> Need:
    return NEEDS.get(operation, UNDECLARED)
