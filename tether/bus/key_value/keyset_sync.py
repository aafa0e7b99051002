"""Keeps a service's keyset up to date from the bucket ``keyset`` and its own files; the newest trusted one wins.

The bucket's entry ``current`` is the keyset as the root key signed it; each also stays under ``v<version>``,
for the audit log. A keyset that the pinned root key did not sign, that is older than the newest one seen, or
that is not in force is refused: the current one stays. A trusted keyset is written to disk before use, so
that a restart does not bring an older one back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tether.bus.key_value.bucket import KvBucket
from tether.crypto import Identity, Keyset, Role, open_keyset
from tether.errors import (
    ConfigError,
    EnvelopeError,
    KeyExpired,
    KeyRevoked,
    KeysetError,
    TetherError,
    UnknownKey,
    VersionConflict,
)
from tether.process import lifecycle, metrics
from tether.process.clock import SystemClock
from tether.process.data_dir import Home, check_folder, keys_locked, load_identity, write_secret

if TYPE_CHECKING:
    from tether.bus.bus import Bus

log = logging.getLogger(__name__)

CURRENT = "current"
"""Key of the newest keyset in the bucket."""

SETTLE_S = 1.0
"""Seconds that a revoked key stays accepted, so that messages in flight still arrive; a new key signs only after as
long, so that all services know it by then.
"""

_RETIRE_S = 0.5
"""Seconds for which a revoked identity may hand over pending work: less than SETTLE_S."""

_TICK_S = 0.5


@dataclass(frozen=True)
class TrustedKeyset:
    """A trusted keyset, and the bytes that the root key signed."""

    keyset: Keyset
    data: bytes
    root_public: bytes

    @classmethod
    def load(cls, home: Home, *, expired: bool = False) -> TrustedKeyset:
        """Return the newest keyset in the files of a home; an ``expired`` one only for its renewal.

        Raises:
            ConfigError: there is none, or no root.pub beside it, or others may write in their folder.
            KeysetError: it is not in force, or the pinned root key did not sign it.
        """
        check_folder(home.root)
        check_folder(home.keys)
        try:
            root_public, data = home.root_public.read_bytes(), home.keyset.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{home.keyset} or {home.root_public} cannot be read; make them with 'tether init'"
            ) from error
        now = None if expired else SystemClock().utc_ms()
        own = cls(open_keyset(data, root_public, now_ms=now), data, root_public)
        seen = _opened(home.keyset_seen, root_public, now)
        return own if seen is None or seen.keyset.version <= own.keyset.version else seen

    def revoked(self, name: str) -> KeyRevoked | None:
        """Return why the identity has no key, if it was revoked."""
        was = any(item.name == name for item in self.keyset.revoked)
        return _revoked(name) if was and all(record.name != name for record in self.keyset.identities) else None

    def newer(self, data: bytes, now_ms: int) -> TrustedKeyset:
        """Return ``data`` as a keyset that may replace this one.

        Raises:
            KeysetError: it may not.
        """
        keyset = open_keyset(data, self.root_public, now_ms=now_ms, newer_than=self.keyset.version)
        if keyset.version == self.keyset.version and data != self.data:
            raise KeysetError(f"a different keyset also has version {keyset.version}", reason="conflict")
        return TrustedKeyset(keyset, data, self.root_public)

    def save(self, home: Home) -> None:
        """Write it to the home unless a newer one is there; beside the keys if those are not writable."""
        try:
            with keys_locked(home):
                if _version(home.keyset, self.root_public) < self.keyset.version:
                    write_secret(home.keyset, self.data)
        except OSError:
            write_secret(home.keyset_seen, self.data)


def _opened(path: Path, root_public: bytes, now_ms: int | None) -> TrustedKeyset | None:
    try:
        data = path.read_bytes()
        return TrustedKeyset(open_keyset(data, root_public, now_ms=now_ms), data, root_public)
    except (OSError, KeysetError):
        return None


def _version(path: Path, root_public: bytes) -> int:
    found = _opened(path, root_public, None)
    return 0 if found is None else found.keyset.version


def _revoked(name: str) -> KeyRevoked:
    return KeyRevoked(f"the key of identity '{name}' was revoked; give it a new one with 'tether identity add {name}'")


def standing(keyset: Keyset, kid: bytes, name: str, now_ms: int) -> EnvelopeError | None:
    """Return why signatures of key ``kid`` of identity ``name`` are invalid now; None if they are valid."""
    if any(item.kid == kid for item in keyset.revoked):
        return _revoked(name)
    record = next((record for record in keyset.identities if record.kid == kid), None)
    if record is None:
        return UnknownKey(f"the keyset does not have the key of identity '{name}'; copy its current identity file here")
    if now_ms >= record.expires_at:
        return KeyExpired(
            f"the key of identity '{name}' is expired; give it a new one with 'tether identity rotate {name}'"
        )
    return None


async def offer(bus: Bus, newest: TrustedKeyset) -> None:
    """Put a keyset into the bucket unless that has it or a newer one.

    Raises:
        BrokerUnavailable: no broker, or the bucket does not exist yet.
        PermissionDenied: this identity may not.
        VersionConflict: others write it every time.
    """
    bucket = KvBucket(bus, "keyset")
    for _ in range(5):
        last = await bus.direct_get(bucket.stream, bucket.subject(CURRENT))
        if last is not None and _is_current(last.data, newest):
            return
        expected = {"Nats-Expected-Last-Subject-Sequence": "0" if last is None else str(last.sequence)}
        try:
            await bus.publish_acked(bucket.subject(CURRENT), newest.data, headers=expected)
        except VersionConflict:
            continue
        await _remember(bucket, newest)
        return
    raise VersionConflict("the keyset in the bucket is being changed by others; try again")


async def _remember(bucket: KvBucket, newest: TrustedKeyset) -> None:
    """Store a keyset under its version for good, to verify old signatures after later keysets."""
    await bucket.create(f"v{newest.keyset.version}", newest.data)


def _is_current(data: bytes, newest: TrustedKeyset) -> bool:
    """Return whether ``data`` needs no replacement by ``newest``."""
    try:
        found = open_keyset(data, newest.root_public, now_ms=SystemClock().utc_ms())
    except KeysetError:
        return False
    return data == newest.data or found.version > newest.keyset.version


@asynccontextmanager
async def following(bus: Bus, home: Home, identity: Path, newest: TrustedKeyset) -> AsyncIterator[None]:
    """Keep verifier and signer of ``bus`` up to date until the block ends; ``identity`` is the signer's file."""
    follower = _Follower(bus, home, identity, newest)
    async with lifecycle.tasks() as running:
        running.spawn(follower.listen(), "keyset-listen")
        running.spawn(follower.tend(), "keyset-tend")
        try:
            yield
        finally:
            follower.stop()


class _Follower:
    def __init__(self, bus: Bus, home: Home, identity: Path, newest: TrustedKeyset) -> None:
        self._bus = bus
        self._home = home
        self._identity = identity
        self._newest = newest
        self._believed = [newest]
        """The trusted keyset to store in the bucket."""
        self._bucket = KvBucket(bus, "keyset")
        self._was_known = standing(newest.keyset, bus.signer.kid, bus.signer.name, bus.clock.utc_ms()) is None
        self._publishes = bus.signer.role is Role.DISPATCHER
        self._stale = True
        """The bucket's keyset is missing, older or not trusted."""
        self._stamps = {path: _stamp(path) for path in (home.keyset, identity)}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        metrics.KEYSET_VERSION.set(newest.keyset.version)

    def stop(self) -> None:
        for timer in self._timers.values():
            timer.cancel()

    def _later(self, what: str, seconds: float, act: object, *args: object) -> None:
        """Run an action after a delay, replacing the pending one of the same name."""
        if (before := self._timers.pop(what, None)) is not None:
            before.cancel()
        self._timers[what] = asyncio.get_running_loop().call_later(seconds, act, *args)  # type: ignore[arg-type]

    async def listen(self) -> None:
        while True:
            try:
                async with self._bucket.watch(self._heard):
                    await self._bus.closed.wait()
                    return
            except TetherError as error:
                log.debug("keyset not watched: %s", error, extra={"action": "keyset_unwatched"})
                await asyncio.sleep(_TICK_S)

    async def tend(self) -> None:
        """Handle changes that no message announces: files, expired keys, a bucket to fill."""
        while not self._bus.closed.is_set():
            self._look_at_files()
            self._check_own_key()
            if self._publishes and self._stale:
                await self._publish()
            await asyncio.sleep(_TICK_S)

    def _heard(self, key: str, data: bytes | None) -> None:
        if key != CURRENT:
            return
        if data is None:
            self._stale = True
            return
        self._consider(data, "the bucket")

    def _look_at_files(self) -> None:
        for path, before in list(self._stamps.items()):
            stamp = _stamp(path)
            if stamp is None or stamp == before:
                continue
            self._stamps[path] = stamp
            if path == self._home.keyset:
                self._consider(path.read_bytes(), str(path.name))
            else:
                self._take_identity()

    def _consider(self, data: bytes, source: str) -> None:
        if data == self._newest.data:
            return
        try:
            found = self._newest.newer(data, self._bus.clock.utc_ms())
        except KeysetError as error:
            self._stale = True
            metrics.KEYSETS_REFUSED.labels(error.reason).inc()
            log.warning(
                "keyset from %s refused, version %d stays in use: %s",
                source,
                self._newest.keyset.version,
                error,
                extra={"action": "keyset_refused", "code": error.code},
            )
            return
        self._accept(found, source)

    def _accept(self, found: TrustedKeyset, source: str) -> None:
        before, self._newest = self._newest.keyset, found
        self._believed.append(found)
        self._stale = self._stale or source != "the bucket"
        try:
            found.save(self._home)
        except OSError as error:
            log.warning("keyset not stored: %s", error.strerror, extra={"action": "keyset_not_stored"})
        self._bus.verifier.replace(_with_grace(before, found.keyset))
        self._later("settle", SETTLE_S, self._bus.verifier.replace, found.keyset)
        metrics.KEYSET_VERSION.set(found.keyset.version)
        if self._bus.on_keyset is not None:
            self._bus.on_keyset(found.keyset.version, _changes(before, found.keyset))
        log.info(
            "keyset version %d: %s",
            found.keyset.version,
            _changes(before, found.keyset),
            extra={"action": "keyset_changed"},
        )
        self._take_identity()
        self._check_own_key()

    def _take_identity(self) -> None:
        """Sign with the key in the identity file, once other services may know it."""
        signer = self._bus.signer
        if not self._identity.exists():
            return
        try:
            found = load_identity(self._identity)
        except ConfigError as error:
            log.warning("identity file not reloaded: %s", error, extra={"action": "identity_unread"})
            return
        if found.kid == signer.kid or (found.name, found.role) != (signer.name, signer.role):
            return
        if self._problem(found.kid) is not None:
            return
        delay = 0.0 if self._problem(signer.kid) is not None else SETTLE_S
        self._later("switch", delay, self._switch, found)

    def _switch(self, identity: Identity) -> None:
        self._timers.pop("switch", None)
        self._bus.signer.replace(identity)
        self._was_known = True
        log.info("signing key replaced", extra={"action": "key_rotated"})

    def _problem(self, kid: bytes) -> EnvelopeError | None:
        return standing(self._newest.keyset, kid, self._bus.signer.name, self._bus.clock.utc_ms())

    def _check_own_key(self) -> None:
        """Stop if this identity's key is invalid, unless a valid key is in its file."""
        problem = self._problem(self._bus.signer.kid)
        if problem is None:
            self._was_known = True
        elif "switch" not in self._timers and (self._was_known or isinstance(problem, KeyRevoked)):
            self._end(problem)

    def _end(self, problem: EnvelopeError) -> None:
        if self._bus.closed.is_set():
            return
        log.error("service stopping: %s", problem, extra={"action": "identity_ended", "code": problem.code})
        self._later("retire", _RETIRE_S, self._bus.signer.retire)
        self._bus.closed.end(problem)

    async def _publish(self) -> None:
        try:
            await offer(self._bus, self._newest)
            while self._believed:
                await _remember(self._bucket, self._believed[0])
                del self._believed[0]
        except TetherError as error:
            log.debug("keyset not published: %s", error, extra={"action": "keyset_not_published"})
        else:
            self._stale = False


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return a value that changes whenever the file does; None if it is missing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _with_grace(before: Keyset, after: Keyset) -> Keyset:
    """Return ``after`` plus withdrawn keys of ``before``, with the version of ``before`` as long as there are some."""
    kept = {record.kid for record in after.identities}
    withdrawn = tuple(record for record in before.identities if record.kid not in kept)
    if not withdrawn:
        return after
    identities = (*after.identities, *withdrawn)
    return msgspec.structs.replace(after, version=before.version, identities=identities, revoked=before.revoked)


def _changes(before: Keyset, after: Keyset) -> str:
    old, new = ({record.kid: record.name for record in keyset.identities} for keyset in (before, after))
    added = sorted(name for kid, name in new.items() if kid not in old)
    gone = sorted(name for kid, name in old.items() if kid not in new)
    return "; ".join(f"{word} {', '.join(names)}" for word, names in (("new:", added), ("gone:", gone)) if names) or (
        "the same identities"
    )
