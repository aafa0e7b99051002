"""What ``/metrics`` of a gateway tells of models, and to whom (S49)."""

from __future__ import annotations

import re

import httpx
import pytest
from support.http.served import TENANT, Served
from support.models import models

HIDDEN = "metrics-hidden"


@pytest.fixture(scope="module")
def traffic(served: Served) -> None:
    """Requests of a model that its owner shares with nobody."""
    served.push(HIDDEN, models.add())
    inputs = [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]
    with served.client() as http:
        assert http.delete(f"/v1/models/{HIDDEN}/grants/*").status_code == 200
        answer = http.post(f"/v2/models/{HIDDEN}/infer", json={"inputs": inputs})
    assert answer.status_code == 200, answer.text


def exposed(served: Served, key: str) -> httpx.Response:
    with httpx.Client(base_url=served.url, trust_env=False, headers={"x-api-key": key} if key else {}) as http:
        return http.get("/metrics")


def named(text: str) -> set[str]:
    return set(re.findall(r'model="([^"]*)"', text))


@pytest.mark.usefixtures("traffic")
def test_without_a_key_no_metric_names_a_model_and_the_others_are_there(served: Served) -> None:
    answer = exposed(served, "")
    assert answer.status_code == 200
    assert named(answer.text) == set()
    assert HIDDEN not in answer.text
    assert "tether_broker_connected " in answer.text
    assert re.search(r'tether_http_requests_total\{route="infer",status="200"\} [1-9]', answer.text)


@pytest.mark.usefixtures("traffic")
def test_a_key_sees_metrics_of_the_models_that_it_sees(served: Served) -> None:
    assert HIDDEN in named(exposed(served, served.key).text)
    assert HIDDEN in named(exposed(served, served.new_key("metrics")).text)
    stranger = exposed(served, served.new_key("metrics", tenant="metrics-stranger"))
    assert stranger.status_code == 200
    assert HIDDEN not in stranger.text


@pytest.mark.parametrize("scope", ["infer", "jobs", "models:read", "models:write", "models:code"])
def test_another_scope_is_not_enough(served: Served, scope: str) -> None:
    assert exposed(served, served.new_key(scope)).status_code == 403


def test_a_wrong_key_is_refused_and_not_taken_for_none(served: Served) -> None:
    assert exposed(served, "tk_aaaaaaaa_" + "a" * 43).status_code == 401


def test_a_session_reads_no_metrics_of_models(served: Served, http: httpx.Client) -> None:
    made = http.post("/v1/sessions", json={})
    assert made.status_code == 201
    assert "metrics" not in made.json()["scopes"]
    assert exposed(served, made.json()["token"]).status_code == 403


@pytest.mark.usefixtures("traffic")
def test_a_key_with_patterns_sees_metrics_of_no_other_model(served: Served, http: httpx.Client) -> None:
    made = http.post("/v1/keys", json={"name": "m", "tenant": TENANT, "scopes": ["admin"], "models": ["other-*"]})
    assert made.status_code == 201, made.text
    assert HIDDEN not in exposed(served, made.json()["key"]).text
