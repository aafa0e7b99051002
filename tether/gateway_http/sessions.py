"""Sessions: short-lived tokens that one gateway signs and every gateway accepts, without asking anybody."""

from __future__ import annotations

import os
from collections.abc import Callable

from tether.bus.connection import Bus
from tether.envelope import SESSION_PREFIX, Keyset, Session, issue_session, open_session
from tether.errors import EnvelopeError

CACHED = 4096
"""Tokens whose signature is not checked again; the oldest gives way."""


class Sessions:
    """Tokens that were verified against the keyset of the moment, by the digest of their text."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._keyset: Keyset = bus.verifier.keyset
        self._known: dict[bytes, Session] = {}

    def open(self, text: str, digest: bytes) -> Session | None:
        """The session of a token, or None when it is no token or nobody vouches for it any more."""
        if self._bus.verifier.keyset is not self._keyset:
            self._keyset = self._bus.verifier.keyset
            self._known.clear()
        found = self._known.get(digest)
        if found is None and text.startswith(SESSION_PREFIX):
            found = self._verified(text)
            if found is not None:
                if len(self._known) >= CACHED:
                    del self._known[next(iter(self._known))]
                self._known[digest] = found
        return found

    def _verified(self, text: str) -> Session | None:
        try:
            return open_session(self._bus.verifier, text)
        except EnvelopeError:
            return None

    def issue(
        self, key: str, tenant: str, *, scopes: tuple[str, ...], models: tuple[str, ...], ends: Callable[[float], float]
    ) -> tuple[str, Session]:
        """A new session of an API key; ``ends`` says when one that begins now is over (UTC seconds)."""
        now = self._bus.clock.utc()
        session = Session(os.urandom(8).hex(), key, tenant, scopes, models, now, ends(now))
        return issue_session(self._bus.signer, session), session
