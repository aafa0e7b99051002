"""Reads and writes the records of durable jobs: entries of the bucket ``jobs``.

A record is stored before its job's bundle is queued, so that a job without room is rejected before it can
run. Without an Idempotency-Key the record is valid at once: if the gateway dies before the bundle is queued,
no client knows the job, and the dispatcher fails it. A record with a key is a claim until the bundle is
queued (``storing`` instead of ``bundle``), because a client may retry with the key: its job is then stored
again, under the same id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from tether.bus.bus import Bus, StoredMessage
from tether.bus.key_value.bucket import KvBucket
from tether.crypto import MessageType
from tether.domain.job import JobId, JobRecord, digest_of_before, older_record_keys, record_key, tenant_mark
from tether.errors import BadEncoding, TetherError, VersionConflict
from tether.wire import codec

log = logging.getLogger(__name__)


class KeptRecord(msgspec.Struct, frozen=True):
    """The record of an Idempotency-Key, if there is one, and the sequence to replace it at."""

    record: JobRecord | None = None
    sequence: int = 0


class Entered(msgspec.Struct, frozen=True):
    """A stored record and its sequence."""

    record: JobRecord
    sequence: int


class JobRecordStore:
    """The bucket ``jobs``."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.raw = KvBucket(bus, "jobs")

    # read

    async def find(self, ids: Sequence[str]) -> dict[JobId, JobRecord]:
        """Return the records of accepted jobs that still exist; ids may be arbitrary client input."""
        wanted = [job_id for job_id in ids if is_job_id(job_id)]
        found = await self._read({record_key(job_id) for job_id in wanted})
        by_id = {record.id: record for record, _ in found.values()}
        if len(by_id.keys() & set(wanted)) < len(wanted):
            missing = [job_id for job_id in wanted if job_id not in by_id]
            older = await self._read({key for job_id in missing for key in older_record_keys(job_id)})
            by_id.update({record.id: record for record, _ in older.values()})
        return {JobId(job_id): by_id[JobId(job_id)] for job_id in wanted if accepted(by_id.get(JobId(job_id)))}

    async def held(self, digests: Sequence[str]) -> dict[str, KeptRecord]:
        """Return the entries of the Idempotency-Keys with these digests."""
        keys = {digest: (record_key(digest), *older_record_keys(digest_of_before(digest))) for digest in digests}
        subjects = {self.raw.subject(key): key for several in keys.values() for key in several}
        stored = await self._bus.direct_batch(self.raw.stream, list(subjects))
        by_key = {subjects[subject]: item for subject, item in stored.items()}
        return {digest: self._newest([by_key.get(key) for key in several]) for digest, several in keys.items()}

    def _newest(self, items: Sequence[StoredMessage | None]) -> KeptRecord:
        """Return a key's entry in its newest format; of the oldest format, only an accepted job."""
        opened = [None if item is None else self.opened(item.subject, item.data) for item in items]
        if not accepted(opened[-1]):
            opened[-1] = None
        for item, record in zip(items, opened, strict=True):
            if item is not None and record is not None:
                return KeptRecord(record, item.sequence)
        return KeptRecord() if items[0] is None else KeptRecord(None, items[0].sequence)

    def subjects_of(self, tenant: str) -> str:
        """Return the subject filter of a tenant's records; it matches hardly any others."""
        return self.raw.subject(f"{tenant_mark(tenant)}.*")

    @property
    def subjects_of_before(self) -> str:
        """Subject filter of all records in an older format, of every tenant."""
        return self.raw.subject("*")

    async def _read(self, keys: set[str]) -> dict[str, tuple[JobRecord, int]]:
        stored = await self._bus.direct_batch(self.raw.stream, [self.raw.subject(key) for key in keys])
        opened = {subject: (self.opened(subject, item.data), item.sequence) for subject, item in stored.items()}
        return {subject: (record, at) for subject, (record, at) in opened.items() if record is not None}

    def opened(self, subject: str, frame: bytes) -> JobRecord | None:
        """Return the verified record of a subject; None if it is missing or cannot be verified."""
        envelope = self._bus.verify_frame(frame, subject, MessageType.RECORD) if frame else None
        if envelope is None:
            return None
        try:
            return codec.decode_record(envelope.body)
        except BadEncoding as error:
            log.warning("ignored an unreadable job record: %s", error, extra={"action": "entry_refused"})
            return None

    # write

    async def enter(self, record: JobRecord, bundle: str) -> Entered:
        """Store the record of a job before ``bundle`` is queued. Idempotent."""
        stored = msgspec.structs.replace(record, bundle=bundle)
        return Entered(stored, await self._put(stored))

    async def claim(self, record: JobRecord, bundle: str, after: int) -> Entered | None:
        """Store a claim for a job with an Idempotency-Key whose entry was ``after`` (0: none). Idempotent.

        Returns None if the key has another entry by now.
        """
        claim = msgspec.structs.replace(record, bundle="", storing=bundle)
        try:
            return Entered(claim, await self._put(claim, expected=after))
        except VersionConflict:
            found = await self._bus.direct_get(self.raw.stream, self.raw.subject(record.key))
            if found is None or self.opened(found.subject, found.data) != claim:
                return None
            return Entered(claim, found.sequence)  # the reply to an earlier try was lost

    async def accept(self, claim: JobRecord) -> Entered:
        """Turn a claim into a record once its bundle is queued. The record is smaller than the claim."""
        record = msgspec.structs.replace(claim, bundle=claim.storing, storing="")
        return Entered(record, await self._put(record))

    async def discard(self, entered: Sequence[Entered]) -> None:
        """Delete the records of rejected jobs. If that fails, they stay until they expire."""
        await asyncio.gather(*[self._discard_one(item) for item in entered])

    async def _discard_one(self, item: Entered) -> None:
        try:
            with suppress(VersionConflict):
                await self.raw.forget(item.record.key, item.sequence)
        except TetherError as error:
            extra = {"action": "record_left", "job_id": item.record.id}
            log.warning("record of a rejected job not deleted: %s", error, extra=extra)

    async def _put(self, record: JobRecord, *, expected: int | None = None) -> int:
        subject = self.raw.subject(record.key)
        frame = self._bus.signer.sign_envelope(MessageType.RECORD, subject, codec.encode_record(record))
        headers = None if expected is None else {"Nats-Expected-Last-Subject-Sequence": str(expected)}
        return (await self._bus.publish_acked(subject, frame, headers=headers)).sequence


def accepted(record: JobRecord | None) -> bool:
    return record is not None and bool(record.bundle)


def is_job_id(text: str) -> bool:
    return len(text) == 32 and all(character in "0123456789abcdef" for character in text)
