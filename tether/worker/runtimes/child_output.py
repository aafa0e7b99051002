"""Logs the standard error of a model's process, with limits on length and rate."""

from __future__ import annotations

import logging
import threading
import time
from io import BufferedReader

log = logging.getLogger(__name__)

LONGEST = 500
"""Maximum characters of a logged line."""
AT_ONCE = 100
"""Burst of lines that are logged."""
PER_SECOND = 2.0
_READ = 1 << 16


class ModelOutputLog:
    """Reads ``pipe`` until all writers have closed it, however much they write."""

    def __init__(self, pipe: BufferedReader, model: str, version: int) -> None:
        self._pipe = pipe
        self._fields = {"action": "model_said", "model": model, "version": version}
        self._left = float(AT_ONCE)
        self._counted_at = time.monotonic()
        self._dropped = 0
        self._thread = threading.Thread(target=self._listen, name=f"said-{model}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Log the remaining output after the process has ended."""
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
        self._log_dropped()

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
        self._log_dropped()
        log.info("model output: %s", text[:LONGEST], extra=self._fields)

    def _log_dropped(self) -> None:
        dropped, self._dropped = self._dropped, 0
        if dropped:
            log.warning("dropped %d more lines of model output", dropped, extra=self._fields)
