"""One line of ``tether doctor``."""

from __future__ import annotations

from typing import Literal

import msgspec

Level = Literal["ok", "warn", "fail"]


class Finding(msgspec.Struct, frozen=True):
    """Result of one check. ``fix`` is empty if nothing needs doing."""

    level: Level
    what: str
    fix: str = ""

    def line(self) -> str:
        return f"{self.level:<4}  {self.what}" + (f"  -> {self.fix}" if self.fix else "")
