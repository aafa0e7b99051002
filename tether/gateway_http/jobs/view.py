"""The job object of the HTTP interface."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from tether.bus.bus import Bus
from tether.crypto import Header, MessageType, Role
from tether.domain.job import SHARED, TERMINAL, AttemptNote, JobId, JobRecord, JobState, Outcome
from tether.errors import BadEncoding, JobLost, ResultConflict
from tether.gateway_http.bundling.refused_outcomes import refuse_end
from tether.wire import codec, oip

_BY_GATEWAY = (JobState.CANCELLED, JobState.EXPIRED)
"""The only outcomes that a gateway may commit."""


class JobSnapshot(msgspec.Struct, frozen=True):
    """The state of a job: its record, its outcome, its last recorded attempt."""

    record: JobRecord
    outcome: Outcome | None = None
    note: AttemptNote | None = None
    outputs: bytes = b""
    """The outcome's outputs as JSON, if encoded elsewhere."""
    left_out: bool = False
    """True if its outputs were omitted for lack of room in the response."""

    @property
    def ended(self) -> bool:
        return self.outcome is not None

    @property
    def state(self) -> JobState:
        if self.outcome is not None:
            return self.outcome.state
        return JobState.RUNNING if self.note is not None and self.note.attempt else JobState.QUEUED


def read_outcome(bus: Bus, record: JobRecord, frame: bytes) -> Outcome | None:
    """Return a job's outcome from its stored frame; None if it cannot be verified."""
    job, subject = record.id, bus.names.result(record.id, record.pool)
    envelope = bus.verify_frame(frame, subject, MessageType.RESULT)
    if envelope is None:
        return None
    if envelope.header.role is Role.WORKER and (envelope.sender_tenant or SHARED) != record.pool:
        refuse_end(job, envelope.sender)
        return None
    try:
        outcomes = codec.decode_outcomes(envelope.body)
    except BadEncoding as error:
        bus.count_refused(error, subject)
        return None
    if len(outcomes) == 1 and _is_end_of(job, envelope.header, outcomes[0]):
        return outcomes[0]
    bus.count_refused(ResultConflict(f"a stored result is not one that job '{job}' can have"), subject)
    return None


def _is_end_of(job: JobId, header: Header, outcome: Outcome) -> bool:
    """Return True if header and outcome belong to this job and attempt, and the sender may commit such an
    outcome."""
    if header.jobs != (job,) or outcome.job != job:
        return False
    if header.role is Role.DISPATCHER:
        return outcome.state is JobState.FAILED and outcome.error is not None and outcome.error.code == JobLost.code
    if header.role is not Role.WORKER:
        return outcome.state in _BY_GATEWAY
    return outcome.state in TERMINAL and header.attempt == outcome.attempts


def view(state: JobSnapshot) -> dict[str, Any]:
    """Return the job object of the HTTP interface; times in RFC 3339 UTC."""
    record, outcome, note = state.record, state.outcome, state.note
    shown: dict[str, Any] = {
        "id": record.id,
        "state": state.state.value,
        "model": record.model,
        "version": str(record.version),
        "priority": record.priority.value,
        "attempts": 0,
        "submitted_at": rfc3339(record.submitted_at),
    }
    if outcome is None:
        if note is not None and note.attempt:
            shown |= {"attempts": note.attempt, "started_at": rfc3339(max(note.started_at, record.submitted_at))}
        return shown
    shown["attempts"] = outcome.attempts
    started, finished = _times(record, outcome)
    if started:
        shown["started_at"] = rfc3339(started)
    shown["finished_at"] = rfc3339(finished)
    if outcome.error is not None:
        shown["error"] = {"code": outcome.error.code, "message": outcome.error.message}
    if state.left_out:
        shown["result_left_out"] = True
    elif outcome.state is JobState.SUCCEEDED:
        shown["result"] = {
            "model_name": record.model,
            "model_version": str(record.version),
            "id": record.id,
            "outputs": msgspec.Raw(state.outputs)
            if state.outputs
            else [oip.tensor_to_json(tensor) for tensor in outcome.outputs],
        }
    return shown


def shown_job(job: dict[str, Any], name: Callable[[str], str], text: Callable[[str], str]) -> dict[str, Any]:
    """Return a job object with model names as its caller writes them; ``name`` and ``text`` translate them."""
    model = name(job["model"])
    shown = {**job, "model": model}
    if "result" in job:
        shown["result"] = {**job["result"], "model_name": model}
    if "error" in job:
        shown["error"] = {**job["error"], "message": text(job["error"]["message"])}
    return shown


def _times(record: JobRecord, outcome: Outcome) -> tuple[float, float]:
    """Return when it started (0: never) and finished, corrected for the worker's clock.

    The run time is as measured, and the start is not before submission.
    """
    if not outcome.started_at:
        return 0.0, max(outcome.finished_at, record.submitted_at)
    took = max(0.0, outcome.finished_at - outcome.started_at)
    started = max(outcome.started_at, record.submitted_at)
    return started, started + took


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
