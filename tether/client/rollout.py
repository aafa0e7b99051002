"""Waits until a worker hosts a version, as a flow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tether.client.operations import Json, model_path
from tether.client.protocol import (
    Flow,
    OperationDeadline,
    Request,
    RetryPolicy,
    Sleep,
    Waiting,
    exchange_json,
    unwatched,
)
from tether.errors import ModelNotReady

POLL_S = (0.1, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Seconds between two polls; the last one repeats."""

SETTLED_S = {"ready": 0.0, "unloaded": 0.0, "not_served": 0.0, "failed": 3.0, "unplaced": 3.0, "no_workers": 10.0}
"""Seconds for which a state must last to be final. A failed load is retried after 0.5 s, or on another
worker; a starting worker appears within seconds."""


def settled(policy: RetryPolicy, name: str, version: int, waiting: Waiting = unwatched) -> Flow[Json]:
    """Poll until a worker hosts a version, or none will, at most ``policy.timeout`` seconds.

    ``waiting`` is called with the reason of the wait.

    Returns:
        The last response of the route ``rollout``; its ``state`` is ``loading`` after a timeout.
    """
    end = policy.monotonic() + policy.timeout
    policy = replace(
        policy, patience=OperationDeadline(end, lambda what: waiting(what) if what else None, answered=True)
    )
    ask = Request("GET", f"{model_path(name)}/versions/{version}/rollout")
    state, since, polls = "", policy.monotonic(), 0
    while True:
        told = yield from exchange_json(policy, ask, dict[str, Any])
        now = policy.monotonic()
        if told["state"] != state:
            state, since = told["state"], now
        if now - since >= SETTLED_S.get(state, policy.timeout):
            waiting("")
            return told
        waiting(words(told))
        pause = POLL_S[min(polls, len(POLL_S) - 1)]
        if now + pause >= end:
            waiting("")
            return {**told, "state": "loading"}
        yield Sleep(pause)
        polls += 1


def wait_ready(policy: RetryPolicy, name: str, version: int, waiting: Waiting | None) -> Flow[Json]:
    """Wait as :func:`settled` does; accept only a version that is ready.

    Raises:
        ModelNotReady: no worker hosts it; the message says why.
    """
    told = yield from settled(policy, name, version, waiting or unwatched)
    if told["state"] != "ready":
        raise not_ready(told, policy.timeout)
    return told


def not_ready(told: Json, timeout: float) -> ModelNotReady:
    """Return the error for a version that no worker hosts."""
    what = f"version {told['version']} of model '{told['name']}'"
    late = told["state"] == "loading"
    return ModelNotReady(f"{what} is stored, but not ready{f' after {timeout:g} s' if late else ''}: {words(told)}")


def words(told: Json) -> str:
    """Describe a response of the route, without the model."""
    workers, reason = told["workers"], told["reason"]
    counted = f"{workers} worker{'' if workers == 1 else 's'}"
    if told["state"] == "ready":
        return f"{told['ready']} of {counted} ready"
    if told["failed"]:
        return f"{told['failed']} of {counted} could not load it{f': {reason}' if reason else ''}"
    return reason or f"loading on {counted}"
