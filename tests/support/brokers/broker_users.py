"""A user without limits in the configuration of a broker."""

from __future__ import annotations

import os
from pathlib import Path

import nkeys

USERS = "    users: [\n"


def new_seed() -> str:
    seed: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return seed.decode()


def add_operator(accounts: Path, seed: str) -> None:
    """Name one more user, without any limit, in a file with accounts of ours."""
    public = nkeys.from_seed(bytearray(seed.encode())).public_key.decode()
    head, mark, rest = accounts.read_text().rpartition(USERS)
    accounts.write_text(f"{head}{mark}      {{ nkey: {public} }}\n{rest}")
