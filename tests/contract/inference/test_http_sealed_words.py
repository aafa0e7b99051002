"""What a sealed tenant sends is in no log and in no audit entry, whatever a model or the gateway says about it (S50)."""

from __future__ import annotations

import logging

import httpx
import pytest
from support.http.served import Served, until
from support.models import models

from tether.domain.tenant import Tenant
from tether.process.logs import JsonFormatter

NAME = "words-lookup"
SEALED, OPEN = "words-sealed", "words-open"
SECRET = 86_753_091
"""An index that the model has no row for: it says so, with the number."""

BODY = {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1, 1], "data": [SECRET]}]}


@pytest.fixture(scope="module")
def tenants(served: Served) -> None:
    gateway = served.services.gateway
    served.push(NAME, models.gather())
    served.share(NAME)
    served.run(gateway.tenants.store(Tenant(SEALED, sealed=True)))
    until(lambda: gateway.tenant_encryption.keyring.newest(SEALED) is not None, "the tenant has a key")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    formatter = JsonFormatter("test")
    return [formatter.format(record) for record in caplog.records if record.name.startswith("tether")]


def ask(http: httpx.Client, path: str) -> httpx.Response:
    if path == "/v1/inference":
        return http.post(path, json={"modelId": NAME, "inputData": {"x": [[SECRET]]}})
    if path != "job":
        return http.post(path, json=BODY)
    made = http.post("/v1/jobs", json={"model": NAME, **BODY})
    assert made.status_code == 202, made.text
    return http.get(f"/v1/jobs/{made.json()['id']}", params={"wait": 20})


@pytest.mark.usefixtures("tenants")
@pytest.mark.parametrize("tenant", [SEALED, OPEN])
@pytest.mark.parametrize("path", [f"/v2/models/{NAME}/infer", "/v1/inference", "job"])
def test_a_models_words_about_an_input_are_for_the_caller_alone(
    served: Served, caplog: pytest.LogCaptureFixture, path: str, tenant: str
) -> None:
    key = served.new_key("infer", "jobs", tenant=tenant)
    with caplog.at_level(logging.DEBUG), served.client() as http:
        http.headers["x-api-key"] = key
        answer = ask(http, path)
    assert str(SECRET) in answer.text
    assert any(str(SECRET) in line for line in lines(caplog)) == (tenant == OPEN)
    assert any("message is" in line for line in lines(caplog)) == (tenant == SEALED)
    with served.client() as http:
        entries = http.get("/v1/audit", params={"tenant": tenant, "limit": 1000})
        assert entries.status_code == 200, entries.text
        assert str(SECRET) not in entries.text


@pytest.mark.usefixtures("tenants")
def test_a_fault_of_the_gateway_tells_where_it_is_and_not_what_was_sent(
    served: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def faulty(*_: object, **__: object) -> None:
        raise ValueError(f"could not convert {SECRET}")

    monkeypatch.setattr(served.services.gateway, "infer", faulty)
    for tenant in (SEALED, OPEN):
        caplog.clear()
        for path in (f"/v2/models/{NAME}/infer", "/v1/inference"):
            with caplog.at_level(logging.DEBUG), served.client() as http:
                http.headers["x-api-key"] = served.new_key("infer", tenant=tenant)
                assert ask(http, path).status_code == 500
        told = lines(caplog)
        assert any(str(SECRET) in line for line in told) == (tenant == OPEN)
        assert len([line for line in told if "request_failed" in line and "ValueError" in line]) == 2
