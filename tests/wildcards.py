"""NATS subject patterns, as the server matches them."""

from __future__ import annotations

from tether.broker.permissions import Permissions


def matches(pattern: str, subject: str) -> bool:
    """Whether a concrete subject fits a pattern: ``*`` is one token, ``>`` one or more at the end."""
    wanted, given = pattern.split("."), subject.split(".")
    for index, token in enumerate(wanted):
        if token == ">":
            return len(given) > index
        if index >= len(given) or token not in ("*", given[index]):
            return False
    return len(wanted) == len(given)


def may_publish(permissions: Permissions, subject: str) -> bool:
    return any(matches(pattern, subject) for pattern in permissions.publish)


def may_subscribe(permissions: Permissions, subject: str) -> bool:
    return any(matches(pattern, subject) for pattern in permissions.subscribe)


def example(pattern: str) -> str:
    """A subject that fits a pattern and no narrower one."""
    return pattern.replace("*", "matrix").replace(">", "matrix")
