"""What is found out about versions while they are run, by this worker or, as the dispatcher tells, by another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from tether.domain.manifest import NO_FINDING, Finding, ModelRef
from tether.process import metrics

log = logging.getLogger(__name__)


class Findings:
    """``changed`` hears of each version of which something else is known than before."""

    def __init__(self, changed: Callable[[ModelRef], None]) -> None:
        self._changed = changed
        self._own: dict[ModelRef, Finding] = {}
        self._told: dict[ModelRef, Finding] = {}

    def get(self, ref: ModelRef) -> Finding:
        own, told = self._own.get(ref), self._told.get(ref)
        return told | own if told and own else told or own or NO_FINDING

    def told(self, findings: Sequence[tuple[ModelRef, Finding]]) -> None:
        """What the dispatcher says is known, as a whole."""
        before, self._told = self._told, dict(findings)
        for ref in before.keys() | self._told.keys():
            if before.get(ref) != self._told.get(ref):
                self._changed(ref)

    def found(self, ref: ModelRef, finding: Finding) -> None:
        before = self.get(ref)
        self._own[ref] = self._own.get(ref, NO_FINDING) | finding
        if self.get(ref) != before:
            self._changed(ref)

    def mixed(self, ref: ModelRef, reason: str) -> None:
        """A run did not keep rows apart: said once, loudly."""
        if self.get(ref).mixed:
            return
        metrics.BATCHING_STOPPED.labels(ref.model).inc()
        fields = {"action": "batching_stopped", "model": ref.model, "version": ref.version}
        log.error("its jobs are not joined any more: %s", reason, extra=fields)
        self.found(ref, Finding(mixed=f"a run did not keep rows apart: {reason}"))

    def crashed(self, ref: ModelRef, how: str) -> None:
        """A job that came again ended the process that it ran in: said once, loudly."""
        if self.get(ref).crashed:
            return
        metrics.WORKER_CRASHES.labels(ref.model).inc()
        fields = {"action": "worker_crashed", "model": ref.model, "version": ref.version}
        log.error("it runs in a process of its own from now on: a run %s", how, extra=fields)
        self.found(ref, Finding(crashed=f"a job that came again ended its process: it {how}"))

    def over(self, ref: ModelRef, how: str) -> None:
        """A run took more than it may in the worker's own process: said once, loudly."""
        if self.get(ref).crashed:
            return
        fields = {"action": "run_over_limit", "model": ref.model, "version": ref.version}
        log.error("it runs in a process of its own from now on: a run %s", how, extra=fields)
        self.found(ref, Finding(crashed=f"a run of it in a worker's own process {how}"))

    def news(self) -> tuple[tuple[ModelRef, Finding], ...]:
        """What the dispatcher does not know yet, for the next heartbeat."""
        return tuple(
            (ref, finding)
            for ref, finding in self._own.items()
            if (told := self._told.get(ref, NO_FINDING)) | finding != told
        )
