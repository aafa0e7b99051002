"""Stores labels and notes of versions in their bucket; each change is merged into the stored entry."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from tether.audit import Kind, clean
from tether.audit.writer import AuditLog
from tether.bus.bus import Bus
from tether.bus.key_value.bucket import EntryRevision, SignedBucket
from tether.crypto import MessageType
from tether.errors import BadEncoding, BrokerUnavailable, ModelNotFound, Unavailable, VersionConflict
from tether.model.version_metadata import VersionNote, noted, patch_of
from tether.modelstore.records.registry import Registry
from tether.wire import codec

log = logging.getLogger(__name__)

TRIES = 16


class VersionMetadataStore:
    """The ``notes`` bucket, as the model store writes it."""

    def __init__(self, bus: Bus, registry: Registry, audit: AuditLog) -> None:
        self._bus = bus
        self._registry = registry
        self._audit = audit
        self._bucket = SignedBucket(bus, "notes", MessageType.CONFIG)

    async def change(self, model: str, version: int, patch: Mapping[str, Any], by: str) -> VersionNote:
        """Change labels and note of a version; return the result.

        Raises:
            InvalidRequest: naming the invalid field.
            ModelNotFound: the version does not exist.
            Unavailable, BrokerUnavailable: try again.
        """
        wanted = patch_of(patch)
        if not await self._registry.exists(model, version):
            raise ModelNotFound(f"model '{model}' has no version '{version}'", field="version")
        key = self._bus.names.version_key(model, version)
        for _ in range(TRIES):
            latest = await self._bucket.latest(key)
            before = self._decoded(model, version, latest)
            after = noted(before, wanted)
            if after == before:
                return before
            stamped = msgspec.structs.replace(
                after, revision=before.revision + 1, changed_at=self._bus.clock.utc(), changed_by=clean(by)
            )
            if await self._stored(key, stamped, latest):
                self._note(stamped)
                await self._audit.settled()
                return stamped
        raise Unavailable(f"the note of model '{model}' version {version} is being changed by others; try again")

    async def forget(self, model: str, version: int) -> None:
        """Delete the entry of a deleted version."""
        await self._bucket.delete(self._bus.names.version_key(model, version))

    async def _stored(self, key: str, note: VersionNote, latest: EntryRevision) -> bool:
        self._registry.check()
        try:
            await self._bucket.replace(key, codec.encode(note), latest)
        except VersionConflict:
            return self._decoded(note.model, note.version, await self._bucket.latest(key)) == note
        except BrokerUnavailable:
            if not await self._bus.wait_connected(10):
                raise
            return self._decoded(note.model, note.version, await self._bucket.latest(key)) == note
        return True

    def _decoded(self, model: str, version: int, latest: EntryRevision) -> VersionNote:
        """Decode an entry; an unverifiable or unreadable one counts as absent."""
        none = VersionNote(model, version)
        if latest.body is None:
            return none
        try:
            found = codec.decode(latest.body, VersionNote)
        except BadEncoding as error:
            log.warning("ignored an unreadable note: %s", error, extra={"action": "entry_refused", "model": model})
            return none
        return found if (found.model, found.version) == (model, version) else none

    def _note(self, note: VersionNote) -> None:
        fields = {"action": "version_noted", "model": note.model, "version": note.version, "by": note.changed_by[:64]}
        log.info("revision %d", note.revision, extra=fields)
        self._audit.record(
            Kind.MODEL,
            "",
            actor=note.changed_by,
            action="note",
            outcome="ok",
            model=note.model,
            version=note.version,
            detail=f"revision {note.revision}; labels {', '.join(note.labels) or 'none'}",
        )
