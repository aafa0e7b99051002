"""Writes the nats.conf files of the embedded broker and under ``ops/nats``, all from one permission table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tether.broker.permissions import identity_permissions, nats_block
from tether.crypto import Role
from tether.errors import ConfigError
from tether.identity.keys import SYSTEM_USER, broker_logins, nats_public_key
from tether.process.data_dir import Home, write_secret
from tether.settings import Settings
from tether.wire.subjects import Names

Version = tuple[int, int, int]

FLAGS_SINCE = (2, 14, 0)
"""First version with ``feature_flags``; older ones refuse the word."""

CLUSTER = ("nats-1", "nats-2", "nats-3")
"""Host names of the servers of the shipped cluster."""

_WRITTEN = "# Written by Tether"
_HEAD = f"{_WRITTEN}: tether init --nats-config DIR (the table is in tether/broker/permissions.py).\n"


TLS_FILES = ("server.crt", "server.key", "ca.crt")

ACCOUNTS = "system_account: SYS"
"""First line of the accounts, which end every configuration."""


@dataclass(frozen=True)
class Login:
    """One user of the broker: an identity and its public nkey; without a role it is the system account's."""

    name: str
    nkey: str = ""
    role: Role | None = None
    tenant: str = ""


DEFAULT_LOGINS = (
    *(Login(role.value, role=role) for role in sorted(Role) if role is not Role.WORKER),
    Login("worker-1", role=Role.WORKER),
    Login("worker-2", role=Role.WORKER),
    Login(SYSTEM_USER),
)
"""Identities in the shipped files: those of a new home."""


@dataclass(frozen=True)
class Ports:
    """Loopback ports of a broker; -1 selects a free one."""

    client: int = -1
    monitor: int = -1


def sync_interval(durability: str) -> str:
    """Return the ``sync_interval`` of a durability profile, 'fast' or 'durable'."""
    return "always" if durability == "durable" else "1s"


def embedded_text(home: Home, settings: Settings, *, version: Version, ports: Ports) -> str:
    """Return the nats.conf of the embedded broker. It contains public keys only."""
    flags = "feature_flags { js_ack_fc_v2: false }\n" if version >= FLAGS_SINCE else ""
    return f"""{_WRITTEN} at every start; changes are lost.
listen: "127.0.0.1:{ports.client}"
http: "127.0.0.1:{ports.monitor}"
server_name: "{settings.prefix}-embedded"
{_embedded_tls(home, settings)}ports_file_dir: {_quoted(home.run)}
log_file: {_quoted(home.logs / "nats.log")}
logfile_size_limit: 64MB
logfile_max_num: 3
{_limits(settings)}{_jetstream(settings, str(home.nats_store))}{flags}{accounts_text(logins_of(home), _names(settings))}"""


def _embedded_tls(home: Home, settings: Settings) -> str:
    if settings.embedded_tls == "off":
        return ""
    files = [home.tls_file(name) for name in TLS_FILES]
    for path in files:
        if not path.is_file():
            raise ConfigError(
                f"embedded_tls needs {path}; make the certificates with 'tether init --tls'", field="embedded_tls"
            )
    return _tls(files)


def _quoted(text: str | Path) -> str:
    """Quote a string for nats.conf, whose escapes differ from JSON's: bytes as ``\\x0a``, other text unchanged.

    Source: ``lexStringEscape`` in nats-server's ``conf/lex.go``.
    """
    parts = (
        f"\\x{ord(letter) & 0xFF:02x}"
        if letter in '"\\' or (not letter.isprintable() and ord(letter) < 0x80) or "\udc80" <= letter <= "\udcff"
        else letter
        for letter in str(text)
    )
    return f'"{"".join(parts)}"'


def _limits(settings: Settings) -> str:
    return f"""max_payload: {settings.max_payload_bytes}
max_pending: {max(64 << 20, settings.max_payload_bytes)}
write_deadline: "10s"
ping_interval: "20s"
ping_max: 2
"""


def _jetstream(settings: Settings, store: str, *, encrypted: bool = False) -> str:
    lock = "  cipher: chacha\n  key: $NATS_JETSTREAM_KEY\n" if encrypted else ""
    return f"""jetstream {{
  store_dir: {_quoted(store)}
  max_mem: {settings.max_memory_mb}MB
  max_file: {settings.max_file_mb}MB
  sync_interval: {sync_interval(settings.durability)}
  strict: true
{lock}}}
"""


def accounts_text(logins: Iterable[Login], names: Names) -> str:
    """Return one user per identity in the platform's account, and the separate system account. Each user must
    have a key.

    Every accounts block we write ends its file, and begins with :data:`ACCOUNTS`.
    """
    logins = tuple(logins)
    users, system = [], ""
    pools = sorted({login.tenant for login in logins if login.tenant})
    for login in logins:
        if login.role is None:
            system = login.nkey
            continue
        permissions = identity_permissions(names, login.role, login.name, login.tenant, pools)
        block = nats_block(permissions, "        ")
        users.append(f"      {{ # {login.name}\n        nkey: {login.nkey}\n        permissions: {block}\n      }}")
    listed = "\n".join(users)
    return f"""{ACCOUNTS}
accounts {{
  SYS {{
    users: [ {{ nkey: {system} }} ]
  }}
  TETHER {{
    jetstream: enabled
    users: [
{listed}
    ]
  }}
}}
"""


def logins_of(home: Home) -> list[Login]:
    """Return the logins for the broker of a home: identities in its keyset that are neither revoked nor expired."""
    found = [Login(record.name, record.nats, record.role, record.tenant) for record in broker_logins(home)]
    return [*found, Login(SYSTEM_USER, nats_public_key(home, SYSTEM_USER))]


def _names(settings: Settings) -> Names:
    return Names(settings.prefix, partitions=settings.partitions)


def write_accounts(home: Home, settings: Settings) -> None:
    """Update the accounts in the embedded broker's configuration; the rest stays unchanged.

    Raises:
        ConfigError: there is no configuration, or it is not ours.
    """
    try:
        before, mark, _ = home.nats_config.read_text().partition(ACCOUNTS)
    except OSError as error:
        raise ConfigError(f"{home.nats_config} cannot be read; 'tether up' writes it") from error
    if not mark:
        raise ConfigError(f"{home.nats_config} was changed by hand; 'tether up' writes it again")
    write_secret(home.nats_config, (before + accounts_text(logins_of(home), _names(settings))).encode())


def write_config(home: Home, settings: Settings, *, version: Version, ports: Ports) -> Path:
    """Write :func:`embedded_text` to the home and return its path."""
    write_secret(home.nats_config, embedded_text(home, settings, version=version, ports=ports).encode())
    return home.nats_config


# files under ops/nats


def _variable(name: str, position: int) -> str:
    """Return the variable of an identity; the number separates names that differ only in characters that it
    may not have.
    """
    return f"TETHER_NKEY_{position}_{re.sub('[^A-Z0-9]', '_', name.upper())}"


def _login_files(logins: Sequence[Login], names: Names) -> dict[str, str]:
    """Return ``permissions.conf`` for ``logins``, and ``users.conf`` with their keys: the server refuses
    unused variables, so the two belong together.
    """
    variables = [_variable(login.name, position) for position, login in enumerate(logins, start=1)]
    referring = [replace(login, nkey=f"${variable}") for login, variable in zip(logins, variables, strict=True)]
    rows = "".join(f"{variable}: {login.nkey}\n" for login, variable in zip(logins, variables, strict=True))
    return {
        "permissions.conf": f'{_HEAD}include "users.conf"\n{accounts_text(referring, names)}',
        "users.conf": f"{_WRITTEN} 'init': public keys of the broker's users. No secrets.\n{rows}",
    }


def ops_files() -> dict[str, str]:
    """Return name and text of every shipped configuration file, for the default identities, prefix and limits."""
    files = {
        "permissions.conf": _login_files(DEFAULT_LOGINS, Names())["permissions.conf"],
        "dev.conf": _HEAD + _dev(),
        "container.conf": _HEAD + _container(),
        "single.conf": _HEAD + _production("nats", ""),
    }
    for number, host in enumerate(CLUSTER, start=1):
        files[f"cluster-{number}.conf"] = _HEAD + _production(host, _cluster(host))
    return files


def _dev() -> str:
    return (
        "# Development: loopback only, no TLS, synced every second.\n"
        'listen: "127.0.0.1:4222"\nhttp: "127.0.0.1:8222"\nserver_name: "tether-dev"\n'
        + _body(Settings(durability="fast"), ".tether/nats")
    )


def _container() -> str:
    return (
        "# One broker on a private network of containers that nothing else can reach: no TLS, every write synced.\n"
        'listen: "0.0.0.0:4222"\nhttp: "0.0.0.0:8222"\nserver_name: "tether"\n'
        + _body(Settings(durability="durable"), "/data")
    )


def _production(host: str, cluster: str) -> str:
    return (
        "# Production: TLS on both sides, the monitor on loopback only, every write synced before it is "
        "acknowledged, and\n"
        "# files that only the key in the environment variable NATS_JETSTREAM_KEY opens. 'tether init "
        "--tls' makes certificates:\n"
        "# tls/ca.crt, tls/server.crt and tls/server.key of the data directory belong in /etc/nats/tls.\n"
        f'listen: "0.0.0.0:4222"\nhttp: "127.0.0.1:8222"\nserver_name: "{host}"\n'
        + _production_tls()
        + cluster
        + _body(Settings(durability="durable"), "/data", encrypted=True)
    )


def _body(settings: Settings, store: str, *, encrypted: bool = False) -> str:
    flags = "feature_flags { js_ack_fc_v2: false }\n"
    return _limits(settings) + _jetstream(settings, store, encrypted=encrypted) + flags + 'include "permissions.conf"\n'


def _tls(files: Sequence[Path], indent: str = "") -> str:
    """Return mutual TLS settings. ``files``: the server's certificate, its key, and its authority's certificate."""
    certificate, key, authority = files
    lines = [
        "tls {",
        f"  cert_file: {_quoted(certificate)}",
        f"  key_file: {_quoted(key)}",
        f"  ca_file: {_quoted(authority)}",
        "  verify: true",
        '  min_version: "1.3"',
        "}",
    ]
    return "".join(f"{indent}{line}\n" for line in lines)


def _production_tls(indent: str = "") -> str:
    return _tls([Path("/etc/nats/tls") / name for name in TLS_FILES], indent)


def _cluster(host: str) -> str:
    routes = ", ".join(f'"nats-route://{other}:6222"' for other in CLUSTER if other != host)
    return f"""cluster {{
  name: tether
  listen: "0.0.0.0:6222"
  routes: [ {routes} ]
{_production_tls("  ")}}}
"""


def write_ops_files(folder: Path, home: Home | None = None, *, partitions: int = 1) -> list[Path]:
    """Write :func:`ops_files` to a folder; with ``home``, for its identities, their keys, and ``partitions``."""
    texts = ops_files()
    if home is not None:
        texts |= _login_files(logins_of(home), Names(partitions=partitions))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]
