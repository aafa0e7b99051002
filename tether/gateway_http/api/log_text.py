"""Logs failed requests. Messages about an encrypted tenant's request, such as a model's error, may contain
its data: only the caller gets them."""

from __future__ import annotations

import logging
from pathlib import Path

from tether.errors import TetherError
from tether.gateway_http.access.authentication import Caller
from tether.gateway_http.gateway import Gateway

log = logging.getLogger(__name__)

_SEALED = "a request of an encrypted tenant failed; its message is not logged"


def sealed(gateway: Gateway, caller: Caller | None) -> bool:
    return caller is not None and gateway.tenant_encryption.sealed(caller.tenant)


def refused(error: TetherError, status: int, request_id: str, *, sealed: bool) -> None:
    """Log an error that was sent to the caller."""
    fields = {"action": "request_refused", "code": error.code, "request_id": request_id}
    log.log(
        logging.WARNING if status == 500 else logging.DEBUG, "%s", _SEALED if sealed else error.message, extra=fields
    )


def failed(error: Exception, request_id: str, *, sealed: bool) -> None:
    """Log a gateway fault with its traceback, which ends with the error's message."""
    fields = {"action": "request_failed", "request_id": request_id}
    if sealed:
        log.error("%s: %s at %s", _SEALED, type(error).__name__, _place(error), extra=fields)
    else:
        log.error("request failed unexpectedly", exc_info=error, extra=fields)


def _place(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
