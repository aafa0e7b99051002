#!/usr/bin/env bash
# Install Tether for this checkout and make the keys of its data directory: scripts/setup.sh
# A second run changes nothing. TETHER_HOME names the data directory (default .tether).
set -euo pipefail
cd "$(dirname "$0")/.."
export TETHER_HOME=${TETHER_HOME:-.tether}

make --no-print-directory setup
"${VENV:-.venv}/bin/tether" init >/dev/null
echo "setup: ready; start with scripts/start-services.sh" >&2
