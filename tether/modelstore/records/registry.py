"""Allocates version numbers and updates aliases with compare-and-set.

A version exists once its manifest does. Two model stores may work on one model at the same time: a version
number and an alias update each go to the first conditional write.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple

import msgspec

from tether.bus.bus import Bus, StoredMessage
from tether.bus.key_value.bucket import KvBucket
from tether.crypto import MessageType
from tether.domain.manifest import LATEST, PROVEN, Alias, Batching, Manifest, Move
from tether.errors import BrokerUnavailable, ConfigError, Conflict, EnvelopeError, Unavailable, VersionConflict
from tether.storage.model_files import open_manifest
from tether.wire import codec
from tether.wire.subjects import token

TRIES = 16
"""Consecutive lost conditional writes before giving up."""

HISTORY = 50
"""Stored history entries of an alias."""


Admit = Callable[[Manifest], Awaitable[None]]


class Versions(NamedTuple):
    """State of a model: its newest readable manifest, and the highest number ever used."""

    newest: Manifest | None
    highest: int


class Deleted(NamedTuple):
    """A deleted version: its manifest, and the entry that keeps it."""

    manifest: Manifest
    subject: str
    sequence: int


class Registry:
    """The ``models`` and ``aliases`` buckets, as the model store writes them.

    ``check`` raises if this model store may not write any more; it is called before each write.
    """

    def __init__(self, bus: Bus, check: Callable[[], None] = lambda: None) -> None:
        self._bus = bus
        self.check = check
        self._models = KvBucket(bus, "models")
        self._aliases = KvBucket(bus, "aliases")

    async def versions(self, model: str) -> Versions:
        """Read a model's entries.

        Raises:
            BrokerUnavailable: no answer.
        """
        newest: Manifest | None = None
        highest = 0
        prefix = f"{token(model)}."
        async for item in self._bus.direct_scan(self._models.stream, self._models.subject(prefix + "*")):
            key = item.subject[len(self._models.subject("")) :]
            number = int(key[len(prefix) :])
            highest = max(highest, number)
            manifest = self._manifest(key, item)
            if manifest is not None and (newest is None or number > newest.version):
                newest = manifest
        return Versions(newest, highest)

    def _manifest(self, key: str, item: StoredMessage) -> Manifest | None:
        return None if item.headers.get("KV-Operation") else self._opened(key, item)

    def _opened(self, key: str, item: StoredMessage) -> Manifest | None:
        try:
            return open_manifest(self._bus.verifier, self._bus.names, key, item.data) if item.data else None
        except EnvelopeError:
            return None

    async def add(
        self, model: str, build: Callable[[int], Manifest], admit: Admit, wanted: int = 0
    ) -> tuple[Manifest, bool]:
        """Give the next number to the version that ``build`` makes; return False if the newest version is identical.
        ``admit`` is called before a new version is made, and raises to prevent it. ``wanted``: require this
        number.

        Raises:
            Conflict: the version ``wanted`` is something else, or not the next one.
            Unavailable: other writers won every time.
            BrokerUnavailable: no answer.
        """
        for _ in range(TRIES):
            newest, highest = await self.versions(model)
            manifest = build(highest + 1)
            if newest is not None and wanted in (0, newest.version) and _same(newest, manifest):
                return newest, False
            if wanted not in (0, manifest.version):
                raise Conflict(
                    f"version {wanted} of model '{model}' cannot be made: the next version is "
                    f"{highest + 1}; use that number, "
                    f"or none",
                    field="version",
                )
            await admit(manifest)
            self.check()
            if await self._create(manifest):
                return manifest, True
        raise Unavailable(f"too many pushes of model '{model}' at the same time; try again", retry_after=2)

    async def _create(self, manifest: Manifest) -> bool:
        key = self._bus.names.version_key(manifest.name, manifest.version)
        frame = self._bus.signer.sign_envelope(MessageType.MANIFEST, self._models.subject(key), codec.encode(manifest))
        try:
            if await self._models.create(key, frame):
                return True
        except BrokerUnavailable:
            # It may be stored all the same: the bucket decides.
            if not await self._bus.wait_connected(10):
                raise
            if await self._models.get(key) is None:
                return await self._models.create(key, frame)
        return await self._models.get(key) == frame

    async def move(self, model: str, name: str, version: int, *, forward_only: bool = False) -> Alias:
        """Point alias ``name`` of ``model`` at ``version``; with ``forward_only`` never at an older one.

        Raises:
            Unavailable: other writers won every time.
            BrokerUnavailable: no answer.
        """

        def moved(current: Alias | None) -> Alias | None:
            if current is not None and forward_only and current.version >= version:
                return current
            return self.next_alias(current, Alias(model, name, version))

        alias = await self.change(model, name, moved)
        return alias or Alias(model, name, version)

    async def change(self, model: str, name: str, decide: Callable[[Alias | None], Alias | None]) -> Alias | None:
        """Replace an alias by the result of ``decide`` (None deletes it), and return that.

        ``decide`` gets the current alias and is called again if another writer came first.

        Raises:
            Unavailable: other writers won every time.
            BrokerUnavailable: no answer.
        """
        subject = self._aliases.subject(f"{token(model)}.{token(name)}")
        for _ in range(TRIES):
            stored = await self._bus.direct_get(self._aliases.stream, subject)
            found = None if stored is None else self._alias(stored)
            current, issued_at = (None, 0) if found is None else found
            wanted = decide(current)
            if wanted == current:
                return current
            headers = {"Nats-Expected-Last-Subject-Sequence": str(0 if stored is None else stored.sequence)}
            if wanted is None:
                headers["KV-Operation"] = "DEL"
                frame = b""
            else:
                frame = self._bus.signer.sign_envelope(
                    MessageType.ALIAS, subject, codec.encode(wanted), after=issued_at
                )
            self.check()
            try:
                await self._bus.publish_acked(subject, frame, headers=headers)
            except VersionConflict:
                continue
            return wanted
        raise Unavailable(f"alias '{name}' of model '{model}' is being changed by others; try again")

    def next_alias(self, current: Alias | None, wanted: Alias) -> Alias:
        """Return ``wanted`` with the history of its predecessor; ``current`` itself if it already has that target."""
        if current is None:
            return wanted
        if (current.version, current.split, current.sticky) == (wanted.version, wanted.split, wanted.sticky):
            return current
        past = (self.as_move(current), *current.previous)[:HISTORY]
        return msgspec.structs.replace(wanted, previous=past, revision=current.revision + 1)

    def as_move(self, alias: Alias) -> Move:
        """Return an alias's target as a history entry."""
        return Move(alias.version, self._bus.clock.utc(), alias.split, alias.sticky)

    async def manifests(self) -> list[Manifest]:
        """Return every version.

        Raises:
            Unavailable: an entry cannot be read, so its references are unknown.
            BrokerUnavailable: no answer.
        """
        prefix, found = len(self._models.subject("")), []
        async for item in self._bus.direct_scan(self._models.stream, self._models.subject(">")):
            if item.headers.get("KV-Operation"):
                continue
            manifest = self._manifest(item.subject[prefix:], item)
            if manifest is None:
                raise Unavailable(f"the manifest of '{item.subject[prefix:]}' is unreadable; delete that version")
            found.append(manifest)
        return found

    async def of_model(self, model: str) -> list[Manifest]:
        """Return every readable version of a model.

        Raises:
            BrokerUnavailable: no answer.
        """
        prefix, found = len(self._models.subject("")), []
        async for item in self._bus.direct_scan(self._models.stream, self._models.subject(f"{token(model)}.*")):
            manifest = self._manifest(item.subject[prefix:], item)
            if manifest is not None:
                found.append(manifest)
        return found

    async def any_recorded(self, model: str) -> bool:
        """Return whether a model has an entry that was not deleted, readable or not.

        Raises:
            BrokerUnavailable: no answer.
        """
        subjects = self._models.subject(f"{token(model)}.*")
        entries = [item async for item in self._bus.direct_scan(self._models.stream, subjects)]
        return any(not item.headers.get("KV-Operation") for item in entries)

    async def recorded(self, model: str, version: int) -> bool:
        """Return whether a version has an entry, readable or not."""
        return await self._models.get(self._bus.names.version_key(model, version)) is not None

    async def exists(self, model: str, version: int) -> bool:
        """Return whether a version has a readable manifest."""
        key = self._bus.names.version_key(model, version)
        frame = await self._models.get(key)
        if frame is None:
            return False
        try:
            open_manifest(self._bus.verifier, self._bus.names, key, frame)
        except EnvelopeError:
            return False
        return True

    async def delete(self, model: str, version: int) -> None:
        """Delete a version; its number is never reused. Its chunks count for its tenant until they are
        collected, so its manifest is kept until then, as that of a deleted version.

        Raises:
            Unavailable: another model store owns the partition by now.
            BrokerUnavailable: no answer.
        """
        self.check()
        key = self._bus.names.version_key(model, version)
        await self._models.delete(key, await self._models.get(key) or b"")

    def _alias(self, stored: StoredMessage) -> tuple[Alias, int] | None:
        """Return an alias and its time of issue."""
        if stored.headers.get("KV-Operation"):
            return None
        envelope = self._bus.verify_frame(stored.data, stored.subject, MessageType.ALIAS)
        return None if envelope is None else (codec.decode(envelope.body, Alias), envelope.header.issued_at)

    async def aliases(self, model: str) -> dict[str, int]:
        """Return every alias of a model and its version."""
        return {alias.name: alias.version for alias in await self.all_aliases(model)}

    async def all_aliases(self, model: str) -> list[Alias]:
        """Return every alias of a model."""
        found: list[Alias] = []
        subjects = self._aliases.subject(f"{token(model)}.*")
        async for item in self._bus.direct_scan(self._aliases.stream, subjects):
            stored = self._alias(item)
            if stored is not None:
                found.append(stored[0])
        return found

    async def deleted(self) -> list[Deleted]:
        """Return deleted versions whose chunks may not have been collected yet.

        Raises:
            BrokerUnavailable: no answer.
        """
        prefix, found = len(self._models.subject("")), []
        async for item in self._bus.direct_scan(self._models.stream, self._models.subject(">")):
            if item.headers.get("KV-Operation"):
                manifest = self._opened(item.subject[prefix:], item)
                if manifest is not None:
                    found.append(Deleted(manifest, item.subject, item.sequence))
        return found

    async def collected(self, left: Deleted) -> None:
        """Record that nothing is left of a deleted version.

        Raises:
            BrokerUnavailable: it may be recorded all the same.
        """
        expected = {"Nats-Expected-Last-Subject-Sequence": str(left.sequence)}
        with suppress(VersionConflict):
            await self._bus.publish_acked(left.subject, b"", headers={"KV-Operation": "DEL", **expected})

    async def repair(self, partition: int) -> None:
        """Update every ``latest`` of a partition that lags because a model store died between manifest and alias.

        Raises:
            Unavailable: another model store owns the partition by now.
            BrokerUnavailable: no answer.
        """
        newest: dict[str, int] = {}
        for manifest in await self.readable(partition):
            newest[manifest.name] = max(newest.get(manifest.name, 0), manifest.version)
        for model, version in newest.items():
            await self.move(model, LATEST, version, forward_only=True)

    async def readable(self, partition: int) -> list[Manifest]:
        """Return every readable version of a partition's models.

        Raises:
            BrokerUnavailable: no answer.
        """
        return [one async for one in self._readable() if self._bus.names.partition(one.name) == partition]

    async def check_partitions(self) -> None:
        """Check that every version's chunks are in an existing partition.

        Raises:
            ConfigError: the setting was lowered.
            BrokerUnavailable: no answer.
        """
        least = 1
        async for manifest in self._readable():
            least = max(least, manifest.partition + 1)
        if least > self._bus.names.partitions:
            raise ConfigError(
                f"setting 'partitions' is {self._bus.names.partitions}, but there are versions in "
                f"{least}; it can only grow",
                field="partitions",
            )

    async def _readable(self) -> AsyncIterator[Manifest]:
        prefix = len(self._models.subject(""))
        async for item in self._bus.direct_scan(self._models.stream, self._models.subject(">")):
            manifest = self._manifest(item.subject[prefix:], item)
            if manifest is not None:
                yield manifest


def _same(one: Manifest, other: Manifest) -> bool:
    """Return whether two versions behave alike: same files, same platform, same batching."""
    files = [(file.path, file.digest) for file in one.files] == [(file.path, file.digest) for file in other.files]
    alike = one.platform == other.platform and one.isolation == other.isolation
    return files and alike and one.run_timeout_s == other.run_timeout_s and _joined_alike(one.batching, other.batching)


def _joined_alike(one: Batching, other: Batching) -> bool:
    """Return whether two versions batch alike. Without a basis, workers decide, and batch if the proof succeeds."""
    alike = (one.max_batch_size, one.max_delay_ms) == (other.max_batch_size, other.max_delay_ms)
    return alike and (one.basis == other.basis or {one.basis, other.basis} == {"", PROVEN})
