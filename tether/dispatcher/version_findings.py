"""Findings of workers on versions, kept in the routes until a version is deleted."""

from __future__ import annotations

import logging
from collections.abc import Collection

from tether.dispatcher.assignments import Place
from tether.domain.manifest import NO_FINDING, Finding, Heartbeat, ModelRef, Route

log = logging.getLogger(__name__)


class Findings:
    """Findings by pool and version: a worker's findings count for its own pool only."""

    def __init__(self) -> None:
        self.known: dict[Place, Finding] = {}

    def remember(self, route: Route) -> None:
        """Adopt the findings in a stored route."""
        if route.finding != NO_FINDING:
            self.known[route.pool, ModelRef(route.model, route.version)] = route.finding

    def record(self, beat: Heartbeat, models: Collection[ModelRef]) -> bool:
        """Return True if a heartbeat has new findings on a version of ``models``."""
        news = False
        for ref, finding in beat.findings:
            before = self.known.get((beat.pool, ref), NO_FINDING)
            after = before | finding
            if ref in models and after != before:
                self.known[beat.pool, ref] = after
                news = True
                fields = {
                    "action": "version_finding",
                    "model": ref.model,
                    "version": ref.version,
                    "worker": beat.worker,
                }
                log.info("%s:%d: %s", ref.model, ref.version, _words(after), extra=fields)
        return news

    def forget(self, place: Place) -> None:
        self.known.pop(place, None)


def _words(finding: Finding) -> str:
    return finding.mixed or finding.crashed or finding.unproven or "its rows are proven to be independent"
