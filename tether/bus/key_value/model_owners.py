"""Who owns which model, as a service last heard of it in the buckets ``configs`` and ``models``."""

from __future__ import annotations

import logging

from tether.domain.manifest import Manifest
from tether.errors import BadEncoding
from tether.model.ownership import Ownership, Right, implied_ownership, owned_model, owner_key
from tether.wire import codec

log = logging.getLogger(__name__)


class OwnerBook:
    """Told of every entry of both buckets; says what a tenant may do with a model.

    Of a model whose record has not come (yet), its versions tell the owner.
    """

    def __init__(self) -> None:
        self._records: dict[str, Ownership] = {}
        self._manifests: dict[str, dict[int, Manifest]] = {}
        self._doubtful: set[str] = set()

    def config_changed(self, key: str, body: bytes | None) -> bool:
        """Whether an entry of ``configs`` is about an owner, and not how a model is served; then it counts from now on."""
        model = owned_model(key)
        if model is None:
            return False
        self._doubtful.discard(model)
        if body is None:
            self._records.pop(model, None)
            return True
        try:
            record = codec.decode(body, Ownership)
        except BadEncoding as error:
            log.warning("unreadable owner of a model: %s", error, extra={"action": "entry_refused", "model": model})
            self.refused(key)
            return True
        if owner_key(record.owned) == key:
            self._records[model] = record
        return True

    def refused(self, key: str) -> None:
        """An entry of ``configs`` cannot be believed. The record before it stays in force; without one, only
        administrators may do anything with the model."""
        model = owned_model(key)
        if model is not None and model not in self._records:
            self._doubtful.add(model)

    def manifest(self, manifest: Manifest) -> None:
        """There is a version."""
        self._manifests.setdefault(manifest.name, {})[manifest.version] = manifest

    def gone(self, model: str, version: int) -> None:
        """A version was deleted."""
        versions = self._manifests.get(model, {})
        versions.pop(version, None)
        if not versions:
            self._manifests.pop(model, None)

    def of(self, model: str) -> Ownership | None:
        """A model's ownership; None: nobody has a model of this name."""
        record = self._records.get(model)
        if record is not None:
            return record
        if model in self._doubtful:
            return Ownership(model, "")
        versions = self._manifests.get(model)
        return None if versions is None else implied_ownership(versions.values())

    def known(self, model: str) -> bool:
        """Whether somebody has a model of this name, or had one."""
        return model in self._records or model in self._manifests or model in self._doubtful

    def right(self, model: str, tenant: str) -> Right:
        """What a tenant may do with a model; everything, when nobody has a model of this name."""
        found = self.of(model)
        return Right.OWN if found is None else found.right(tenant)
