"""The command ``tether model push``."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from tether_cli.commands.model_config import Labels, Note, labels_of, read_config
from tether_cli.options import ModelName, Timeout, Url, connect
from tether_cli.output import JsonFlag, print_json, progress, say

Encrypt = Annotated[
    bool | None,
    typer.Option(
        "--encrypt/--no-encrypt", help="Store it encrypted, or not; default: as the model's previous versions."
    ),
]
MaxBatchSize = Annotated[
    int | None,
    typer.Option(
        "--max-batch-size",
        metavar="N",
        min=0,
        help="Maximum rows per run; 2 or more declares that no row's output depends on another row. 0: no batching; "
        "default: batched if row independence is proven.",
    ),
]
ModelPath = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A folder, or an .onnx, .pt2, .pt, .ts, .jit, .torchscript, .safetensors or .tflite file.",
    ),
]
SampleFile = Annotated[
    str | None,
    typer.Option(
        "--sample",
        metavar="FILE",
        help="Real inputs (.npz or JSON): tested at the push, run at each load, stored with the version.",
    ),
]
SignatureName = Annotated[
    str | None,
    typer.Option("--signature", metavar="NAME", help="Serve this signature of a SavedModel or .tflite file."),
]
IsolationName = Annotated[
    str | None,
    typer.Option("--isolation", metavar="WHERE", help="Run in a 'thread' of the worker, or in its own 'process'."),
]
ConfigFile = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="JSON file with fields of 'tether model config'.")
]
NextVersion = Annotated[
    int | None,
    typer.Option("--version", metavar="N", min=1, help="Expected version number; fails if the next number differs."),
]
Wait = Annotated[
    bool,
    typer.Option("--wait/--no-wait", help="Wait up to --timeout until a worker serves the version, or do not."),
]


def push(
    name: ModelName,
    path: ModelPath,
    *,
    max_batch_size: MaxBatchSize = None,
    max_delay_ms: Annotated[
        float | None,
        typer.Option(
            "--max-delay-ms", metavar="MS", min=0, help="Maximum time to wait for more requests to fill a batch."
        ),
    ] = None,
    isolation: IsolationName = None,
    run_timeout_s: Annotated[
        float | None,
        typer.Option("--run-timeout", metavar="S", min=0, help="Kill the model's process after a run of this length."),
    ] = None,
    config: ConfigFile = None,
    version: NextVersion = None,
    label: Labels = None,
    note: Note = None,
    encrypt: Encrypt = None,
    sample: SampleFile = None,
    signature: SignatureName = None,
    wait: Wait = True,
    url: Url = None,
    timeout: Timeout = 600.0,
    json_output: JsonFlag = False,
) -> None:
    """Push a file or a folder as the next version of a model, and wait until a worker serves it.

    Only chunks that the store lacks are sent.
    """
    begun = time.monotonic()
    with connect(url, timeout) as client, progress("pushing", _size(path), unit="bytes") as done:
        answer = client.push(
            name,
            path,
            max_batch_size=max_batch_size,
            max_delay_ms=max_delay_ms,
            isolation=isolation,
            run_timeout_s=run_timeout_s,
            config=None if config is None else read_config(config),
            version=version,
            labels={key: value or "" for key, value in labels_of(label).items()} or None,
            note=note,
            encrypt=encrypt,
            sample=sample,
            signature=signature,
            progress=done,
            waiting=done.waiting,
            timeout=timeout,
        )
    if not json_output:
        _print_pushed(answer)
    rollout = _rollout(answer, url, max(1.0, timeout - (time.monotonic() - begun))) if wait else None
    if json_output:
        print_json(answer if rollout is None else {**answer, "rollout": rollout})
    if rollout is not None:
        _print_rollout(rollout, timeout)


_MAY_WAIT = ("ready", "no_workers", "unloaded", "not_served")
"""Successful outcomes: the version is loaded, or will be once it may be."""


def _rollout(answer: dict[str, Any], url: str | None, left_s: float) -> dict[str, Any]:
    """Wait until a worker serves the version, or the gateway reports that none will."""
    from tether.client.rollout import settled

    with connect(url) as client, progress(f"version {answer['version']} is stored:", None) as bar:
        return client.run(lambda policy: settled(policy, answer["name"], answer["version"], bar.waiting), left_s)


def _print_rollout(rollout: dict[str, Any], timeout: float) -> None:
    """Print the outcome of the wait.

    Raises:
        ModelNotReady: the version is stored, and will not be served, or not in time.
    """
    from tether.client.rollout import not_ready, words

    if rollout["state"] not in _MAY_WAIT:
        raise not_ready(rollout, timeout)
    said = words(rollout)
    say(f"ready: {said}" if rollout["state"] == "ready" else f"stored, not loaded yet: {said}")


def _size(path: str) -> int | None:
    """Return a file's bytes; None for a folder or an unreadable file, which the push reports itself."""
    from pathlib import Path

    try:
        return Path(path).stat().st_size if Path(path).is_file() else None
    except (OSError, ValueError):
        return None


def _print_pushed(answer: dict[str, Any]) -> None:
    typer.echo(f"{answer['name']} {answer['version']}")
    how = "encrypted, " if answer.get("encrypted") else ""
    size, sent = answer.get("size"), answer.get("stored_bytes")
    say(
        f"{how}{size} bytes sent"
        if sent == size
        else f"{how}{size} bytes, {sent} of them sent; the rest was already stored"
    )
    for side in ("inputs", "outputs"):
        listed = ", ".join(f"{spec['name']} {spec['datatype']} {spec['shape']}" for spec in answer.get(side, ()))
        say(f"{side}: {listed or 'none'}")
    if answer.get("skipped"):
        say(f"not sent, because not part of the model: {', '.join(answer['skipped'])}")
    others = [name for name in answer.get("signatures", ()) if name != answer.get("signature")]
    if others:
        say(f"serves signature '{answer['signature']}'; the file also has {', '.join(others)} (--signature NAME)")
    if answer.get("untried"):
        say(f"not tried: {answer['untried']}; push it with --sample FILE to try it with real inputs")
    say(_joined(answer.get("batching") or {}))


def _joined(batching: dict[str, Any]) -> str:
    """Describe whether rows of several requests share a run of the version, and why."""
    rows, reason = batching.get("max_batch_size", 0), batching.get("reason", "")
    if not rows:
        return f"not batched: {reason}"
    how = "proven from the graph" if batching.get("basis") == "proven" else "declared by you, the publisher"
    return f"batched: up to {rows} rows a run, {how}{f'; a trial run says: {reason}' if reason else ''}"
