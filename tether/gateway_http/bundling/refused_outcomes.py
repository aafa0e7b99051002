"""Outcomes of jobs that a gateway does not accept."""

from __future__ import annotations

import logging

from tether.errors import ResultConflict
from tether.process import metrics

log = logging.getLogger(__name__)


def refuse_end(job: str, sender: str) -> None:
    """Count and log an outcome from a worker that does not serve the job's tenant: the worker of an isolated tenant answers
    that tenant's jobs alone, and no other worker does."""
    metrics.ENVELOPES_REJECTED.labels(ResultConflict.code).inc()
    log.warning("'%s' answered a job of another pool", sender, extra={"action": "answer_refused", "job_id": job})
