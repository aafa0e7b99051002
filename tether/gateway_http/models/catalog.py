"""In-memory mirror of models, aliases, configurations and routes; resolves every request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket, read_entry
from tether.bus.key_value.model_owners import OwnerBook
from tether.crypto import MessageType
from tether.domain.job import SHARED, Lane, LaneKind, Priority
from tether.domain.manifest import LATEST, Alias, Batching, Finding, Manifest, Route, TensorSpec, check_inputs
from tether.domain.tensor import Tensor
from tether.errors import ModelNotFound, ModelNotReady, ModelUnloaded
from tether.gateway_http.models.traffic_split import drawn, no_worker
from tether.model.config import ModelConfig, QueuePolicy, default_config
from tether.model.ownership import no_such_model
from tether.model.run_settings import effective_batching
from tether.model.version_metadata import VersionNote
from tether.model.version_policy import served_versions
from tether.storage.stored_bytes import Stored
from tether.wire.subjects import name_of, token

log = logging.getLogger(__name__)

_FOLLOW_S = 1.0


@dataclass(frozen=True)
class ResolvedVersion:
    """One version with everything that the fast path needs, computed once."""

    manifest: Manifest
    specs: dict[str, TensorSpec]
    infer_lane: Lane
    """Lane of the shared pool; see :meth:`lane`."""
    _own_lanes: dict[str, Lane] = field(default_factory=dict, compare=False, repr=False)

    def lane(self, pool: str) -> Lane:
        """Return the infer lane of a pool."""
        if pool == SHARED:
            return self.infer_lane
        lane = self._own_lanes.get(pool)
        if lane is None:
            shared = self.infer_lane
            lane = self._own_lanes[pool] = Lane(LaneKind.INFER, shared.model, shared.version, shared.region, pool)
        return lane

    def job_lane(self, priority: Priority, pool: str = SHARED) -> Lane:
        lane = self.infer_lane
        return Lane(LaneKind.JOB, lane.model, lane.version, lane.region, pool, priority)


class Catalog:
    """Mirrors the buckets ``models``, ``aliases``, ``configs``, ``notes`` and ``routes``."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.owners = OwnerBook()
        self.stored = Stored(bus)
        self._served: dict[str, dict[int, ResolvedVersion]] = {}
        self._aliases: dict[str, dict[str, Alias]] = {}
        self._changed = asyncio.Event()
        self._configs: dict[str, ModelConfig] = {}
        self._policies: dict[str, frozenset[int]] = {}
        self._notes: dict[str, VersionNote] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._routes: dict[tuple[str, int, str], Route] = {}
        self._keys: dict[str, tuple[str, int]] = {}

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for name, kind, changed in (
                ("models", MessageType.MANIFEST, self._model_changed),
                ("aliases", MessageType.ALIAS, self._alias_changed),
                ("configs", MessageType.CONFIG, self._config_changed),
                ("notes", MessageType.CONFIG, self._note_changed),
                ("routes", MessageType.ROUTE, self._route_changed),
            ):
                refused = self.owners.refused if name == "configs" else None
                deleted = self.stored.deleted if name == "models" else None
                watch = SignedBucket(self._bus, name, kind).watch(changed, on_refused=refused, on_deleted=deleted)
                await stack.enter_async_context(watch)
            yield

    def on_change(self, listener: Callable[[str], None]) -> None:
        """Call ``listener`` with a model's name when its configuration changes, or a version is removed or
        replaced."""
        self._listeners.append(listener)

    def _notify(self, model: str) -> None:
        for listener in self._listeners:
            listener(model)

    def _model_changed(self, key: str, body: bytes | None) -> None:
        if body is None:
            name, version = self._keys.pop(key, ("", 0))
            self.stored.drop(key)
            self._policies.pop(name, None)
            self.owners.gone(name, version)
            self._served.get(name, {}).pop(version, None)
            if name and not self._served.get(name):
                self._served.pop(name, None)
            self._notify(name)
            return
        manifest = read_entry(body, Manifest)
        if manifest is None or self._bus.names.version_key(manifest.name, manifest.version) != key:
            return
        lane = Lane(LaneKind.INFER, manifest.name, manifest.version, self._bus.settings.region)
        specs = {spec.name: spec for spec in manifest.inputs}
        self._policies.pop(manifest.name, None)
        known = key in self._keys
        self.owners.manifest(manifest)
        self.stored.keep(key, manifest)
        self._keys[key] = (manifest.name, manifest.version)
        self._served.setdefault(manifest.name, {})[manifest.version] = ResolvedVersion(manifest, specs, lane)
        if known:
            self._notify(manifest.name)
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _alias_changed(self, key: str, body: bytes | None) -> None:
        alias = None if body is None else read_entry(body, Alias)
        if body is None:
            model, _, name = key.partition(".")
            self._policies.pop(name_of(model), None)
            self._aliases.get(name_of(model), {}).pop(name_of(name), None)
        elif alias is not None and key == f"{token(alias.model)}.{token(alias.name)}":
            self._policies.pop(alias.model, None)
            self._aliases.setdefault(alias.model, {})[alias.name] = alias
        self._wake_waiters()

    def _config_changed(self, key: str, body: bytes | None) -> None:
        if self.owners.config_changed(key, body):
            return
        config = None if body is None else read_entry(body, ModelConfig)
        self._policies.pop(name_of(key), None)
        if body is None:
            self._configs.pop(name_of(key), None)
            self._notify(name_of(key))
        elif config is not None and key == token(config.model):
            self._configs[config.model] = config
            self._notify(config.model)

    def _note_changed(self, key: str, body: bytes | None) -> None:
        note = None if body is None else read_entry(body, VersionNote)
        if body is None:
            self._notes.pop(key, None)
        elif note is not None and key == self._bus.names.version_key(note.model, note.version):
            self._notes[key] = note

    def _route_changed(self, key: str, body: bytes | None) -> None:
        if body is None:
            version_key = self._bus.names.version_key
            self._routes = {place: route for place, route in self._routes.items() if version_key(*place) != key}
            return
        route = read_entry(body, Route)
        if route is not None and key == self._bus.names.version_key(route.model, route.version, route.pool):
            self._policies.pop(route.model, None)
            self._routes[route.model, route.version, route.pool] = route

    # read

    def resolve(self, model: str, version: str, sticky: str = "", caller: str = "") -> ResolvedVersion:
        """Return the version that a name and a version (number, alias, or empty for ``latest``) refer to now.

        Of a weighted alias, the same ``sticky`` gets the same version; so does the same ``caller`` if the
        alias says so.

        Raises:
            BadName: no model can have this name.
            ModelNotFound: no such model, version or alias, or the version policy does not serve that
                version.
        """
        served = self.known(model, version, sticky, caller)
        number = served.manifest.version
        if not self.serves(model, number):
            listed = ", ".join(map(str, sorted(self._served_numbers(model)))) or "none"
            raise ModelNotFound(
                f"version {number} of model '{model}' is not served: its version policy serves {listed}",
                field="version",
            )
        return served

    def known(self, model: str, version: str, sticky: str = "", caller: str = "") -> ResolvedVersion:
        """Resolve like :meth:`resolve`, but include versions that are not served."""
        versions = self._served.get(model)
        if versions is None:
            raise no_such_model(model)
        number = (
            int(version)
            if version.isdecimal() and len(version) < 10
            else self._alias(model, version or LATEST, sticky, caller)
        )
        served = versions.get(number)
        if served is None:
            raise ModelNotFound(f"model '{model}' has no version '{version[:64]}'", field="version")
        return served

    def _alias(self, model: str, name: str, sticky: str, caller: str) -> int:
        found = self._aliases.get(model, {}).get(name)
        if name == LATEST and (found is None or not found.split):
            newest = self._latest(model, found)
            return newest if self.serves(model, newest) else max(self._served_numbers(model), default=newest)
        if found is None:
            return 0
        return drawn(found, sticky or (caller if found.sticky else "")) if found.split else found.version

    def _latest(self, model: str, found: Alias | None) -> int:
        if found is None:
            return max(self._served[model], default=0)
        if found.previous and not self._hosted(model, found.version):
            return self._previous_if_newest_unhosted(model, found)
        return found.version

    def serves(self, model: str, version: int) -> bool:
        """Return True if the version policy serves a version; an unloaded one is served once it is loaded
        again."""
        return model not in self._configs or version in self._served_numbers(model)

    def _served_numbers(self, model: str) -> frozenset[int]:
        """Return the served versions; cached until anything they depend on changes."""
        found = self._policies.get(model)
        if found is None:
            versions, aliases = self._served.get(model, {}), self._aliases.get(model, {})
            hosted = [number for number in versions if self._hosted(model, number)]
            found = served_versions(self.config(model), versions, aliases.values(), hosted, loaded=True)
            self._policies[model] = found
        return found

    def _previous_if_newest_unhosted(self, model: str, latest: Alias) -> int:
        """Return the previous ``latest`` while no worker hosts the newest version."""
        before = latest.previous[0].version
        return before if before in self._served[model] and self._hosted(model, before) else latest.version

    def _hosted(self, model: str, version: int) -> bool:
        """Return True if a shared worker hosts a version; shared ones only, so that ``latest`` is the same
        for all."""
        return bool(self.route(model, version).workers)

    def route(self, model: str, version: int, pool: str = SHARED) -> Route:
        """Return the dispatcher's route of a version in a pool; an empty one if it has no lanes there."""
        return self._routes.get((model, version, pool)) or Route(model, version, (), pool=pool)

    def workers(self, served: ResolvedVersion, pool: str = SHARED) -> tuple[str, ...]:
        """Return the workers that host a version in a pool now."""
        return self.route(served.manifest.name, served.manifest.version, pool).workers

    def reason(self, served: ResolvedVersion, pool: str = SHARED) -> str:
        """Return the reason why fewer workers than desired host a version; empty if none is known."""
        return self.route(served.manifest.name, served.manifest.version, pool).reason

    def worker_count(self, lane: Lane) -> int:
        return len(self.route(lane.model, lane.version, lane.pool).workers)

    def job_s(self, lane: Lane) -> float:
        """Return the approximate run time of a lane's jobs in seconds; 0 if short or unknown."""
        return self.route(lane.model, lane.version, lane.pool).job_s

    def require_lane(self, served: ResolvedVersion, pool: str = SHARED) -> None:
        """Check that the version has lanes in a pool, so that its jobs will be found.

        Raises:
            ModelNotReady: it was just pushed, or its tenant just isolated, and it has no lanes yet.
        """
        if (served.manifest.name, served.manifest.version, pool) not in self._routes:
            whose = "" if pool == SHARED else f" for tenant '{pool}', which is isolated"
            raise ModelNotReady(
                f"model '{served.manifest.name}' version {served.manifest.version} is not ready yet{whose}; try again"
            )

    def require_worker(self, served: ResolvedVersion, pool: str) -> None:
        """Check the lane, and for an isolated tenant that a worker of its own hosts the version.

        Raises:
            ModelNotReady
            ModelUnloaded
        """
        if not self.loaded(served.manifest.name):
            name = served.manifest.name
            raise ModelUnloaded(f"model '{name}' is unloaded; load it with 'tether model load {name}'", field="model")
        self.require_lane(served, pool)
        if pool != SHARED and not self.workers(served, pool):
            raise ModelNotReady(no_worker(served.manifest, pool, self.reason(served, pool)))

    def ready(self, served: ResolvedVersion, pool: str = SHARED) -> bool:
        """Return True if a request for the version would be run now."""
        name = served.manifest.name
        return self.loaded(name) and self.serves(name, served.manifest.version) and bool(self.workers(served, pool))

    def loaded(self, model: str) -> bool:
        """Return True unless the model was unloaded explicitly."""
        config = self._configs.get(model)
        return config is None or config.loaded

    def queue(self, model: str) -> QueuePolicy | None:
        """Return the model's own queue policy, if it has one."""
        config = self._configs.get(model)
        return None if config is None else config.queue

    def default_priority(self, served: ResolvedVersion) -> Priority:
        """Return the priority of a durable job that names none."""
        config = self._configs.get(served.manifest.name)
        return Priority(config.default_priority) if config is not None and config.default_priority else Priority.NORMAL

    def batching(self, served: ResolvedVersion, pool: str = SHARED) -> Batching:
        """Return the effective batching of a version in a pool, and why it is off."""
        return effective_batching(served.manifest, self.config(served.manifest.name), self.finding(served, pool))

    def finding(self, served: ResolvedVersion, pool: str = SHARED) -> Finding:
        """Return the findings of a pool's workers about a version."""
        return self.route(served.manifest.name, served.manifest.version, pool).finding

    def check_inputs(self, served: ResolvedVersion, inputs: tuple[Tensor, ...], pool: str = SHARED) -> None:
        """Check a request's tensors against the version's signature.

        Raises:
            BadTensor: naming the tensor, the given and the expected value.
        """
        check_inputs(served.manifest, inputs, run_rows=self.batching(served, pool).max_batch_size)

    def config(self, model: str) -> ModelConfig:
        """Return the configuration of a model, or the defaults."""
        return self._configs.get(model) or default_config(model)

    def find(self, model: str, version: int) -> ResolvedVersion | None:
        """Return a version by its number, or None."""
        return self._served.get(model, {}).get(version)

    def note(self, model: str, version: int) -> VersionNote:
        """Return labels and note of a version."""
        return self._notes.get(self._bus.names.version_key(model, version)) or VersionNote(model, version)

    def names(self) -> list[str]:
        return sorted(self._served)

    def versions(self, model: str) -> dict[int, ResolvedVersion]:
        """Return all versions of a model by number.

        Raises:
            BadName, ModelNotFound
        """
        versions = self._served.get(model)
        if versions is None:
            raise no_such_model(model)
        return dict(sorted(versions.items()))

    def aliases(self, model: str) -> dict[str, int]:
        return {name: alias.version for name, alias in sorted(self._aliases.get(model, {}).items())}

    def alias(self, model: str, name: str) -> Alias:
        """Return an alias with its history.

        Raises:
            BadName, ModelNotFound
        """
        found = self._aliases.get(model, {}).get(name)
        if found is None:
            self.versions(model)
            raise ModelNotFound(f"model '{model}' has no alias '{name[:64]}'", field="alias")
        return found

    async def wait_for_alias(self, alias: Alias) -> None:
        """Wait until new requests use ``alias`` or a later state of it; a second at most."""
        if not await self._wait_until(lambda: self._has_alias(alias)):
            log.warning(
                "alias of '%s' moved, but this gateway has not seen it within a second",
                alias.model,
                extra={"action": "alias_unheard"},
            )

    async def wait_for_version(self, model: str, version: int) -> None:
        """Wait until new requests find a new version; a second at most."""
        if not await self._wait_until(lambda: version in self._served.get(model, {})):
            log.warning(
                "version of '%s' created, but this gateway has not seen it within a second",
                model,
                extra={"action": "version_unheard"},
            )

    async def _wait_until(self, known: Callable[[], bool]) -> bool:
        try:
            async with asyncio.timeout(_FOLLOW_S):
                while not known():
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _has_alias(self, alias: Alias) -> bool:
        known = self._aliases.get(alias.model, {}).get(alias.name)
        return known is not None and (known == alias or known.revision > alias.revision)
