"""Decrypts the jobs of tenants with encryption before they run, and encrypts their outcomes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from tether.bus.key_value.keyrings import Keyring
from tether.crypto.payload_encryption import seal_outcome
from tether.domain.job import Failure, Job, JobState, Outcome
from tether.errors import (
    AttemptsExhausted,
    DeadlineExceeded,
    DecryptionFailed,
    EnvelopeError,
    JobCancelled,
    ModelNotFound,
    NoDecryptionKey,
)
from tether.process import metrics

log = logging.getLogger(__name__)

_OURS = frozenset(
    error.code
    for error in (NoDecryptionKey, DecryptionFailed, DeadlineExceeded, JobCancelled, ModelNotFound, AttemptsExhausted)
)
"""Error codes whose messages are our own and hold no part of the request."""


async def opened(keyring: Keyring, jobs: Sequence[Job]) -> tuple[list[Job], list[tuple[Job, EnvelopeError]]]:
    """Return jobs with decrypted inputs, and those that cannot be decrypted, each with the error."""
    found: list[Job] = []
    refused: list[tuple[Job, EnvelopeError]] = []
    for job in jobs:
        try:
            found.append(await keyring.open_job(job))
        except EnvelopeError as error:
            metrics.ENVELOPES_REJECTED.labels(error.code).inc()
            ids = {"job_id": job.id, "tenant": job.tenant}
            log.warning(
                "could not decrypt a job: %s", error, extra={"action": "seal_refused", "code": error.code, **ids}
            )
            refused.append((job, error))
    return found, refused


def refusals(refused: Sequence[tuple[Job, EnvelopeError]], *, attempt: int, worker: str, now: float) -> list[Outcome]:
    """Return failed outcomes for jobs that cannot be decrypted. ``now`` is UTC seconds."""
    return [
        Outcome(job.id, JobState.FAILED, (), Failure(error.code, error.message), attempt, worker, 0.0, now)
        for job, error in refused
    ]


def closed(keyring: Keyring, jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    """Encrypt the outcomes of encrypted jobs with their tenant's newest key."""
    by_id = {job.id: job for job in jobs if job.sealed is not None}
    if not by_id:
        return outcomes
    return [
        outcome if (job := by_id.get(outcome.job)) is None else _closed(keyring, job, outcome) for outcome in outcomes
    ]


def _closed(keyring: Keyring, job: Job, outcome: Outcome) -> Outcome:
    """Encrypt with the job's own key if the newest is not available; without any drop the content."""
    key = keyring.newest(job.tenant)
    if key is None and job.sealed is not None:
        key = keyring.known(job.tenant, job.sealed.key_id)
    if key is not None:
        return seal_outcome(key, job.tenant, outcome)
    if outcome.outputs:
        failure = Failure(NoDecryptionKey.code, "the worker no longer has a key to decrypt this tenant's payloads")
        return msgspec.structs.replace(outcome, state=JobState.FAILED, outputs=(), error=failure)
    if outcome.error is None or outcome.error.code in _OURS:
        return outcome
    failure = Failure(outcome.error.code, "the worker no longer has a key to encrypt the failure of this tenant's job")
    return msgspec.structs.replace(outcome, error=failure)
