"""What lets a request in, whichever way it came: its key, and how much it may ask; and what counts it by key.

REST and gRPC each call `admit` once for a request, run it under `Admitted`, and ask `access.check` once they know which
operation it is.
"""

from __future__ import annotations

from contextvars import Token
from dataclasses import dataclass, field
from types import TracebackType

from service.app.access import CALLER, Caller
from service.app.keys import Keys
from service.app.limits import Limiter
from service.errors import Unauthorized
from service.observability import Metrics


@dataclass
class Admitted:
    """A request that was let in, until the block ends."""

    caller: Caller
    _who: str
    _limiter: Limiter
    _token: Token[Caller] | None = field(default=None, init=False)

    def __enter__(self) -> Caller:
        self._token = CALLER.set(self.caller)
        return self.caller

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            CALLER.reset(self._token)
        self._limiter.end(self._who)


class Admission:
    def __init__(self, keys: Keys, limiter: Limiter, metrics: Metrics) -> None:
        self._keys = keys
        self._limiter = limiter
        self._metrics = metrics

    def admit(self, authorization: bytes, address: str) -> Admitted:
        """Raises `Unauthorized`, `RateLimited`. What is admitted is to be entered: it holds a place."""
        try:
            caller = self._keys.caller(authorization)
        except Unauthorized:
            self._limiter.count(address)  # so that nobody can try keys faster than ask
            raise
        who = caller.key_id or caller.name or address
        self._limiter.count(who, caller.rate_limit)
        self._limiter.start(who, caller.concurrent_max)
        self._metrics.used(caller.name, requests=1)
        return Admitted(caller, who, self._limiter)
