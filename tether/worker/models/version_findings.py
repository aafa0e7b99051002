"""Findings on versions from their runs, by this worker or, through the dispatcher, by others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from tether.domain.manifest import NO_FINDING, Finding, ModelRef
from tether.process import metrics

log = logging.getLogger(__name__)


class Findings:
    """Known findings; ``changed`` is called with each version whose findings changed."""

    def __init__(self, changed: Callable[[ModelRef], None]) -> None:
        self._changed = changed
        self._own: dict[ModelRef, Finding] = {}
        self._from_dispatcher: dict[ModelRef, Finding] = {}

    def get(self, ref: ModelRef) -> Finding:
        own, known = self._own.get(ref), self._from_dispatcher.get(ref)
        return known | own if known and own else known or own or NO_FINDING

    def set_known(self, findings: Sequence[tuple[ModelRef, Finding]]) -> None:
        """Replace the findings received from the dispatcher."""
        before, self._from_dispatcher = self._from_dispatcher, dict(findings)
        for ref in before.keys() | self._from_dispatcher.keys():
            if before.get(ref) != self._from_dispatcher.get(ref):
                self._changed(ref)

    def record(self, ref: ModelRef, finding: Finding) -> None:
        before = self.get(ref)
        self._own[ref] = self._own.get(ref, NO_FINDING) | finding
        if self.get(ref) != before:
            self._changed(ref)

    def record_mixed(self, ref: ModelRef, reason: str) -> None:
        """Record and log once that the model mixes rows of different jobs."""
        if self.get(ref).mixed:
            return
        metrics.BATCHING_STOPPED.labels(ref.model).inc()
        fields = {"action": "batching_stopped", "model": ref.model, "version": ref.version}
        log.error("stopped batching: %s", reason, extra=fields)
        self.record(ref, Finding(mixed=f"a run mixed rows of different jobs: {reason}"))

    def record_crash(self, ref: ModelRef, how: str) -> None:
        """Record and log once that a redelivered job killed its process."""
        if self.get(ref).crashed:
            return
        metrics.WORKER_CRASHES.labels(ref.model).inc()
        fields = {"action": "worker_crashed", "model": ref.model, "version": ref.version}
        log.error("moved the model to its own process: a run %s", how, extra=fields)
        self.record(ref, Finding(crashed=f"a redelivered job ended its process: it {how}"))

    def record_over_limit(self, ref: ModelRef, how: str) -> None:
        """Record and log once that a run exceeded its limits in the worker's own process."""
        if self.get(ref).crashed:
            return
        fields = {"action": "run_over_limit", "model": ref.model, "version": ref.version}
        log.error("moved the model to its own process: a run %s", how, extra=fields)
        self.record(ref, Finding(crashed=f"a run in the worker's own process {how}"))

    def unreported(self) -> tuple[tuple[ModelRef, Finding], ...]:
        """Return findings that the dispatcher does not have yet, for the next heartbeat."""
        return tuple(
            (ref, finding)
            for ref, finding in self._own.items()
            if (known := self._from_dispatcher.get(ref, NO_FINDING)) | finding != known
        )
