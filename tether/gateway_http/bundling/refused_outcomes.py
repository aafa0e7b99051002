"""Rejects outcomes from workers of another pool."""

from __future__ import annotations

import logging

from tether.errors import ResultConflict
from tether.process import metrics

log = logging.getLogger(__name__)


def refuse_end(job: str, sender: str) -> None:
    """Count and log an outcome from a worker outside the job's pool.

    An isolated tenant's jobs are answered by its own workers only, and those answer no other jobs.
    """
    metrics.ENVELOPES_REJECTED.labels(ResultConflict.code).inc()
    log.warning(
        "rejected an outcome: worker '%s' is not in the job's pool",
        sender,
        extra={"action": "answer_refused", "job_id": job},
    )
