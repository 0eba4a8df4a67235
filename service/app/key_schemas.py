"""API keys in requests and replies. A key itself is in one reply only, that of its making."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, Field, model_validator

from service.app.access import EVERYTHING, Level
from service.app.fields import Name, Reply, Request
from service.settings import RateLimit

SCOPES_MAX = 100  # of one key: they are looked through with every request

Target = Annotated[
    str,
    Field(pattern=r"^(\*|[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\*?)$", description="a collection, a beginning* or *"),
]


def _check_scopes(scopes: dict[str, Level]) -> dict[str, Level]:
    if scopes.get(EVERYTHING) == "admin" and len(scopes) > 1:
        raise ValueError("admin on * is everything, and may make keys for everything: it cannot be held to less")
    return scopes


Scopes = Annotated[dict[Target, Level], Field(min_length=1, max_length=SCOPES_MAX), AfterValidator(_check_scopes)]


class KeyRequest(Request):
    """Where several scopes fit a collection, the longest decides."""

    name: Name
    scopes: Scopes
    expires_at: AwareDatetime | None = Field(default=None, description="from when on it is refused")
    rate_limit: RateLimit | None = Field(default=None, description="instead of the server's: 100/second;2000/minute")
    concurrent_max: int | None = Field(default=None, ge=1, description="requests at once, instead of the server's")

    @model_validator(mode="after")
    def _lasts(self) -> KeyRequest:
        if self.expires_at is not None and self.expires_at <= datetime.now(self.expires_at.tzinfo):
            raise ValueError("expires_at has passed")
        return self


class KeyInfo(Reply):
    id: str
    name: str
    hint: str = Field(description="the key's first characters")
    scopes: dict[str, Level]
    rate_limit: str | None
    concurrent_max: int | None
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    last_used_at: str | None = Field(description="to the minute")


class NewKey(KeyInfo):
    key: str = Field(description="shown here and nowhere else")


class KeyList(Reply):
    keys: list[KeyInfo]
