"""The data directory of one machine: keys, broker store, cache, logs and pid files.

Key files are created with mode 0600, and refused if others may read them.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tether.crypto import Identity, Role
from tether.errors import ConfigError


@dataclass(frozen=True)
class Home:
    """Paths below one data directory; nothing is created before the first write."""

    root: Path

    @classmethod
    def at(cls, path: str) -> Home:
        """Return the data directory of the settings; ``./.tether`` if none is set.

        Raises:
            ConfigError: its name is not UTF-8, so no configuration, log or message could contain it.
        """
        root = Path(path or ".tether").absolute()
        try:
            str(root).encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"the data directory {os.fsencode(root)!r} is not valid UTF-8; choose another", field="home"
            ) from error
        return cls(root)

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def root_key(self) -> Path:
        return self.keys / "root.key"

    @property
    def root_public(self) -> Path:
        return self.keys / "root.pub"

    @property
    def keyset(self) -> Path:
        return self.keys / "keyset"

    @property
    def keyset_seen(self) -> Path:
        """Return the path of a keyset newer than the one in ``keys``, if ``keys`` is not writable."""
        return self.run / "keyset"

    def identity(self, name: str) -> Path:
        return self.keys / f"{name}.identity"

    def nats_seed(self, name: str) -> Path:
        """Return the path of an identity's nkey seed for its broker login."""
        return self.keys / f"nats-{name!s}.seed"

    @property
    def authority_key(self) -> Path:
        """Return the path of the key of the authority that signs the certificates in ``tls``."""
        return self.keys / "ca.key"

    def tls_file(self, name: str) -> Path:
        """Return the path of ``ca.crt``, ``server.crt``, ``server.key``, ``client.crt`` or ``client.key``."""
        return self.root / "tls" / name

    @property
    def admin_key(self) -> Path:
        return self.root / "admin.key"

    @property
    def nats_config(self) -> Path:
        return self.root / "nats.conf"

    @property
    def nats_store(self) -> Path:
        return self.root / "nats"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def audit(self) -> Path:
        """Return the folder of audit blocks that are not sent yet, with a folder for each identity."""
        return self.root / "audit"

    def cache(self, worker: str) -> Path:
        return self.root / "cache" / worker

    @property
    def endpoints(self) -> Path:
        """Return the path of the JSON list of running services, written by ``tether up``."""
        return self.run / "endpoints.json"


def private_folder(path: Path) -> None:
    """Create a folder that only its owner may enter, with missing parents; an existing one is not changed.

    Raises:
        ConfigError: the path exists and is not a folder.
        OSError: it cannot be created.
    """
    if path.is_dir():
        return
    if path.is_symlink() or path.exists():
        raise ConfigError(f"{path} is not a folder; choose another with --data-dir or TETHER_HOME")
    private_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)


def check_folder(path: Path) -> None:
    """Check that no other user can write into a folder of keys or models; a missing folder passes.

    Raises:
        ConfigError: it belongs to another user, or group or others may write into it.
    """
    try:
        found = path.stat()
    except OSError:
        return
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"folder {path} belongs to another user (uid {found.st_uid}); run: chown {os.geteuid()} {path}"
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o022 and not mode & stat.S_ISVTX:
        raise ConfigError(f"others may write into folder {path} (mode {mode:04o}); run: chmod go-w {path}")


@contextmanager
def keys_locked(home: Home) -> Iterator[None]:
    """Lock a home's keys while reading, changing and writing them; other processes wait.

    Raises:
        OSError: the folder of keys is not writable.
    """
    descriptor = os.open(home.keys / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_secret(path: Path, content: bytes) -> None:
    """Write a file atomically with mode 0600."""
    private_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_secret(path: Path) -> bytes:
    """Read a key file.

    Raises:
        ConfigError: it is missing or another user's, group or others may read it, or they may write into its folder;
            the message has the command that fixes it.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"key file {path} cannot be read; {_where(path)}") from error
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f"key file {path} belongs to another user (uid {found.st_uid}); run: chown {os.geteuid()} {path}"
        )
    check_folder(path.parent)
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise ConfigError(f"key file {path} is readable by others (mode {mode:04o}); run: chmod 600 {path}")
    return path.read_bytes()


def _where(path: Path) -> str:
    if path.name == "root.key":
        return "give the path of the root key with --root-key, or create a new platform's with 'tether init'"
    return "create it with 'tether init'"


def save_identity(path: Path, identity: Identity) -> None:
    content = {
        "name": identity.name,
        "role": identity.role.value,
        "seed": base64.b64encode(identity.seed).decode(),
        "box_seed": base64.b64encode(identity.box_seed).decode(),
    }
    write_secret(path, json.dumps(content).encode())


def load_identity(path: Path) -> Identity:
    """Read an identity file written by :func:`save_identity`.

    Raises:
        ConfigError: it is missing, readable by others, or not an identity file.
    """
    raw = read_secret(path)
    try:
        content = json.loads(raw)
        return Identity(
            str(content["name"]),
            Role(content["role"]),
            base64.b64decode(content["seed"], validate=True),
            base64.b64decode(content["box_seed"], validate=True),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"key file {path} is not an identity; recreate it with 'tether init'") from error
