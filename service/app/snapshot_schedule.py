"""Snapshots at set times: what is due is queued as any snapshot is, and only the newest of those are kept.

Rules:
- Where several servers share a database one of them queues what is due (see `storage.schedules`), and whichever has
  workers makes it.
- What a schedule did not make it never removes: it goes by the ids it has noted, not by their names.
- One that fails is logged, told by the schedule and by its operation, and takes no other's place: the next is tried at
  its time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import structlog

from service.app.resources import SNAPSHOT_JOB, Resources
from service.app.schemas import Problem
from service.app.snapshot_schemas import ScheduleRequest, SnapshotSchedule
from service.app.snapshots import new_id, run_snapshot_job
from service.errors import EngramError, SnapshotNotFound
from service.storage.jobs import Job, NewJob
from service.storage.schedules import Schedule

log = structlog.get_logger()

PREFIX = "scheduled-"  # of the snapshots' names, for whoever reads a list of them


def put(resources: Resources, name: str, request: ScheduleRequest) -> SnapshotSchedule:
    """Raises `CollectionNotFound`."""
    return told(resources.repository.put_schedule(name, request.every_s, request.keep))


def get(resources: Resources, name: str) -> SnapshotSchedule:
    """Raises `CollectionNotFound`, `ScheduleNotFound`."""
    return told(resources.repository.get_schedule(name))


def delete(resources: Resources, name: str) -> None:
    """What it made stays. Raises `CollectionNotFound`."""
    resources.repository.delete_schedule(name)


def told(schedule: Schedule) -> SnapshotSchedule:
    return SnapshotSchedule(
        every_s=schedule.every_s, keep=schedule.keep, next_at=schedule.next_at.isoformat(), operation=schedule.job_id,
        snapshot=schedule.made[-1] if schedule.made else None, made_at=_said(schedule.made_at),
        failed_at=_said(schedule.failed_at), error=None if schedule.error is None else Problem(**schedule.error),
    )  # fmt: skip


def tick(resources: Resources) -> None:
    """Queue what is due, and see what became of what was. To be asked every second or so, by every server."""
    repository = resources.repository
    for schedule in repository.schedules_to_see():
        if schedule.job_id is not None:
            ended = repository.settle(schedule.collection_id, schedule.job_id)
            if ended is not None and ended.error is not None:
                log.error("a snapshot at a set time failed", operation=schedule.job_id, **ended.error)
        if schedule.next_at <= datetime.now(UTC):
            payload = {"snapshot": {"id": PREFIX + new_id(), "scheduled": True}, "items": 0}
            job = NewJob(SNAPSHOT_JOB, payload)
            if repository.take_due(schedule.collection_id, SNAPSHOT_JOB, job):
                resources.wake_workers()
                resources.tell(True)


def run_job(resources: Resources, job: Job, beat: Callable[[float], None]) -> dict[str, Any]:
    """Make a snapshot, at its time or because somebody asked for one; then keep the newest of the former."""
    made = run_snapshot_job(resources, job, beat)
    if job.payload["snapshot"]["scheduled"]:
        _keep_newest(resources, made["collection"], made["id"])
    return made


def _keep_newest(resources: Resources, name: str, id_: str) -> None:
    """Note a snapshot that was made at its time, and remove those that it makes one too many."""
    schedule = resources.repository.note_scheduled(name, id_)
    if schedule is None:
        return
    try:
        kept = {each.id for each in resources.snapshots.list(name)}
        gone = [made for made in schedule.made if made not in kept]  # removed by somebody: they count no more
        for old in [made for made in schedule.made if made in kept][: -schedule.keep]:
            with suppress(SnapshotNotFound):
                resources.snapshots.delete(name, old)
            gone.append(old)
        resources.repository.forget_scheduled(name, gone)
    except EngramError as error:  # the new one stands; what is left is removed after the next
        log.warning("older snapshots could not be removed", collection=name, detail=error.detail)


def _said(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
