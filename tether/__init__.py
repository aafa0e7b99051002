"""Tether serves machine-learning models as a message-queue job system.

``from tether import Client, AsyncClient`` is the Python interface; importing the package itself loads nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tether.client.blocking import AsyncClient, AsyncJobHandle, Client, JobHandle

__version__ = "0.1.0"
__all__ = ["AsyncClient", "AsyncJobHandle", "Client", "JobHandle", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tether' has no attribute {name!r}")
    from tether.client import blocking  # noqa: PLC0415 - loads httpx and numpy only for those who use the client

    return getattr(blocking, name)
