"""Accepted and refused entries of a watched signed bucket; a newer keyset can change either."""

from __future__ import annotations

import logging
from collections.abc import Callable

from tether.crypto import Verifier, kid_of

log = logging.getLogger(__name__)


class VerifiedEntries:
    """Verifies the entries of one bucket. Refused entries are verified again under the next keyset: an entry
    and the keyset with its signer travel separately. With ``withdraw`` an accepted entry is removed when its
    signing key is revoked.
    """

    def __init__(
        self,
        verifier: Verifier,
        opened: Callable[[str, bytes], bytes | None],
        on_change: Callable[[str, bytes | None], None],
        *,
        on_refused: Callable[[str], None] | None = None,
        withdraw: bool = False,
    ) -> None:
        self._verifier = verifier
        self._opened = opened
        self._on_change = on_change
        self._on_refused = on_refused
        self._withdraw = withdraw
        self._refused: dict[str, bytes] = {}
        self._signers: dict[str, bytes] = {}

    def received(self, key: str, frame: bytes | None) -> None:
        """Handle an entry that arrived, changed or was deleted. One that fails verification changes nothing."""
        self._refused.pop(key, None)
        body = None if frame is None else self._opened(key, frame)
        if frame is None:
            self._signers.pop(key, None)
            self._on_change(key, None)
        elif body is None:
            self._refused[key] = frame
            if self._on_refused is not None:
                self._on_refused(key)
        else:
            self._signers[key] = kid_of(frame)
            self._on_change(key, body)

    def verify_again(self) -> None:
        """Verify all entries again under another keyset."""
        for key, frame in list(self._refused.items()):
            self._tried(key, lambda key=key, frame=frame: self.received(key, frame))  # type: ignore[misc]
        if not self._withdraw:
            return
        revoked = {item.kid for item in self._verifier.keyset.revoked}
        for key, kid in list(self._signers.items()):
            if kid in revoked:
                del self._signers[key]
                self._tried(key, lambda key=key: self._on_change(key, None))  # type: ignore[misc]

    def _tried(self, key: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception:
            log.exception("entry '%s' refused", key, extra={"action": "watch_failed"})
