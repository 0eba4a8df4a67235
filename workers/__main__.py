"""A worker of its own: `python -m workers` runs background jobs of a database that servers share, until it is told to
stop.

It reads the same settings as the server (`ENGRAM_DATABASE_URL`, `ENGRAM_ORIGINALS`, ...), and needs a data folder of
its own. Servers with `ENGRAM_JOBS=false` leave all jobs to such processes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import structlog

from service import settings
from service.errors import EngramError, InvalidSettings
from service.observability import configure_logging


def main() -> None:
    configure_logging()
    log = structlog.get_logger()
    try:
        chosen = settings.load(os.environ)
        if chosen.database_url is None:
            raise InvalidSettings(
                "a worker shares its database with servers: set ENGRAM_DATABASE_URL. Over SQLite the server runs jobs"
            )
        if not chosen.jobs:
            raise InvalidSettings("ENGRAM_JOBS is false, and running jobs is all that a worker does")
        os.environ.setdefault("OMP_NUM_THREADS", str(chosen.threads))
        import torch

        from service.app.engine import Engine
        from workers.loop import running

        torch.set_num_threads(chosen.threads)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        with Engine(chosen) as engine, running(engine):
            log.info("a worker runs", pid=os.getpid())
            stop.wait()
            log.info("a worker stops: the batch at hand is finished, other servers take the rest")
    except EngramError as error:
        log.error(error.title, code=error.code, detail=error.detail)
        sys.exit(1)


if __name__ == "__main__":
    main()
