"""Usage of the quota ``stored_bytes`` by a tenant's model versions, computed the same everywhere."""

from __future__ import annotations

from collections.abc import Iterable

from tether.domain.manifest import Manifest


def stored_bytes(kept: Iterable[Manifest], deleted: Iterable[Manifest]) -> int:
    """Return the bytes of one tenant's versions, and of chunks that only its deleted versions reference.

    References of other tenants' versions make no difference, so that the number reveals nothing about them.
    """
    own = list(kept)
    left = {chunk: size for one in deleted for chunk, size in chunks_of(one).items()}
    if left:
        for one in own:
            for chunk in chunks_of(one):
                left.pop(chunk, None)
    return sum(one.size for one in own) + sum(left.values())


def chunks_of(manifest: Manifest) -> dict[tuple[int, str], int]:
    """Return the bytes of a version's distinct chunks, by partition and digest."""
    return {(manifest.partition, digest): size for file in manifest.files for digest, size in file.sized_chunks()}
