"""Which tests stay together when the suite runs in several processes (pytest-xdist).

A file's tests share what is set up for them, so they go to one process. Files whose tests are to be alone are one group, what
watches whole platforms is one, and what runs in containers is one. xdist's own groups are not used: they travel as a part of
each test's id, which pytest no longer lets xdist change since 9.2 (pytest-xdist issue 1386), and then nothing is grouped and
nothing says so.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from xdist.scheduler import LoadScopeScheduling

ALONE = "alone"
ACCEPTANCE = "acceptance"
CONTAINER = "container"
FIRST = (ALONE, ACCEPTANCE, CONTAINER)
"""What is alone begins, one test after another, so that the others wait for it once; then the longest groups, because a
process that began late with one of them would be the last for minutes."""

ALONE_FILES = frozenset(
    {"test_key_revocation.py", "test_keyset.py", "test_limits_cluster.py", "test_run_limits.py", "test_slow_clients.py"}
)
"""These watch how long things take, so no other test runs beside theirs."""


def group_of(nodeid: str) -> str:
    """The group of a test, by its id: ``tests/unit/test_x.py::test_y[container-1]``."""
    file, _, test = nodeid.partition("::")
    path = PurePosixPath(file)
    if path.name in ALONE_FILES:
        return ALONE
    if path.parent.name == ACCEPTANCE:
        return ACCEPTANCE
    parameters = test.partition("[")[2].rstrip("]")
    return CONTAINER if CONTAINER in re.split("-", parameters) else file


def rank(nodeid: str) -> int:
    """What a suite's tests are sorted by; those of one rank keep their order."""
    group = group_of(nodeid)
    return FIRST.index(group) if group in FIRST else len(FIRST)


class ByGroup(LoadScopeScheduling):  # type: ignore[misc] # xdist's scheduler has no types
    """Hands out one group at a time, in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
