"""Reads that want a collection at a version at least: a writer's own writes are then among what it reads.

A bank follows the commits of its own process before anybody is answered; those of other servers are looked for at
once, and waited for.
"""

from __future__ import annotations

import time

from service.app.fields import AtVersion
from service.app.live import LiveCollection
from service.app.resources import Resources
from service.errors import Unavailable, VersionNotReached

SLICE_S = 0.5  # the bank waited for may be one that another takes the place of meanwhile (see `reencode`)


def stored_at(resources: Resources, name: str, request: AtVersion) -> LiveCollection:
    """The collection, to be read from SQL, which is at its version by itself. Raises `VersionNotReached`."""
    live = resources.live(name)
    if request.min_version is not None and request.min_version > live.bank.version:
        _check_committed(resources, live, request.min_version)
    return live


def live_at(resources: Resources, name: str, request: AtVersion) -> LiveCollection:
    """The collection once its bank is at the version asked for. Raises `VersionNotReached`, and `Unavailable` if it is
    not within the request's `timeout_s`."""
    live, wanted = resources.live(name), request.min_version
    if wanted is None or live.bank.version >= wanted:
        return live
    _check_committed(resources, live, wanted)
    deadline = time.monotonic() + request.timeout_s
    resources.look()
    while not live.bank.wait_for(wanted, min(SLICE_S, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            raise Unavailable(f"{name} is at version {live.bank.version} here, not at {wanted} yet", retry_after_s=1)
        live = resources.live(name)
    return live


def _check_committed(resources: Resources, live: LiveCollection, wanted: int) -> None:
    now = resources.repository.version_of(live.id)
    if wanted > now:
        raise VersionNotReached(f"min_version is {wanted}, and {live.name} is at version {now}")
