#!/usr/bin/env bash
# Every test; those about the broker run on the embedded server and, where TETHER_TEST_NATS_IMAGE names an image, once more on a
# server in a container. Arguments go to pytest, whose closing line is the last one printed. With COVERAGE=1 lines are counted,
# and fewer than four fifths of them are a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
counted=()
if [ -n "${COVERAGE:-}" ]; then
    counted=(--cov --cov-report=term:skip-covered)
    [ $# -gt 0 ] || counted+=(--cov-fail-under=80) # a chosen part of the suite cannot cover what the whole covers
fi
exec "${VENV:-.venv}/bin/python" -m pytest "${counted[@]}" "$@"
