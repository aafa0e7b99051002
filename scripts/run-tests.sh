#!/usr/bin/env bash
# Every test; those about the broker run on the embedded server and, where TETHER_TEST_NATS_IMAGE names an image, once more on a
# server in a container. Arguments go to pytest, whose closing line is the last one printed. The whole suite, which mostly waits,
# runs in TEST_PROCESSES processes (3); a test marked "alone" does while no other runs. With COVERAGE=1 lines are counted, and
# fewer than four fifths of them are a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
counted=()
if [ -n "${COVERAGE:-}" ]; then
    counted=(--cov --cov-report=term:skip-covered)
    [ $# -gt 0 ] || counted+=(--cov-fail-under=80) # a chosen part of the suite cannot cover what the whole covers
fi
side_by_side=()
if [ $# -eq 0 ]; then
    side_by_side=(-n "${TEST_PROCESSES:-3}" --dist loadscope --no-loadscope-reorder) # grouped by tests/support/suite/groups.py
fi
TETHER_TEST_LOCKS=$(mktemp -d "${TMPDIR:-/tmp}/tether-locks.XXXXXX")
export TETHER_TEST_LOCKS
trap 'rm -rf "$TETHER_TEST_LOCKS"' EXIT
"${VENV:-.venv}/bin/python" -m pytest "${side_by_side[@]}" "${counted[@]}" "$@"
