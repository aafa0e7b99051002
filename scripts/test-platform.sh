#!/usr/bin/env bash
# Prove that the platform works: push the digits model, run it once over HTTP and once as a durable job.
# Uses what runs; when nothing runs, starts the platform for the test and stops it again.
set -euo pipefail
cd "$(dirname "$0")/.."
export TETHER_HOME=${TETHER_HOME:-.tether}
bin=${VENV:-.venv}/bin

[ -x "$bin/tether" ] || { echo "test: run scripts/setup.sh first" >&2; exit 1; }
if ! "$bin/tether" status >/dev/null 2>&1; then
    trap scripts/stop-services.sh EXIT
    scripts/start-services.sh "$@" >&2
fi

sample() { # the first held-out image as {"image": [row]}
    "$bin/python" -c '
import json, numpy
images = numpy.load("examples/digits/digits_holdout.npz")["images"]
print(json.dumps({"image": images[:1].tolist()}))'
}

check() { # WHAT: an answer with the label of that image must be on stdin
    "$bin/python" -c '
import json, sys, numpy
want = int(numpy.load("examples/digits/digits_holdout.npz")["labels"][0])
answer = json.load(sys.stdin)
if "jobs" in answer:
    outputs = answer["jobs"][0]["result"]["outputs"]
    answer = {output["name"]: output["data"] for output in outputs}
got = answer["label"][0]
sys.exit(None if got == want else f"test: {sys.argv[1]} answered {got}, not {want}")' "$1"
    echo "test: $1 ok" >&2
}

"$bin/tether" model push digits examples/digits/digits.onnx >/dev/null
echo "test: push ok" >&2
sample | "$bin/tether" infer digits - --json | check inference
sample | "$bin/tether" submit digits - --wait --json | check job
echo passed
