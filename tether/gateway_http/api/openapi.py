"""Builds the OpenAPI 3.1 document of a route table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from tether import __version__
from tether.gateway_http.access.authentication import ANY_SCOPE
from tether.gateway_http.api.route_spec import JSON, Media, RouteSpec
from tether.gateway_http.http.error_responses import ErrorBody

_REF = "#/components/schemas/{name}"
_ERROR = {"$ref": "#/components/schemas/ErrorBody"}
_PARAMETER = re.compile(r"\{(\w+)\}")

_PARAMETERS = {
    "model": "A model's name; `tenant%2Fmodel` for one in another tenant's namespace.",
    "name": "A model's name; `tenant%2Fmodel` for one in another tenant's namespace.",
    "version": "A version's number, or an alias such as `latest`.",
    "id": "The id.",
    "tenant": "A tenant's name.",
    "alias": "An alias's name.",
    "digest": "The hex SHA-256 of a chunk.",
}

_DESCRIPTION = (
    "Machine-learning models served as a message-queue job system. Send an API key as `x-api-key: KEY` or "
    "`Authorization: Bearer KEY`. Every response has an `x-request-id`; send your own to find it in the logs. "
    "Errors are `{error, code, request_id}`; `Retry-After` of a 429 or 503 says when to retry."
)


def document(rows: Sequence[RouteSpec]) -> dict[str, Any]:
    """Return the document as a plain value."""
    types = _types(rows)
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    by_type = {_key(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: dict[str, Any] = {}
    for row in rows:
        paths.setdefault(row.path, {})[row.method.lower()] = _operation(row, by_type)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tether", "version": __version__, "description": _DESCRIPTION},
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(row.tag for row in rows)],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _types(rows: Sequence[RouteSpec]) -> list[Any]:
    found: dict[str, Any] = {_key(ErrorBody): ErrorBody}
    for row in rows:
        answered = [part for answer in row.answers.values() for part in _parts(answer)]
        for kind in (row.body, row.query, *answered):
            if kind is not None and not isinstance(kind, Media):
                found[_key(kind)] = kind
    return list(found.values())


def _key(kind: Any) -> str:
    return repr(kind)


def _parts(answer: Any) -> tuple[Any, ...]:
    """Return the alternative forms of a response."""
    return answer if isinstance(answer, tuple) else (answer,)


def _operation(row: RouteSpec, by_type: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "summary": row.summary,
        "tags": [row.tag],
        "operationId": _operation_id(row),
        "parameters": _parameters(row),
        "security": [] if row.scope is None else [{"apiKey": []}, {"bearer": []}],
        "responses": _responses(row, by_type),
    }
    if row.scope is not None:
        scope = "." if row.scope == ANY_SCOPE else f" with the scope `{row.scope}`."
        found["description"] = f"Needs an API key{scope}"
    content = _content((row.body, row.binary), by_type)
    if content:
        found["requestBody"] = {"required": not row.body_optional, "content": content}
    return found


def _operation_id(row: RouteSpec) -> str:
    words = re.findall(r"\w+", row.path.replace("/v1/", "/").replace("/v2", "/oip/"))
    return "_".join([row.method.lower(), *words])


def _parameters(row: RouteSpec) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "description": _PARAMETERS[name], "schema": {"type": "string"}}
        for name in _PARAMETER.findall(row.path)
    ]
    if row.query is not None:
        found += _query_parameters(row.query)
    return found + [
        {
            "name": header.name,
            "in": "header",
            "required": False,
            "description": header.description,
            "schema": {"type": "string"},
        }
        for header in row.headers
    ]


def _query_parameters(query: type[msgspec.Struct]) -> list[dict[str, Any]]:
    (_,), components = msgspec.json.schema_components([query], ref_template=_REF)
    found = []
    for name, schema in components[query.__name__]["properties"].items():
        described = {"name": name, "in": "query", "required": False, "schema": schema}
        if "description" in schema:
            described["description"] = schema.pop("description")
        found.append(described)
    return found


def _responses(row: RouteSpec, by_type: dict[str, Any]) -> dict[str, Any]:
    found = {
        str(status): {"description": HTTPStatus(status).phrase, "content": _content(_parts(answer), by_type)}
        for status, answer in sorted(row.answers.items())
    }
    for status in row.statuses():
        found[str(status)] = {"description": HTTPStatus(status).phrase, "content": {JSON: {"schema": _ERROR}}}
    return found


def _content(kinds: Sequence[Any], by_type: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in kinds:
        if isinstance(kind, Media):
            found[kind.type] = {"schema": {"description": kind.description}}
        elif kind is not None:
            found[JSON] = {"schema": by_type[_key(kind)]}
    return found
