"""API keys as rows, on either database."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from service.errors import AdminKeyNeeded, Conflict, KeyNotFound
from service.storage import keys as keys_module
from service.storage.keys import StoredKey

NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)


def key(number: int) -> StoredKey:
    return StoredKey(
        id=f"k{number}", name="web", hash=f"{number:064x}", hint="engram_abcde", scopes={"*": "read", "a-*": "write"},
        rate_limit="3/second", concurrent_max=2, created_at=NOW, expires_at=NOW + timedelta(days=1),
    )  # fmt: skip


def anything(known):
    pass


def test_keys_come_back_as_they_were_made(storage):
    for number in (2, 1):
        storage.repository.add_key(key(number), anything)
    storage.repository.note_used({"k1": NOW, "gone": NOW})
    assert storage.repository.list_keys() == [key(2), replace(key(1), last_used_at=NOW)]


def test_revoking_is_kept_and_done_once(storage):
    storage.repository.add_key(key(1), anything)
    storage.repository.revoke_key("k1", NOW, anything)
    storage.repository.revoke_key("k1", NOW + timedelta(days=1), anything)
    assert storage.repository.list_keys() == [replace(key(1), revoked_at=NOW)]
    with pytest.raises(KeyNotFound):
        storage.repository.revoke_key("k2", NOW, anything)


def test_a_check_sees_the_others_and_can_refuse(storage):
    seen = []

    def refuse(known):
        seen.append([one.id for one in known])
        raise AdminKeyNeeded("no")

    storage.repository.add_key(key(1), anything)
    with pytest.raises(AdminKeyNeeded):
        storage.repository.add_key(key(2), refuse)
    with pytest.raises(AdminKeyNeeded):
        storage.repository.revoke_key("k1", NOW, refuse)
    assert seen == [["k1"], []]
    assert storage.repository.list_keys() == [key(1)]


def test_when_full_the_key_that_was_revoked_first_makes_room(storage, monkeypatch):
    monkeypatch.setattr(keys_module, "KEYS_MAX", 3)
    for number in range(3):
        storage.repository.add_key(key(number), anything)
    with pytest.raises(Conflict, match="3 keys already"):
        storage.repository.add_key(key(3), anything)
    storage.repository.revoke_key("k2", NOW, anything)
    storage.repository.revoke_key("k0", NOW + timedelta(seconds=1), anything)
    storage.repository.add_key(key(3), anything)
    assert [one.id for one in storage.repository.list_keys()] == ["k0", "k1", "k3"]
