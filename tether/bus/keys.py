"""Makes the keys of a home: root key, identities, signed keyset, and the nkeys that log in to the broker."""

from __future__ import annotations

import os

import msgspec
import nkeys

from tether.clock import SystemClock
from tether.envelope import (
    ROLE_TYPES,
    Identity,
    IdentityRecord,
    Keyset,
    Role,
    new_identity,
    open_keyset,
    root_public_key,
    sign_keyset,
)
from tether.errors import ConfigError
from tether.home import Home, load_identity, read_secret, save_identity, write_secret

SYSTEM_USER = "system"
"""The NATS user of the system account; no service logs in with it."""

VALIDITY_MS = 10 * 365 * 86_400_000
"""How long a new keyset and its identities are valid."""

_SHARED_WORKER_SEED = "worker"
"""Until 0.1 all workers of a home had one login."""


def create_home(home: Home, *, workers: int) -> None:
    """Make every key that is missing and sign the keyset anew when what it says of an identity is no longer so.

    What exists is kept, so a second call changes nothing. ``workers`` is how many worker identities there must be.

    Raises:
        ConfigError: a key file is unreadable, open to others or not what it should be, or the root key is needed
            and not there.
        KeysetError: the existing keyset is not signed by the root key beside it.
    """
    home.keys.mkdir(parents=True, exist_ok=True, mode=0o700)
    if home.keyset.exists() and not home.root_key.exists():
        _require_complete(home, workers)
        return
    root_seed = _root_key(home)
    make_nats_seed(home, SYSTEM_USER)
    identities = [_identity(home, name, role) for name, role in _wanted(home, workers)]
    _forget_shared_seed(home, identities)
    _sign(home, root_seed, identities)


def nats_public_key(home: Home, name: str) -> str:
    """The public nkey of an identity or of the system user, as server configurations name it.

    Raises:
        ConfigError: the seed is missing, open to others or no nkey seed.
    """
    path = home.nats_seed(name)
    seed = read_secret(path).strip()
    try:
        public: bytes = nkeys.from_seed(bytearray(seed)).public_key
    except (nkeys.NkeysError, ValueError) as error:
        raise ConfigError(f"key file {path} is not an nkey seed; remove it and run 'tether init'") from error
    return public.decode()


def make_nats_seed(home: Home, name: str) -> None:
    """Make the broker login of an identity unless it has one."""
    if not home.nats_seed(name).exists():
        write_secret(home.nats_seed(name), nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))


def read_keyset(home: Home) -> Keyset:
    """The keyset of a home.

    Raises:
        ConfigError: there is none, or no root.pub beside it.
        KeysetError: it is not in force.
    """
    try:
        data, root_public = home.keyset.read_bytes(), home.root_public.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{home.keyset} or {home.root_public} cannot be read; make them with 'tether init'"
        ) from error
    return open_keyset(data, root_public, now_ms=SystemClock().utc_ms())


def broker_logins(home: Home) -> list[IdentityRecord]:
    """The identities that may log in to the broker, one for each nkey, by name.

    Raises:
        ConfigError: the keyset names no logins: an earlier version signed it.
    """
    now, keyset = SystemClock().utc_ms(), read_keyset(home)
    revoked = {item.kid for item in keyset.revoked}
    valid = [record for record in keyset.identities if record.kid not in revoked and now < record.expires_at]
    if lacking := [record.name for record in valid if not record.nats]:
        raise ConfigError(f"{home.keyset} names no broker login of '{lacking[0]}'; run 'tether init' with the root key")
    found = {record.nats: record for record in valid}
    return sorted(found.values(), key=lambda record: record.name)


def _require_complete(home: Home, workers: int) -> None:
    """Without the root key a home goes on as it is, if it has what its services need."""
    known = {record.name for record in read_keyset(home).identities}
    needed = [name for name, _ in _services(workers)]
    for name in needed:
        if name not in known or not home.identity(name).exists() or not home.nats_seed(name).exists():
            raise ConfigError(
                f"identity '{name}' has no keys in {home.keys} and {home.root_key} is not there to make them; "
                "put the root key back"
            )


def _root_key(home: Home) -> bytes:
    if not home.root_key.exists():
        write_secret(home.root_key, os.urandom(32))
    seed = read_secret(home.root_key)
    if len(seed) != 32:
        raise ConfigError(f"key file {home.root_key} must hold 32 bytes, not {len(seed)}; restore it from its backup")
    if not home.root_public.exists():
        write_secret(home.root_public, root_public_key(seed))
    return seed


def _services(workers: int) -> list[tuple[str, Role]]:
    services = [(role.value, role) for role in Role if role is not Role.WORKER]
    return [*services, *((f"worker-{number}", Role.WORKER) for number in range(1, workers + 1))]


def _wanted(home: Home, workers: int) -> list[tuple[str, Role]]:
    wanted = _services(workers)
    known = {name for name, _ in wanted}
    for path in sorted(home.keys.glob("*.identity")):
        if path.stem not in known:
            wanted.append((path.stem, load_identity(path).role))
    return wanted


def _identity(home: Home, name: str, role: Role) -> Identity:
    path = home.identity(name)
    if not path.exists():
        save_identity(path, new_identity(name, role))
    make_nats_seed(home, name)
    return load_identity(path)


def _forget_shared_seed(home: Home, identities: list[Identity]) -> None:
    if all(identity.name != _SHARED_WORKER_SEED for identity in identities):
        home.nats_seed(_SHARED_WORKER_SEED).unlink(missing_ok=True)


def _sign(home: Home, root_seed: bytes, identities: list[Identity]) -> None:
    """Sign a newer keyset unless the one there says the same of every identity; what else is in it stays in it."""
    now = SystemClock().utc_ms()
    old = Keyset(0, now, now + VALIDITY_MS, ())
    if home.keyset.exists():
        old = open_keyset(home.keyset.read_bytes(), root_public_key(root_seed), now_ms=now)
    records = {record.kid: _current(record) for record in old.identities}
    for identity in identities:
        nats = nats_public_key(home, identity.name)
        before = records.get(identity.kid, identity.record(not_before=now, expires_at=now + VALIDITY_MS))
        records[identity.kid] = msgspec.structs.replace(before, nats=nats)
    if tuple(records.values()) == old.identities:
        return
    made = Keyset(old.version + 1, now, now + VALIDITY_MS, tuple(records.values()), old.revoked)
    write_secret(home.keyset, sign_keyset(root_seed, made))


def _current(record: IdentityRecord) -> IdentityRecord:
    """A record with the message types that its role has in this version."""
    return msgspec.structs.replace(record, types=tuple(sorted(ROLE_TYPES[record.role])))
