# One image for every service: `docker run tether gateway`, `... dispatcher`, `... worker`, `... modelstore`.
#
#   PYTHON_IMAGE   a base with Python 3.11 or newer
#   EXTRAS         optional runtimes, e.g. [torch] or [all]
#   PIP_OPTIONS    e.g. "--no-index --find-links /src/build/wheels" where a build reaches no package index
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ARG EXTRAS=""
ARG PIP_OPTIONS=""
COPY . /src/
RUN python3 -m venv /opt/tether \
 && /opt/tether/bin/pip install --no-cache-dir ${PIP_OPTIONS} "/src${EXTRAS}" \
 && /opt/tether/bin/pip uninstall --yes pip setuptools

FROM ${PYTHON_IMAGE}
RUN groupadd --system --gid 10001 tether \
 && useradd --system --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin tether \
 && install -d -o 10001 -g 10001 -m 0700 /data /data/cache /data/audit
COPY --from=build /opt/tether /opt/tether
ENV PATH=/opt/tether/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TETHER_HOME=/data
USER 10001:10001
WORKDIR /data
ENTRYPOINT ["tether"]
CMD ["--help"]
