"""Proves in a separate process that a version's rows are independent, for manifests without that information.

Such manifests were made before batching needed proof. ``tether.worker.runs.row_judgement FILE`` runs in a
confined process (:mod:`tether.sandbox.enter`) and prints one JSON object ``{"independent", "reason"}``.
"""

from __future__ import annotations

import asyncio
import resource
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

import msgspec

from tether.domain.manifest import Finding, Manifest
from tether.frameworks.row_proof.prover import RowProof, prove
from tether.process.os_process import die_with_parent
from tether.sandbox import plan
from tether.storage.upload import MODEL_PATH

DECLARE = "if no output row depends on another row, push it again with --max-batch-size N"
_WALL_S = 120.0
_CPU_S = 60
_MEMORY_MB = 2048
"""Address space of the child in MiB, in addition to the file size."""


def unjudged(manifest: Manifest) -> bool:
    """Return True if a manifest asks for batching without stating that rows are independent."""
    return manifest.batching.max_batch_size > 0 and not manifest.batching.basis


async def judge(manifest: Manifest, directory: Path) -> Finding:
    """Return the finding on a version whose files are in ``directory``; the child gets a minute of CPU time."""
    if manifest.platform != "onnxruntime_onnx":
        return Finding(unproven=f"only ONNX graphs can be proven safe to batch; {DECLARE}")
    proof = await _asked(directory / MODEL_PATH)
    return Finding(proven=True) if proof.independent else Finding(unproven=f"{proof.reason}; {DECLARE}")


async def _asked(path: Path) -> RowProof:
    wish = plan.ConfinementRequest(mode=plan.AVAILABLE, apart=str(path.parent), read=(str(path),), behind=True)
    process = await asyncio.create_subprocess_exec(
        *plan.command(plan.plan(wish), "tether.worker.runs.row_judgement", str(path)),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=DEVNULL,
        env=plan.environment(),
        start_new_session=True,
        preexec_fn=die_with_parent(signal.SIGKILL),
    )
    try:
        async with asyncio.timeout(_WALL_S):
            answer, _ = await process.communicate()
            return msgspec.json.decode(answer, type=RowProof)
    except (TimeoutError, msgspec.DecodeError):
        return RowProof(independent=False, reason="the proof exceeded its time or memory limit")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def main(path: Path) -> None:
    """Limit this process and print the result for one file."""
    memory = (_MEMORY_MB << 20) + 2 * path.stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    sys.stdout.buffer.write(msgspec.json.encode(prove(path)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
