"""API keys: made, listed, revoked, and recognised.

Rules:
- A key is 256 random bits; it is shown once and stored as its SHA-256.
- Keys are recognised in memory, in microseconds. What another process changed in the database is seen at the next
  `refresh`.
- Once there is any key, revoked ones among them, or the settings have one, every request needs one: no revocation opens
  a server again. That is why the first key, and the last one left, is admin on everything.
- A key that is unknown, revoked or expired is refused in the same words.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import cast

from service.app.access import EVERYTHING, OWNER, Caller, Level
from service.app.key_schemas import KeyInfo, KeyList, KeyRequest, NewKey
from service.errors import AdminKeyNeeded, Unauthorized
from service.storage.keys import StoredKey
from service.storage.repository import Repository

PREFIX = "engram_"
KEY_BYTES = 32
HINT = len(PREFIX) + 5  # thirty bits of 256: enough to tell keys apart, of no help in guessing one
SETTINGS_KEY = "ENGRAM_API_KEY"  # the name under which the key of the settings is counted
USED_EVERY = timedelta(minutes=1)  # how exactly it is kept when a key was last used: a write a minute, not a request

REFUSED = "send a valid key in the header Authorization: Bearer <key>; commands take ENGRAM_API_KEY, clients api_key="


@dataclass(frozen=True)
class _Known:
    """A key that may be let in."""

    digest: bytes
    caller: Caller
    expires_at: datetime | None = None


@dataclass(frozen=True)
class _Cache:
    by_digest: Mapping[bytes, _Known] = field(default_factory=dict)
    rows: tuple[StoredKey, ...] = ()


class Keys:
    """Safe to use from several threads."""

    def __init__(self, repository: Repository, settings_key: str | None = None) -> None:
        self._repository = repository
        self._settings_key = settings_key
        self._cache = _Cache()
        self._refreshing = threading.Lock()
        self._used: dict[str, datetime] = {}
        self._noted_at = datetime.now(UTC)
        self.refresh()

    # --- recognised ---

    @property
    def required(self) -> bool:
        return self._settings_key is not None or bool(self._cache.rows)

    @property
    def has_admin(self) -> bool:
        """Whether anybody can be let in who may make keys."""
        return self._settings_key is not None or _has_admin(self._cache.rows)

    @property
    def names(self) -> frozenset[str]:
        """Of the keys that may be let in."""
        return frozenset(known.caller.name or "" for known in self._cache.by_digest.values())

    def caller(self, authorization: bytes) -> Caller:
        """Who sends this Authorization header. Raises `Unauthorized`."""
        if not self.required:
            return OWNER
        scheme, _, key = authorization.partition(b" ")
        digest = sha256(key.strip()).digest()
        # Found by the hash of what was sent, which tells nothing of a key's own beginning; compared in constant time.
        known = self._cache.by_digest.get(digest)
        same = hmac.compare_digest(digest, bytes(len(digest)) if known is None else known.digest)
        now = datetime.now(UTC)
        expired = known is not None and known.expires_at is not None and known.expires_at <= now
        if known is None or not same or expired or scheme.lower() != b"bearer":
            raise Unauthorized(REFUSED)
        if known.caller.key_id is not None:
            self._used[known.caller.key_id] = now
        return known.caller

    def refresh(self) -> None:
        """Follow the database, and keep there when keys were used."""
        with self._refreshing:
            self._note_used()
            rows = tuple(self._repository.list_keys())
            known = {bytes.fromhex(row.hash): _known(row) for row in rows if row.revoked_at is None}
            if self._settings_key is not None:
                digest = sha256(self._settings_key.encode()).digest()
                known[digest] = _Known(digest, Caller(SETTINGS_KEY, {EVERYTHING: "admin"}))
            self._cache = _Cache(known, rows)

    def close(self) -> None:
        with self._refreshing:
            self._note_used(at_once=True)

    def _note_used(self, at_once: bool = False) -> None:
        now = datetime.now(UTC)
        if not self._used or (not at_once and now - self._noted_at < USED_EVERY):
            return
        self._noted_at = now
        used, self._used = self._used, {}
        self._repository.note_used({key_id: _coarse(when) for key_id, when in dict(used).items()})

    # --- made, listed, revoked ---

    def create(self, request: KeyRequest) -> NewKey:
        """Raises `AdminKeyNeeded` where it would be the first and is not admin on everything, `Conflict`."""
        key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
        stored = StoredKey(
            id=secrets.token_hex(8), name=request.name, hash=sha256(key.encode()).hexdigest(), hint=key[:HINT],
            scopes=request.scopes, rate_limit=request.rate_limit, concurrent_max=request.concurrent_max,
            created_at=datetime.now(UTC), expires_at=request.expires_at,
        )  # fmt: skip
        self._repository.add_key(stored, lambda known: self._check_admin([*known, stored]))
        self.refresh()
        return NewKey(**_info(stored, None).model_dump(), key=key)

    def listed(self) -> KeyList:
        """All, revoked ones among them, in the order they were made."""
        self.refresh()
        return KeyList(keys=[_info(row, self._used.get(row.id)) for row in self._cache.rows])

    def revoke(self, key_id: str) -> None:
        """From now on it is refused. Raises `KeyNotFound`, and `AdminKeyNeeded` where it is the last that is admin on
        everything.
        """
        self._repository.revoke_key(key_id, datetime.now(UTC), self._check_admin)
        self.refresh()

    def _check_admin(self, rows: Sequence[StoredKey]) -> None:
        if self._settings_key is None and not _has_admin(rows):
            raise AdminKeyNeeded(
                f"a key that is admin on * is needed first, or the setting {SETTINGS_KEY}: else nobody could make keys"
            )


def _has_admin(rows: Sequence[StoredKey]) -> bool:
    now = datetime.now(UTC)
    return any(
        row.scopes.get(EVERYTHING) == "admin"
        and row.revoked_at is None
        and (row.expires_at is None or row.expires_at > now)
        for row in rows
    )


def _known(row: StoredKey) -> _Known:
    caller = Caller(row.name, _scopes(row), row.id, row.rate_limit, row.concurrent_max)
    return _Known(bytes.fromhex(row.hash), caller, row.expires_at)


def _info(row: StoredKey, used: datetime | None) -> KeyInfo:
    row = row if used is None else replace(row, last_used_at=_coarse(used))
    return KeyInfo(
        id=row.id, name=row.name, hint=row.hint, scopes=_scopes(row), rate_limit=row.rate_limit,
        concurrent_max=row.concurrent_max, created_at=row.created_at.isoformat(), expires_at=_iso(row.expires_at),
        revoked_at=_iso(row.revoked_at), last_used_at=_iso(row.last_used_at),
    )  # fmt: skip


def _scopes(row: StoredKey) -> dict[str, Level]:
    return cast(dict[str, Level], dict(row.scopes))  # checked when the key was made


def _coarse(when: datetime) -> datetime:
    return when.replace(second=0, microsecond=0)


def _iso(when: datetime | None) -> str | None:
    return None if when is None else when.isoformat()
