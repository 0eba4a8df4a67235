"""Who may do what: the rules over plain values, and the keys of a real engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.app.access import OWNER, RANKS, Caller, Level, Need, check
from service.app.key_schemas import KeyRequest
from service.app.keys import Keys
from service.app.limits import Limiter
from service.errors import AdminKeyNeeded, Forbidden, RateLimited, Unauthorized
from service.settings import Settings, load
from service.storage.database import Database
from service.storage.repository import Repository
from service.storage.writer import Writer

LEVELS = get_args(Level)
NAMES = st.text("ab-", min_size=1, max_size=4)
SCOPES = st.dictionaries(st.one_of(NAMES, NAMES.map(lambda name: name + "*"), st.just("*")), st.sampled_from(LEVELS))
ADMIN = {"*": "admin"}


def allowed(scopes: dict[str, Level], need: Need, collection: str | None) -> bool:
    try:
        check(Caller("k", scopes), need, collection)
    except Forbidden:
        return False
    return True


@given(SCOPES, NAMES, st.sampled_from(LEVELS))
def test_the_longest_scope_that_fits_decides(scopes: dict[str, Level], collection: str, level: Level) -> None:
    """Against the rule said another way: by trying ever shorter scopes."""
    tried = [collection, *(collection[:length] + "*" for length in range(len(collection), -1, -1))]
    given_ = next((scopes[scope] for scope in tried if scope in scopes), None)
    assert Caller("k", scopes).level(collection) == given_
    assert allowed(scopes, Need(level), collection) == (RANKS[given_] >= RANKS[level])


@given(SCOPES, st.sampled_from(LEVELS))
def test_everything_is_given_by_a_star_alone(scopes: dict[str, Level], level: Level) -> None:
    assert allowed(scopes, Need(level, "everything"), "ab") == (RANKS[scopes.get("*")] >= RANKS[level])
    assert allowed(scopes, Need(level), None) == (RANKS[scopes.get("*")] >= RANKS[level])


def test_a_refusal_names_the_scope_that_is_missing() -> None:
    with pytest.raises(Forbidden, match=r"needs the scope write on photos; the key web has read there"):
        check(Caller("web", {"*": "read"}), Need("write"), "photos")
    with pytest.raises(Forbidden, match=r"needs the scope admin on \*; the key web has none there"):
        check(Caller("web", {"photos": "admin"}), Need("admin", "everything"))
    check(OWNER, Need("admin", "everything"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "a b"}, {"scopes": {}}, {"scopes": {"a": "own"}}, {"scopes": {"a*b": "read"}},
        {"scopes": {"-": "read"}},
        {"scopes": {"*": "admin", "a": "read"}}, {"scopes": {f"c{i}": "read" for i in range(101)}},
        {"expires_at": "2020-01-01T00:00:00Z"}, {"expires_at": "2099-01-01T00:00:00"}, {"rate_limit": "many"},
        {"rate_limit": "0/second"}, {"rate_limit": ";".join(["1/second"] * 5)}, {"concurrent_max": 0}, {"key": "mine"},
    ],
)  # fmt: skip
def test_a_key_that_is_described_wrongly_is_refused(wrong: dict[str, object]) -> None:
    good = {"name": "web", "scopes": {"a": "read"}}
    KeyRequest.model_validate(good)
    with pytest.raises(ValidationError):
        KeyRequest.model_validate({**good, **wrong})


@pytest.fixture
def open_keys(tmp_path: Path, new_database: Callable[[Path], Path | str]) -> Callable[..., Keys]:
    """Keys over the one database, as many objects as are asked for."""
    database = Database.open(new_database(tmp_path))
    writer = Writer(database)
    yield lambda key=None: Keys(Repository(database, writer), key)
    writer.close()
    database.close()


def bearer(key: str) -> bytes:
    return b"Bearer " + key.encode()


def request(name: str = "web", **fields: object) -> KeyRequest:
    return KeyRequest.model_validate({"name": name, "scopes": {"a": "read"}, **fields})


def test_the_first_key_and_the_last_one_left_is_an_admin(open_keys: Callable[..., Keys]) -> None:
    keys = open_keys()
    assert not keys.required
    assert keys.caller(b"") is OWNER
    with pytest.raises(AdminKeyNeeded):
        keys.create(request())
    assert not keys.required
    admin = keys.create(request("root", scopes=ADMIN))
    assert keys.required
    assert keys.caller(bearer(admin.key)).scopes == ADMIN
    keys.create(request())
    with pytest.raises(AdminKeyNeeded):
        keys.revoke(admin.id)
    keys.create(request("other", scopes=ADMIN))
    keys.revoke(admin.id)
    assert keys.has_admin


def test_with_a_key_in_the_settings_any_key_may_be_the_first(open_keys: Callable[..., Keys]) -> None:
    keys = open_keys("secret")
    assert (keys.required, keys.has_admin) == (True, True)
    keys.revoke(keys.create(request()).id)
    assert keys.caller(bearer("secret")).scopes == ADMIN
    assert keys.names == {"ENGRAM_API_KEY"}
    without = open_keys()  # the same database, served without it: what was ever closed stays so
    assert (without.required, without.has_admin) == (True, False)


def test_keys_are_random_and_stored_only_hashed(open_keys: Callable[..., Keys], tmp_path: Path) -> None:
    keys = open_keys("secret")
    made = [keys.create(request()) for _ in range(5)]
    assert len({one.key for one in made}) == 5
    for one in made:
        assert one.key.startswith(one.hint)
        assert len(one.key) == len("engram_") + 43  # 256 bits in base64
    assert "key" not in keys.listed().model_dump()["keys"][0]
    for file in tmp_path.iterdir():
        assert not any(one.key.encode() in file.read_bytes() for one in made)


def test_unknown_revoked_and_expired_are_refused_alike(open_keys: Callable[..., Keys]) -> None:
    keys = open_keys("secret")
    revoked, expiring = (
        keys.create(request()),
        keys.create(request(expires_at=datetime.now(UTC) + timedelta(seconds=1))),
    )
    keys.revoke(revoked.id)
    assert keys.caller(bearer(expiring.key)).name == "web"
    time.sleep(1)
    sent = [b"", b"Bearer", bearer("engram_unknown"), bearer(revoked.key), bearer(expiring.key), b"Basic secret"]
    said = set()
    for header in sent:
        with pytest.raises(Unauthorized) as raised:
            keys.caller(header)
        said.add(raised.value.detail)
    assert len(said) == 1


def test_other_processes_changes_are_seen_at_a_refresh(open_keys: Callable[..., Keys]) -> None:
    here, there = open_keys("secret"), open_keys("secret")
    made = there.create(request())
    with pytest.raises(Unauthorized):
        here.caller(bearer(made.key))
    here.refresh()
    assert here.caller(bearer(made.key)).key_id == made.id
    there.revoke(made.id)
    here.refresh()
    with pytest.raises(Unauthorized):
        here.caller(bearer(made.key))


def test_when_a_key_was_used_is_kept_to_the_minute(open_keys: Callable[..., Keys]) -> None:
    keys = open_keys("secret")
    made = keys.create(request())
    assert keys.listed().keys[0].last_used_at is None
    before = datetime.now(UTC)
    for _ in range(100):
        keys.caller(bearer(made.key))
    used = keys.listed().keys[0].last_used_at
    assert used is not None
    assert before - timedelta(minutes=1) < datetime.fromisoformat(used) <= datetime.now(UTC)
    assert open_keys("secret").listed().keys[0].last_used_at is None  # not a write a request
    keys.close()
    assert open_keys("secret").listed().keys[0].last_used_at == used


def test_requests_in_a_window_are_bounded_by_who_asks() -> None:
    limiter = Limiter("3/minute;1000/hour", None)
    for _ in range(3):
        limiter.count("a")
    with pytest.raises(RateLimited) as raised:
        limiter.count("a")
    amount, remaining, wait_s = raised.value.allowance
    assert (amount, remaining) == (3, 0)
    assert raised.value.retry_after_s == wait_s
    assert 1 <= wait_s <= 60
    limiter.count("b")
    limiter.count("a", "1000/minute")  # a limit of its own
    Limiter(None, None).count("a")


def test_requests_at_once_are_bounded_and_places_come_back() -> None:
    limiter = Limiter(None, 2)
    for _ in range(3):
        limiter.start("a")
        limiter.start("a")
        with pytest.raises(RateLimited):
            limiter.start("a")
        limiter.start("b")
        for who in ("a", "a", "b"):
            limiter.end(who)
    limiter.start("a", 1)
    with pytest.raises(RateLimited):
        limiter.start("a", 1)


def test_a_rate_limit_is_checked_with_the_settings() -> None:
    assert load({"ENGRAM_RATE_LIMIT": "5/second"}).rate_limit == "5/second"
    assert Settings().rate_limit is None
    for wrong in ("5", "5/fortnight", "", "0/second"):
        with pytest.raises(Exception, match="ENGRAM_RATE_LIMIT: a rate limit is like"):
            load({"ENGRAM_RATE_LIMIT": wrong})
