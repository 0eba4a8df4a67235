"""The client's methods for API keys, the same over HTTP and in process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from engram import Client
from service.errors import AdminKeyNeeded, Forbidden, InvalidRequest, KeyNotFound, Unauthorized

Serving = Callable[..., AbstractContextManager[str]]


@pytest.fixture(params=["over HTTP", "in process"])
def owner(request: pytest.FixtureRequest, serving: Serving, tmp_path: Path) -> Iterator[Client]:
    """Of a folder of its own: a key closes a server to whoever else asks it."""
    if request.param == "in process":
        with Client(path=tmp_path) as client:
            yield client
    else:
        with serving(tmp_path) as url, Client(url) as client:
            yield client


def test_keys_are_made_listed_and_revoked(owner: Client) -> None:
    with pytest.raises(AdminKeyNeeded):
        owner.create_key("web", {"*": "read"})
    with pytest.raises(InvalidRequest, match="scopes"):
        owner.create_key("web", {"*": "own"})
    admin = owner.create_key("root", {"*": "admin"})
    assert admin.key.startswith(admin.hint)
    assert admin.key not in repr(admin)
    if owner.in_process:
        keyed = owner  # whoever has the folder needs no key
    else:
        with pytest.raises(Unauthorized):
            owner.keys()
        keyed = Client(owner._transport.url, api_key=admin.key)  # type: ignore[attr-defined]
    ends = datetime.now(UTC) + timedelta(days=1)
    web = keyed.create_key("web", {"photos-*": "write"}, expires_at=ends, rate_limit="5/second", concurrent_max=2)
    listed = keyed.keys()
    assert [key.name for key in listed] == ["root", "web"]
    assert datetime.fromisoformat(listed[1].expires_at or "") == ends
    assert (listed[1].scopes, listed[1].rate_limit, listed[1].concurrent_max) == ({"photos-*": "write"}, "5/second", 2)
    with pytest.raises(AdminKeyNeeded):
        keyed.revoke_key(admin.id)
    if not owner.in_process:
        with Client(owner._transport.url, api_key=web.key) as limited:  # type: ignore[attr-defined]
            assert limited.collections() == []
            with pytest.raises(Forbidden, match="needs the scope admin on photos-1; the key web has write there"):
                limited.create_collection("photos-1")
    keyed.revoke_key(web.id)
    with pytest.raises(KeyNotFound):
        keyed.revoke_key("gone")
    left = keyed.keys()
    assert [key.revoked_at is None for key in left] == [True, False]
    if keyed is not owner:
        keyed.close()
