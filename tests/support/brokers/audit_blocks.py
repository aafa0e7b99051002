"""Audit logs as bytes, written as a service writes them, without a broker."""

from __future__ import annotations

import dataclasses

import msgspec

from tether import audit, crypto
from tether.audit import Chain, Checker, Mark, Record, VerificationReport, What
from tether.crypto import Historical, MessageType, Role, Signer
from tether.wire import codec

NOW = 1_800_000_000_000
DAY = 86_400_000
HOUR = 3_600_000
GATEWAY = crypto.new_identity("gateway", Role.GATEWAY)
WORKER = crypto.new_identity("worker-1", Role.WORKER)
KEYS = crypto.Keyset(
    1,
    NOW - DAY,
    NOW + DAY,
    tuple(who.record(not_before=NOW - DAY, expires_at=NOW + 400 * DAY) for who in (GATEWAY, WORKER)),
)
INFERENCE = "tether.audit.acme.inference"
ACCESS = "tether.audit.acme.access"
CHECKPOINTS = "tether.audit.-.checkpoint"


@dataclasses.dataclass
class Writer:
    """Writes a log as a service does, one millisecond a block."""

    run: str
    records: list[Record]
    now: int = NOW
    who: crypto.Identity = GATEWAY
    chains: dict[str, Chain] = dataclasses.field(default_factory=dict)

    def put(self, subject: str, rows: list[bytes]) -> None:
        chain = self.chains.setdefault(subject, Chain(self.run, subject))
        body = chain.block(rows)
        self.now += 1
        name = audit.message_id(self.run, chain.number, subject)
        frame = Signer(self.who, lambda: self.now).sign_envelope(MessageType.AUDIT, subject, body, message_id=name)
        self.records.append(Record(len(self.records) + 1, subject, self.now, name, frame))

    def entries(self, subject: str, count: int = 3) -> None:
        self.put(subject, [entry(self.now, number) for number in range(count)])

    def mark(self, *marks: Mark) -> None:
        self.put(CHECKPOINTS, [codec.pack(msgspec.to_builtins(mark)) for mark in marks])

    def checkpoint(self) -> None:
        marks = []
        for subject, chain in self.chains.items():
            if subject != CHECKPOINTS and chain.listed < chain.number:
                since = chain.listed + 1
                marks.append(Mark(self.now, What.HEAD, self.run, subject, since, chain.number, chain.head))
                chain.listed = chain.number
        self.mark(*marks or [Mark(self.now, What.ALIVE, self.run)])

    def say(self, what: What) -> None:
        self.mark(Mark(self.now, what, self.run))


def entry(at: int, number: int) -> bytes:
    return audit.encode((at, "key:abcdefgh", "infer", "ok", "digits", 1, f"{number:032x}", "r", 256, 40, 900))


def check(
    records: list[Record], *, retention_ms: int = 365 * DAY, now_ms: int = 0, keys: object = None
) -> VerificationReport:
    checker = Checker(Historical([KEYS]) if keys is None else keys, retention_ms)  # type: ignore[arg-type]
    for record in records:
        checker.add(record)
    return checker.finish(now_ms=now_ms)
