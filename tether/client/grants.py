"""Ownership of models and grants to other tenants, for both clients."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from tether.client.operations import Json, model_path, put
from tether.client.protocol import Flow, Request, RetryPolicy, exchange_json

T = TypeVar("T")

EVERYBODY = "*"
"""The name for every tenant, present and future."""


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
    """Grants of a model's owner to other tenants; see :attr:`tether.Client.grants`.

    Every method returns the current ``model``, ``owner``, ``grants`` (a list of ``tenant`` and ``right``) and
    ``revision``.

    Raises:
        ModelNotFound: there is no such model that this key may see.
        Forbidden: the key's tenant does not own the model.
    """

    def __init__(self, run: _Run) -> None:
        self._run = run

    def show(self, model: str) -> Json:
        return self._run(_shown(model))

    def grant(self, model: str, tenant: str, right: str = "use") -> Json:
        """Grant ``tenant`` (``*``: every tenant) the right to ``use`` or ``write`` a model; replaces its
        earlier grant."""
        return self._run(_granted(model, tenant, right))

    def revoke(self, model: str, tenant: str) -> Json:
        """Revoke the grant of ``tenant``."""
        return self._run(_revoked(model, tenant))

    def hand_over(self, model: str, tenant: str) -> Json:
        """Transfer a model to another tenant; for administrators."""
        return self._run(_handed_over(model, tenant))


class AsyncGrants:
    """:class:`Grants` of the asynchronous client."""

    def __init__(self, run: _RunAsync) -> None:
        self._run = run

    async def show(self, model: str) -> Json:
        return await self._run(_shown(model))

    async def grant(self, model: str, tenant: str, right: str = "use") -> Json:
        """Grant a right as :meth:`Grants.grant` does."""
        return await self._run(_granted(model, tenant, right))

    async def revoke(self, model: str, tenant: str) -> Json:
        """Revoke a grant as :meth:`Grants.revoke` does."""
        return await self._run(_revoked(model, tenant))

    async def hand_over(self, model: str, tenant: str) -> Json:
        """Transfer a model as :meth:`Grants.hand_over` does."""
        return await self._run(_handed_over(model, tenant))
