#!/usr/bin/env bash
# Start the platform in the background: scripts/start-services.sh [OPTIONS OF tether up]
#
# Broker, model store, dispatcher, workers and gateway start in this order and are waited for; when one does not become
# ready, all that started are stopped again and the exit status is 1. Started again while it runs, it changes nothing.
# Logs are in $TETHER_HOME/logs, pid files in $TETHER_HOME/run (default .tether).
set -euo pipefail
cd "$(dirname "$0")/.."
export TETHER_HOME=${TETHER_HOME:-.tether}
tether=${VENV:-.venv}/bin/tether

[ -x "$tether" ] || { echo "start: run scripts/setup.sh first" >&2; exit 1; }
if "$tether" status >/dev/null 2>&1; then
    echo "start: it runs already; see tether status" >&2
    exit 0
fi
"$tether" up --detach "$@"
