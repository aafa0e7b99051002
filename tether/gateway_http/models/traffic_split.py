"""Draws a version of a weighted alias, and explains why no worker is ready. Pure, apart from randomness."""

from __future__ import annotations

import hashlib
import random

from tether.domain.job import SHARED
from tether.domain.manifest import Alias, Manifest


def drawn(alias: Alias, sticky: str) -> int:
    """Return the version for one request: determined by ``sticky``, or random if that is empty."""
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
    """Explain why a version is not ready in a pool, and how to fix it."""
    if reason:
        return f"no worker hosts it: {reason}"
    if pool == SHARED:
        return "no worker has it loaded"
    return (
        f"tenant '{pool}' is isolated and none of its own workers has model '{manifest.name}' version "
        f"{manifest.version} loaded; the administrator starts one with "
        f"'tether identity add NAME --role worker --tenant {pool}' and 'tether worker --name NAME --ops-port 0'"
    )
