"""Tenants as clients over HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import httpx
from support.http.served import Served, until
from support.models import models

ALL = ("infer", "jobs", "models:read", "models:write")
INPUT = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}


class Tenant:
    """A tenant with a key that may do everything but administer."""

    def __init__(self, served: Served, name: str) -> None:
        self.name = name
        self.key = served.new_key(*ALL, tenant=name)
        self.http = httpx.Client(base_url=served.url, headers={"x-api-key": self.key}, timeout=60, trust_env=False)

    def seen(self, model: str) -> str:
        """How other tenants write one of its models in a path."""
        return f"{self.name}%2F{model}"

    def push(self, model: str, bias: float = 1.0) -> httpx.Response:
        return self.http.post(f"/v1/models/{model}/versions", content=models.add(bias))

    def infer(self, model: str) -> int:
        return self.http.post(f"/v2/models/{model}/infer", json=INPUT).status_code

    def listed(self) -> dict[str, str]:
        """The models that it may know of, each with what it may do with it."""
        found = self.http.get("/v1/models").json()["models"]
        index = {entry["name"] for entry in self.http.post("/v2/repository/index").json()}
        assert index == {entry["name"] for entry in found}
        return {entry["name"]: entry["right"] for entry in found}

    def grant(self, model: str, tenant: str, right: str) -> httpx.Response:
        return self.http.put(f"/v1/models/{model}/grants/{tenant}", json={"right": right})


@contextlib.contextmanager
def tenants(served: Served) -> Iterator[Callable[[str], Tenant]]:
    """Makes tenants of names; their connections end with the block."""
    with contextlib.ExitStack() as stack:

        def made(name: str) -> Tenant:
            found = Tenant(served, name)
            stack.callback(found.http.close)
            return found

        yield made


def pushed(tenant: Tenant, model: str, bias: float = 1.0) -> None:
    """Push a model that adds ``bias``, and wait until it answers."""
    answer = tenant.push(model, bias)
    assert answer.status_code == 201, answer.text
    until(lambda: tenant.infer(model) == 200, f"{model} answers")
