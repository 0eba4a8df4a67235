"""Following other servers: what they commit to a shared database is brought to the banks here.

Strategy: one look at all collections' heads tells what has moved. Of memories the rows written since are read; of what
was learned, kernels and records; under other encoders a collection is loaded anew, beside the one that answers.

Rules:
- It looks every `POLL_S`, at once where somebody waits (for a version, for a name or a job that is not known here), and
  when told of a commit (see `notices`).
- A commit of this server that comes after another's is brought after it: `LiveCollection.follow` sees the gap, and the
  rows of both are read.
- A collection that cannot be loaded is tried again at each change of it.
"""

from __future__ import annotations

import threading

import structlog

from service.app import collections
from service.app.resources import Resources
from service.errors import CollectionNotFound, EngramError
from service.storage.following import Head

log = structlog.get_logger()

POLL_S = 1.0
"""How late what another server wrote may be seen by who does not ask for its version."""


PAUSE_S = 0.005
"""Between two looks: many commits a second are seen together."""


class Follower:
    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._syncing = threading.Lock()
        self._failed: dict[int, Head] = {}  # could not be loaded as they stood then
        self._stopping = threading.Event()
        self._told = threading.Event()
        self._thread = threading.Thread(target=self._work, name="follow", daemon=True)

    def start(self) -> None:
        self._resources.look = self.sync
        self._thread.start()

    def wake(self, of_job: bool) -> None:
        """Look at once; where a job was queued, let workers look as well."""
        self._told.set()
        if of_job:
            self._resources.wake_workers()

    def stop(self) -> None:
        self._resources.look = lambda: None
        self._stopping.set()
        self._told.set()
        if self._thread.ident is not None:
            self._thread.join()

    def sync(self) -> None:
        """Bring everything to where the database stands now, or later. Raises `StorageUnavailable`, `TooBusy`."""
        with self._syncing:
            lives = self._resources.all_lives()  # before the heads: what is made after them is in neither
            heads = self._resources.repository.heads()
            standing = {head.id for head in heads}
            for live in lives:
                if live.id not in standing:
                    self._resources.remove(live)
            names = {head.name for head in heads}
            for name in self._resources.broken.keys() - names:
                self._resources.broken.pop(name, None)
            for head in heads:
                self._follow(head)
            self._resources.hear_of_ended()

    def _follow(self, head: Head) -> None:
        live = self._resources.find(head.id)
        if live is None or live.generation < head.generation:
            if self._failed.get(head.id) != head:
                self._load(head)
            return
        if live.generation > head.generation:  # this server has changed it since the heads were read
            return
        lag = head.version - live.bank.version
        self._resources.metrics.bank_lag.labels(head.name).set(max(0, lag))
        if lag > 0:
            live.catch_up()
            self._resources.after_write(live)  # another server may leave calibrations to this one
        if live.revision < head.revision and not collections.relearn(self._resources, live):
            self._load(head)

    def _load(self, head: Head) -> None:
        try:
            live = collections.load(self._resources, self._resources.repository.get_collection(head.name))
        except CollectionNotFound:
            return
        except EngramError as error:
            log.error("a collection could not be loaded", collection=head.name, detail=error.detail)
            self._resources.broken[head.name] = error
            self._failed[head.id] = head
            return
        self._failed.pop(head.id, None)
        self._resources.broken.pop(head.name, None)
        self._resources.succeed(live)

    def _work(self) -> None:
        while not self._stopping.is_set():
            self._told.wait(POLL_S)
            self._told.clear()
            try:
                self.sync()
            except EngramError as error:
                log.warning("other servers' writes are not seen", detail=error.detail)
            except Exception:
                log.exception("other servers' writes are not seen")
            self._stopping.wait(PAUSE_S)
