"""The nats.conf files: of the embedded broker, and those under ``ops/nats``. All come from one permission table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tether.bus.keys import SYSTEM_USER, broker_logins, nats_public_key
from tether.bus.permissions import nats_block, role_permissions
from tether.envelope import Role
from tether.home import Home, write_secret
from tether.settings import Settings
from tether.subjects import Names

Version = tuple[int, int, int]

FLAGS_SINCE = (2, 14, 0)
"""First version that knows ``feature_flags``; an older one refuses the word."""

CLUSTER = ("nats-1", "nats-2", "nats-3")
"""Host names of the servers of the shipped cluster."""

_WRITTEN = "# Written by Tether"
_HEAD = f"{_WRITTEN}: tether init --nats-config DIR (the table is in tether/bus/permissions.py).\n"


@dataclass(frozen=True)
class Ports:
    """Loopback ports of a broker; -1 takes a free one."""

    client: int = -1
    monitor: int = -1


def sync_interval(durability: str) -> str:
    """The ``sync_interval`` of a durability profile, 'fast' or 'durable'."""
    return "always" if durability == "durable" else "1s"


def embedded_text(home: Home, settings: Settings, *, version: Version, ports: Ports) -> str:
    """The nats.conf of the embedded broker. It holds public keys only."""
    flags = "feature_flags { js_ack_fc_v2: false }\n" if version >= FLAGS_SINCE else ""
    return f"""{_WRITTEN} at every start; changes are lost.
listen: "127.0.0.1:{ports.client}"
http: "127.0.0.1:{ports.monitor}"
server_name: "{settings.prefix}-embedded"
ports_file_dir: {_quoted(home.run)}
log_file: {_quoted(home.logs / "nats.log")}
logfile_size_limit: 64MB
logfile_max_num: 3
{_limits(settings)}{_jetstream(settings, str(home.nats_store))}{flags}{_embedded_accounts(home, Names(settings.prefix))}"""


def _quoted(path: Path) -> str:
    return json.dumps(str(path))


def _limits(settings: Settings) -> str:
    return f"""max_payload: {settings.max_payload_bytes}
max_pending: {max(64 << 20, settings.max_payload_bytes)}
write_deadline: "10s"
ping_interval: "20s"
ping_max: 2
"""


def _jetstream(settings: Settings, store: str) -> str:
    return f"""jetstream {{
  store_dir: {json.dumps(store)}
  max_mem: {settings.max_memory_mb}MB
  max_file: {settings.max_file_mb}MB
  sync_interval: {sync_interval(settings.durability)}
  strict: true
}}
"""


def _embedded_accounts(home: Home, names: Names) -> str:
    blocks = {role: nats_block(permissions, "        ") for role, permissions in role_permissions(names).items()}
    return _accounts(home, blocks)


def _accounts(home: Home, permissions: Mapping[Role, str]) -> str:
    """One user per identity in the platform's account, and the system account. No user may come without a key."""
    users = "\n".join(
        f"      {{  # {record.name}\n        nkey: {record.nats}\n        permissions: {permissions[record.role]}\n      }}"
        for record in broker_logins(home)
    )
    return f"""system_account: SYS
accounts {{
  SYS {{
    users: [ {{ nkey: {nats_public_key(home, SYSTEM_USER)} }} ]
  }}
  TETHER {{
    jetstream: enabled
    users: [
{users}
    ]
  }}
}}
"""


def write_config(home: Home, settings: Settings, *, version: Version, ports: Ports) -> Path:
    """Write :func:`embedded_text` to the home and return its path."""
    write_secret(home.nats_config, embedded_text(home, settings, version=version, ports=ports).encode())
    return home.nats_config


# the files under ops/nats


def users_text(home: Home) -> str:
    """``users.conf``: the accounts, with the public keys of one home's identities. It includes ``permissions.conf``."""
    head = f"{_WRITTEN} 'init': public keys of the broker's users. No secrets.\ninclude \"permissions.conf\"\n"
    return head + _accounts(home, {role: f"${_variable(role)}" for role in Role})


def _permissions_text(roles: Iterable[Role]) -> str:
    """``permissions.conf``: the allow lists of ``roles``, as the variables that ``users.conf`` refers to.

    The server refuses a variable that nothing refers to.
    """
    table = role_permissions(Names())
    return "".join(f"{_variable(role)}: {nats_block(table[role], '')}\n" for role in roles)


def _variable(role: Role) -> str:
    return f"TETHER_{role.name}"


def ops_files() -> dict[str, str]:
    """Name and text of every shipped configuration file, for the default prefix and limits."""
    files = {
        "permissions.conf": _HEAD + _permissions_text(Role),
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
        "# Production: TLS to clients, the monitor on loopback only, every write synced before it is acknowledged.\n"
        "# Services trust the CA that SSL_CERT_FILE names in their environment.\n"
        f'listen: "0.0.0.0:4222"\nhttp: "127.0.0.1:8222"\nserver_name: "{host}"\n'
        + _tls("", verify=False)
        + cluster
        + _body(Settings(durability="durable"), "/data")
    )


def _body(settings: Settings, store: str) -> str:
    flags = "feature_flags { js_ack_fc_v2: false }\n"
    return _limits(settings) + _jetstream(settings, store) + flags + 'include "users.conf"\n'


def _tls(indent: str, *, verify: bool) -> str:
    lines = [
        "tls {",
        '  cert_file: "/etc/nats/tls/server.crt"',
        '  key_file: "/etc/nats/tls/server.key"',
        '  ca_file: "/etc/nats/tls/ca.crt"',
        f"  verify: {str(verify).lower()}",
        '  min_version: "1.3"',
        "}",
    ]
    return "".join(f"{indent}{line}\n" for line in lines)


def _cluster(host: str) -> str:
    routes = ", ".join(f'"nats-route://{other}:6222"' for other in CLUSTER if other != host)
    return f"""cluster {{
  name: tether
  listen: "0.0.0.0:6222"
  routes: [ {routes} ]
{_tls("  ", verify=True)}}}
"""


def write_ops_files(folder: Path, home: Home | None = None) -> list[Path]:
    """Write :func:`ops_files` to a folder, and ``users.conf`` with the keys of ``home`` when there is one."""
    texts = ops_files()
    if home is not None:
        used = {record.role for record in broker_logins(home)}
        texts["permissions.conf"] = _HEAD + _permissions_text(role for role in Role if role in used)
        texts["users.conf"] = users_text(home)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]
