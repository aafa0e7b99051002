"""Renders the OpenAPI document as one HTML page without scripts or external resources."""

from __future__ import annotations

from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --get: #1a7f5a; --post: #2563c9; --put: #9a5b00;
  --patch: #7a4fb5; --delete: #c2362b; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin: 2.5rem 0 .5rem; font-size: 1.15rem; }
code, pre { font: 13px/1.45 ui-monospace, monospace; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .4rem 0; }
summary { padding: .45rem .8rem; cursor: pointer; display: flex; gap: .8rem; align-items: baseline; flex-wrap: wrap; }
details[open] > summary { border-bottom: 1px solid var(--line); background: var(--soft); }
.body { padding: .4rem .8rem .8rem; overflow-x: auto; }
.method { font: 600 12px ui-monospace, monospace; color: #fff; border-radius: 4px; padding: .1rem .5rem;
  min-width: 3.2rem; text-align: center; }
.get { background: var(--get); } .post { background: var(--post); } .delete { background: var(--delete); }
.put { background: var(--put); } .patch { background: var(--patch); }
.what { opacity: .75; } table { border-collapse: collapse; margin: .3rem 0 .8rem; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } .none { opacity: .6; }
"""


def page(document: dict[str, Any]) -> str:
    """Render a document of :mod:`tether.gateway_http.api.openapi`."""
    info = document["info"]
    groups = "".join(_group(tag["name"], document) for tag in document["tags"])
    schemas = "".join(_schema(name, schema) for name, schema in sorted(document["components"]["schemas"].items()))
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(info['title'])} API</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(info['title'])} API</h1><p class=what>version {escape(info['version'])} &middot; "
        f"<a href='/openapi.json'>openapi.json</a></p><p>{_prose(info['description'])}</p>"
        f"{groups}<h2>Values</h2>{schemas}</body></html>\n"
    )


def _prose(text: str) -> str:
    """Escape text and mark its backquoted parts as code."""
    parts = escape(text).split("`")
    return "".join(part if place % 2 == 0 else f"<code>{part}</code>" for place, part in enumerate(parts))


def _group(tag: str, document: dict[str, Any]) -> str:
    operations = [
        _operation(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if tag in operation["tags"]
    ]
    return f"<h2>{escape(tag)}</h2>{''.join(operations)}"


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    access = operation.get("description", "Needs no API key.")
    parts = [f"<p>{_prose(access)}</p>", _parameters(operation["parameters"])]
    if "requestBody" in operation:
        parts.append("<b>Body</b>" + _contents(operation["requestBody"]["content"]))
    rows = "".join(
        f"<tr><td>{status}</td><td>{escape(answer['description'])}</td><td>{_kinds(answer['content'])}</td></tr>"
        for status, answer in operation["responses"].items()
    )
    parts.append(f"<b>Responses</b><table>{rows}</table>")
    return (
        f"<details id='{escape(operation['operationId'])}'><summary><span class='method {method}'>{method.upper()}"
        f"</span><code>{escape(path)}</code><span class=what>{escape(operation['summary'])}</span></summary>"
        f"<div class=body>{''.join(parts)}</div></details>"
    )


def _parameters(parameters: list[dict[str, Any]]) -> str:
    if not parameters:
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(item['name'])}</code></td><td>{item['in']}</td><td>{_type(item['schema'])}</td>"
        f"<td>{_prose(item.get('description', ''))}</td></tr>"
        for item in parameters
    )
    return f"<b>Parameters</b><table>{rows}</table>"


def _contents(content: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(kind)}</code></td><td>{_type(media['schema'])}</td></tr>"
        for kind, media in content.items()
    )
    return f"<table>{rows}</table>"


def _kinds(content: dict[str, Any]) -> str:
    return "<br>".join(_type(media["schema"]) for media in content.values())


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code></td><td>{_type(kind)}</td>"
        f"<td class=none>{'' if field in required else 'optional'}</td></tr>"
        for field, kind in schema.get("properties", {}).items()
    )
    body = f"<table>{rows}</table>" if rows else _type(schema)
    return (
        f"<details id='schema-{escape(name)}'><summary><code>{escape(name)}</code>"
        f"<span class=what>{_prose(schema.get('description', ''))}</span></summary>"
        f"<div class=body>{body}</div></details>"
    )


def _type(schema: dict[str, Any]) -> str:
    """Return a short description of a schema, with links to named ones."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f"<a href='#schema-{name}'>{name}</a>"
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    return _plain_type(schema)


def _plain_type(schema: dict[str, Any]) -> str:
    kind = schema.get("type")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if kind == "object":
        values = schema.get("additionalProperties", {})
        return f"object of {_type(values)}" if isinstance(values, dict) and values else "object"
    if kind is None:
        return _prose(schema.get("description", "any value"))
    return escape(str(kind))
