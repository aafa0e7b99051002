"""Drives a client's flows without a socket: answers in, requests and pauses out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np

from tether.client.protocol import Concurrently, Flow, NoResponse, Request, Response, RetryPolicy, Sleep
from tether.domain.tensor import from_numpy
from tether.wire import oip

T = TypeVar("T")
REFUSED = NoResponse("connection refused", sent=False)
BROKEN = NoResponse("connection closed", sent=True)


class Drive:
    """Answers what a flow sends, one answer after another, and notes everything it did."""

    def __init__(self, answers: Iterable[Response | NoResponse], **policy: Any) -> None:
        self.answers = iter(answers)
        self.now = 0.0
        self.sent: list[Request] = []
        self.pauses: list[float] = []
        self.policy = RetryPolicy(monotonic=lambda: self.now, chance=lambda: 1.0, **policy)

    def __call__(self, flow: Callable[[RetryPolicy], Flow[T]]) -> T:
        return self._drive(flow(self.policy))

    def _drive(self, steps: Flow[T]) -> T:
        answer: Any = None
        try:
            while True:
                step = steps.send(answer)
                answer = None
                if isinstance(step, Sleep):
                    self.now += step.seconds
                    self.pauses.append(step.seconds)
                elif isinstance(step, Concurrently):
                    answer = [self._one(step, flow) for flow in step.flows]
                else:
                    self.sent.append(step)
                    answer = next(self.answers)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]

    def _one(self, step: Concurrently, flow: Flow[Any]) -> Any:
        result = self._drive(flow)
        step.done(result)
        return result

    def body(self, index: int = -1) -> Any:
        content = self.sent[index].content
        assert isinstance(content, bytes)
        return json.loads(content)


def reply(value: Any, status: int = 200, **headers: str) -> Response:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Response(status, {name.replace("_", "-"): text for name, text in headers.items()}, body)


def refusal(code: str, status: int, message: str = "why", **headers: str) -> Response:
    return reply({"error": message, "code": code, "request_id": "r"}, status, **headers)


def job(state: str = "queued", job_id: str = "j", **more: Any) -> dict[str, Any]:
    return {"id": job_id, "state": state, "model": "m", "version": 1, "submitted_at": "2026-01-02T03:04:05.5Z", **more}


def done(job_id: str = "j", value: float = 1.0) -> dict[str, Any]:
    outputs = [oip.tensor_to_json(from_numpy("y", np.array([value], dtype=np.float32)))]
    return job("succeeded", job_id, result={"model_name": "m", "model_version": "1", "outputs": outputs})
