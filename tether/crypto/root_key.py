"""The root key on disk: 32 plain bytes, or encrypted with a passphrase.

An encrypted file is ``"tether/root-key/v1\\0" | operations u32 | KiB of memory u32 | salt 16 | secretbox``:
Argon2id (version 1.3, those two costs) derives the 32-byte key of the XSalsa20-Poly1305 box, which begins with
its nonce (24) and contains the seed.
"""

from __future__ import annotations

import os
import struct

import nacl.exceptions
import nacl.pwhash.argon2id
import nacl.secret

from tether.errors import ConfigError

SEED_BYTES = 32

_MAGIC = b"tether/root-key/v1\0"
_COSTS = struct.Struct(">II16s")
_BOX_BYTES = 24 + 16 + SEED_BYTES
_OPERATIONS = nacl.pwhash.argon2id.OPSLIMIT_MODERATE
_MEMORY_KIB = nacl.pwhash.argon2id.MEMLIMIT_MODERATE // 1024
_MOST_OPERATIONS = nacl.pwhash.argon2id.OPSLIMIT_SENSITIVE * 4
_MOST_MEMORY_KIB = nacl.pwhash.argon2id.MEMLIMIT_SENSITIVE // 1024


def is_locked(data: bytes) -> bool:
    """Return whether a root key file needs a passphrase."""
    return data.startswith(_MAGIC)


def lock_root_key(seed: bytes, passphrase: str) -> bytes:
    """Encrypt a root key with a passphrase; takes most of a second."""
    costs = _COSTS.pack(_OPERATIONS, _MEMORY_KIB, os.urandom(16))
    return _MAGIC + costs + bytes(_box(passphrase, costs).encrypt(seed))


def unlock_root_key(data: bytes, passphrase: str) -> bytes:
    """Decrypt the result of :func:`lock_root_key`; return the seed.

    Raises:
        ConfigError: another passphrase, or the file is damaged.
    """
    costs = data[len(_MAGIC) :][: _COSTS.size]
    box = data[len(_MAGIC) + _COSTS.size :]
    if len(costs) != _COSTS.size or len(box) != _BOX_BYTES:
        raise ConfigError("the root key file is damaged; restore it from its backup")
    try:
        return bytes(_box(passphrase, costs).decrypt(box))
    except nacl.exceptions.CryptoError as error:
        raise ConfigError("the passphrase does not decrypt the root key", field="passphrase") from error


def _box(passphrase: str, costs: bytes) -> nacl.secret.SecretBox:
    operations, memory_kib, salt = _COSTS.unpack(costs)
    if not 1 <= operations <= _MOST_OPERATIONS or not 8 <= memory_kib <= _MOST_MEMORY_KIB:
        raise ConfigError("the root key file is damaged; restore it from its backup")
    key = nacl.pwhash.argon2id.kdf(
        nacl.secret.SecretBox.KEY_SIZE, passphrase.encode(), salt, opslimit=operations, memlimit=memory_kib * 1024
    )
    return nacl.secret.SecretBox(key)
