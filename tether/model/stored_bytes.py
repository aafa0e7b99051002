"""What a tenant's model versions take of its quota ``stored_bytes``: the same number wherever it is asked for."""

from __future__ import annotations

from collections.abc import Iterable

from tether.domain.manifest import Manifest


def stored_bytes(kept: Iterable[Manifest], deleted: Iterable[Manifest]) -> int:
    """Bytes of one tenant's versions, and of the chunks that its deleted ones left and none of its versions names.

    What other tenants' versions name makes no difference, so that nobody learns from it what others have.
    """
    own = list(kept)
    left = {chunk: size for one in deleted for chunk, size in chunks_of(one).items()}
    if left:
        for one in own:
            for chunk in chunks_of(one):
                left.pop(chunk, None)
    return sum(one.size for one in own) + sum(left.values())


def chunks_of(manifest: Manifest) -> dict[tuple[int, str], int]:
    """Bytes of the chunks of a version, each once, by partition and digest."""
    return {(manifest.partition, digest): size for file in manifest.files for digest, size in file.sized_chunks()}
