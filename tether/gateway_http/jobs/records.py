"""The records of durable jobs as gateways write and read them: entries of the bucket ``jobs``.

A record is stored before the bundle that carries its job is queued, so that a job which finds no room is refused before
it can run. Without an Idempotency-Key the record counts at once: should the gateway die before the bundle is queued, no
client was told of the job, and the dispatcher ends it. A record under a key counts as a claim until the bundle is queued
(``storing`` instead of ``bundle``), because a client may send the key again: its job is then stored again, under the
same id.
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
    """What an Idempotency-Key has: the record under it, if there is one, and the sequence to replace it at."""

    record: JobRecord | None = None
    sequence: int = 0


class Entered(msgspec.Struct, frozen=True):
    """A record that was stored, and where."""

    record: JobRecord
    sequence: int


class JobRecordStore:
    """The bucket ``jobs``."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.raw = KvBucket(bus, "jobs")

    # read

    async def find(self, ids: Sequence[str]) -> dict[JobId, JobRecord]:
        """The records of those jobs that were accepted and are not forgotten; ids may be anything a client sent."""
        wanted = [job_id for job_id in ids if is_job_id(job_id)]
        found = await self._read({record_key(job_id) for job_id in wanted})
        by_id = {record.id: record for record, _ in found.values()}
        if len(by_id.keys() & set(wanted)) < len(wanted):
            missing = [job_id for job_id in wanted if job_id not in by_id]
            older = await self._read({key for job_id in missing for key in older_record_keys(job_id)})
            by_id.update({record.id: record for record, _ in older.values()})
        return {JobId(job_id): by_id[JobId(job_id)] for job_id in wanted if accepted(by_id.get(JobId(job_id)))}

    async def held(self, digests: Sequence[str]) -> dict[str, KeptRecord]:
        """What the Idempotency-Keys with these digests have."""
        keys = {digest: (record_key(digest), *older_record_keys(digest_of_before(digest))) for digest in digests}
        subjects = {self.raw.subject(key): key for several in keys.values() for key in several}
        stored = await self._bus.direct_batch(self.raw.stream, list(subjects))
        by_key = {subjects[subject]: item for subject, item in stored.items()}
        return {digest: self._held([by_key.get(key) for key in several]) for digest, several in keys.items()}

    def _held(self, items: Sequence[StoredMessage | None]) -> KeptRecord:
        """Of a key's three subjects the newest form counts first; of the oldest form only a job that was accepted."""
        opened = [None if item is None else self.opened(item.subject, item.data) for item in items]
        if not accepted(opened[-1]):
            opened[-1] = None
        for item, record in zip(items, opened, strict=True):
            if item is not None and record is not None:
                return KeptRecord(record, item.sequence)
        return KeptRecord() if items[0] is None else KeptRecord(None, items[0].sequence)

    def subjects_of(self, tenant: str) -> str:
        """All records of a tenant, and hardly any other one's."""
        return self.raw.subject(f"{tenant_mark(tenant)}.*")

    @property
    def subjects_of_before(self) -> str:
        """All records that homes of before left, of every tenant."""
        return self.raw.subject("*")

    async def _read(self, keys: set[str]) -> dict[str, tuple[JobRecord, int]]:
        stored = await self._bus.direct_batch(self.raw.stream, [self.raw.subject(key) for key in keys])
        opened = {subject: (self.opened(subject, item.data), item.sequence) for subject, item in stored.items()}
        return {subject: (record, at) for subject, (record, at) in opened.items() if record is not None}

    def opened(self, subject: str, frame: bytes) -> JobRecord | None:
        """The verified record of a subject; None when there is none that can be believed."""
        envelope = self._bus.verify_frame(frame, subject, MessageType.RECORD) if frame else None
        if envelope is None:
            return None
        try:
            return codec.decode_record(envelope.body)
        except BadEncoding as error:
            log.warning("unreadable record: %s", error, extra={"action": "entry_refused"})
            return None

    # write

    async def enter(self, record: JobRecord, bundle: str) -> Entered:
        """Store the record of a job that goes into ``bundle``, before that is queued. Safe to repeat."""
        stored = msgspec.structs.replace(record, bundle=bundle)
        return Entered(stored, await self._put(stored))

    async def claim(self, record: JobRecord, bundle: str, after: int) -> Entered | None:
        """:meth:`enter` for a job under an Idempotency-Key that had the entry ``after`` (0: none); None when it has
        another one by now. Safe to repeat."""
        claim = msgspec.structs.replace(record, bundle="", storing=bundle)
        try:
            return Entered(claim, await self._put(claim, expected=after))
        except VersionConflict:
            found = await self._bus.direct_get(self.raw.stream, self.raw.subject(record.key))
            if found is None or self.opened(found.subject, found.data) != claim:
                return None
            return Entered(claim, found.sequence)  # the answer to an earlier try was lost

    async def accept(self, claim: JobRecord) -> Entered:
        """The claim's bundle is queued: from now on the key has its job. It takes less room than the claim did."""
        record = msgspec.structs.replace(claim, bundle=claim.storing, storing="")
        return Entered(record, await self._put(record))

    async def leave(self, entered: Sequence[Entered]) -> None:
        """Take back what was stored for jobs that were refused. What the broker does not hear is left to age."""
        await asyncio.gather(*[self._leave(item) for item in entered])

    async def _leave(self, item: Entered) -> None:
        try:
            with suppress(VersionConflict):
                await self.raw.forget(item.record.key, item.sequence)
        except TetherError as error:
            extra = {"action": "record_left", "job_id": item.record.id}
            log.warning("the record of a refused job stays: %s", error, extra=extra)

    async def _put(self, record: JobRecord, *, expected: int | None = None) -> int:
        subject = self.raw.subject(record.key)
        frame = self._bus.signer.sign_envelope(MessageType.RECORD, subject, codec.encode_record(record))
        headers = None if expected is None else {"Nats-Expected-Last-Subject-Sequence": str(expected)}
        return (await self._bus.publish_acked(subject, frame, headers=headers)).sequence


def accepted(record: JobRecord | None) -> bool:
    return record is not None and bool(record.bundle)


def is_job_id(text: str) -> bool:
    return len(text) == 32 and all(character in "0123456789abcdef" for character in text)
