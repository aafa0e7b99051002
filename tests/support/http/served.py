"""All services and the HTTP gateway on a thread of their own, so that blocking clients can talk to them."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, TypeVar

import httpx
from support.brokers.brokers import Broker, embedded, temporary_home
from support.platform.services import Services, services

from tether.broker.embedded_server import Binary, reload_embedded
from tether.crypto import Role
from tether.domain import api_key
from tether.gateway_http import service
from tether.identity import keyset_editor
from tether.identity.keys import RootKey
from tether.process.data_dir import Home

T = TypeVar("T")

TENANT = "default"


@dataclasses.dataclass
class Served:
    """A platform behind a URL. ``key`` may do everything; :meth:`new_key` makes lesser ones."""

    url: str
    key: str
    home: Home
    broker: Broker
    services: Services
    loop: asyncio.AbstractEventLoop

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine where the services run."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def new_key(self, *scopes: str, tenant: str = TENANT) -> str:
        text = api_key.new_key_text()
        record = api_key.stored_key(text, tenant=tenant, scopes=scopes, name="test", created_at=time.time())
        self.run(self.services.gateway.keys.store(record))
        return text

    def bind(self, worker: str, tenant: str) -> None:
        """Make an identity of a worker that serves one isolated tenant, and tell the broker of it."""
        keyset_editor.add(self.home, RootKey(self.home.root_key), worker, Role.WORKER, tenant=tenant)
        assert reload_embedded(self.home, self.services.settings)

    @property
    def headers(self) -> dict[str, str]:
        return {"x-api-key": self.key}

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=60, trust_env=False, **options)

    def share(self, name: str) -> None:
        """Let every tenant use a model."""
        with self.client() as http:
            answer = http.put(f"/v1/models/{name}/grants/*", json={"right": "use"})
            assert answer.status_code == 200, answer.text

    def push(self, name: str, content: bytes, **query: float) -> int:
        """Push a model over HTTP and wait until a worker answers for it; its version."""
        with self.client() as http:
            digest = hashlib.sha256(content).hexdigest()
            answer = http.post(
                f"/v1/models/{name}/versions", content=content, params=query, headers={"x-tether-sha256": digest}
            )
            assert answer.status_code in (200, 201), answer.text
            version = int(answer.json()["version"])
            path = f"/v2/models/{name}/versions/{version}/ready"
            until(lambda: http.get(path).status_code == 200, f"{name}:{version} is ready")
            return version


def until(true: Any, what: str, timeout_s: float = 20.0) -> None:
    """Wait in a thread that has no event loop."""
    end = time.monotonic() + timeout_s
    pause = threading.Event()
    while not true():
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        pause.wait(0.02)


@contextmanager
def served(binary: Binary, *, workers: int = 1, **changes: Any) -> Iterator[Served]:
    """Broker, dispatcher, model store, workers and a gateway that listens on a free port; ``changes`` are settings."""
    with temporary_home(workers=3) as home:
        ready: Future[Served] = Future()
        stop: Future[asyncio.Event] = Future()
        platform = _platform(home, binary, workers, changes)
        thread = threading.Thread(target=_main, args=(platform, ready, stop), name="served")
        thread.start()
        try:
            found = ready.result(60)
            yield found
        finally:
            if stop.done():
                ready.result().loop.call_soon_threadsafe(stop.result().set)
            thread.join(60)
        assert not thread.is_alive()


@asynccontextmanager
async def _platform(home: Home, binary: Binary, workers: int, changes: Any) -> AsyncIterator[Served]:
    async with (
        embedded(home, binary, **changes) as broker,
        services(broker, workers=workers) as running,
        service.listen(running.gateway, "127.0.0.1", 0) as port,
    ):
        text = api_key.new_key_text()
        key = api_key.stored_key(text, tenant=TENANT, scopes=api_key.SCOPES, name="test", created_at=time.time())
        await running.gateway.keys.store(key)
        yield Served(f"http://127.0.0.1:{port}", text, home, broker, running, asyncio.get_running_loop())


def _main(platform: AbstractAsyncContextManager[Served], ready: Future[Served], stop: Future[asyncio.Event]) -> None:
    async def live() -> None:
        async with platform as made:
            ended = asyncio.Event()
            stop.set_result(ended)
            ready.set_result(made)
            await ended.wait()

    try:
        asyncio.run(live())
    except BaseException as error:
        if ready.done():
            raise
        ready.set_exception(error)
