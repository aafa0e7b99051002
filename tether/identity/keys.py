"""Creates the keys of a home: root key, identities, signed keyset, and nkeys for broker logins."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import nkeys

from tether.bus.key_value.keyset_sync import TrustedKeyset
from tether.crypto import (
    ROLE_TYPES,
    Identity,
    IdentityRecord,
    Keyset,
    Role,
    is_locked,
    lock_root_key,
    new_identity,
    root_public_key,
    sign_keyset,
    unlock_root_key,
)
from tether.environment import root_passphrase
from tether.errors import ConfigError
from tether.process.clock import SystemClock
from tether.process.data_dir import (
    Home,
    keys_locked,
    load_identity,
    private_folder,
    read_secret,
    save_identity,
    write_secret,
)

SYSTEM_USER = "system"
"""NATS user of the system account; no service logs in with it."""

DAY_MS = 86_400_000
VALIDITY_DAYS = 3650
"""Validity of a new keyset and its identities, in days."""

_SHARED_WORKER_SEED = "worker"
"""Shared broker login of all workers of a home, until 0.1."""


def _given_passphrase() -> str:
    if given := root_passphrase():
        return given
    raise ConfigError("the root key is locked with a passphrase; set TETHER_ROOT_PASSPHRASE or use 'tether init'")


@dataclass(frozen=True)
class RootKey:
    """Location of the root key, and the source of its passphrase if it is encrypted."""

    path: Path
    passphrase: Callable[[], str] = _given_passphrase

    @property
    def locked(self) -> bool:
        """Return whether its file needs the passphrase; False if the key is on another machine."""
        return self.path.exists() and is_locked(read_secret(self.path))

    def open(self, home: Home) -> bytes:
        """Return the seed, if it is the root key that ``home`` trusts.

        Raises:
            ConfigError: it is missing, readable by others, has another passphrase, or is not the key of this
        home.
        """
        data = read_secret(self.path)
        seed = unlock_root_key(data, self.passphrase()) if is_locked(data) else data
        if len(seed) != 32:
            raise ConfigError(f"key file {self.path} must hold 32 bytes, not {len(seed)}; restore it from its backup")
        if home.root_public.exists() and home.root_public.read_bytes() != root_public_key(seed):
            raise ConfigError(f"{self.path} is not the root key that {home.root_public} belongs to")
        return seed

    def create(self, home: Home, *, lock: bool) -> bytes:
        """Create the root key of a new home, encrypted with the passphrase if ``lock``."""
        seed = os.urandom(32)
        write_secret(self.path, lock_root_key(seed, self.passphrase()) if lock else seed)
        write_secret(home.root_public, root_public_key(seed))
        return seed


def create_home(
    home: Home, *, workers: int, model_stores: int = 1, root: RootKey | None = None, lock: bool = False
) -> None:
    """Create every missing key, and re-sign the keyset if an identity's record is out of date.

    Existing keys are kept, so a second call changes nothing, and needs no root key. ``workers`` and
    ``model_stores`` are the required numbers of identities; ``root`` is keys/root.key unless it is stored
    elsewhere; a new one is encrypted if ``lock`` or if TETHER_ROOT_PASSPHRASE is set.

    Raises:
        ConfigError: a key file is unreadable, readable by others or invalid; an identity was revoked; or the
    root key
            is required and missing.
        KeysetError: the existing keyset is not signed by the root key of this home.
    """
    private_folder(home.keys)
    root = RootKey(home.root_key) if root is None else root
    needed = _services(workers, model_stores)
    if home.keyset.exists() and not (lacking := _lacking(home, needed)):
        return
    if not home.keyset.exists():
        seed = root.open(home) if root.path.exists() else root.create(home, lock=lock or bool(root_passphrase()))
    elif root.path.exists():
        seed = root.open(home)
    else:
        raise ConfigError(f"{lacking} and {root.path}, which must sign it, is missing; restore the root key")
    if not home.root_public.exists():
        write_secret(home.root_public, root_public_key(seed))
    with keys_locked(home):
        make_nats_seed(home, SYSTEM_USER)
        for name, role in needed:
            if not home.identity(name).exists():
                save_identity(home.identity(name), new_identity(name, role))
        identities = own_identities(home)
        for identity in identities:
            make_nats_seed(home, identity.name)
        if all(identity.name != _SHARED_WORKER_SEED for identity in identities):
            home.nats_seed(_SHARED_WORKER_SEED).unlink(missing_ok=True)
        _sign(home, seed, identities)


def nats_public_key(home: Home, name: str) -> str:
    """Return the public nkey of an identity or of the system user, as in server configurations.

    Raises:
        ConfigError: the seed is missing, readable by others or not an nkey seed.
    """
    path = home.nats_seed(name)
    seed = read_secret(path).strip()
    try:
        public: bytes = nkeys.from_seed(bytearray(seed)).public_key
    except (nkeys.NkeysError, ValueError) as error:
        raise ConfigError(f"key file {path} is not an nkey seed; remove it and run 'tether init'") from error
    return public.decode()


def make_nats_seed(home: Home, name: str) -> None:
    """Create the broker login of an identity unless it has one."""
    if not home.nats_seed(name).exists():
        write_secret(home.nats_seed(name), nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))


def read_keyset(home: Home) -> Keyset:
    """Return the keyset of a home.

    Raises:
        ConfigError: there is none, or no root.pub beside it.
        KeysetError: it is not in force.
    """
    return TrustedKeyset.load(home).keyset


def broker_logins(home: Home) -> list[IdentityRecord]:
    """Return the identities that may log in to the broker, one for each nkey, by name.

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


def own_identities(home: Home) -> list[Identity]:
    """Return every identity whose file is in a home, by name."""
    return [load_identity(path) for path in sorted(home.keys.glob("*.identity"))]


def store_names(count: int) -> list[str]:
    """Return the identity names for a number of model stores on one home."""
    return [Role.MODELSTORE.value, *(f"{Role.MODELSTORE.value}-{number}" for number in range(2, count + 1))]


def _services(workers: int, model_stores: int) -> list[tuple[str, Role]]:
    services = [(role.value, role) for role in Role if role is not Role.WORKER]
    stores = [(name, Role.MODELSTORE) for name in store_names(model_stores)[1:]]
    return [*services, *stores, *((f"worker-{number}", Role.WORKER) for number in range(1, workers + 1))]


def _lacking(home: Home, needed: list[tuple[str, Role]]) -> str:
    """Return what a home with a keyset lacks for its services to start; empty if nothing."""
    keyset = read_keyset(home)
    records = {record.kid: record for record in keyset.identities}
    revoked = {item.kid for item in keyset.revoked}
    gone = {item.name for item in keyset.revoked} - {record.name for record in keyset.identities}
    for name, role in needed:
        if name in gone:
            raise ConfigError(
                f"identity '{name}' was revoked; create it again: tether identity add {name} --role {role}"
            )
        if not home.identity(name).exists():
            return f"identity '{name}' has no keys in {home.keys}"
    for identity in own_identities(home):
        if identity.kid in revoked:
            continue
        record = records.get(identity.kid)
        if record is None or not home.nats_seed(identity.name).exists() or record != _current(home, record):
            return f"identity '{identity.name}' has an outdated record in the keyset"
    return "" if home.nats_seed(SYSTEM_USER).exists() else "the broker's system user has no key"


def _current(home: Home, record: IdentityRecord) -> IdentityRecord:
    """Return a record with its role's message types in this release, and its login."""
    nats = nats_public_key(home, record.name) if home.nats_seed(record.name).exists() else record.nats
    return msgspec.structs.replace(record, types=tuple(sorted(ROLE_TYPES[record.role])), nats=nats)


def _sign(home: Home, seed: bytes, identities: list[Identity]) -> None:
    """Sign a newer keyset with these identities; its other content stays."""
    now = SystemClock().utc_ms()
    end = now + VALIDITY_DAYS * DAY_MS
    old = TrustedKeyset.load(home).keyset if home.keyset.exists() else Keyset(0, now, end, ())
    revoked = {item.kid for item in old.revoked}
    records = {record.kid: record for record in old.identities}
    for identity in identities:
        if identity.kid not in revoked:
            records.setdefault(identity.kid, identity.record(not_before=now, expires_at=end))
    current = tuple(_current(home, record) for record in records.values())
    write_secret(home.keyset, sign_keyset(seed, Keyset(old.version + 1, now, end, current, old.revoked)))
