"""A client that holds every answer against the OpenAPI document: path, method, status, content type, body."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import httpx
from jsonschema import Draft202012Validator
from support.http.served import Served


@dataclass
class Document:
    """An OpenAPI document, ready to be compared with what was answered."""

    content: dict[str, Any]

    @classmethod
    def of(cls, served: Served) -> Document:
        with served.client() as http:
            return cls(http.get("/openapi.json").json())

    def template(self, path: str) -> str | None:
        """The documented path that ``path`` is one of."""
        for template in self.content["paths"]:
            if re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template)), path):
                return str(template)
        return None

    def operations(self) -> list[tuple[str, str, dict[str, Any]]]:
        return [
            (method.upper(), path, operation)
            for path, methods in self.content["paths"].items()
            for method, operation in methods.items()
        ]

    def check(self, answer: httpx.Response) -> None:
        """Fail when the document does not foresee this answer."""
        method = answer.request.method
        if method in ("HEAD", "OPTIONS") or answer.status_code == 405:
            return
        answer.read()
        template = self.template(answer.request.url.path)
        if template is None:
            assert answer.status_code == 404, f"{method} {answer.request.url} is not documented"
            return
        responses = self.content["paths"][template][method.lower()]["responses"]
        assert str(answer.status_code) in responses, f"{method} {template}: {answer.status_code} is not documented"
        kinds = responses[str(answer.status_code)]["content"]
        kind = answer.headers["content-type"].split(";")[0]
        assert kind in kinds, f"{method} {template} {answer.status_code}: {kind} is not documented"
        if kind == "application/json":
            self.check_body(kinds[kind]["schema"], answer.json())

    def check_body(self, schema: dict[str, Any], body: Any) -> None:
        Draft202012Validator({**schema, "components": self.content["components"]}).validate(body)

    def client(self, served: Served, key: str | None = None) -> httpx.Client:
        """A client with ``key``, or with one that may do everything."""
        headers = {"x-api-key": served.key if key is None else key}
        return httpx.Client(
            base_url=served.url,
            headers=headers,
            timeout=60,
            trust_env=False,
            event_hooks={"response": [self.check]},
        )


def assert_error(answer: httpx.Response, status: int, code: str, *words: str) -> None:
    """A typed error whose one line has all of ``words``."""
    assert answer.status_code == status, answer.text
    assert answer.json()["code"] == code, answer.text
    for word in words:
        assert word in answer.json()["error"], answer.text
