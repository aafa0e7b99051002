"""Refuse words that the project has given up, in sources and documentation: each has one name, and CHANGELOG.md has the table.

A word on the wire or in storage keeps its bytes, in the files that ``ON_THE_WIRE`` names.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CLASSES = {
    "BadSeal": "DecryptionFailed",
    "Believed": "VerifiedEntries",
    "BusDelivery": "Delivery",
    "CachedPieces": "CachedChunkSource",
    "Configs": "ModelConfigReader, ModelConfigStore",
    "DamagedPiece": "DamagedChunk",
    "Decided": "ModelConfigMirror",
    "EndedVersions": "DeletedVersionLanes, DeletedVersionDrain",
    "Flight": "InFlightBundle",
    "Going": "ActiveRun",
    "Gossip": "LimitSync",
    "Heading": "RequestHeaders",
    "Holder": "VersionManager",
    "HotRoutes": "FastPath",
    "Intake": "BundleReader",
    "JobRoom": "QueuedJobsQuota",
    "KeptAnswers": "RequestCoalescer",
    "KeyMaker": "ModelKeyRotation",
    "KeyUses": "KeyUsage",
    "KvBinding": "StaleEntry",
    "LanePull": "LaneConsumer",
    "Loadout": "LoadSpec",
    "LoosePieces": "UnreferencedChunks",
    "ModelInstance": "VersionServer",
    "ModelLimits": "InspectionLimitExceeded",
    "ModelSeals": "EncryptedModels",
    "NoMemoryFolder": "TmpfsUnavailable",
    "NotEntitled": "NoDecryptionKey",
    "Offer": "WorkerOffer",
    "OpenJobs": "OpenJobCounter",
    "OwnerKeys": "DataKeyring",
    "Patience": "BodyTimeouts, RetryDeadline, OperationDeadline",
    "Piece": "Segment, StoredChunk",
    "PieceDb": "LmdbChunks",
    "PieceKeeper": "ChunkLifecycle",
    "Placed": "Placement",
    "Possession": "ChunkPossession",
    "SealedForm": "EncryptedEncoding",
    "SeenKeyset": "TrustedKeyset",
    "Seldom": "LogRateLimiter",
    "SignOfLife": "StoreHeartbeat",
    "Standing": "KeyStatus",
    "Tally": "ShadowStats",
    "Ticket": "LimitPermit, JobTicket",
    "Together": "Concurrently",
    "UnderWay": "ActiveRuns",
    "Window": "BoundedTaskGroup",
    "_Copy": "_Instance, _LoadingInstance",
    "_Here": "_InProcessRuntime",
    "_Seen": "_RequestState, _ChainState",
    "_Shared": "_SharedLimit",
    "_Shelf": "_TenantLru",
}

SETTINGS = {
    "worker_slots": "worker_prefetch",
    "memory_dir": "decrypted_model_dir",
    "cache_mb": "chunk_cache_mb",
    "cache_versions_mb": "model_files_mb",
    "collect_grace_s": "gc_grace_s",
    "collect_interval_s": "gc_interval_s",
    "upload_ttl_s": "unreferenced_ttl_s",
    "lease_s": "partition_lease_s",
    "store_name": "modelstore_name",
    "store_replicas": "chunk_replicas",
    "key_rate": "default_key_rate",
    "key_concurrency": "default_key_concurrency",
    "drain_s": "shutdown_timeout_s",
    "wait_limit_s": "max_wait_s",
    "onnx_threads": "instance_threads",
    "isolated_tenants": "max_isolated_tenants",
}

METRICS = {
    "tether_limited_total": "tether_requests_limited_total",
    "tether_answers_late_total": "tether_replies_unclaimed_total",
    "tether_pull_resets_total": "tether_pull_restarts_total",
    "tether_collections_total": "tether_gc_runs_total",
    "tether_collection_seconds": "tether_gc_seconds",
    "tether_collected_pieces_total": "tether_gc_removed_chunks_total",
    "tether_collected_bytes_total": "tether_gc_removed_bytes_total",
    "tether_unreferenced_pieces": "tether_unreferenced_chunks",
    "tether_chunk_cache_lost_total": "tether_chunk_cache_drops_total",
    "tether_repaired_pieces_total": "tether_repaired_chunks_total",
    "tether_damaged_pieces": "tether_damaged_chunks",
}

ERROR_CODES = {
    "kv_binding": "stale_entry",
    "model_limits": "inspection_limit_exceeded",
    "not_entitled": "no_decryption_key",
    "bad_seal": "decryption_failed",
    "no_memory_folder": "tmpfs_unavailable",
}

RETIRED = {
    **CLASSES,
    **SETTINGS,
    **METRICS,
    **ERROR_CODES,
    **{f"TETHER_{old.upper()}": new for old, new in SETTINGS.items()},
}
"""Old word -> the word to use."""

ON_THE_WIRE = frozenset(
    {
        "docs/wire-format.md",
        "ops/nats/permissions.conf",
        "scripts/vectors_models.py",
        "tests/unit/crypto/test_vectors.py",
        "tests/vectors/encrypted.json",
        "tests/vectors/frames.json",
        "tether/crypto/model_encryption.py",
        "tether/crypto/roles.py",
        "tether/wire/subjects.py",
        "tether/worker/files/lmdb_chunks.py",
    }
)
"""Files that may say ``piece``, which a chunk is called in bytes that were stored or sent."""

EXEMPT = frozenset({"CHANGELOG.md", "scripts/check-words.py", "tests/security/test_checks.py"})
_SUFFIXES = (".py", ".md", ".toml", ".yaml", ".yml", ".json", ".conf", ".sh", "Makefile")
_WORD = re.compile(r"\b(" + "|".join(sorted(map(re.escape, RETIRED), key=len, reverse=True)) + r")\b")
_PIECE = re.compile("piece", re.IGNORECASE)


def findings(name: str, text: str) -> Iterator[str]:
    """One line for each retired word in a file."""
    for number, line in enumerate(text.splitlines(), 1):
        for found in _WORD.finditer(line):
            yield f"{name}:{number}: '{found[1]}' is now '{RETIRED[found[1]]}'"
        if _PIECE.search(line) and name not in ON_THE_WIRE:
            yield f"{name}:{number}: a piece of a model file is a chunk"


def main() -> int:
    root = Path(__file__).parents[1]
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    files = [name for name in listed if name.endswith(_SUFFIXES) and name not in EXEMPT and (root / name).is_file()]
    found = [line for name in files for line in findings(name, (root / name).read_text())]
    print("\n".join([*found, f"words: {len(files)} files, {len(found)} findings"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
