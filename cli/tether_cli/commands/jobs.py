"""Commands that run models: infer, submit, and durable jobs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether_cli.options import JobId, ModelName, Output, Source, Timeout, Url, Version, Within, connect
from tether_cli.output import JsonFlag, print_fields, print_json, print_table, progress, say

if TYPE_CHECKING:
    from tether.client.blocking import Client, JobInfo
    from tether.client.operations import Outputs
    from tether.domain.tensor import Array


def _arrays(client: Client, model: str, version: str | None, source: str) -> dict[str, Array]:
    from tether.client.inputs import arrays
    from tether_cli import inputs

    given = inputs.read(source)
    return client.run(lambda policy: arrays(policy, model, version, given, fit=True))


def _save(path: str, outputs: Outputs) -> None:
    import numpy as np

    from tether.errors import InvalidRequest

    # numpy stores objects only as pickle, so text is written as fixed-width bytes
    plain: dict[str, Any] = {
        name: array.astype("S") if array.dtype == object else array for name, array in outputs.items()
    }
    try:
        with open(path, "wb") as file:  # noqa: PTH123 - savez would add .npz to any other name
            np.savez_compressed(file, **plain)
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}", field="output") from error
    say(f"wrote {', '.join(outputs)} to {path}")


def _plain(outputs: Outputs) -> dict[str, Any]:
    return {name: _nested(_shortest(array).tolist()) for name, array in outputs.items()}


def _shortest(array: Array) -> Array:
    """Shorten floats of less than 64 bits to the fewest exact digits: 0.1, not 0.10000000149011612."""
    short = array.dtype.kind not in "biuOSU" and array.dtype.itemsize < 8
    return array.astype(str).astype(float) if short else array


def _nested(value: Any) -> Any:
    if isinstance(value, list):
        return [_nested(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value if not isinstance(value, float) or abs(value) < float("inf") else str(value)


def print_outputs(outputs: Outputs, *, json_output: bool) -> None:
    import json

    plain = _plain(outputs)
    if json_output:
        print_json(plain)
        return
    short = {name: array for name, array in outputs.items() if sys.stdout.isatty() and array.size > MOST_SHOWN}
    print_fields(
        {
            name: _first(short[name]) if name in short else json.dumps(value, ensure_ascii=False)
            for name, value in plain.items()
        }
    )
    if short:
        say(
            f"only the first elements of {', '.join(short)} are shown; --output FILE.npz writes all of "
            "them, --json prints them"
        )


MOST_SHOWN = 100
"""Maximum number of elements of an output on a terminal; files and pipes get all of them."""


def _first(array: Array) -> str:
    import json

    some = json.dumps(_nested(_shortest(array.ravel()[:8]).tolist()), ensure_ascii=False)
    return f"shape {list(array.shape)}: {some[:-1]}, ...]"


def infer(
    model: ModelName,
    source: Source,
    *,
    version: Version = None,
    wanted: Annotated[
        list[str] | None, typer.Option("--want", metavar="OUTPUT", help="Only this output; repeatable.")
    ] = None,
    output: Output = None,
    url: Url = None,
    timeout: Timeout = 30.0,
    json_output: JsonFlag = False,
) -> None:
    """Run a model once and print its outputs."""
    with connect(url, timeout) as client:
        outputs = client.infer(model, _arrays(client, model, version, source), version, wanted or ())
    if output is not None:
        _save(output, outputs)
    else:
        print_outputs(outputs, json_output=json_output)


def submit(
    model: ModelName,
    source: Source,
    *,
    rows: Annotated[bool, typer.Option("--rows", help="Submit one job per row of the inputs' first axis.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the jobs finish and print their outputs.")] = False,
    within: Within = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE.npz", help="Wait and write the outputs to this file.")
    ] = None,
    version: Version = None,
    priority: Annotated[
        str | None, typer.Option("--priority", metavar="LEVEL", help="Priority: high, normal or low.")
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            "--deadline", metavar="SECONDS", min=0.001, help="Let the job expire if it has not finished by then."
        ),
    ] = None,
    key: Annotated[
        str | None, typer.Option("--idempotency-key", metavar="KEY", help="A repeated key returns the same job.")
    ] = None,
    url: Url = None,
    timeout: Timeout = 30.0,
    json_output: JsonFlag = False,
) -> None:
    """Queue durable jobs and print their ids.

    With --wait print their results.
    """
    if rows and key is not None:
        raise typer.BadParameter("--idempotency-key names one job; it cannot go with --rows")
    from tether_cli import inputs

    with connect(url, timeout) as client:
        given = _arrays(client, model, version, source)
        if rows:
            parts = list(inputs.rows(given))
            with progress("submitting", len(parts)) as done:
                handles = client.submit_many(
                    model, parts, version=version, priority=priority, deadline=deadline, progress=done
                )
        else:
            handles = [
                client.submit(model, given, version=version, priority=priority, deadline=deadline, idempotency_key=key)
            ]
        ids = [handle.id for handle in handles]
        if wait or output is not None:
            _finish(client, ids, within, output, json_output=json_output)
        elif json_output:
            print_json({"jobs": ids})
        else:
            typer.echo("\n".join(ids))


def _finish(client: Client, ids: Sequence[str], within: float | None, output: str | None, *, json_output: bool) -> None:
    """Wait for jobs, then print or save their results; exit with status 1 if one did not succeed."""
    with progress("waiting", len(ids)) as done:
        ended = client.wait_many(ids, timeout=within, progress=done)
    if output is not None:
        _save_all(output, ended)
    elif json_output:
        _print_jobs_json(ended)
    else:
        _print_ends(ended)
    failed = [info for info in ended if info.state != "succeeded"]
    for info in failed:
        say(f"job {info.id} {info.state.value}: {_reason(info)}")
    if failed:
        say(f"{len(failed)} of {len(ended)} jobs did not succeed")
        raise typer.Exit(1)
    again = sum(info.attempts > 1 for info in ended)
    if len(ended) > 1:
        say(f"{len(ended):,} of {len(ended):,} jobs succeeded{f', {again:,} of them after a retry' if again else ''}")


def _reason(info: JobInfo) -> str:
    return f"{info.error.message} ({info.error.code})" if info.error else "no reason given"


def _save_all(path: str, ended: Sequence[JobInfo]) -> None:
    import numpy as np

    found = [info.outputs() for info in ended if info.state == "succeeded"]
    if not found or len(found) < len(ended):
        say(f"{path} was not written: it would lack the outputs of {len(ended) - len(found)} jobs")
        return
    if len(found) == 1:
        _save(path, found[0])
        return
    _save(path, {name: np.concatenate([outputs[name] for outputs in found]) for name in found[0]})


def _print_ends(ended: Sequence[JobInfo]) -> None:
    import json

    if len(ended) == 1 and ended[0].state == "succeeded":
        print_outputs(ended[0].outputs(), json_output=False)
        return
    for info in ended:
        shown = json.dumps(_plain(info.outputs()), ensure_ascii=False) if info.state == "succeeded" else "-"
        typer.echo(f"{info.id}  {info.state.value}  {shown}")


def _print_jobs_json(infos: Sequence[JobInfo]) -> None:
    from tether.client.operations import encoded_job

    print_json({"jobs": [encoded_job(info) for info in infos]})


def listing(
    *,
    state: Annotated[str | None, typer.Option("--state", metavar="STATE", help="Only jobs in this state.")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="Only jobs of this model.")] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="Maximum number of jobs.")] = 50,
    cursor: Annotated[
        str | None, typer.Option("--cursor", metavar="CURSOR", help="Cursor of the previous page.")
    ] = None,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """List jobs, newest first."""
    from tether.client.operations import encoded_job

    with connect(url) as client:
        page = client.jobs(state=state, model=model, limit=limit, cursor=cursor)
    if json_output:
        more = {"next_cursor": page.next_cursor} if page.next_cursor else {}
        print_json({"jobs": [encoded_job(info) for info in page.jobs], **more})
        return
    heading = ("ID", "STATE", "MODEL", "VERSION", "PRIORITY", "ATTEMPTS", "SUBMITTED")
    print_table(heading, [_job_row(info) for info in page.jobs])
    if page.next_cursor:
        say(f"more with --cursor {page.next_cursor}")


def _job_row(info: JobInfo) -> tuple[Any, ...]:
    return (info.id, info.state.value, info.model, info.version, info.priority, info.attempts, _time(info.submitted_at))


def _time(moment: Any) -> str:
    return "" if moment is None else str(moment.isoformat(timespec="milliseconds"))


def _print_job(info: JobInfo, *, json_output: bool) -> None:
    import json

    from tether.client.operations import encoded_job

    if json_output:
        print_json(encoded_job(info))
        return
    fields: dict[str, Any] = {
        "id": info.id,
        "state": info.state.value,
        "model": info.model,
        "version": info.version,
        "priority": info.priority,
        "attempts": info.attempts,
        "submitted": _time(info.submitted_at),
        "started": _time(info.started_at),
        "finished": _time(info.finished_at),
    }
    if info.error is not None:
        fields["error"] = _reason(info)
    if info.state == "succeeded":
        outputs = _plain(info.outputs())
        fields.update({f"output {name}": json.dumps(value, ensure_ascii=False) for name, value in outputs.items()})
    print_fields(fields)


def get(
    job_id: JobId,
    *,
    wait: Annotated[
        float, typer.Option("--wait", metavar="SECONDS", min=0, help="Wait up to this long for it to finish.")
    ] = 0.0,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Show a job's current state."""
    with connect(url) as client:
        _print_job(client.job(job_id, wait=wait), json_output=json_output)


def wait(
    job_ids: Annotated[list[str], typer.Argument(metavar="JOB...", help="Job ids; - reads them from standard input.")],
    *,
    within: Within = None,
    output: Output = None,
    url: Url = None,
    json_output: JsonFlag = False,
) -> None:
    """Wait until jobs finish and print their outputs; exit status 1 if one did not succeed."""
    ids = sys.stdin.read().split() if job_ids == ["-"] else job_ids
    if not ids:
        raise typer.BadParameter("no job ids given; pass ids, or - to read them from standard input")
    with connect(url) as client:
        _finish(client, ids, within, output, json_output=json_output)


def cancel(job_id: JobId, *, url: Url = None, json_output: JsonFlag = False) -> None:
    """Cancel a job; fails if it has already finished."""
    with connect(url) as client:
        info = client.cancel(job_id)
    if json_output:
        _print_job(info, json_output=True)
    else:
        say(f"job {info.id} is {info.state.value}")
