"""Every verb of the JetStream API of nats-server 2.15, as the subject that asks for it."""

from __future__ import annotations

from collections.abc import Iterable

OF_STREAM = {
    "create": "$JS.API.STREAM.CREATE.{stream}",
    "update": "$JS.API.STREAM.UPDATE.{stream}",
    "info": "$JS.API.STREAM.INFO.{stream}",
    "delete": "$JS.API.STREAM.DELETE.{stream}",
    "purge": "$JS.API.STREAM.PURGE.{stream}",
    "get": "$JS.API.STREAM.MSG.GET.{stream}",
    "delete message": "$JS.API.STREAM.MSG.DELETE.{stream}",
    "snapshot": "$JS.API.STREAM.SNAPSHOT.{stream}",
    "restore": "$JS.API.STREAM.RESTORE.{stream}",
    "step down": "$JS.API.STREAM.LEADER.STEPDOWN.{stream}",
    "remove peer": "$JS.API.STREAM.PEER.REMOVE.{stream}",
    "direct get": "$JS.API.DIRECT.GET.{stream}",
    "direct get by subject": "$JS.API.DIRECT.GET.{stream}.{subject}",
    "consumer": "$JS.API.CONSUMER.CREATE.{stream}",
    "named consumer": "$JS.API.CONSUMER.CREATE.{stream}.c",
    "filtered consumer": "$JS.API.CONSUMER.CREATE.{stream}.c.{subject}",
    "durable consumer": "$JS.API.CONSUMER.DURABLE.CREATE.{stream}.c",
    "consumer info": "$JS.API.CONSUMER.INFO.{stream}.c",
    "consumer names": "$JS.API.CONSUMER.NAMES.{stream}",
    "consumer list": "$JS.API.CONSUMER.LIST.{stream}",
    "delete consumer": "$JS.API.CONSUMER.DELETE.{stream}.c",
    "next": "$JS.API.CONSUMER.MSG.NEXT.{stream}.c",
    "pause": "$JS.API.CONSUMER.PAUSE.{stream}.c",
    "unpin": "$JS.API.CONSUMER.UNPIN.{stream}.c",
    "reset": "$JS.API.CONSUMER.RESET.{stream}.c",
    "consumer steps down": "$JS.API.CONSUMER.LEADER.STEPDOWN.{stream}.c",
    "acknowledge": "$JS.ACK.{stream}.c.1.2.3.4.5",
    "acknowledge, second form": "$JS.ACK._.hash.{stream}.c.1.2.3.4.5.token",
    "flow control": "$JS.FC.{stream}.c.x",
}
"""By what they do with a stream. ``subject``: one that the stream takes."""

OF_ACCOUNT = {
    "account": "$JS.API.INFO",
    "stream names": "$JS.API.STREAM.NAMES",
    "stream list": "$JS.API.STREAM.LIST",
    "template": "$JS.API.STREAM.TEMPLATE.CREATE.x",
    "meta leader": "$JS.API.META.LEADER.STEPDOWN",
    "remove server": "$JS.API.SERVER.REMOVE",
    "purge account": "$JS.API.ACCOUNT.PURGE.TETHER",
    "move stream": "$JS.API.ACCOUNT.STREAM.MOVE.TETHER.x",
    "another domain": "$JS.hub.API.STREAM.NAMES",
}


def subjects(streams: Iterable[str]) -> list[str]:
    """Every verb for each of the streams, and those of the account."""
    found = list(OF_ACCOUNT.values())
    for stream in streams:
        found += [pattern.format(stream=stream, subject="a.b.c") for pattern in OF_STREAM.values()]
    return found
