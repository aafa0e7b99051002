"""The Python SDK: :class:`Client` blocks, :class:`AsyncClient` awaits; they are otherwise identical.

Arrays are sent and received in binary form. Errors are those of :mod:`tether.errors`, by the code that the
server sent.
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
    """A submitted job. Iterating over it yields a :class:`JobInfo` for each state change, including the last."""

    def __init__(self, client: Client, job_id: str) -> None:
        self._client = client
        self.id = job_id

    def info(self) -> JobInfo:
        return self._client.job(self.id)

    def state(self) -> JobState:
        return self.info().state

    def result(self, timeout: float | None = None) -> Outputs:
        """Wait until it has finished, at most ``timeout`` seconds (None: no limit), and return the outputs.

        Raises:
            DeadlineExceeded: the job had not finished in time, or its own deadline passed.
            JobCancelled, InferenceFailed, AttemptsExhausted: it did not succeed.
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
    """A connection to a Tether server, for blocking code; thread-safe.

    Server and key are the arguments, else TETHER_URL and TETHER_API_KEY, else those of the data directory
    (TETHER_HOME). ``timeout`` is in seconds, for one operation with all its retries.
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
        """Run ``model`` once; return its outputs by name (all of them if ``outputs`` is empty).

        A model's only input needs no name. Lists, numbers and arrays of float64 and int64 are converted to
        the model's datatype if it can hold their values; other arrays keep their dtype. Inputs or outputs
        that are too large for one request are split into several if the model is batched, within the same
        ``timeout``.

        Raises:
            TetherError: the server's error, or Unavailable if it cannot be reached.
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
        """Queue a durable job. ``deadline`` is seconds from now; ``priority`` is high, normal or low. A retry
        after a lost reply, or with the same ``idempotency_key``, returns the same job."""
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
        """Queue one job per row, 200 per request; ``progress`` is called with the number queued."""
        options = JobOptions(version, priority, deadline)
        infos = self.run(lambda policy: flows.submit_many(policy, model, rows, options, progress))
        return [JobHandle(self, info.id) for info in infos]

    def wait_many(
        self, ids: Sequence[str], *, timeout: float | None = None, progress: Progress | None = None
    ) -> list[JobInfo]:
        """Wait until all jobs have finished; return them in the order of ``ids``.

        Raises:
            DeadlineExceeded: some had not finished after ``timeout`` seconds (None: no limit).
        """
        return self.run(lambda policy: flows.wait_many(policy, ids, timeout, progress))

    def job(self, job_id: str, *, wait: float = 0.0) -> JobInfo:
        """Return a job once it has finished, or as it is after ``wait`` seconds."""
        return self.run(lambda policy: flows.job(policy, job_id, wait))

    def jobs(
        self, *, state: str | None = None, model: str | None = None, limit: int | None = None, cursor: str | None = None
    ) -> JobPage:
        """List the tenant's jobs, newest first."""
        params = {"state": state, "model": model, "limit": limit, "cursor": cursor}
        return self.run(lambda policy: flows.jobs(policy, params))

    def cancel(self, job_id: str) -> JobInfo:
        """Cancel a job.

        Raises:
            ResultConflict: it has already finished.
        """
        return self.run(lambda policy: flows.cancel(policy, job_id))

    # models

    def models(self) -> list[Json]:
        """List all models with their versions and aliases."""
        return self.run(lambda policy: flows.get(policy, "/v1/models", "models"))

    def model(self, name: str) -> Json:
        """Return one model with the signature and files of each version."""
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
        """Push the file or folder at ``path`` as the next version of ``name``.

        Only missing chunks are sent, so an aborted push resumes. ``options`` are those of
        :class:`~tether.client.pushing.push.PushOptions`. The result says whether runs combine requests
        (``batching``), why no trial run succeeded (``untried``) and which files of the folder were not pushed
        (``skipped``). ``progress`` is called with the bytes stored so far. Restarting services are retried
        for ``timeout`` seconds in all; ``waiting`` is called with the reason of a wait, and with an empty
        text when it is over.

        Raises:
            Conflict: ``version`` exists with other content, or is not the next one.
            ModelRejected: the model cannot be served.
            InvalidRequest: unreadable, or an unsupported format; the message says how to convert it.
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
        """Wait at most ``timeout`` seconds until a worker hosts a version; return its rollout state.

        Raises:
            ModelNotReady: no worker could load it, none may host it, or the timeout; the message says
                which.
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
        """Write the files of a version below ``folder``; verify each against its digest.

        Raises:
            ModelNotFound: there is no such version.
            Conflict: a file of the same name exists with other content.
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
        """Point ``alias`` at ``version``, or only ``canary`` percent of its requests. With ``sticky`` an API
        key always gets the same version; ``force`` does not require a worker that hosts it.

        Raises:
            ModelNotFound: there is no such version.
            ModelNotReady: no worker hosts it yet.
            InvalidRequest: a canary needs an alias that points at another version.
        """
        return self.run(
            lambda policy: model_operations.promote(policy, name, version, alias, canary, sticky=sticky, force=force)
        )

    def rollback(self, name: str, *, alias: str = model_operations.PRODUCTION) -> Json:
        """Point ``alias`` at its previous version or split.

        Raises:
            Conflict: it has no previous one.
        """
        return self.run(lambda policy: model_operations.rollback(policy, name, alias))

    def alias(self, name: str, alias: str) -> Json:
        """Return an alias with its target and history."""
        return self.run(lambda policy: flows.get(policy, model_operations.alias_path(name, alias)))

    def delete_alias(self, name: str, alias: str) -> None:
        self.run(lambda policy: model_operations.delete_alias(policy, name, alias))

    def rekey(self, name: str) -> Json:
        """Rotate the key of an encrypted model; re-encrypt its versions in the background, without a push.

        Raises:
            ModelNotFound: the model is not encrypted.
        """
        return self.run(lambda policy: model_operations.rekey(policy, name))

    def delete_model(self, name: str, version: int | None = None, *, force: bool = False) -> list[int]:
        """Delete a version, or all of them; return their numbers. ``force`` also deletes their aliases.

        Raises:
            Conflict: another alias than ``latest`` points at it.
        """
        return self.run(lambda policy: model_operations.delete_model(policy, name, version, force=force))

    @property
    def grants(self) -> Grants:
        """Ownership of models, and grants to other tenants."""
        return Grants(self.run)

    # model configuration

    def config(self, name: str) -> Json:
        """Return the configuration of a model; ``revision`` counts its changes."""
        return self.run(lambda policy: flows.get(policy, model_operations.config_path(name)))

    def configure(self, name: str, patch: Json, *, revision: int | None = None) -> Json:
        """Change a model's configuration: merge objects, replace other values; None means the default.

        Raises:
            InvalidRequest: naming the invalid field; nothing was changed.
            Conflict: the configuration has another ``revision``.
        """
        return self.run(lambda policy: model_operations.change_config(policy, name, "PATCH", patch, revision))

    def reset_config(self, name: str, *, revision: int | None = None) -> Json:
        """Reset a model's configuration to the default; an unloaded model stays unloaded."""
        return self.run(lambda policy: model_operations.change_config(policy, name, "DELETE", None, revision))

    def load(self, name: str, *, timeout: float | None = None) -> Json:
        """Load an unloaded model, and wait until a worker hosts its newest version.

        Raises:
            ModelNotReady: no worker hosted it in time; loading continues.
        """
        return self.run(lambda policy: model_operations.load(policy, name, "load"), timeout)

    def unload(self, name: str) -> Json:
        """Unload a model from all workers. Its durable jobs wait; callers get ModelUnloaded."""
        return self.run(lambda policy: model_operations.load(policy, name, "unload"))

    def annotate(
        self, name: str, version: int, *, labels: Mapping[str, str | None] | None = None, note: str | None = None
    ) -> Json:
        """Change labels and note of a version. Labels are merged with the current ones; None removes one.

        Raises:
            ModelNotFound: there is no such version.
        """
        return self.run(lambda policy: model_operations.annotate(policy, name, version, labels or {}, note))

    def shadows(self, name: str) -> list[Json]:
        """Return the results of a model's shadow versions at the gateway that answers."""
        return self.run(lambda policy: model_operations.shadows(policy, name))

    # administration

    def store(self) -> Json:
        """Return the contents of the chunk store; ``damaged`` lists chunks to push again."""
        return self.run(lambda policy: flows.get(policy, model_operations.STORE))

    def collect(self) -> Json:
        """Start to delete unreferenced chunks; return the current contents of the store."""
        return self.run(lambda policy: model_operations.work_on_store(policy, "collect"))

    def scrub(self) -> Json:
        """Start to verify all stored chunks; return the current contents of the store."""
        return self.run(lambda policy: model_operations.work_on_store(policy, "scrub"))

    def create_key(self, tenant: str, scopes: Sequence[str], name: str = "") -> Json:
        """Create an API key; its text is in the result's ``key`` and is not shown again."""
        return self.run(lambda policy: flows.create_key(policy, tenant, scopes, name))

    def keys(self) -> list[Json]:
        """List all API keys without their secrets."""
        return self.run(lambda policy: flows.get(policy, "/v1/keys", "keys"))

    def revoke_key(self, key_id: str) -> None:
        self.run(lambda policy: flows.revoke_key(policy, key_id))

    def workers(self) -> list[Json]:
        """List all workers with the versions that they host."""
        return self.run(lambda policy: flows.get(policy, "/v1/workers", "workers"))

    def server_ready(self) -> bool:
        """Return True if the server can serve requests; False also if it cannot be reached."""
        return self.run(flows.ready)
