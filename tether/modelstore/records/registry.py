"""Versions and aliases in the broker's buckets: numbers without gaps in authority, aliases that only move whole.

A version exists when its manifest does. Two model stores may work on one model at the same time: a version number
and a move of an alias are each won by whoever's conditional write comes first.
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
"""Conditional writes lost in a row before giving up."""

HISTORY = 50
"""Moves of an alias that are remembered."""


Admit = Callable[[Manifest], Awaitable[None]]


class Versions(NamedTuple):
    """What is known of a model: its newest readable manifest, and the highest number that was ever given out."""

    newest: Manifest | None
    highest: int


class Deleted(NamedTuple):
    """What is kept of a deleted version: its manifest, and where that is."""

    manifest: Manifest
    subject: str
    sequence: int


class Registry:
    """The ``models`` and ``aliases`` buckets, as the model store writes them.

    ``check`` raises when this model store may not write any more; it is asked before each write.
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
        """Give the next number to what ``build`` makes of it; False when the newest version is just the same. ``admit``
        is asked before a new version is made, and raises when there must be none. ``wanted``: only as that number.

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
                    f"version {wanted} of model '{model}' cannot be made: the next one is {highest + 1}; push it as that, "
                    f"or without a version",
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
            # It may be stored all the same: what the bucket holds then decides.
            if not await self._bus.wait_connected(10):
                raise
            if await self._models.get(key) is None:
                return await self._models.create(key, frame)
        return await self._models.get(key) == frame

    async def move(self, model: str, name: str, version: int, *, forward_only: bool = False) -> Alias:
        """Let alias ``name`` of ``model`` stand for ``version``; with ``forward_only`` it never goes back.

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
        """Replace an alias by what ``decide`` makes of it (None: it is to be gone), and return that.

        ``decide`` sees the alias as it is and is asked again when another writer came first.

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
        raise Unavailable(f"alias '{name}' of model '{model}' is moved by others all the time; try again")

    def next_alias(self, current: Alias | None, wanted: Alias) -> Alias:
        """``wanted`` with the history of what it takes over from; ``current`` itself when it already says the same."""
        if current is None:
            return wanted
        if (current.version, current.split, current.sticky) == (wanted.version, wanted.split, wanted.sticky):
            return current
        past = (self.as_move(current), *current.previous)[:HISTORY]
        return msgspec.structs.replace(wanted, previous=past, revision=current.revision + 1)

    def as_move(self, alias: Alias) -> Move:
        """What an alias stands for, as an entry of its history."""
        return Move(alias.version, self._bus.clock.utc(), alias.split, alias.sticky)

    async def manifests(self) -> list[Manifest]:
        """Every version there is.

        Raises:
            Unavailable: an entry cannot be read, so nobody knows what it names.
            BrokerUnavailable: no answer.
        """
        prefix, found = len(self._models.subject("")), []
        async for item in self._bus.direct_scan(self._models.stream, self._models.subject(">")):
            if item.headers.get("KV-Operation"):
                continue
            manifest = self._manifest(item.subject[prefix:], item)
            if manifest is None:
                raise Unavailable(f"the manifest of '{item.subject[prefix:]}' cannot be read; delete that version")
            found.append(manifest)
        return found

    async def of_model(self, model: str) -> list[Manifest]:
        """Every version of a model that can be read.

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
        """Whether a model has an entry that was not deleted, be it one that cannot be read.

        Raises:
            BrokerUnavailable: no answer.
        """
        subjects = self._models.subject(f"{token(model)}.*")
        entries = [item async for item in self._bus.direct_scan(self._models.stream, subjects)]
        return any(not item.headers.get("KV-Operation") for item in entries)

    async def recorded(self, model: str, version: int) -> bool:
        """Whether a version has an entry, be it one that cannot be read."""
        return await self._models.get(self._bus.names.version_key(model, version)) is not None

    async def exists(self, model: str, version: int) -> bool:
        """Whether a version has a manifest that can be read."""
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
        """Take a version away for good; its number is never given out again. What it named counts for its tenant until it is
        collected, so its manifest stays until then, as that of a deleted version.

        Raises:
            Unavailable: another model store looks after the model by now.
            BrokerUnavailable: no answer.
        """
        self.check()
        key = self._bus.names.version_key(model, version)
        await self._models.delete(key, await self._models.get(key) or b"")

    def _alias(self, stored: StoredMessage) -> tuple[Alias, int] | None:
        """An alias and when it was issued."""
        if stored.headers.get("KV-Operation"):
            return None
        envelope = self._bus.verify_frame(stored.data, stored.subject, MessageType.ALIAS)
        return None if envelope is None else (codec.decode(envelope.body, Alias), envelope.header.issued_at)

    async def aliases(self, model: str) -> dict[str, int]:
        """Every alias of a model and the version it stands for."""
        return {alias.name: alias.version for alias in await self.all_aliases(model)}

    async def all_aliases(self, model: str) -> list[Alias]:
        """Every alias of a model."""
        found: list[Alias] = []
        subjects = self._aliases.subject(f"{token(model)}.*")
        async for item in self._bus.direct_scan(self._aliases.stream, subjects):
            stored = self._alias(item)
            if stored is not None:
                found.append(stored[0])
        return found

    async def deleted(self) -> list[Deleted]:
        """Deleted versions whose chunks may not have been collected yet.

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
        """Nothing is left of a deleted version.

        Raises:
            BrokerUnavailable: it may be noted all the same.
        """
        expected = {"Nats-Expected-Last-Subject-Sequence": str(left.sequence)}
        with suppress(VersionConflict):
            await self._bus.publish_acked(left.subject, b"", headers={"KV-Operation": "DEL", **expected})

    async def repair(self, partition: int) -> None:
        """Move every ``latest`` of a partition that was left behind when a model store died between a manifest and its alias.

        Raises:
            Unavailable: another model store looks after it by now.
            BrokerUnavailable: no answer.
        """
        newest: dict[str, int] = {}
        for manifest in await self.readable(partition):
            newest[manifest.name] = max(newest.get(manifest.name, 0), manifest.version)
        for model, version in newest.items():
            await self.move(model, LATEST, version, forward_only=True)

    async def readable(self, partition: int) -> list[Manifest]:
        """Every version of a partition's models that can be read.

        Raises:
            BrokerUnavailable: no answer.
        """
        return [one async for one in self._readable() if self._bus.names.partition(one.name) == partition]

    async def check_partitions(self) -> None:
        """Prove that every version's chunks are in a partition that there is.

        Raises:
            ConfigError: the setting was lowered.
            BrokerUnavailable: no answer.
        """
        least = 1
        async for manifest in self._readable():
            least = max(least, manifest.partition + 1)
        if least > self._bus.names.partitions:
            raise ConfigError(
                f"setting 'partitions' is {self._bus.names.partitions}, but there are versions in {least}; it can only grow",
                field="partitions",
            )

    async def _readable(self) -> AsyncIterator[Manifest]:
        prefix = len(self._models.subject(""))
        async for item in self._bus.direct_scan(self._models.stream, self._models.subject(">")):
            manifest = self._manifest(item.subject[prefix:], item)
            if manifest is not None:
                yield manifest


def _same(one: Manifest, other: Manifest) -> bool:
    """Whether two versions would behave alike: same files, same platform, same batching."""
    files = [(file.path, file.digest) for file in one.files] == [(file.path, file.digest) for file in other.files]
    alike = one.platform == other.platform and one.isolation == other.isolation
    return files and alike and one.run_timeout_s == other.run_timeout_s and _joined_alike(one.batching, other.batching)


def _joined_alike(one: Batching, other: Batching) -> bool:
    """Whether jobs are joined alike. A version without a basis is judged by its workers, and batched when that proves it."""
    alike = (one.max_batch_size, one.max_delay_ms) == (other.max_batch_size, other.max_delay_ms)
    return alike and (one.basis == other.basis or {one.basis, other.basis} == {"", PROVEN})
