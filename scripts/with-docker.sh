#!/usr/bin/env bash
# Run a command beside a Docker engine: scripts/with-docker.sh COMMAND...
#
# An engine that answers is used as it is. Otherwise, as root on a machine with apt, Docker is installed and a daemon of
# our own is started on a private socket and store, which are gone when the command ends. Elsewhere the command runs
# without one and the tests that need it are skipped; in CI that is an error.
# The images that the tests use are built first and named in TETHER_TEST_NATS_IMAGE and TETHER_TEST_IMAGE.
set -euo pipefail
cd "$(dirname "$0")/.."

base=${TMPDIR:-/tmp}
state=""
daemon=""

say() { echo "docker: $*" >&2; }

answers() { command -v docker >/dev/null && timeout 15 docker info >/dev/null 2>&1; }

end_daemon() { # PID: TERM, up to 20 s for its containers, then KILL
    kill -TERM "$1" 2>/dev/null || return 0
    for _ in $(seq 100); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.2
    done
    kill -KILL "$1" 2>/dev/null || true
}

remove_state() { # DIR: unmount what a daemon left mounted below it, then remove it
    awk -v dir="$1/" 'index($2, dir) == 1 { print $2 }' /proc/mounts | sort -r | xargs -r -n1 umount -l 2>/dev/null || true
    rm -rf "$1"
}

remove_leftovers() { # a former run that was killed could not end its daemon
    local old pid
    for old in "$base"/tether-docker.*; do
        [ -d "$old" ] || continue
        pid=$(cat "$old/owner" 2>/dev/null || echo 0)
        if [ "$pid" != 0 ] && kill -0 "$pid" 2>/dev/null; then continue; fi
        say "removing what an earlier run left in $old"
        pid=$(cat "$old/dockerd.pid" 2>/dev/null || echo 0)
        if [ "$pid" != 0 ] && grep -qs "$old" "/proc/$pid/cmdline"; then end_daemon "$pid"; fi
        remove_state "$old"
    done
}

finish() {
    local status=$?
    trap - EXIT INT TERM
    if [ -n "$daemon" ]; then
        docker ps -aq | xargs -r docker rm -f >/dev/null 2>&1 || true
        end_daemon "$daemon"
    fi
    if [ -n "$state" ]; then remove_state "$state"; fi
    exit "$status"
}

install_docker() {
    local missing=()
    command -v dockerd >/dev/null || missing+=(docker.io)
    command -v iptables >/dev/null || missing+=(iptables)
    docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null || missing+=(docker-compose)
    command -v debootstrap >/dev/null || missing+=(debootstrap)
    if [ ${#missing[@]} -eq 0 ]; then return 0; fi
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >/dev/null || say "apt-get update complained; trying all the same"
    apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null >/dev/null
}

start_daemon() {
    remove_leftovers
    state=$(mktemp -d "$base/tether-docker.XXXXXX")
    echo $$ >"$state/owner"
    export DOCKER_HOST="unix://$state/docker.sock"
    dockerd --host "$DOCKER_HOST" --data-root "$state/data" --exec-root "$state/exec" --pidfile "$state/dockerd.pid" \
        --group "$(id -gn)" </dev/null >"$state/dockerd.log" 2>&1 &
    daemon=$!
    for _ in $(seq 120); do
        if answers; then
            say "started an engine in $state"
            return 0
        fi
        kill -0 "$daemon" 2>/dev/null || break
        sleep 0.5
    done
    tail -n 20 "$state/dockerd.log" >&2
    return 1
}

prepare() {
    if answers; then
        say "using the engine that runs"
        return 0
    fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return 1; fi
    install_docker && start_daemon
}

trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if prepare; then
    scripts/build-images.sh
    export TETHER_TEST_NATS_IMAGE=tether-nats:local TETHER_TEST_IMAGE=tether:local TESTCONTAINERS_RYUK_DISABLED=true
elif [ -n "${CI:-}" ]; then
    say "no engine could be started, and CI must run the container tests"
    exit 1
else
    say "no engine answers and none can be started here: the tests that need containers are skipped"
fi
"$@"
