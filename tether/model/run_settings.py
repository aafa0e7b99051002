"""How a version is run just now: its manifest, its model's configuration and what workers found out, together. Pure."""

from __future__ import annotations

import msgspec

from tether.domain.manifest import DECLARED, PROVEN, Batching, Isolation, Manifest, isolation_of
from tether.domain.worker_protocol import NO_FINDING, Finding
from tether.model.config import ModelConfig

NOT_JUDGED = "it was pushed before batching had to be proven, and no worker has judged it yet"


def effective_batching(manifest: Manifest, config: ModelConfig, finding: Finding = NO_FINDING) -> Batching:
    """``reason`` says why a version is not batched, whoever decided that.

    A configuration may only lower what the version allows. A version whose manifest names no basis is batched only when a
    worker has proven it.
    """
    own = manifest.batching
    if not own.max_batch_size:
        return own
    if finding.mixed:
        return _alone(own, finding.mixed)
    if not own.basis and manifest.platform == "python":
        own = msgspec.structs.replace(own, basis=DECLARED)  # by its description, which said so before a manifest did
    if not own.basis and not finding.proven:
        return _alone(own, finding.unproven or NOT_JUDGED)
    if config.max_batch_size == 0:
        return _alone(own, "the model's configuration says max_batch_size 0")
    rows = own.max_batch_size if config.max_batch_size is None else min(own.max_batch_size, config.max_batch_size)
    return msgspec.structs.replace(own, max_batch_size=rows, basis=own.basis or PROVEN)


def effective_isolation(
    manifest: Manifest, config: ModelConfig, finding: Finding = NO_FINDING, *, rule: str = Isolation.THREAD
) -> Isolation:
    """A program never runs in a worker's own process, nor does a version that has ended one, nor any by the ``rule``
    ``process``, which is the setting ``onnx_isolation``."""
    if (
        finding.crashed
        or rule == Isolation.PROCESS
        or isolation_of(msgspec.structs.replace(manifest, isolation="")) is Isolation.PROCESS
    ):
        return Isolation.PROCESS
    return Isolation(config.isolation) if config.isolation else isolation_of(manifest)


def _alone(own: Batching, reason: str) -> Batching:
    return Batching(0, own.max_delay_ms, "", reason)
