"""Makes the keys of a home: root key, identities, signed keyset, and the nkeys that log in to the broker."""

from __future__ import annotations

import os

import nkeys

from tether.clock import SystemClock
from tether.envelope import Identity, Keyset, Role, new_identity, open_keyset, root_public_key, sign_keyset
from tether.errors import ConfigError
from tether.home import Home, load_identity, read_secret, save_identity, write_secret

SYSTEM_USER = "system"
"""The NATS user of the system account; no service logs in with it."""

VALIDITY_MS = 10 * 365 * 86_400_000
"""How long a new keyset and its identities are valid."""


def create_home(home: Home, *, workers: int) -> None:
    """Make every key that is missing and sign the keyset anew when an identity was added.

    What exists is kept, so a second call changes nothing. ``workers`` is how many worker identities there must be.

    Raises:
        ConfigError: a key file is unreadable, open to others or not what it should be.
        KeysetError: the existing keyset is not signed by the root key beside it.
    """
    home.keys.mkdir(parents=True, exist_ok=True, mode=0o700)
    root_seed = _root_key(home)
    for user in (*Role, SYSTEM_USER):
        if not home.nats_seed(user).exists():
            write_secret(home.nats_seed(user), _new_seed())
    identities = [_identity(home, name, role) for name, role in _wanted(home, workers)]
    _sign(home, root_seed, identities)


def nats_public_key(home: Home, user: Role | str) -> str:
    """The public nkey of a broker user, as server configurations name it.

    Raises:
        ConfigError: the seed is missing, open to others or no nkey seed.
    """
    path = home.nats_seed(user)
    seed = read_secret(path).strip()
    try:
        public: bytes = nkeys.from_seed(bytearray(seed)).public_key
    except (nkeys.NkeysError, ValueError) as error:
        raise ConfigError(f"key file {path} is not an nkey seed; remove it and run 'tether init'") from error
    return public.decode()


def _root_key(home: Home) -> bytes:
    if not home.root_key.exists():
        if home.keyset.exists():
            raise ConfigError(
                f"{home.keyset} exists without {home.root_key}; put the root key back to change identities"
            )
        write_secret(home.root_key, os.urandom(32))
    seed = read_secret(home.root_key)
    if len(seed) != 32:
        raise ConfigError(f"key file {home.root_key} must hold 32 bytes, not {len(seed)}; restore it from its backup")
    if not home.root_public.exists():
        write_secret(home.root_public, root_public_key(seed))
    return seed


def _new_seed() -> bytes:
    seed: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return seed


def _wanted(home: Home, workers: int) -> list[tuple[str, Role]]:
    wanted: list[tuple[str, Role]] = [(role.value, role) for role in Role if role is not Role.WORKER]
    wanted += [(f"worker-{number}", Role.WORKER) for number in range(1, workers + 1)]
    known = {name for name, _ in wanted}
    for path in sorted(home.keys.glob("*.identity")):
        if path.stem not in known:
            wanted.append((path.stem, load_identity(path).role))
    return wanted


def _identity(home: Home, name: str, role: Role) -> Identity:
    path = home.identity(name)
    if not path.exists():
        save_identity(path, new_identity(name, role))
    return load_identity(path)


def _sign(home: Home, root_seed: bytes, identities: list[Identity]) -> None:
    now = SystemClock().utc_ms()
    old = None
    if home.keyset.exists():
        old = open_keyset(home.keyset.read_bytes(), root_public_key(root_seed), now_ms=now)
        if {record.kid for record in old.identities} == {identity.kid for identity in identities}:
            return
    records = tuple(identity.record(not_before=now, expires_at=now + VALIDITY_MS) for identity in identities)
    keyset = Keyset(1 if old is None else old.version + 1, now, now + VALIDITY_MS, records)
    write_secret(home.keyset, sign_keyset(root_seed, keyset))
