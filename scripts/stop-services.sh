#!/usr/bin/env bash
# Stop what scripts/start-services.sh started, gateway first and broker last; returns when every process has ended.
# Run again, it changes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
export TETHER_HOME=${TETHER_HOME:-.tether}
tether=${VENV:-.venv}/bin/tether

[ -x "$tether" ] || { echo "stop: run scripts/setup.sh first" >&2; exit 1; }
"$tether" down
