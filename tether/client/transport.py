"""Sends a client's requests over HTTP, blocking and asynchronous. The only importer of httpx."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tether.client.address import is_local, resolve, where_keys_are
from tether.client.protocol import NoResponse, Request, Response
from tether.errors import ConfigError, InvalidRequest, Unauthenticated


def _options(url: str | None, api_key: str | None) -> dict[str, Any]:
    base, key = resolve(url, api_key)
    try:
        httpx.URL(base)
    except httpx.InvalidURL as error:
        raise ConfigError(f"'{base}' is not a URL: {error}", field="url") from error
    # tensors and chunks hardly compress, and compressing them takes longer than sending them
    headers = {"accept-encoding": "identity"} | ({"x-api-key": key} if key else {})
    return {"base_url": base, "headers": headers, "trust_env": not is_local(base)}


def _request(send: Request) -> dict[str, Any]:
    return {
        "method": send.method,
        "url": send.path,
        "params": dict(send.params),
        "headers": dict(send.headers),
        "timeout": httpx.Timeout(send.timeout, connect=min(5.0, send.timeout)),
    }


def _reply(answer: httpx.Response, options: dict[str, Any]) -> Response:
    content = answer.content
    if answer.status_code == 401 and "x-api-key" not in options["headers"]:
        content = json.dumps({"error": where_keys_are(options["base_url"]), "code": Unauthenticated.code}).encode()
    return Response(answer.status_code, {name.lower(): value for name, value in answer.headers.items()}, content)


def _lost(error: httpx.RequestError) -> NoResponse:
    reason = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, httpx.ConnectError):
        url = error.request.url
        reason = (
            f"nothing listens at {url.scheme}://{url.netloc.decode()} ({error}); "
            "start it with 'tether up', or set TETHER_URL"
        )
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)):
        return NoResponse(reason, sent=False)
    return NoResponse(reason, sent=True, late=isinstance(error, httpx.TimeoutException))


class Transport:
    """A connection pool for blocking use."""

    def __init__(self, url: str | None, api_key: str | None) -> None:
        self._options = _options(url, api_key)
        self.url = str(self._options["base_url"])
        self._http = httpx.Client(**self._options)

    def send(self, send: Request) -> Response | NoResponse:
        try:
            return _reply(self._http.request(content=send.content, **_request(send)), self._options)
        except httpx.RequestError as error:
            return _lost(error)
        except httpx.InvalidURL as error:
            raise InvalidRequest(
                f"invalid request URL, probably a name that is too long: {error}", field="path"
            ) from error

    def close(self) -> None:
        self._http.close()


class AsyncWire:
    """A connection pool for asynchronous use."""

    def __init__(self, url: str | None, api_key: str | None) -> None:
        self._options = _options(url, api_key)
        self.url = str(self._options["base_url"])
        self._http = httpx.AsyncClient(**self._options)

    async def send(self, send: Request) -> Response | NoResponse:
        try:
            return _reply(await self._http.request(content=send.content, **_request(send)), self._options)
        except httpx.RequestError as error:
            return _lost(error)
        except httpx.InvalidURL as error:
            raise InvalidRequest(
                f"invalid request URL, probably a name that is too long: {error}", field="path"
            ) from error

    async def close(self) -> None:
        await self._http.aclose()
