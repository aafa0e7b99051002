"""Read, verify and export the audit log with the admin's keys: the work behind ``tether audit``."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tether.audit import Checker, Record, VerificationReport, read_records, write_record
from tether.audit import reader as audit_read
from tether.audit.reader import AuditReader, Filter, Found
from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.errors import BadEncoding, ConfigError
from tether.process.data_dir import Home
from tether.settings import Settings
from tether_cli.platform.up import read_endpoints

DAY_MS = 86_400_000
KEYSET = "keyset"
"""Subject of the keysets at the start of an export; they verify its blocks."""

_POLL_S = 0.5


@asynccontextmanager
async def connected(settings: Settings, home: Home) -> AsyncIterator[Bus]:
    """Connect as the identity ``admin`` to the broker of the settings, or of the platform on this home.

    Raises:
        ConfigError: no broker is known, or this home lacks the admin's keys.
    """
    if not settings.nats_url:
        running = read_endpoints(home)
        if running is None:
            raise ConfigError(
                f"no platform runs on {home.root}: set TETHER_NATS_URL or start 'tether up'", field="nats_url"
            )
        settings = dataclasses.replace(settings, nats_url=running["nats"])
    async with connect(settings, home, "admin") as bus:
        yield bus


async def search(settings: Settings, home: Home, wanted: Filter, limit: int) -> list[Found]:
    """Return at most ``limit`` matching entries, newest first."""
    async with connected(settings, home) as bus:
        reader = await audit_read.reader(bus, home)
        found, before = await reader.page(wanted, limit)
        while before is not None and len(found) < limit:
            more, before = await reader.page(wanted, limit - len(found), before)
            found += more
        return found


async def follow(settings: Settings, home: Home, wanted: Filter, count: int, show: Callable[[Found], None]) -> None:
    """Show the last ``count`` entries, then every new one until cancelled."""
    async with connected(settings, home) as bus:
        reader = await audit_read.reader(bus, home)
        start = await reader.last() + 1
        found, _ = await reader.page(wanted, count, (start, 0))
        for item in reversed(found):
            show(item)
        while True:
            start = await _shown(reader, wanted, start, show)
            await asyncio.sleep(_POLL_S)


async def _shown(reader: AuditReader, wanted: Filter, start: int, show: Callable[[Found], None]) -> int:
    """Show the entries from block ``start`` on; return the first block not yet read."""
    end = await reader.last()
    async for item in reader.forward(wanted, start):
        show(item)
        end = max(end, item.position[0])
    return max(start, end + 1)


async def verify(settings: Settings, home: Home) -> VerificationReport:
    """Verify the whole stream, the unsent entries of this machine's services, and their recorded chain heads."""
    async with connected(settings, home) as bus:
        # in this order: entries acknowledged meanwhile are in the stream
        left = audit_read.left_behind(home)
        keys = audit_read.historical(await audit_read.keysets(bus, home), _root(home))
        checker = Checker(keys, settings.audit_retention_days * DAY_MS)
        async for record in (await audit_read.reader(bus, home)).records():
            checker.add(record)
        return checker.finish(now_ms=bus.clock.utc_ms(), known=audit_read.check_local(checker, left))


def verify_file(settings: Settings, home: Home, path: Path) -> VerificationReport:
    """Verify an export against the root key of this home.

    Raises:
        ConfigError: the file cannot be read, or is not an export.
        KeysetError: no keyset in it was signed by this root key.
    """
    try:
        with path.open("rb") as file:
            end = 0

            def whole() -> Iterator[Record]:
                nonlocal end
                for record, position in read_records(file):
                    end = position
                    yield record

            records = whole()
            keysets, first = _keysets(records)
            checker = Checker(audit_read.historical(keysets, _root(home)), settings.audit_retention_days * DAY_MS)
            if first is not None:
                checker.add(first)
            for record in records:
                checker.add(record)
        if end != path.stat().st_size:
            raise ConfigError(f"{path} ends in the middle of a block, after byte {end}; export it again")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except BadEncoding as error:
        raise ConfigError(f"{path} is damaged: {error.message}") from error
    return checker.finish()


def _keysets(records: Any) -> tuple[list[bytes], Record | None]:
    """Return the keysets at the beginning of an export, and the first record after them."""
    found: list[bytes] = []
    for record in records:
        if record.subject != KEYSET:
            return found, record
        found.append(record.frame)
    return found, None


def _root(home: Home) -> bytes:
    try:
        return home.root_public.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{home.root_public} cannot be read; it is the root public key that verifies the log: restore it"
        ) from error


async def export(settings: Settings, home: Home, path: Path) -> int:
    """Write every block to a file, after the keysets that verify it; return the number of blocks."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    async with connected(settings, home) as bus:
        count = 0
        try:
            with temporary.open("wb") as file:
                temporary.chmod(0o600)
                for signed in await audit_read.keysets(bus, home):
                    file.write(write_record(Record(0, KEYSET, 0, KEYSET, signed)))
                async for record in (await audit_read.reader(bus, home)).records():
                    file.write(write_record(record))
                    count += 1
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return count


def time_of(text: str, ago_s: Callable[[str], float]) -> int:
    """Return UTC milliseconds for an RFC 3339 time, or for a duration ago such as ``2h``."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return int((datetime.now(UTC).timestamp() - ago_s(text)) * 1000)
    return int((at if at.tzinfo else at.astimezone()).timestamp() * 1000)


def as_json(found: Found) -> dict[str, Any]:
    """Return an entry as a JSON object without its empty fields."""
    entry = {name: value for name, value in _fields(found).items() if value not in ("", 0)}
    return {"at": when(found.entry.at), "kind": found.kind.value, "writer": found.writer, **entry}


def _fields(found: Found) -> dict[str, Any]:
    entry = found.entry
    return {
        "tenant": found.tenant,
        "actor": entry.actor,
        "action": entry.action,
        "outcome": entry.outcome,
        "model": entry.model,
        "version": entry.version,
        "job": entry.job,
        "request_id": entry.request_id,
        "bytes_in": entry.bytes_in,
        "bytes_out": entry.bytes_out,
        "seconds": entry.micros / 1e6,
        "count": entry.count,
        "address": entry.address,
        "detail": entry.detail,
    }


def when(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def line(found: Found) -> str:
    """Return an entry as one line of text."""
    entry = found.entry
    what = f"{entry.model}:{entry.version}" if entry.version else entry.model
    times = f"x{entry.count}" if entry.count > 1 else ""
    words = (entry.actor, entry.action, what, entry.outcome, times, entry.job, entry.address, entry.detail)
    return "  ".join([when(entry.at), found.kind.value, found.tenant or "-", *filter(None, words)])
