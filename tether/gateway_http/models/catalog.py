"""Models, aliases, configurations and routes as the gateway last heard of them; every request is resolved here, in memory."""

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
    """One version, ready to be asked: what the hot path needs, worked out once."""

    manifest: Manifest
    specs: dict[str, TensorSpec]
    infer_lane: Lane
    """That of the shared pool; see :meth:`lane`."""
    _own_lanes: dict[str, Lane] = field(default_factory=dict, compare=False, repr=False)

    def lane(self, pool: str) -> Lane:
        """The infer lane of a pool."""
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
    """Follows the buckets ``models``, ``aliases``, ``configs``, ``notes`` and ``routes``."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.owners = OwnerBook()
        self.stored = Stored(bus)
        self._served: dict[str, dict[int, ResolvedVersion]] = {}
        self._aliases: dict[str, dict[str, Alias]] = {}
        self._moved = asyncio.Event()
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
        """Call ``listener`` with a model's name whenever its configuration changed, or one of its versions went or is
        another."""
        self._listeners.append(listener)

    def _tell(self, model: str) -> None:
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
            self._tell(name)
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
            self._tell(manifest.name)
        self._notify()

    def _notify(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    def _alias_changed(self, key: str, body: bytes | None) -> None:
        alias = None if body is None else read_entry(body, Alias)
        if body is None:
            model, _, name = key.partition(".")
            self._policies.pop(name_of(model), None)
            self._aliases.get(name_of(model), {}).pop(name_of(name), None)
        elif alias is not None and key == f"{token(alias.model)}.{token(alias.name)}":
            self._policies.pop(alias.model, None)
            self._aliases.setdefault(alias.model, {})[alias.name] = alias
        self._notify()

    def _config_changed(self, key: str, body: bytes | None) -> None:
        if self.owners.config_changed(key, body):
            return
        config = None if body is None else read_entry(body, ModelConfig)
        self._policies.pop(name_of(key), None)
        if body is None:
            self._configs.pop(name_of(key), None)
            self._tell(name_of(key))
        elif config is not None and key == token(config.model):
            self._configs[config.model] = config
            self._tell(config.model)

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

    # reading

    def resolve(self, model: str, version: str, sticky: str = "", caller: str = "") -> ResolvedVersion:
        """The version that a name and a version (a number, an alias, or empty for ``latest``) mean just now.

        Of an alias that several versions share, the same ``sticky`` gets the same one, or, where the alias says so, the
        same ``caller``.

        Raises:
            BadName: the name is not one a model could have.
            ModelNotFound: there is no such model, version or alias, or the version policy does not serve that version.
        """
        served = self.known(model, version, sticky, caller)
        number = served.manifest.version
        if not self.serves(model, number):
            listed = ", ".join(map(str, sorted(self._open(model)))) or "none"
            raise ModelNotFound(
                f"version {number} of model '{model}' is not served: its version policy serves {listed}",
                field="version",
            )
        return served

    def known(self, model: str, version: str, sticky: str = "", caller: str = "") -> ResolvedVersion:
        """:meth:`resolve`, of versions that are not served too."""
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
            return newest if self.serves(model, newest) else max(self._open(model), default=newest)
        if found is None:
            return 0
        return drawn(found, sticky or (caller if found.sticky else "")) if found.split else found.version

    def _latest(self, model: str, found: Alias | None) -> int:
        if found is None:
            return max(self._served[model], default=0)
        if found.previous and not self._held(model, found.version):
            return self._previous_if_newest_unhosted(model, found)
        return found.version

    def serves(self, model: str, version: int) -> bool:
        """Whether a model's version policy serves a version; one that is unloaded is served when it is loaded again."""
        return model not in self._configs or version in self._open(model)

    def _open(self, model: str) -> frozenset[int]:
        """The versions that are served, worked out once for each change of anything that they depend on."""
        found = self._policies.get(model)
        if found is None:
            versions, aliases = self._served.get(model, {}), self._aliases.get(model, {})
            held = [number for number in versions if self._held(model, number)]
            found = served_versions(self.config(model), versions, aliases.values(), held, loaded=True)
            self._policies[model] = found
        return found

    def _previous_if_newest_unhosted(self, model: str, latest: Alias) -> int:
        """While nobody holds what was pushed last, ``latest`` stays what it was."""
        before = latest.previous[0].version
        return before if before in self._served[model] and self._held(model, before) else latest.version

    def _held(self, model: str, version: int) -> bool:
        """Whether a shared worker holds a version: what ``latest`` means is the same for every tenant."""
        return bool(self.route(model, version).workers)

    def route(self, model: str, version: int, pool: str = SHARED) -> Route:
        """What the dispatcher says of a version in a pool; of one that has no lanes there, nothing."""
        return self._routes.get((model, version, pool)) or Route(model, version, (), pool=pool)

    def workers(self, served: ResolvedVersion, pool: str = SHARED) -> tuple[str, ...]:
        """Who answers for a version in a pool just now; empty when nobody does."""
        return self.route(served.manifest.name, served.manifest.version, pool).workers

    def reason(self, served: ResolvedVersion, pool: str = SHARED) -> str:
        """Why a version is on fewer workers than it should be; empty when nothing is known against it."""
        return self.route(served.manifest.name, served.manifest.version, pool).reason

    def worker_count(self, lane: Lane) -> int:
        return len(self.route(lane.model, lane.version, lane.pool).workers)

    def job_s(self, lane: Lane) -> float:
        """About how long a job of a lane runs; 0 when that is short or not known."""
        return self.route(lane.model, lane.version, lane.pool).job_s

    def require_lane(self, served: ResolvedVersion, pool: str = SHARED) -> None:
        """Prove that the version has lanes in a pool, so that a job for it will be found.

        Raises:
            ModelNotReady: it was pushed, or its tenant isolated, a moment ago and it has none yet.
        """
        if (served.manifest.name, served.manifest.version, pool) not in self._routes:
            whose = "" if pool == SHARED else f" for tenant '{pool}', which is isolated"
            raise ModelNotReady(
                f"model '{served.manifest.name}' version {served.manifest.version} is not ready yet{whose}; try again"
            )

    def require_worker(self, served: ResolvedVersion, pool: str) -> None:
        """:meth:`require_lane`; and for an isolated tenant, that a worker of its own is there to answer: it may never
        have had one.

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
        """Whether a request for the version would be run just now."""
        name = served.manifest.name
        return self.loaded(name) and self.serves(name, served.manifest.version) and bool(self.workers(served, pool))

    def loaded(self, model: str) -> bool:
        """Whether a model is not unloaded on purpose."""
        config = self._configs.get(model)
        return config is None or config.loaded

    def queue(self, model: str) -> QueuePolicy | None:
        """The limits of waiting that a model has of its own, if there are any."""
        config = self._configs.get(model)
        return None if config is None else config.queue

    def default_priority(self, served: ResolvedVersion) -> Priority:
        """That of a durable job that names none."""
        config = self._configs.get(served.manifest.name)
        return Priority(config.default_priority) if config is not None and config.default_priority else Priority.NORMAL

    def batching(self, served: ResolvedVersion, pool: str = SHARED) -> Batching:
        """How a version's jobs are joined in a pool just now, and why they are not."""
        return effective_batching(served.manifest, self.config(served.manifest.name), self.finding(served, pool))

    def finding(self, served: ResolvedVersion, pool: str = SHARED) -> Finding:
        """What a pool's workers found out about a version."""
        return self.route(served.manifest.name, served.manifest.version, pool).finding

    def check_inputs(self, served: ResolvedVersion, inputs: tuple[Tensor, ...], pool: str = SHARED) -> None:
        """Compare a request's tensors with the version's signature.

        Raises:
            BadTensor: naming the tensor, what was sent and what is expected.
        """
        check_inputs(served.manifest, inputs, run_rows=self.batching(served, pool).max_batch_size)

    def config(self, model: str) -> ModelConfig:
        """What is decided about a model; of one without an entry, the defaults."""
        return self._configs.get(model) or default_config(model)

    def find(self, model: str, version: int) -> ResolvedVersion | None:
        """A version by its number, when there is one."""
        return self._served.get(model, {}).get(version)

    def note(self, model: str, version: int) -> VersionNote:
        """Labels and note of a version."""
        return self._notes.get(self._bus.names.version_key(model, version)) or VersionNote(model, version)

    def names(self) -> list[str]:
        return sorted(self._served)

    def versions(self, model: str) -> dict[int, ResolvedVersion]:
        """Every version of a model by number.

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
        """An alias with its history.

        Raises:
            BadName, ModelNotFound
        """
        found = self._aliases.get(model, {}).get(name)
        if found is None:
            self.versions(model)
            raise ModelNotFound(f"model '{model}' has no alias '{name[:64]}'", field="alias")
        return found

    async def wait_for_alias(self, alias: Alias) -> None:
        """Return when requests that come now go by ``alias``, or by what it became since; after a second in any case."""
        if not await self._heard(lambda: self._has_alias(alias)):
            log.warning("an alias of '%s' moved and was not heard of", alias.model, extra={"action": "alias_unheard"})

    async def wait_for_version(self, model: str, version: int) -> None:
        """Return when requests that come now find a version that was made; after a second in any case."""
        if not await self._heard(lambda: version in self._served.get(model, {})):
            log.warning("a version of '%s' was made and not heard of", model, extra={"action": "version_unheard"})

    async def _heard(self, known: Callable[[], bool]) -> bool:
        try:
            async with asyncio.timeout(_FOLLOW_S):
                while not known():
                    await self._moved.wait()
        except TimeoutError:
            return False
        return True

    def _has_alias(self, alias: Alias) -> bool:
        known = self._aliases.get(alias.model, {}).get(alias.name)
        return known is not None and (known == alias or known.revision > alias.revision)
