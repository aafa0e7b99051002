"""NATS subject patterns, as the server matches them."""

from __future__ import annotations

from tether.broker.permissions import Permissions, matches


def may_publish(permissions: Permissions, subject: str) -> bool:
    return any(matches(pattern, subject) for pattern in permissions.publish)


def may_subscribe(permissions: Permissions, subject: str) -> bool:
    return any(matches(pattern, subject) for pattern in permissions.subscribe)


def example(pattern: str) -> str:
    """A subject that fits a pattern and no narrower one."""
    return pattern.replace("*", "matrix").replace(">", "matrix")
