"""Commands that run the platform: init, up, down, status, streams, doctor, and each service on its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether_cli.options import DataDir, Nats, RootKeyPath, root_key
from tether_cli.output import JsonFlag, print_fields, print_json, print_table, say

if TYPE_CHECKING:
    from tether.process.data_dir import Home
    from tether.settings import Settings

Http = Annotated[str | None, typer.Option("--http", metavar="HOST:PORT", help="Address on which the gateway listens.")]
Partitions = Annotated[
    int | None, typer.Option("--partitions", metavar="P", help="Number of buckets for model chunks.")
]
Workers = Annotated[int | None, typer.Option("--workers", metavar="N", help="Number of workers.")]
ModelStores = Annotated[
    int | None, typer.Option("--model-stores", metavar="N", help="Number of model stores; they share the partitions.")
]
OpsPort = Annotated[int | None, typer.Option("--ops-port", metavar="PORT", help="Port of /healthz, /readyz, /metrics.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(init)
    app.command()(up)
    app.command()(down)
    app.command()(status)
    app.command()(streams)
    app.command()(doctor)
    app.command()(gateway)
    app.command()(dispatcher)
    app.command()(worker)
    app.command()(modelstore)


def _quiet() -> None:
    """Silence log lines: they would repeat what the command prints."""
    import logging

    logging.getLogger("tether").setLevel(logging.CRITICAL)


def _load(service: str, **overrides: Any) -> tuple[Settings, Home]:
    from tether.process.data_dir import Home
    from tether.settings import load

    settings = load(service, overrides=overrides)
    return settings, Home.at(settings.home)


def init(
    *,
    data_dir: DataDir = None,
    workers: Workers = None,
    model_stores: ModelStores = None,
    nats_config: Annotated[
        str | None, typer.Option(metavar="DIR", help="Also write the broker's configuration files to DIR.")
    ] = None,
    root: RootKeyPath = None,
    passphrase: Annotated[
        bool,
        typer.Option("--passphrase", help="Lock a new root key with a passphrase; default: TETHER_ROOT_PASSPHRASE."),
    ] = False,
    tls: Annotated[
        bool, typer.Option("--tls", help="Also create or renew certificates for the broker and services.")
    ] = False,
    host: Annotated[
        list[str] | None, typer.Option("--host", metavar="NAME", help="With --tls: a name or address of the broker.")
    ] = None,
) -> None:
    """Create the keys of a data directory; existing ones are kept."""
    from pathlib import Path

    from tether.broker.nats_config import write_ops_files
    from tether.identity.keys import create_home

    settings, home = _load("broker", home=data_dir, workers=workers, model_stores=model_stores)
    key = root_key(home, root, confirm=passphrase and not home.keyset.exists())
    create_home(home, workers=settings.workers, model_stores=settings.model_stores, root=key, lock=passphrase)
    say(f"keys are in {home.keys}; keep {key.path} where only you can read it")
    if tls or host:
        from tether.identity.certificates import authority_locked, make_certificates

        locked = authority_locked(home) if home.authority_key.exists() else key.locked
        make_certificates(home, host or [], passphrase=key.passphrase() if locked else "")
        say(f"certificates are in {home.tls_file('ca.crt').parent}; keep {home.authority_key} as you keep root.key")
    if nats_config is not None:
        for path in write_ops_files(Path(nats_config), home, partitions=settings.partitions):
            say(f"wrote {path}")
    typer.echo(str(home.root))


def up(
    *,
    data_dir: DataDir = None,
    http: Http = None,
    workers: Workers = None,
    model_stores: ModelStores = None,
    partitions: Partitions = None,
    nats: Nats = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once the platform is ready; stop it with 'down'.")
    ] = False,
    log_files: Annotated[bool, typer.Option("--log-files", help="Write each service's log to DIR/logs.")] = False,
) -> None:
    """Run the whole platform until Ctrl-C, or with --detach until 'down'.

    The platform is a broker, a model store, a dispatcher, workers and a gateway.
    """
    from tether.process import logs
    from tether_cli.platform import up as running

    counts = {"workers": workers, "model_stores": model_stores, "partitions": partitions}
    settings, home = _load("broker", home=data_dir, nats_url=nats, **counts)
    address = None if http is None else running.parse_address(http)
    if detach:
        given = {
            "--data-dir": str(home.root),
            "--http": http,
            **{f"--{name.replace('_', '-')}": count for name, count in counts.items()},
            "--nats": nats,
        }
        words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
        typer.echo(f"ready {running.detach([*words, '--log-files'], home)}")
        return
    logs.setup(settings, "up")
    asyncio.run(running.run(running.UpOptions(settings, address, to_files=log_files)))


def down(data_dir: DataDir = None) -> None:
    """Stop the platform that 'tether up' started, and wait until its processes have ended."""
    from tether_cli.platform import up as running

    _, home = _load("broker", home=data_dir)
    stopped = asyncio.run(running.down(home))
    say("stopped" if stopped else f"nothing runs on {home.root}; name the folder of a platform with --data-dir")


def status(
    data_dir: DataDir = None,
    json_output: JsonFlag = False,
    streams: Annotated[bool, typer.Option("--streams", help="Also show the broker's streams.")] = False,
) -> None:
    """Show processes, models, workers and queues.

    The exit status is 1 if a process is not running or not ready.
    """
    from tether_cli.platform.status import collect

    _quiet()
    settings, home = _load("broker", home=data_dir)
    found = asyncio.run(collect(settings, home))
    if json_output:
        print_json(found)
    else:
        _print_status(found, streams=streams)
    if not (found["running"] and all(row["alive"] and row["ready"] for row in found["processes"])):
        raise typer.Exit(1)


def _print_status(found: dict[str, Any], *, streams: bool) -> None:
    if not found["running"]:
        say(f"nothing runs on {found['home']}; start it with 'tether up', or name another folder with --data-dir")
        return
    broker, queues = found["broker"], found["queues"]
    print_fields(
        {
            "gateway": found["http"],
            "broker": f"{broker['url']} ({broker['durability']})",
            "waiting": f"messages with durable jobs {queues['jobs']}, with requests {queues['requests']}",
            "kept": f"results {queues['results']}, dead letters {queues['dead_letters']}",
        }
    )
    typer.echo()
    columns = ("name", "pid", "alive", "ready", "port", "restarts")
    print_table(("process", *columns[1:]), [[_word(row[column]) for column in columns] for row in found["processes"]])
    for row in found["processes"]:
        for what, reason in row["missing"].items():
            typer.echo(f"{row['name']}: {what}: {reason}")
        if row["restarted_because"]:
            typer.echo(f"{row['name']} was restarted: {row['restarted_because']}")
    typer.echo()
    print_table(
        ("worker", "models", "running", "slots", "last heartbeat"),
        [
            [row["name"], len(row["ready"]), row["running"], row["slots"], f"{row['age_s']:.1f} s ago"]
            for row in found["workers"]
        ],
    )
    typer.echo()
    print_table(
        ("model", "versions", "aliases", "ready"),
        [
            [
                row["name"],
                row["versions"],
                [f"{name}={version}" for name, version in row["aliases"].items()],
                _word(row["ready"]),
            ]
            for row in found["models"]
        ],
    )
    if "error" in found:
        typer.echo(f"cannot read models and workers: {found['error']}")
    if streams:
        typer.echo()
        counts = ("messages", "bytes", "consumers")
        rows = [[row["name"], *(row[count] for count in counts)] for row in broker.get("streams", [])]
        print_table(("stream", *counts), rows)


def _word(value: Any) -> Any:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def streams(
    data_dir: DataDir = None,
    nats: Nats = None,
    *,
    apply: Annotated[
        bool, typer.Option("--apply", help="Update the streams; 'tether up' does so at its start.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Show streams of the broker that differ from the settings.

    The exit status is 1 if some still differ.
    """
    from tether.streams.updates import differing_streams, update_streams
    from tether_cli.audit_queries import connected

    _quiet()
    settings, home = _load("dispatcher", home=data_dir, nats_url=nats)

    async def looked() -> dict[str, list[str]]:
        async with connected(settings, home) as bus:
            return await (update_streams if apply else differing_streams)(bus, settings)

    found = asyncio.run(looked())
    if json_output:
        print_json(found)
    else:
        print_table(
            ("stream", "changed" if apply else "differs in"), [[name, ", ".join(of)] for name, of in found.items()]
        )
    if found and not apply:
        raise typer.Exit(1)


def doctor(data_dir: DataDir = None, json_output: JsonFlag = False) -> None:
    """Check machine, keys, ports and broker, and print a fix for each finding.

    One line per check. The exit status is 1 if a check fails.
    """
    import msgspec

    from tether_cli.platform.doctor import examine

    _quiet()
    settings, home = _load("broker", home=data_dir)
    found = asyncio.run(examine(settings, home))
    if json_output:
        print_json([msgspec.to_builtins(finding) for finding in found])
    else:
        for finding in found:
            typer.echo(finding.line())
    if any(finding.level == "fail" for finding in found):
        raise typer.Exit(1)


def gateway(data_dir: DataDir = None, nats: Nats = None, http: Http = None) -> None:
    """Run the gateway."""
    from tether.gateway_http import service
    from tether_cli.platform.up import parse_address

    host, port = (None, None) if http is None else parse_address(http)
    _serve(service.main, "gateway", home=data_dir, nats_url=nats, http_host=host, http_port=port)


def dispatcher(data_dir: DataDir = None, nats: Nats = None, ops_port: OpsPort = None) -> None:
    """Run the dispatcher."""
    from tether.dispatcher import service

    _serve(service.main, "dispatcher", home=data_dir, nats_url=nats, ops_port=ops_port)


def worker(
    data_dir: DataDir = None,
    nats: Nats = None,
    name: Annotated[str | None, typer.Option("--name", help="Identity of the worker, such as worker-1.")] = None,
    ops_port: OpsPort = None,
) -> None:
    """Run a worker."""
    from tether.worker import service

    _serve(service.main, "worker", home=data_dir, nats_url=nats, worker_name=name, ops_port=ops_port)


def modelstore(
    data_dir: DataDir = None,
    nats: Nats = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Identity of the model store; default: modelstore.")
    ] = None,
    partitions: Partitions = None,
    ops_port: OpsPort = None,
) -> None:
    """Run a model store."""
    from tether.modelstore import service

    _serve(
        service.main,
        "modelstore",
        home=data_dir,
        nats_url=nats,
        modelstore_name=name,
        partitions=partitions,
        ops_port=ops_port,
    )


def _serve(main: Any, name: str, **overrides: Any) -> None:
    """Run a service until it is stopped, on the broker of the settings or of the platform on this home."""
    import dataclasses

    import uvloop

    from tether.errors import ConfigError

    settings, home = _load(name, **overrides)
    if not settings.nats_url:
        running = _endpoints(home)
        if running is None:
            raise ConfigError(
                f"{name} has no broker: use --nats, set TETHER_NATS_URL or start 'tether up' on {home.root}",
                field="nats_url",
            )
        folder = settings.nats_store_dir if running["durability"] == "external" else str(home.nats_store)
        settings = dataclasses.replace(
            settings, nats_url=running["nats"], nats_monitor_url=running["monitor"], nats_store_dir=folder
        )
    uvloop.run(main(settings))


def _endpoints(home: Home) -> dict[str, Any] | None:
    from tether_cli.platform.up import read_endpoints

    return read_endpoints(home)
