"""Sessions: short-lived tokens that one gateway signs and every gateway accepts, without asking anybody."""

from __future__ import annotations

import os
from collections.abc import Callable

from tether.bus.bus import Bus
from tether.crypto import SESSION_PREFIX, Keyset, Session, issue_session, open_session
from tether.errors import BadSignature, EnvelopeError, RateLimited

CACHED = 4096
"""Tokens whose signature is not checked again; the oldest gives way."""

FORGERIES = 500
"""Wrong signatures that are looked at within a second, before anybody is authenticated: about 3 % of a processor."""


class Sessions:
    """Tokens that were verified against the keyset of the moment, by the digest of their text."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._keyset: Keyset = bus.verifier.keyset
        self._known: dict[bytes, Session] = {}
        self._forged = 0
        self._second = 0.0

    def open(self, text: str, digest: bytes) -> Session | None:
        """The session of a token, or None when it is no token or nobody vouches for it any more.

        Raises:
            RateLimited: there were too many forged tokens just now to look at one that was not seen before.
        """
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

    def known(self, digest: bytes) -> Session | None:
        """The session of a token that was verified before and is still remembered."""
        return self._known.get(digest)

    def _verified(self, text: str) -> Session | None:
        now = self._bus.clock.monotonic()
        if now - self._second >= 1.0:
            self._forged, self._second = 0, now
        if self._forged >= FORGERIES:
            raise RateLimited("too many session tokens that nobody signed come in; try again, or use the API key")
        try:
            return open_session(self._bus.verifier, text)
        except BadSignature:
            self._forged += 1
        except EnvelopeError:
            return None
        return None

    def issue(
        self, key: str, tenant: str, *, scopes: tuple[str, ...], models: tuple[str, ...], ends: Callable[[float], float]
    ) -> tuple[str, Session]:
        """A new session of an API key; ``ends`` says when one that begins now is over (UTC seconds)."""
        now = self._bus.clock.utc()
        session = Session(os.urandom(8).hex(), key, tenant, scopes, models, now, ends(now))
        return issue_session(self._bus.signer, session), session
