"""The operations of a client as flows (see :mod:`tether.client.protocol`), for blocking and asynchronous use."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote

import msgspec

from tether.client.inputs import Inputs, Version, arrays, fitted
from tether.client.protocol import Flow, Progress, Request, Response, RetryPolicy, exchange, exchange_json
from tether.domain.job import TERMINAL, Failure, JobState
from tether.domain.tensor import Array, from_numpy, to_numpy
from tether.errors import (
    AttemptsExhausted,
    DeadlineExceeded,
    InferenceFailed,
    InvalidRequest,
    JobCancelled,
    ResultTooLarge,
    TetherError,
    by_code,
)
from tether.wire import oip

Outputs = dict[str, Array]
Json = dict[str, Any]

BATCH = 200
"""Jobs in one ``/v1/jobs:batch`` request, and ids in one waiting request."""

BATCH_BYTES = 2 << 20
"""Size above which a batch is sent with fewer jobs, below the gateway's limit of one request."""

POLL_S = 20.0
"""Longest wait of one request, in seconds."""

_BY_STATE: dict[JobState, type[TetherError]] = {
    JobState.FAILED: InferenceFailed,
    JobState.CANCELLED: JobCancelled,
    JobState.EXPIRED: DeadlineExceeded,
    JobState.DEAD: AttemptsExhausted,
}


class JobInfo(msgspec.Struct, frozen=True):
    """A durable job as the gateway returns it."""

    id: str
    state: JobState
    model: str
    version: int | str
    priority: str = "normal"
    attempts: int = 0
    submitted_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    result: msgspec.Raw = msgspec.Raw(b"null")
    result_left_out: bool = False
    error: Failure | None = None

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL

    def outputs(self) -> Outputs:
        """Return the outputs of a job that succeeded.

        Raises:
            TetherError: there are none; its class follows from the job's error code.
        """
        if self.result_left_out:
            raise ResultTooLarge(f"the result of job {self.id} did not fit into the response; request this job alone")
        if self.state is JobState.SUCCEEDED:
            try:
                result = _result_decoder.decode(self.result)
            except msgspec.MsgspecError as error:
                raise oip.bad_json(error, where="the job's result") from error
            return {tensor.name: to_numpy(tensor) for tensor in oip.tensors_from_json(result.outputs, where="outputs")}
        if self.error is not None:
            raise by_code(self.error.code, self.error.message)
        raise _BY_STATE.get(self.state, InvalidRequest)(f"job {self.id} is {self.state.value} and has no outputs")


class JobPage(msgspec.Struct, frozen=True):
    """Some jobs, and the cursor of the next page (None: last page)."""

    jobs: list[JobInfo]
    next_cursor: str | None = None


class _Result(msgspec.Struct):
    outputs: list[oip.WireTensor]


_result_decoder = msgspec.json.Decoder(_Result)


def encoded_job(job: JobInfo) -> Json:
    """Return a job as the plain object that the gateway sent."""
    plain = msgspec.json.decode(msgspec.json.encode(job))
    return {name: value for name, value in plain.items() if value is not None}


# jobs


@dataclass(frozen=True)
class JobOptions:
    """Options of a job besides its inputs. ``deadline`` is in seconds from now."""

    version: Version = None
    priority: str | None = None
    deadline: float | None = None


def job_body(model: str, inputs: Mapping[str, Array], options: JobOptions) -> Json:
    """Return the JSON body of one job."""
    tensors = [oip.tensor_to_json(from_numpy(name, array), compact=True) for name, array in inputs.items()]
    body: Json = {"model": model, "inputs": tensors}
    if options.version is not None:
        text = str(options.version)
        body["version"] = int(text) if text.isdecimal() else text
    if options.priority is not None:
        body["priority"] = str(options.priority)
    if options.deadline is not None:
        body["deadline_ms"] = max(1, round(options.deadline * 1000))
    return body


def post(path: str, body: Json, **more: Any) -> Request:
    headers = {"content-type": "application/json", **more.pop("headers", {})}
    return Request("POST", path, msgspec.json.encode(body), headers=headers, **more)


def put(path: str, body: Json) -> Request:
    return Request("PUT", path, msgspec.json.encode(body), headers={"content-type": "application/json"})


def submit(policy: RetryPolicy, model: str, inputs: Inputs, options: JobOptions, key: str | None) -> Flow[JobInfo]:
    headers = {"idempotency-key": key or uuid.uuid4().hex}

    def sent(given: dict[str, Array]) -> Flow[JobInfo]:
        return exchange_json(policy, post("/v1/jobs", job_body(model, given, options), headers=headers), JobInfo)

    return (yield from fitted(policy, model, options.version, inputs, sent))


def submit_many(
    policy: RetryPolicy, model: str, rows: Iterable[Inputs], options: JobOptions, progress: Progress | None
) -> Flow[list[JobInfo]]:
    """Submit one job per row, at most :data:`BATCH` jobs and :data:`BATCH_BYTES` bytes per request."""
    found: list[JobInfo] = []
    known: dict[str, str] = {}
    bodies: list[msgspec.Raw] = []
    size = 0
    for row in rows:
        given = yield from arrays(policy, model, options.version, row, known, fit=True)
        body = msgspec.json.encode(job_body(model, given, options))
        if bodies and (len(bodies) == BATCH or size + len(body) > BATCH_BYTES):
            found += yield from _submit_batch(policy, bodies)
            tell(progress, len(found))
            bodies, size = [], 0
        bodies.append(msgspec.Raw(body))
        size += len(body)
    if bodies:
        found += yield from _submit_batch(policy, bodies)
        tell(progress, len(found))
    return found


def _submit_batch(policy: RetryPolicy, bodies: Sequence[msgspec.Raw]) -> Flow[list[JobInfo]]:
    """Submit a batch under one key, from which the server derives one per job, so that a retry is safe."""
    headers = {"idempotency-key": uuid.uuid4().hex}
    page = yield from exchange_json(policy, post("/v1/jobs:batch", {"jobs": bodies}, headers=headers), JobPage)
    return page.jobs


def tell(progress: Progress | None, done: int) -> None:
    if progress is not None:
        progress(done)


class ProgressCounter:
    """A sum that is reported to ``progress``, starting at ``done``."""

    def __init__(self, progress: Progress | None, done: int = 0) -> None:
        self._progress = progress
        self._done = done
        tell(progress, done)

    def add(self, size: int) -> None:
        self._done += size
        tell(self._progress, self._done)


def _job_path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def job(policy: RetryPolicy, job_id: str, wait: float) -> Flow[JobInfo]:
    params = {"wait": f"{wait:.3f}"} if wait else {}
    return (yield from exchange_json(policy, Request("GET", _job_path(job_id), params=params), JobInfo, longer=wait))


def cancel(policy: RetryPolicy, job_id: str) -> Flow[JobInfo]:
    return (yield from exchange_json(policy, Request("DELETE", _job_path(job_id)), JobInfo))


def change(policy: RetryPolicy, job_id: str, known: JobState | None) -> Flow[JobInfo]:
    """Return the job once its state differs from ``known``."""
    while True:
        info = yield from job(policy, job_id, 0.0 if known is None else 1.0)
        if info.state is not known:
            return info


def wait_many(
    policy: RetryPolicy,
    ids: Sequence[str],
    within: float | None,
    progress: Progress | None,
) -> Flow[list[JobInfo]]:
    """Return every finished job, in the order of ``ids``; ``within`` is in seconds (None: no limit)."""
    end = None if within is None else policy.monotonic() + within
    ended: dict[str, JobInfo] = {}
    open_ids = list(dict.fromkeys(ids))
    while open_ids:
        part = open_ids[:BATCH]
        left = POLL_S if end is None else min(POLL_S, end - policy.monotonic())
        if left < 0:
            raise DeadlineExceeded(f"{len(open_ids)} of {len(set(ids))} jobs had not finished after {within:g} s")
        params = {"ids": ",".join(part), "wait": f"{left:.3f}"}
        ask = Request("GET", "/v1/jobs", params=params)
        page = yield from exchange_json(policy, ask, JobPage, longer=left)
        for info in page.jobs:
            if info.ended:
                ended[info.id] = (yield from job(policy, info.id, 0.0)) if info.result_left_out else info
        open_ids = [job_id for job_id in open_ids if job_id not in ended]
        tell(progress, len(ended))
    return [ended[job_id] for job_id in ids]


def jobs(policy: RetryPolicy, params: Mapping[str, Any]) -> Flow[JobPage]:
    given = {name: str(value) for name, value in params.items() if value is not None}
    return (yield from exchange_json(policy, Request("GET", "/v1/jobs", params=given), JobPage))


# models, keys, health


def get(policy: RetryPolicy, path: str, key: str | None = None) -> Flow[Any]:
    """Return a JSON object, or its field ``key``."""
    found = yield from exchange_json(policy, Request("GET", path), dict[str, Any])
    return found if key is None else found.get(key, [])


def ask(policy: RetryPolicy, method: str, path: str, body: Json | None = None) -> Flow[Json]:
    """Send a request with a JSON reply; only a GET is retried after a lost reply."""
    content = b"" if body is None else msgspec.json.encode(body)
    headers = {} if body is None else {"content-type": "application/json"}
    sent = Request(method, path, content, headers=headers, repeatable=method == "GET")
    return (yield from exchange_json(policy, sent, dict[str, Any]))


def below(path: str, name: str) -> str:
    """Return ``path`` with ``name`` as its last segment."""
    return f"{path}/{quote(name, safe='')}"


def model_path(name: str) -> str:
    return f"/v1/models/{quote(name, safe='')}"


def create_key(policy: RetryPolicy, tenant: str, scopes: Sequence[str], name: str) -> Flow[Json]:
    body = {"tenant": tenant, "scopes": list(scopes), **({"name": name} if name else {})}
    return (yield from exchange_json(policy, post("/v1/keys", body, repeatable=False), dict[str, Any]))


def revoke_key(policy: RetryPolicy, key_id: str) -> Flow[None]:
    yield from exchange(policy, Request("DELETE", f"/v1/keys/{quote(key_id, safe='')}"))


def ready(policy: RetryPolicy) -> Flow[bool]:
    got = yield Request("GET", "/v2/health/ready", timeout=policy.timeout)
    return isinstance(got, Response) and got.status == 200
