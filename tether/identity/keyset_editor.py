"""Edits the set of identities: each edit signs a newer keyset and writes it, with its keys, to a home."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tether.bus.key_value.keyset_sync import TrustedKeyset
from tether.crypto import Identity, IdentityRecord, Keyset, Revocation, Role, new_identity, sign_keyset
from tether.domain.tenant import check_tenant_name
from tether.errors import ConfigError, Conflict, InvalidRequest, NotFound
from tether.identity.keys import DAY_MS, SYSTEM_USER, VALIDITY_DAYS, RootKey, make_nats_seed, nats_public_key
from tether.process.clock import SystemClock
from tether.process.data_dir import (
    Home,
    check_folder,
    keys_locked,
    load_identity,
    private_folder,
    save_identity,
    write_secret,
)

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_KID = re.compile(r"[0-9a-f]{8,32}")

Edit = Callable[[Keyset, int], Keyset]
"""Returns the next keyset from the previous one and the time, UTC milliseconds."""


@dataclass(frozen=True)
class KeyStatus:
    """One key of a keyset, for display. Times are UTC milliseconds; ``state`` is current, outgoing, expired
    or revoked.
    """

    name: str
    role: str
    tenant: str
    kid: str
    state: str
    not_before: int = 0
    expires_at: int = 0
    """Of a revoked key: the time of revocation."""


def add(
    home: Home, root: RootKey, name: str, role: Role, *, tenant: str = "", valid_days: int = VALIDITY_DAYS
) -> IdentityRecord:
    """Add an identity, its broker login and its keyset record.

    Raises:
        InvalidRequest: the name or the tenant is invalid.
        Conflict: the name has a valid key.
        ConfigError, KeysetError: the root key or the keyset cannot be used.
    """
    _check_name(name)
    if tenant:
        check_tenant_name(tenant)
        if role is not Role.WORKER:
            raise InvalidRequest("only a worker can serve a single tenant; leave --tenant out", field="tenant")
    identity = new_identity(name, role)

    def edit(keyset: Keyset, now: int) -> Keyset:
        if _live(keyset, name, now):
            raise Conflict(
                f"identity '{name}' exists; 'tether identity rotate {name}' gives it a new key", field="name"
            )
        home.nats_seed(name).unlink(missing_ok=True)
        make_nats_seed(home, name)
        record = identity.record(
            not_before=now, expires_at=now + valid_days * DAY_MS, tenant=tenant, nats=nats_public_key(home, name)
        )
        return msgspec.structs.replace(keyset, identities=(*keyset.identities, record))

    made = _change(home, root, edit)
    save_identity(home.identity(name), identity)
    return _record(made, identity.kid)


def rotate(
    home: Home, root: RootKey, name: str, *, grace_s: int = 3600, valid_days: int = VALIDITY_DAYS
) -> IdentityRecord:
    """Give an identity a new signing key; the old one stays valid for ``grace_s`` seconds.

    Login and box key stay, so that data encrypted for the identity can still be decrypted.

    Raises:
        NotFound: no identity of this name has a valid key.
        ConfigError, KeysetError: the root key, the keyset or the identity's file cannot be used.
    """
    made_of = home.identity(name)
    fresh: list[Identity] = []

    def edit(keyset: Keyset, now: int) -> Keyset:
        live = _live(keyset, name, now)
        if not live:
            raise NotFound(f"no identity '{name}' has a valid key; 'tether identity list' shows all", field="name")
        before, made = live[-1], new_identity(name, live[-1].role)
        if made_of.exists():
            made = msgspec.structs.replace(made, box_seed=load_identity(made_of).box_seed)
        fresh.append(made)
        record = made.record(
            not_before=now, expires_at=now + valid_days * DAY_MS, tenant=before.tenant, nats=before.nats
        )
        last = now + grace_s * 1000
        aged = [
            msgspec.structs.replace(old, expires_at=min(old.expires_at, last)) if old.name == name else old
            for old in keyset.identities
        ]
        return msgspec.structs.replace(keyset, identities=(*aged, record))

    keyset = _change(home, root, edit)
    save_identity(home.identity(name), fresh[0])
    return _record(keyset, fresh[0].kid)


def revoke(home: Home, root: RootKey, who: str) -> tuple[Revocation, ...]:
    """Revoke every key of a name, or the one key whose id begins with ``who``; return the revoked ones.

    Raises:
        NotFound: there is no such key.
        ConfigError, KeysetError: the root key or the keyset cannot be used.
    """
    gone: list[Revocation] = []

    def edit(keyset: Keyset, now: int) -> Keyset:
        found = _named(keyset, who)
        if not found:
            raise NotFound(f"no identity or key '{who[:64]}'; 'tether identity list' shows all")
        gone.extend(Revocation(record.kid, record.name, now) for record in found)
        kids = {record.kid for record in found}
        kept = tuple(record for record in keyset.identities if record.kid not in kids)
        return msgspec.structs.replace(keyset, identities=kept, revoked=(*keyset.revoked, *gone))

    keyset = _change(home, root, edit)
    _forget(home, keyset, gone)
    return tuple(gone)


def renew(home: Home, root: RootKey, *, valid_days: int = VALIDITY_DAYS) -> Keyset:
    """Re-sign the keyset: it and every identity's current key are valid for ``valid_days`` from now.

    Raises:
        ConfigError, KeysetError: the root key or the keyset cannot be used.
    """

    def edit(keyset: Keyset, now: int) -> Keyset:
        newest = {record.name: record.kid for record in keyset.identities}
        end = now + valid_days * DAY_MS
        renewed = tuple(
            msgspec.structs.replace(record, expires_at=end) if newest[record.name] == record.kid else record
            for record in keyset.identities
        )
        return msgspec.structs.replace(keyset, not_before=now, expires_at=end, identities=renewed)

    return _change(home, root, edit)


def listing(home: Home) -> list[KeyStatus]:
    """Return every key in the keyset, by name; the key that signs now is the last of its name.

    Raises:
        ConfigError, KeysetError: the keyset cannot be used.
    """
    keyset, now = TrustedKeyset.load(home, expired=True).keyset, SystemClock().utc_ms()
    newest = {record.name: record.kid for record in keyset.identities}
    rows = []
    for record in keyset.identities:
        state = (
            "expired" if now >= record.expires_at else "current" if newest[record.name] == record.kid else "outgoing"
        )
        times = {"not_before": record.not_before, "expires_at": record.expires_at}
        rows.append(KeyStatus(record.name, str(record.role), record.tenant, record.kid.hex(), state, **times))
    rows += [
        KeyStatus(item.name, "", "", item.kid.hex(), "revoked", expires_at=item.revoked_at) for item in keyset.revoked
    ]
    return sorted(rows, key=lambda row: row.name)


def export(home: Home, name: str, folder: Path) -> Path:
    """Write a data directory with the files that one identity needs on another machine, and no others.

    A worker finds its keys under its own name, every other service under its role.

    Raises:
        ConfigError: the folder is readable by others, or a key of the identity is not in this home.
    """
    identity = load_identity(home.identity(name))
    target = Home(folder.absolute())
    private_folder(target.keys)
    check_folder(target.root)
    check_folder(target.keys)
    used = name if identity.role is Role.WORKER else identity.role.value
    pairs = [
        (home.root_public, target.root_public),
        (home.keyset, target.keyset),
        (home.identity(name), target.identity(used)),
        (home.nats_seed(name), target.nats_seed(used)),
    ]
    for source, copy in pairs:
        write_secret(copy, source.read_bytes())
    return target.root


def _change(home: Home, root: RootKey, edit: Edit) -> Keyset:
    """Sign and write the keyset that ``edit`` returns, under a lock against other editors."""
    seed = root.open(home)
    with keys_locked(home):
        before = TrustedKeyset.load(home, expired=True).keyset
        made = edit(before, SystemClock().utc_ms())
        made = msgspec.structs.replace(made, version=before.version + 1)
        write_secret(home.keyset, sign_keyset(seed, made))
    return made


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None or name == SYSTEM_USER:
        raise InvalidRequest(
            f"'{name[:64]}' cannot be an identity's name: lower-case letters, digits, '-' and '_', and not "
            f"'{SYSTEM_USER}'",
            field="name",
        )


def _live(keyset: Keyset, name: str, now: int) -> list[IdentityRecord]:
    return [record for record in keyset.identities if record.name == name and now < record.expires_at]


def _named(keyset: Keyset, who: str) -> list[IdentityRecord]:
    found = [record for record in keyset.identities if record.name == who]
    if not found and _KID.fullmatch(who):
        found = [record for record in keyset.identities if record.kid.hex().startswith(who)]
        if len(found) > 1:
            raise InvalidRequest(f"several keys begin with '{who}'; give a longer prefix")
    return found


def _record(keyset: Keyset, kid: bytes) -> IdentityRecord:
    return next(record for record in keyset.identities if record.kid == kid)


def _forget(home: Home, keyset: Keyset, gone: list[Revocation]) -> None:
    """Remove the files of invalid keys."""
    kids, left = {item.kid for item in gone}, {record.name for record in keyset.identities}
    for name in {item.name for item in gone}:
        try:
            if load_identity(home.identity(name)).kid in kids:
                home.identity(name).unlink()
        except ConfigError:
            continue  # it is stored on another machine
        if name not in left:
            home.nats_seed(name).unlink(missing_ok=True)
