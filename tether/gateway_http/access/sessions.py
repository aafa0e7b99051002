"""Sessions: short-lived tokens that one gateway signs and every gateway verifies locally."""

from __future__ import annotations

import os
from collections.abc import Callable

from tether.bus.bus import Bus
from tether.crypto import SESSION_PREFIX, Keyset, Session, issue_session, open_session
from tether.errors import BadSignature, EnvelopeError, RateLimited

CACHED = 4096
"""Verified tokens that are cached; the oldest is evicted."""

FORGERIES = 500
"""Invalid signatures verified per second, before authentication: about 3 % of a CPU core."""


class Sessions:
    """Tokens verified against the current keyset, by the digest of their text."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._keyset: Keyset = bus.verifier.keyset
        self._known: dict[bytes, Session] = {}
        self._forged = 0
        self._second = 0.0

    def open(self, text: str, digest: bytes) -> Session | None:
        """Return a token's session; None if it is not a token or no trusted key signed it.

        Raises:
            RateLimited: too many forged tokens arrived to verify one that was not seen before.
        """
        if self._bus.verifier.keyset is not self._keyset:
            self._keyset = self._bus.verifier.keyset
            self._known.clear()
        found = self._known.get(digest)
        if found is None and text.startswith(SESSION_PREFIX):
            found = self._verify(text)
            if found is not None:
                if len(self._known) >= CACHED:
                    del self._known[next(iter(self._known))]
                self._known[digest] = found
        return found

    def known(self, digest: bytes) -> Session | None:
        """Return the session of a token that was verified before and is still cached."""
        return self._known.get(digest)

    def _verify(self, text: str) -> Session | None:
        now = self._bus.clock.monotonic()
        if now - self._second >= 1.0:
            self._forged, self._second = 0, now
        if self._forged >= FORGERIES:
            raise RateLimited("too many forged session tokens are arriving; try again, or use the API key")
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
        """Issue a session of an API key; ``ends`` maps its start to its expiry (UTC seconds)."""
        now = self._bus.clock.utc()
        session = Session(os.urandom(8).hex(), key, tenant, scopes, models, now, ends(now))
        return issue_session(self._bus.signer, session), session
