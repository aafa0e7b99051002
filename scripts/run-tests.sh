#!/usr/bin/env bash
# Every test with coverage; those that need a broker run on the embedded server and, where TETHER_TEST_NATS_IMAGE names an
# image, once more on a server in a container. Arguments go to pytest, whose closing line is the last one printed.
set -euo pipefail
cd "$(dirname "$0")/.."
floor=()
[ $# -gt 0 ] || floor=(--cov-fail-under=80) # a chosen part of the suite cannot cover what the whole covers
exec "${VENV:-.venv}/bin/python" -m pytest --cov --cov-report=term:skip-covered "${floor[@]}" "$@"
