"""What a model's process writes to its standard error, as lines of the worker's log: short ones, and not more than so many."""

from __future__ import annotations

import logging
import threading
import time
from io import BufferedReader

log = logging.getLogger(__name__)

LONGEST = 500
"""Characters of one line that are logged."""
AT_ONCE = 100
"""Lines that may come together."""
PER_SECOND = 2.0
_READ = 1 << 16


class Said:
    """Reads ``pipe`` until all who could write to it are gone, however much comes."""

    def __init__(self, pipe: BufferedReader, model: str, version: int) -> None:
        self._pipe = pipe
        self._fields = {"action": "model_said", "model": model, "version": version}
        self._left = float(AT_ONCE)
        self._counted_at = time.monotonic()
        self._dropped = 0
        self._thread = threading.Thread(target=self._listen, name=f"said-{model}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The process has ended: log its last words."""
        self._thread.join(1.0)

    def _listen(self) -> None:
        with self._pipe as pipe:
            line = b""
            while part := pipe.read1(_READ):
                *lines, line = (line + part).split(b"\n")
                for one in lines:
                    self._say(one)
                if len(line) > 4 * LONGEST:
                    self._say(line)
                    line = b""
            self._say(line)
        self._tell_dropped()

    def _say(self, line: bytes) -> None:
        text = line.decode(errors="replace").strip()
        if not text:
            return
        now = time.monotonic()
        self._left = min(float(AT_ONCE), self._left + (now - self._counted_at) * PER_SECOND)
        self._counted_at = now
        if self._left < 1:
            self._dropped += 1
            return
        self._left -= 1
        self._tell_dropped()
        log.info("a model wrote: %s", text[:LONGEST], extra=self._fields)

    def _tell_dropped(self) -> None:
        dropped, self._dropped = self._dropped, 0
        if dropped:
            log.warning("a model wrote %d more lines, which are not logged", dropped, extra=self._fields)
