"""The Python SDK: :class:`Client` blocks, :class:`AsyncClient` awaits; both do exactly the same.

Arrays go to the server and come back in binary form. Errors are those of :mod:`tether.errors`, by the code the server
sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self, TypeVar, Unpack

from tether.client import model_operations, rollout, split_inference
from tether.client import operations as flows
from tether.client import pull as client_pull
from tether.client.asynchronous import AsyncClient, AsyncJobHandle
from tether.client.driver import drive
from tether.client.grants import Grants
from tether.client.inputs import Inputs, Version
from tether.client.operations import JobInfo, JobOptions, JobPage, Json, Outputs
from tether.client.protocol import Flow, Progress, RetryPolicy, Waiting
from tether.client.pushing import local_model
from tether.client.pushing import push as client_push
from tether.client.pushing.push import PushOptions
from tether.client.transport import Transport
from tether.domain.job import JobState

__all__ = ["AsyncClient", "AsyncJobHandle", "Client", "JobHandle", "JobInfo", "JobPage"]

T = TypeVar("T")


class JobHandle:
    """A submitted job. Iterating over it yields a :class:`JobInfo` for each state it comes to, its end included."""

    def __init__(self, client: Client, job_id: str) -> None:
        self._client = client
        self.id = job_id

    def info(self) -> JobInfo:
        return self._client.job(self.id)

    def state(self) -> JobState:
        return self.info().state

    def result(self, timeout: float | None = None) -> Outputs:
        """Wait for the end, at most ``timeout`` seconds (None: as long as it takes), and return the outputs.

        Raises:
            DeadlineExceeded: the job had not ended in time, or its own deadline passed.
            JobCancelled, InferenceFailed, AttemptsExhausted: it ended otherwise.
        """
        return self._client.wait_many([self.id], timeout=timeout)[0].outputs()

    def cancel(self) -> JobInfo:
        return self._client.cancel(self.id)

    def __iter__(self) -> Iterator[JobInfo]:
        known: JobState | None = None
        while True:
            info = self._client.run(partial(flows.change, job_id=self.id, known=known))
            yield info
            if info.ended:
                return
            known = info.state

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r})"


class Client:
    """A connection to a Tether server, for blocking code; safe to share between threads.

    Server and key come from the arguments, else TETHER_URL and TETHER_API_KEY, else the data directory of this machine.
    ``timeout`` is in seconds, for one operation with all its tries.
    """

    def __init__(
        self, url: str | None = None, api_key: str | None = None, *, timeout: float = 30.0, tries: int = 8
    ) -> None:
        self._policy = RetryPolicy(timeout=timeout, tries=tries)
        self._wire = Transport(url, api_key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: object, _value: object, _trace: object) -> None:
        self.close()

    def close(self) -> None:
        self._wire.close()

    @property
    def url(self) -> str:
        """The server's address."""
        return self._wire.url

    def run(self, flow: Callable[[RetryPolicy], Flow[T]], timeout: float | None = None) -> T:
        """Drive a flow of :mod:`tether.client.operations` to its result."""
        policy = self._policy if timeout is None else replace(self._policy, timeout=timeout)
        return drive(self._wire, flow(policy))

    # inference

    def infer(
        self,
        model: str,
        inputs: Inputs,
        version: Version = None,
        outputs: Sequence[str] = (),
        timeout: float | None = None,
    ) -> Outputs:
        """Run ``model`` once on ``inputs`` and return its outputs by name (all of them when ``outputs`` is empty).

        A model's only input needs no name. Lists, numbers and arrays of float64 and int64 take the datatype that the model
        declares, where it can hold their values; other arrays keep their dtype. What is too large for one request is sent as
        several where the model is batched, within the same ``timeout``.

        Raises:
            TetherError: what the server refused, or Unavailable when it cannot be reached.
        """
        return self.run(lambda policy: split_inference.infer(policy, model, inputs, version, outputs), timeout)

    # jobs

    def submit(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: Version = None,
        priority: str | None = None,
        deadline: float | None = None,
        idempotency_key: str | None = None,
    ) -> JobHandle:
        """Queue a durable job. ``deadline`` is in seconds from now, ``priority`` high, normal or low.

        A repeat after a lost answer, or with the same ``idempotency_key``, is the same job.
        """
        options = JobOptions(version, priority, deadline)
        info = self.run(lambda policy: flows.submit(policy, model, inputs, options, idempotency_key))
        return JobHandle(self, info.id)

    def submit_many(
        self,
        model: str,
        rows: Iterable[Inputs],
        *,
        version: Version = None,
        priority: str | None = None,
        deadline: float | None = None,
        progress: Progress | None = None,
    ) -> list[JobHandle]:
        """Queue one job for each of ``rows``, 200 in a request; ``progress`` is called with how many are queued."""
        options = JobOptions(version, priority, deadline)
        infos = self.run(lambda policy: flows.submit_many(policy, model, rows, options, progress))
        return [JobHandle(self, info.id) for info in infos]

    def wait_many(
        self, ids: Sequence[str], *, timeout: float | None = None, progress: Progress | None = None
    ) -> list[JobInfo]:
        """Wait until all of these jobs have ended; they come in the order of ``ids``.

        Raises:
            DeadlineExceeded: some had not ended after ``timeout`` seconds (None: as long as it takes).
        """
        return self.run(lambda policy: flows.wait_many(policy, ids, timeout, progress))

    def job(self, job_id: str, *, wait: float = 0.0) -> JobInfo:
        """A job as it is, or as it is when it ends within ``wait`` seconds."""
        return self.run(lambda policy: flows.job(policy, job_id, wait))

    def jobs(
        self, *, state: str | None = None, model: str | None = None, limit: int | None = None, cursor: str | None = None
    ) -> JobPage:
        """The tenant's jobs, newest first."""
        params = {"state": state, "model": model, "limit": limit, "cursor": cursor}
        return self.run(lambda policy: flows.jobs(policy, params))

    def cancel(self, job_id: str) -> JobInfo:
        """Take a job back.

        Raises:
            ResultConflict: it has already ended.
        """
        return self.run(lambda policy: flows.cancel(policy, job_id))

    # models

    def models(self) -> list[Json]:
        """Every model with its versions and aliases."""
        return self.run(lambda policy: flows.get(policy, "/v1/models", "models"))

    def model(self, name: str) -> Json:
        """One model with the signature and the files of each version."""
        return self.run(lambda policy: flows.get(policy, flows.model_path(name)))

    def push(
        self,
        name: str,
        path: str | Path,
        *,
        progress: Progress | None = None,
        waiting: Waiting | None = None,
        timeout: float = client_push.PUSH_TIMEOUT_S,
        **options: Unpack[PushOptions],
    ) -> Json:
        """Make the file or folder at ``path`` the next version of ``name``.

        Only chunks that the store does not have are sent, so a push that broke off goes on where it was. What can be said of the
        version is in :class:`~tether.client.pushing.push.PushOptions`. The answer says under ``batching`` whether rows of several requests
        share a run, under ``untried`` why no trial run succeeded, under ``skipped`` which files of the folder are no part of it.
        ``progress`` is called with the bytes that are there. What restarts on the way is waited for until ``timeout`` seconds are
        over; ``waiting`` is told for what, and an empty text when it goes on.

        Raises:
            Conflict: ``version`` is something else already, or not the next one.
            ModelRejected: the file is no model that can be served.
            InvalidRequest: it cannot be read, or is another form of model; the message says how to convert it.
        """
        model = local_model.local_model(Path(path))
        params = client_push.checked(options)
        return self.run(
            lambda policy: client_push.push(policy, name, model, params, progress, waiting=waiting),
            timeout,
        )

    def wait_ready(
        self,
        name: str,
        version: int,
        *,
        waiting: Waiting | None = None,
        timeout: float = client_push.PUSH_TIMEOUT_S,
    ) -> Json:
        """Wait until a worker answers for a version, at most ``timeout`` seconds; how many do is in the answer.

        Raises:
            ModelNotReady: no worker could load it, none may hold it, or the time was over; the message says which.
        """
        return self.run(lambda policy: rollout.wait_ready(policy, name, version, waiting), timeout)

    def pull(
        self,
        name: str,
        folder: str | Path,
        *,
        version: int | str = "latest",
        progress: Progress | None = None,
        timeout: float = client_push.PUSH_TIMEOUT_S,
    ) -> Json:
        """Write the files of a version below ``folder``, each compared with its digest.

        Raises:
            ModelNotFound: there is no such version.
            Conflict: a file of the same name with other content is there.
        """
        flow = partial(client_pull.pull, name=name, version=str(version), folder=Path(folder), progress=progress)
        return self.run(flow, timeout)

    def promote(
        self,
        name: str,
        version: int,
        *,
        alias: str = model_operations.PRODUCTION,
        canary: float | None = None,
        sticky: bool = False,
        force: bool = False,
    ) -> Json:
        """Let ``alias`` stand for ``version``; with ``canary`` it gets that many percent of the alias's requests.

        With ``sticky`` the same API key always gets the same version. ``force`` does not wait for a worker to hold it.

        Raises:
            ModelNotFound: there is no such version.
            ModelNotReady: no worker holds it yet.
            InvalidRequest: a canary needs an alias that stands for another version.
        """
        return self.run(
            lambda policy: model_operations.promote(policy, name, version, alias, canary, sticky=sticky, force=force)
        )

    def rollback(self, name: str, *, alias: str = model_operations.PRODUCTION) -> Json:
        """Let ``alias`` stand for what it stood for before.

        Raises:
            Conflict: it has stood for nothing else.
        """
        return self.run(lambda policy: model_operations.rollback(policy, name, alias))

    def alias(self, name: str, alias: str) -> Json:
        """What an alias stands for, and its history."""
        return self.run(lambda policy: flows.get(policy, model_operations.alias_path(name, alias)))

    def delete_alias(self, name: str, alias: str) -> None:
        self.run(lambda policy: model_operations.delete_alias(policy, name, alias))

    def rekey(self, name: str) -> Json:
        """Store the versions of an encrypted model under another key, in the background: who had the old one and has it no
        more cannot read what is stored then. Nothing needs to be pushed again.

        Raises:
            ModelNotFound: the model is not encrypted.
        """
        return self.run(lambda policy: model_operations.rekey(policy, name))

    def delete_model(self, name: str, version: int | None = None, *, force: bool = False) -> list[int]:
        """Delete a version, or all of a model's, for good; returns their numbers. With ``force`` their aliases go too.

        Raises:
            Conflict: another alias than ``latest`` stands for it.
        """
        return self.run(lambda policy: model_operations.delete_model(policy, name, version, force=force))

    @property
    def grants(self) -> Grants:
        """Who owns a model, and what it grants to other tenants."""
        return Grants(self.run)

    # how a model is served

    def config(self, name: str) -> Json:
        """How a model is served; ``revision`` counts its changes."""
        return self.run(lambda policy: flows.get(policy, model_operations.config_path(name)))

    def configure(self, name: str, patch: Json, *, revision: int | None = None) -> Json:
        """Change how a model is served: objects of ``patch`` are merged, everything else is replaced, None is the default.

        Raises:
            InvalidRequest: naming the field that is wrong; nothing was changed.
            Conflict: it is at another ``revision``.
        """
        return self.run(lambda policy: model_operations.change_config(policy, name, "PATCH", patch, revision))

    def reset_config(self, name: str, *, revision: int | None = None) -> Json:
        """Serve a model as by default again; one that is unloaded stays so."""
        return self.run(lambda policy: model_operations.change_config(policy, name, "DELETE", None, revision))

    def load(self, name: str, *, timeout: float | None = None) -> Json:
        """Load a model that was unloaded, and wait until its newest version is held by a worker.

        Raises:
            ModelNotReady: no worker held it in time; it goes on being loaded.
        """
        return self.run(lambda policy: model_operations.load(policy, name, "load"), timeout)

    def unload(self, name: str) -> Json:
        """Take a model out of all workers until it is loaded again. Its durable jobs wait; callers get ModelUnloaded."""
        return self.run(lambda policy: model_operations.load(policy, name, "unload"))

    def annotate(
        self, name: str, version: int, *, labels: Mapping[str, str | None] | None = None, note: str | None = None
    ) -> Json:
        """Change labels and note of a version: labels are merged with those it has, and one that is None goes.

        Raises:
            ModelNotFound: there is no such version.
        """
        return self.run(lambda policy: model_operations.annotate(policy, name, version, labels or {}, note))

    def shadows(self, name: str) -> list[Json]:
        """What became of the copies of requests for a model's shadow versions, at the gateway that answers."""
        return self.run(lambda policy: model_operations.shadows(policy, name))

    # administration

    def store(self) -> Json:
        """What is in the store of model chunks; ``damaged`` lists chunks to push again."""
        return self.run(lambda policy: flows.get(policy, model_operations.STORE))

    def collect(self) -> Json:
        """Have chunks that no version names collected soon; the store as it is now."""
        return self.run(lambda policy: model_operations.work_on_store(policy, "collect"))

    def scrub(self) -> Json:
        """Have every stored chunk read and compared soon; the store as it is now."""
        return self.run(lambda policy: model_operations.work_on_store(policy, "scrub"))

    def create_key(self, tenant: str, scopes: Sequence[str], name: str = "") -> Json:
        """Make an API key; its text is in the answer's ``key`` and is never shown again."""
        return self.run(lambda policy: flows.create_key(policy, tenant, scopes, name))

    def keys(self) -> list[Json]:
        """Every API key without its secret."""
        return self.run(lambda policy: flows.get(policy, "/v1/keys", "keys"))

    def revoke_key(self, key_id: str) -> None:
        self.run(lambda policy: flows.revoke_key(policy, key_id))

    def workers(self) -> list[Json]:
        """Every worker the platform hears of, and what it holds."""
        return self.run(lambda policy: flows.get(policy, "/v1/workers", "workers"))

    def server_ready(self) -> bool:
        """Whether the server answers and can serve; False when it cannot be reached."""
        return self.run(flows.ready)
