"""Effective run settings of a version, from its manifest, its model's configuration and workers' findings.
Pure."""

from __future__ import annotations

import msgspec

from tether.domain.manifest import DECLARED, PROVEN, Batching, Isolation, Manifest, isolation_of
from tether.domain.worker_protocol import NO_FINDING, Finding
from tether.model.config import ModelConfig

NOT_JUDGED = "it was pushed before batching had to be proven, and no worker has checked it yet"


def effective_batching(manifest: Manifest, config: ModelConfig, finding: Finding = NO_FINDING) -> Batching:
    """Return the effective batching; ``reason`` says why a version is not batched.

    A configuration can only lower the version's limits. A version whose manifest has no basis is batched only
    after a worker has proven it.
    """
    own = manifest.batching
    if not own.max_batch_size:
        return own
    if finding.mixed:
        return _unbatched(own, finding.mixed)
    if not own.basis and manifest.platform == "python":
        own = msgspec.structs.replace(own, basis=DECLARED)  # declared in its description, before manifests had a basis
    if not own.basis and not finding.proven:
        return _unbatched(own, finding.unproven or NOT_JUDGED)
    if config.max_batch_size == 0:
        return _unbatched(own, "the model's configuration has max_batch_size 0")
    rows = own.max_batch_size if config.max_batch_size is None else min(own.max_batch_size, config.max_batch_size)
    return msgspec.structs.replace(own, max_batch_size=rows, basis=own.basis or PROVEN)


def effective_isolation(
    manifest: Manifest, config: ModelConfig, finding: Finding = NO_FINDING, *, rule: str = Isolation.THREAD
) -> Isolation:
    """Return where a version runs.

    Models that contain code and versions that have crashed a worker always run in their own process; so does
    every version if ``rule`` (the setting ``onnx_isolation``) is ``process``.
    """
    if (
        finding.crashed
        or rule == Isolation.PROCESS
        or isolation_of(msgspec.structs.replace(manifest, isolation="")) is Isolation.PROCESS
    ):
        return Isolation.PROCESS
    return Isolation(config.isolation) if config.isolation else isolation_of(manifest)


def _unbatched(own: Batching, reason: str) -> Batching:
    return Batching(0, own.max_delay_ms, "", reason)
