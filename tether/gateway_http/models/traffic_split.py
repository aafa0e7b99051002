"""Which version of a split a request gets, and what is said when there is none, or nobody to run it. Pure but for chance."""

from __future__ import annotations

import hashlib
import random

from tether.domain.job import SHARED
from tether.domain.manifest import Alias, Manifest


def drawn(alias: Alias, sticky: str) -> int:
    """The version of a split that one request gets: by its ``sticky`` text, or by chance when that is empty."""
    if sticky:
        digest = hashlib.blake2b(f"{alias.model}\0{alias.name}\0{sticky}".encode(), digest_size=8).digest()
        point = int.from_bytes(digest) / 2**64
    else:
        point = random.random()  # noqa: S311 - spreading load, not secrets
    point *= sum(share.weight for share in alias.split)
    for share in alias.split:
        point -= share.weight
        if point < 0:
            return share.version
    return alias.split[-1].version


def no_worker(manifest: Manifest, pool: str, reason: str = "") -> str:
    """Why a version is not ready in a pool, and what to do about it."""
    if reason:
        return f"no worker has it: {reason}"
    if pool == SHARED:
        return "no worker has it loaded"
    return (
        f"tenant '{pool}' is isolated and none of its own workers has model '{manifest.name}' version "
        f"{manifest.version} loaded; the administrator starts one with "
        f"'tether identity add NAME --role worker --tenant {pool}' and 'tether worker --name NAME --ops-port 0'"
    )
