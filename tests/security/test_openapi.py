"""What the OpenAPI document says, tried by generated requests: no fault of ours, and no status it does not name."""

from __future__ import annotations

from typing import Any

import msgspec
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance
from support.http.served import Served

from tether.gateway_http.api import openapi, route_table

SCHEMA = schemathesis.openapi.from_dict(msgspec.to_builtins(openapi.document(route_table.table())))


@SCHEMA.parametrize()
@settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_generated_requests_get_documented_answers(target: Served, case: Case[Any]) -> None:
    """Requests that fit the document and requests that do not."""
    answer = case.call(base_url=target.url, headers={"x-api-key": target.key}, timeout=20)
    case.validate_response(answer, checks=[status_code_conformance, content_type_conformance])
    if answer.status_code != 503:  # where a route may say that a part is away, it is documented
        case.validate_response(answer, checks=[not_a_server_error])
