"""A durable job as clients see it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from tether import codec, oip
from tether.bus.connection import Bus
from tether.envelope import Header, MessageType, Role
from tether.errors import BadEncoding, ResultConflict
from tether.job import TERMINAL, AttemptNote, JobId, JobRecord, JobState, Outcome

_BY_GATEWAY = (JobState.CANCELLED, JobState.EXPIRED)
"""The only ends that a gateway may give a job."""


class State(msgspec.Struct, frozen=True):
    """Everything known of a job: its record, how it ended, the last attempt that was noted."""

    record: JobRecord
    outcome: Outcome | None = None
    note: AttemptNote | None = None

    @property
    def ended(self) -> bool:
        return self.outcome is not None

    @property
    def state(self) -> JobState:
        if self.outcome is not None:
            return self.outcome.state
        return JobState.QUEUED if self.note is None else JobState.RUNNING


def read_outcome(bus: Bus, job: JobId, frame: bytes) -> Outcome | None:
    """The verified end of a job from its stored frame; None when it must not be believed."""
    envelope = bus.open_frame(frame, bus.names.result(job), MessageType.RESULT)
    if envelope is None:
        return None
    try:
        outcomes = codec.decode_outcomes(envelope.body)
    except BadEncoding as error:
        bus.count_refused(error, bus.names.result(job))
        return None
    if len(outcomes) == 1 and _is_end_of(job, envelope.header, outcomes[0]):
        return outcomes[0]
    bus.count_refused(ResultConflict(f"a stored result is not one that job '{job}' can have"), bus.names.result(job))
    return None


def _is_end_of(job: JobId, header: Header, outcome: Outcome) -> bool:
    """Whether header and outcome speak of this job, and of the same attempt, and the sender may end a job so."""
    if header.jobs != (job,) or outcome.job != job:
        return False
    if header.role is not Role.WORKER:
        return outcome.state in _BY_GATEWAY
    return outcome.state in TERMINAL and header.attempt == outcome.attempts


def view(state: State) -> dict[str, Any]:
    """The job object of the HTTP interface; times in RFC 3339 UTC."""
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
        if note is not None:
            shown |= {"attempts": note.attempt, "started_at": rfc3339(note.started_at)}
        return shown
    shown["attempts"] = outcome.attempts
    if outcome.started_at:
        shown["started_at"] = rfc3339(outcome.started_at)
    shown["finished_at"] = rfc3339(outcome.finished_at)
    if outcome.error is not None:
        shown["error"] = {"code": outcome.error.code, "message": outcome.error.message}
    if outcome.state is JobState.SUCCEEDED:
        shown["result"] = {
            "model_name": record.model,
            "model_version": str(record.version),
            "id": record.id,
            "outputs": [oip.tensor_to_json(tensor) for tensor in outcome.outputs],
        }
    return shown


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
