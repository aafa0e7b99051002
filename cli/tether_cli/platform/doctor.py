"""Checks machine and platform for ``tether doctor``: one line per check, with the fix."""

from __future__ import annotations

import dataclasses
import stat
import sys
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
import msgspec

from tether.broker.embedded_server import EmbeddedServer, check_server, find_server, show_version
from tether.broker.permissions import OWN_RIGHTS, matches
from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.crypto import Role, open_keyset
from tether.errors import BrokerUnavailable, ConfigError, KeysetError, NotFound, PermissionDenied, TetherError
from tether.identity.certificates import expires_at
from tether.process.data_dir import Home
from tether.process.disk import look, shortage
from tether.process.os_process import can_listen
from tether.settings import Settings
from tether.streams.broker_storage import frozen_streams
from tether.wire.subjects import Names
from tether_cli.platform.doctor_confinement import confinement
from tether_cli.platform.doctor_finding import Finding, Level
from tether_cli.platform.up import is_locked, ops_ports, read_endpoints

MIN_FREE_MB = 1024
CERTIFICATE_WARNING_DAYS = 30
KEYSET_WARNING_MS = 30 * 86_400_000


async def examine(settings: Settings, home: Home) -> list[Finding]:
    """Return the findings of every check in order; a check that cannot be made is a finding too."""
    found = [python_version(), disk(home, settings), *keys(home), *ports(home, settings), *[binary(settings)]]
    found += confinement(settings, home)
    found += [finding async for finding in broker(settings, home)]
    return found


def python_version() -> Finding:
    return Finding("ok", f"python {'.'.join(map(str, sys.version_info[:3]))}")


def disk(home: Home, settings: Settings) -> Finding:
    folder = home.root
    while not folder.exists():
        folder = folder.parent
    room = look(folder)
    if room is None:
        return Finding("fail", f"disk: {folder} cannot be read", "give this user the right to read it")
    free = room.free >> 20
    what = f"disk: {free} MB free under {home.root}"
    if missing := shortage(room, settings.store_reserve_mb):
        fix = f"make room: nothing new is stored there until then (it {missing}; store_reserve_mb)"
        return Finding("fail", what, fix)
    if free < MIN_FREE_MB:
        return Finding("fail", what, f"free at least {MIN_FREE_MB} MB or choose another TETHER_HOME")
    if free < settings.max_file_mb:
        return Finding("warn", what, f"max_file_mb allows the broker {settings.max_file_mb} MB; lower it or free disk")
    return Finding("ok", what)


def keys(home: Home) -> Iterator[Finding]:
    """Check modes of every key file, and the keyset's signature and validity."""
    if not home.keys.is_dir():
        yield Finding("warn", f"keys: none in {home.keys}", "run 'tether init' ('tether up' does it too)")
        return
    files = [path for path in sorted(home.keys.iterdir()) if path.is_file()]
    if home.admin_key.exists():
        files.append(home.admin_key)
    wide = [path for path in files if stat.S_IMODE(path.stat().st_mode) & 0o077]
    for path in wide:
        yield Finding("fail", f"key file {path.name} is open to others", f"chmod 600 {path}")
    if not wide:
        yield Finding("ok", f"key files: {len(files)}, readable by their owner only")
    yield keyset(home)
    if home.authority_key.exists():
        yield certificates(home)


def certificates(home: Home) -> Finding:
    """Check when the first certificate of ``tether init --tls`` expires."""
    try:
        left = (expires_at(home) - datetime.now(UTC)).days
    except ConfigError as error:
        return Finding("fail", f"certificates: {error.message}", "run 'tether init --tls'")
    if left < CERTIFICATE_WARNING_DAYS:
        level: Level = "fail" if left < 0 else "warn"
        return Finding(level, f"certificates: {left} days left", "renew them: tether init --tls --host NAME ...")
    return Finding("ok", f"certificates: {left} days left")


def keyset(home: Home) -> Finding:
    now = time.time_ns() // 1_000_000
    try:
        opened = open_keyset(home.keyset.read_bytes(), home.root_public.read_bytes(), now_ms=now)
    except OSError:
        return Finding("fail", "keyset: missing", "run 'tether init'")
    except KeysetError as error:
        return Finding("fail", f"keyset: {error.message}", "run 'tether init' where the root key is, or restore it")
    days = (opened.expires_at - now) // 86_400_000
    what = f"keyset: version {opened.version}, {len(opened.identities)} identities, {days} days left"
    if opened.expires_at - now < KEYSET_WARNING_MS:
        return Finding("warn", what, "sign a new keyset with 'tether init'")
    return Finding("ok", what)


def ports(home: Home, settings: Settings) -> Iterator[Finding]:
    """Check that ``tether up`` would get its ports; skipped while it runs."""
    if is_locked(home):
        yield Finding("ok", "ports: in use by the platform that runs on this home")
        return
    wanted = {"gateway": (settings.http_host, settings.http_port)}
    wanted |= {name: (settings.ops_host, port) for name, port in ops_ports(settings).items()}
    taken = {name: where for name, where in wanted.items() if not can_listen(*where)}
    for name, (host, port) in taken.items():
        level: Level = "fail" if name == "gateway" else "warn"
        fix = "choose another with --http" if name == "gateway" else "'tether up' takes a free one instead"
        yield Finding(level, f"port {host}:{port} ({name}) is taken", fix)
    if not taken:
        yield Finding("ok", f"ports: {', '.join(str(port) for _, port in wanted.values())} are free")


def binary(settings: Settings) -> Finding:
    if settings.nats_url:
        return Finding("ok", "nats-server: not needed, nats_url names a broker")
    try:
        found = find_server(settings)
    except ConfigError as error:
        what, _, fix = error.message.partition("; ")
        return Finding("fail", what, fix)
    return Finding("ok", f"nats-server {show_version(found.version)} at {found.path}")


async def broker(settings: Settings, home: Home) -> AsyncIterator[Finding]:
    """Check the running broker; if none runs, an embedded one is started for the check."""
    running = read_endpoints(home) if is_locked(home) else None
    if running is not None:
        async for finding in _examine_broker(settings, home, str(running["nats"]), str(running["monitor"])):
            yield finding
    elif settings.nats_url:
        async for finding in _examine_broker(settings, home, settings.nats_url, settings.nats_monitor_url):
            yield finding
    elif not home.keyset.exists():
        yield Finding("warn", "broker: not examined, there are no keys yet", "run 'tether init'")
    else:
        async for finding in _examine_embedded(settings, home):
            yield finding


async def _examine_embedded(settings: Settings, home: Home) -> AsyncIterator[Finding]:
    try:
        async with EmbeddedServer(home, settings) as server:
            async for finding in _examine_broker(settings, home, server.url, server.monitor):
                yield finding
    except TetherError as error:
        yield Finding("fail", f"broker: {error.message}", f"see {home.logs / 'nats.log'}")


async def _examine_broker(settings: Settings, home: Home, url: str, monitor: str) -> AsyncIterator[Finding]:
    if monitor:
        async for finding in _examine_monitor(settings, monitor):
            yield finding
    else:
        yield Finding(
            "warn",
            "broker settings: not checked, the monitor of an external server is not known",
            "set nats_monitor_url",
        )
    settings = dataclasses.replace(settings, nats_url=url)
    yield await _jetstream(settings, home)
    for role in Role:
        yield await _permissions(settings, home, role)


async def _examine_monitor(settings: Settings, monitor: str) -> AsyncIterator[Finding]:
    report = await check_server(monitor)
    for problem in report.problems:
        what, _, fix = problem.partition("; ")
        yield Finding("fail", f"broker: {what}", fix)
    if not report.problems:
        yield Finding("ok", f"broker: nats-server {report.version}, JetStream on, acknowledgement format v1")
    async with httpx.AsyncClient(trust_env=False) as http:
        if frozen := await frozen_streams(http, monitor):
            yield Finding("fail", f"storage: {frozen}", "make room; an embedded broker then restarts, restart another")
    if report.sync == "always":
        yield Finding("ok", "durability: durable, every write is synced before it is acknowledged")
    else:
        what = f"durability: {settings.durability}, synced every {report.sync}"
        yield Finding("warn", what, "a power cut may lose that much; set TETHER_DURABILITY=durable")
    yield await _clock(monitor)


async def _clock(monitor: str) -> Finding:
    async with httpx.AsyncClient(trust_env=False, timeout=5) as http:
        before = time.time()
        header = (await http.get(f"{monitor}/healthz")).headers.get("date")
    if header is None:
        return Finding("warn", "clock: the broker does not report its time")
    skew = parsedate_to_datetime(header).timestamp() - before
    if abs(skew) > 5:
        return Finding("fail", f"clock: {skew:+.0f} s from the broker's", "synchronise the clocks (NTP)")
    return Finding("ok", "clock: agrees with the broker's")


async def _jetstream(settings: Settings, home: Home) -> Finding:
    try:
        async with connect(settings, home, "admin") as bus:
            account = await bus.api("INFO")
    except TetherError as error:
        return Finding("fail", f"JetStream: {error.message}", "compare the broker's users with this home's keys")
    used = f"{account['streams']} streams, {account['consumers']} consumers, {account['storage'] >> 20} MB on disk"
    return Finding("ok", f"JetStream: {used}")


async def _permissions(settings: Settings, home: Home, role: Role) -> Finding:
    """Check that a role is refused another role's subjects; else the broker's allow lists are not ours."""
    identity = "worker-1" if role is Role.WORKER else role.value
    foreign = _foreign(Names(settings.prefix), role)
    refused = Finding("ok", f"permissions: {identity} can log in and is refused what is not its own")
    try:
        async with connect(settings, home, identity) as bus:
            if await _refused(bus, foreign):
                return refused
            await bus.publish_acked(foreign, b"", timeout=2)
    except PermissionDenied:
        return refused
    except (ConfigError, NotFound) as error:
        return Finding("fail", f"permissions: {identity}: {error.message}", "compare the broker's users with the keys")
    except TetherError as error:
        return Finding("fail", f"permissions: {identity} was not refused '{foreign}' ({error.code})", _LISTS)
    return Finding("fail", f"permissions: {identity} may publish on '{foreign}'", _LISTS)


async def _refused(bus: Bus, subject: str) -> bool:
    """Return whether a login may not publish on a subject, by the broker's report: a try would log an error there."""
    try:
        answer = await bus.request(OWN_RIGHTS, b"", timeout=2)
    except (PermissionDenied, BrokerUnavailable):  # allow lists of an earlier release
        return False
    allowed = msgspec.json.decode(answer.data, type=_Rights).data.permissions.publish
    listed = any(matches(pattern, subject) for pattern in allowed.allow)
    return bool(allowed.allow) and (not listed or any(matches(pattern, subject) for pattern in allowed.deny))


class _Lists(msgspec.Struct):
    allow: list[str] = []
    deny: list[str] = []


class _Permissions(msgspec.Struct):
    publish: _Lists = msgspec.field(default_factory=_Lists)


class _User(msgspec.Struct):
    permissions: _Permissions = msgspec.field(default_factory=_Permissions)


class _Rights(msgspec.Struct):
    """The reply of ``$SYS.REQ.USER.INFO``."""

    data: _User = msgspec.field(default_factory=_User)


def _foreign(names: Names, role: Role) -> str:
    """Return a subject that a role must be refused; for some, a right that earlier releases granted."""
    match role:
        case Role.DISPATCHER:
            return f"$JS.API.STREAM.UPDATE.{names.audit_stream}"
        case Role.WORKER:
            return f"$JS.API.DIRECT.GET.{names.results_stream}"
        case Role.MODELSTORE:
            return names.bucket_key("apikeys", "doctor")
        case _:
            return names.bucket_key("models", "doctor")


_LISTS = "use the lists of ops/nats/permissions.conf"
