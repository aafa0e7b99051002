"""Owners and grants of models, from the newest entries of the buckets ``configs`` and ``models``."""

from __future__ import annotations

import logging

from tether.domain.manifest import Manifest
from tether.errors import BadEncoding
from tether.model.ownership import Ownership, Right, implied_ownership, owned_model, owner_key
from tether.wire import codec

log = logging.getLogger(__name__)


class OwnerBook:
    """Receives every entry of both buckets; answers which rights a tenant has on a model.

    For a model without an ownership record, its versions determine the owner.
    """

    def __init__(self) -> None:
        self._records: dict[str, Ownership] = {}
        self._manifests: dict[str, dict[int, Manifest]] = {}
        self._doubtful: set[str] = set()

    def config_changed(self, key: str, body: bytes | None) -> bool:
        """Apply an entry of ``configs`` if it is an ownership record; return whether it is one."""
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
            log.warning(
                "ignored an unreadable model owner: %s", error, extra={"action": "entry_refused", "model": model}
            )
            self.refused(key)
            return True
        if owner_key(record.owned) == key:
            self._records[model] = record
        return True

    def refused(self, key: str) -> None:
        """Handle an entry of ``configs`` that failed verification. The previous record stays in force;
        without one, only administrators may act on the model.
        """
        model = owned_model(key)
        if model is not None and model not in self._records:
            self._doubtful.add(model)

    def manifest(self, manifest: Manifest) -> None:
        """Add a version."""
        self._manifests.setdefault(manifest.name, {})[manifest.version] = manifest

    def gone(self, model: str, version: int) -> None:
        """Remove a version."""
        versions = self._manifests.get(model, {})
        versions.pop(version, None)
        if not versions:
            self._manifests.pop(model, None)

    def of(self, model: str) -> Ownership | None:
        """Return a model's ownership; None if no model has this name."""
        record = self._records.get(model)
        if record is not None:
            return record
        if model in self._doubtful:
            return Ownership(model, "")
        versions = self._manifests.get(model)
        return None if versions is None else implied_ownership(versions.values())

    def known(self, model: str) -> bool:
        """Return whether a tenant owns or owned a model of this name."""
        return model in self._records or model in self._manifests or model in self._doubtful

    def right(self, model: str, tenant: str) -> Right:
        """Return a tenant's right on a model; every right if no model has this name."""
        found = self.of(model)
        return Right.OWN if found is None else found.right(tenant)
