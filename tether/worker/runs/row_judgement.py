"""Whether the rows of a version are independent whose manifest does not say so: asked in a process of its own, by the worker that
loads it. Versions have such manifests from before batching had to be proven.

Called as ``tether.worker.runs.row_judgement FILE`` in a process that is confined (:mod:`tether.sandbox.enter`), it prints one JSON object ``{"independent", "reason"}``.
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

DECLARE = "if no row's answer depends on another row, push it again with --max-batch-size N"
_WALL_S = 120.0
_CPU_S = 60
_MEMORY_MB = 2048
"""Address space of the child, beside what the file itself takes."""


def unjudged(manifest: Manifest) -> bool:
    """Whether a manifest asks for batches and says on no basis."""
    return manifest.batching.max_batch_size > 0 and not manifest.batching.basis


async def judge(manifest: Manifest, directory: Path) -> Finding:
    """What is to be known of such a version; its files are whole in ``directory``. The child may use a minute of processor time."""
    if manifest.platform != "onnxruntime_onnx":
        return Finding(unproven=f"only ONNX graphs are proven to be safe to batch; {DECLARE}")
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
        return RowProof(independent=False, reason="the proof took more time or memory than it may")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def main(path: Path) -> None:
    """Limit this process and answer about one file."""
    memory = (_MEMORY_MB << 20) + 2 * path.stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    sys.stdout.buffer.write(msgspec.json.encode(prove(path)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
