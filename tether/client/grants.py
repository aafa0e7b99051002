"""Who owns a model and what other tenants may do with it, for both clients."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from tether.client.operations import Json, model_path, put
from tether.client.protocol import Flow, Request, RetryPolicy, exchange_json

T = TypeVar("T")

EVERYBODY = "*"
"""As a tenant: every tenant there is and will be."""


class _Run(Protocol):
    def __call__(self, flow: Callable[[RetryPolicy], Flow[T]], /) -> T: ...


class _RunAsync(Protocol):
    def __call__(self, flow: Callable[[RetryPolicy], Flow[T]], /) -> Awaitable[T]: ...


def _ask(policy: RetryPolicy, send: Request) -> Flow[Json]:
    return (yield from exchange_json(policy, send, dict[str, Any]))


def _shown(model: str) -> Callable[[RetryPolicy], Flow[Json]]:
    return partial(_ask, send=Request("GET", f"{model_path(model)}/grants"))


def _granted(model: str, tenant: str, right: str) -> Callable[[RetryPolicy], Flow[Json]]:
    return partial(_ask, send=put(_path(model, tenant), {"right": right}))


def _revoked(model: str, tenant: str) -> Callable[[RetryPolicy], Flow[Json]]:
    return partial(_ask, send=Request("DELETE", _path(model, tenant)))


def _handed_over(model: str, tenant: str) -> Callable[[RetryPolicy], Flow[Json]]:
    return partial(_ask, send=put(f"{model_path(model)}/owner", {"tenant": tenant}))


def _path(model: str, tenant: str) -> str:
    return f"{model_path(model)}/grants/{quote(tenant, safe='')}"


class Grants:
    """What a model's owner grants to other tenants; :attr:`tether.Client.grants`. Every method returns ``model``, ``owner``,
    ``grants`` (a list of ``tenant`` and ``right``) and ``revision``, as they are then.

    Raises:
        ModelNotFound: there is no such model that this key may know of.
        Forbidden: the key's tenant does not own the model.
    """

    def __init__(self, run: _Run) -> None:
        self._run = run

    def show(self, model: str) -> Json:
        return self._run(_shown(model))

    def grant(self, model: str, tenant: str, right: str = "use") -> Json:
        """Let ``tenant`` (``*``: all of them) ``use`` a model, or ``write`` to it, in place of what it had."""
        return self._run(_granted(model, tenant, right))

    def revoke(self, model: str, tenant: str) -> Json:
        """Take back what ``tenant`` was granted."""
        return self._run(_revoked(model, tenant))

    def hand_over(self, model: str, tenant: str) -> Json:
        """Let another tenant own a model; for administrators."""
        return self._run(_handed_over(model, tenant))


class AsyncGrants:
    """:class:`Grants` of the asynchronous client."""

    def __init__(self, run: _RunAsync) -> None:
        self._run = run

    async def show(self, model: str) -> Json:
        return await self._run(_shown(model))

    async def grant(self, model: str, tenant: str, right: str = "use") -> Json:
        """As :meth:`Grants.grant`."""
        return await self._run(_granted(model, tenant, right))

    async def revoke(self, model: str, tenant: str) -> Json:
        """As :meth:`Grants.revoke`."""
        return await self._run(_revoked(model, tenant))

    async def hand_over(self, model: str, tenant: str) -> Json:
        """As :meth:`Grants.hand_over`."""
        return await self._run(_handed_over(model, tenant))
