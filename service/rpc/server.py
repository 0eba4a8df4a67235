"""The gRPC server: on the event loop of REST, over the same engine and the same pool of threads.

Rules:
- One handler answers every operation of the table; streams have modules of their own.
- Requests are parsed here, not by grpc: what is no message is refused as such, and nothing is parsed for who has no
  key.
- Health and reflection need no key: they tell nothing about what is stored.
- grpc cancels a call whose deadline is over or whose client is gone. What still waits for a thread or a batch is then
  not done; what was committed stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractContextManager, aclosing, asynccontextmanager
from functools import cache, partial
from typing import Any

import grpc
import structlog
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from service.app import serving
from service.app.access import CALLER, check
from service.app.engine import Engine
from service.app.needs import need_of
from service.app.serving import Pool
from service.errors import EngramError, InvalidSettings, MalformedBody, TooBusy
from service.rpc.messages import POOL, SERVICE_NAME
from service.rpc.methods import METHODS, Method
from service.rpc.problems import DETAIL_MAX, status_of, trailers
from service.rpc.requests import Asked, pack, parse, parsed
from service.rpc.storing import store_stream
from service.rpc.transfers import Transfers

log = structlog.get_logger()

Context = Any  # grpc.aio.ServicerContext: grpc has no types

REPLY_MARGIN_S = 0.2  # a wait ends that much before the call's deadline, so that the reply still arrives
WAIT_MIN_S = 0.001
WAIT_MAX_S = 600.0  # the bound on `timeout_s`
STREAMS_MAX = 64  # each holds some megabytes of what waits


class RpcServer:
    """`start`, `serving` once all is loaded, `stop`; on the loop that it is made on."""

    def __init__(self, engine: Engine, pool: Pool, *, body_bytes_max: int) -> None:
        self._engine = engine
        self._pool = pool
        self._metrics = engine.resources.metrics
        self._under_way = 0
        self._streams = 0
        self._transfers = Transfers()
        self._idle = asyncio.Event()
        self._idle.set()
        self._health = health.aio.HealthServicer()
        options = [
            ("grpc.so_reuseport", 0),  # else a second server takes the same port, and half of the calls
            ("grpc.max_receive_message_length", body_bytes_max),
            ("grpc.max_send_message_length", -1),
        ]
        self._server = grpc.aio.server(options=options)
        handlers = {method.rpc: self._handler(method) for method in METHODS.values()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(_described(), self._server, pool=POOL)

    async def start(self, host: str, port: int) -> None:
        """Listen; until `serving`, calls are answered with how far loading is. Raises `InvalidSettings`."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            self._server.add_insecure_port(address)
        except RuntimeError:
            raise InvalidSettings(f"cannot listen on {address} for gRPC") from None
        await self._server.start()

    async def serving(self) -> None:
        await self._say(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        """Say so to who watches, refuse new calls, and give those under way `grace_s` to end."""
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.ensure_future(self._server.stop(grace_s))
        idle = asyncio.ensure_future(self._idle.wait())
        await asyncio.wait([stopping, idle], return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        await self._server.stop(None)  # who watches health or lists the service never ends by itself
        await stopping

    async def _say(self, status: Any) -> None:
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)

    # --- calls ---

    def _handler(self, method: Method) -> Any:
        if method.client_streams:
            return grpc.stream_stream_rpc_method_handler(partial(self._stream, method))
        if method.server_streams:
            return grpc.unary_stream_rpc_method_handler(partial(self._stream, method))
        return grpc.unary_unary_rpc_method_handler(partial(self._unary, method))

    async def _unary(self, method: Method, raw: bytes, context: Context) -> bytes:
        async with self._call(method, context):
            self._metrics.used(CALLER.get().name, bytes_in=len(raw))
            return await self._answer(method, raw, context)
        raise AssertionError("a call that failed has raised")

    async def _answer(self, method: Method, raw: bytes, context: Context) -> bytes:
        engine, pool = self._engine, self._pool
        asked = await (parsed(pool, method, raw) if method.name == "recall" else pool.run(parse, method, raw))
        check(CALLER.get(), need_of(method.as_operation), asked.path.get("collection"))
        if method.name == "recall" and asked.body.cue is not None:
            return pack(method, await serving.recall(engine, pool, asked.path["collection"], asked.body))
        if method.name == "store":
            timeout_s = min(asked.body.timeout_s, wait_max_s(context.time_remaining()))
            body = asked.body.model_copy(update={"timeout_s": timeout_s})
            reply = await serving.store(engine, pool, asked.path["collection"], body)
            return await pool.run(pack, method, reply)
        return await pool.run(self._work, method, asked)

    def _work(self, method: Method, asked: Asked) -> bytes:
        assert method.call is not None
        return pack(method, method.call(self._engine, asked.path, asked.body))

    async def _stream(self, method: Method, raws: Any, context: Context) -> None:
        """`raws`: the request, or the stream of them."""
        async with self._call(method, context):
            if self._streams >= STREAMS_MAX:
                raise TooBusy(f"{STREAMS_MAX} streams are open already", retry_after_s=1)
            self._streams += 1
            try:
                raw = raws if isinstance(raws, bytes) else await anext(aiter(raws), None)
                if raw is None:
                    raise MalformedBody("the stream has no message")
                asked = await parsed(self._pool, method, raw)
                check(CALLER.get(), need_of(method.as_operation), asked.path.get("collection"))
                async with aclosing(self._replies(method, asked, raws, context)) as replies:
                    async for reply in replies:
                        await context.write(pack(method, reply))
            finally:
                self._streams -= 1

    def _replies(self, method: Method, asked: Asked, raws: Any, context: Context) -> AsyncGenerator[Any, None]:
        if method.name == "export":
            return self._transfers.export(self._engine, asked)
        if method.name == "get_snapshot_content":
            return self._transfers.snapshot(self._engine, asked)
        if method.name == "put_snapshot_content":
            return self._transfers.keep_snapshot(self._engine, method, asked, raws)
        if method.name == "import_rows":
            return self._transfers.import_rows(self._engine, method, asked, raws)
        return store_stream(self._engine, self._pool, method, asked, raws, lambda: wait_max_s(context.time_remaining()))

    @asynccontextmanager
    async def _call(self, method: Method, context: Context) -> AsyncIterator[None]:
        """What every call passes, and how its errors leave it; nothing of a traceback does."""
        self._under_way += 1
        self._idle.clear()
        status = grpc.StatusCode.OK
        try:
            with self._admit(context):
                self._engine.check_loaded()
                yield
        except EngramError as error:
            status = status_of(error)
            if error.status >= 500:
                log.warning("call failed", call=method.rpc, code=error.code, detail=error.detail)
            await context.abort(status, error.detail[:DETAIL_MAX], trailers(error))
        except asyncio.CancelledError:
            status = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            status = grpc.StatusCode.INTERNAL
            log.error("unexpected error", call=method.rpc, exc_info=error)
            own = EngramError("the server met an error of its own; its log has the details")
            await context.abort(status, own.detail, trailers(own))
        finally:
            self._metrics.called(method.rpc, status.name)
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    def _admit(self, context: Context) -> AbstractContextManager[object]:
        """Raises `Unauthorized`, `RateLimited`."""
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        address = context.peer().partition(":")[2].rpartition(":")[0]  # of ipv4:127.0.0.1:5000
        return self._engine.admission.admit(str(given).encode(), address)


def wait_max_s(left_s: float | None) -> float:
    """The longest wait that a call's deadline leaves; the API's own bound where it has none."""
    if left_s is None:
        return WAIT_MAX_S
    return min(WAIT_MAX_S, max(WAIT_MIN_S, left_s - min(REPLY_MARGIN_S, left_s / 4)))


@cache
def _described() -> tuple[str, ...]:
    """The services that reflection tells of, their files in the one pool that it looks in."""
    names = [SERVICE_NAME]
    for module in (health_pb2, reflection_pb2):
        file = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        POOL.Add(file)
        names += [service.full_name for service in module.DESCRIPTOR.services_by_name.values()]
    return tuple(names)
