"""The audit log's format: entries, hash chains, and their verification. No I/O."""

from tether.audit.chain import (
    BLOCK_ENTRIES,
    DOMAIN,
    Block,
    Chain,
    decode_block,
    entries_of,
    first_unfit,
    marks_of,
    message_id,
    parse_message_id,
)
from tether.audit.entries import NOBODY, AuditEntry, Kind, Mark, What, clean, encode
from tether.audit.records import Record, read_records, write_record
from tether.audit.verification import ALIVE_MS, Checker, Problem, VerificationReport

__all__ = [
    "ALIVE_MS",
    "BLOCK_ENTRIES",
    "DOMAIN",
    "NOBODY",
    "AuditEntry",
    "Block",
    "Chain",
    "Checker",
    "Kind",
    "Mark",
    "Problem",
    "Record",
    "VerificationReport",
    "What",
    "clean",
    "decode_block",
    "encode",
    "entries_of",
    "first_unfit",
    "marks_of",
    "message_id",
    "parse_message_id",
    "read_records",
    "write_record",
]
