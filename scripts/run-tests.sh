#!/usr/bin/env bash
# Every test: the integration suite against a broker in a container when there is one, then everything on the embedded
# broker with coverage. Further arguments go to pytest. The last line printed is pytest's own.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${VENV:-.venv}/bin/python

if [ -n "${TETHER_TEST_NATS_IMAGE:-}" ]; then
    "$python" -m pytest tests/integration --broker=container -q "$@"
fi
exec "$python" -m pytest --cov --cov-report=term:skip-covered "$@"
