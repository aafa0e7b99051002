"""Encrypted models without a broker: names, seals, and who gets a key."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest
import zstandard

from tether import crypto
from tether.crypto import IdentityRecord, Role
from tether.crypto.model_encryption import (
    ChunkSeal,
    ModelKeys,
    model_holders,
    open_files,
    opened_manifest,
    passed_on,
    seal_files,
    with_new_key,
)
from tether.crypto.payload_encryption import KeyOpener, new_data_key
from tether.domain.chunking import LARGEST
from tether.domain.manifest import Batching, Manifest, ModelFile, SealedDigests
from tether.errors import DecryptionFailed
from tether.wire import codec

NOW = 1_800_000_000_000
YEAR = 365 * 86_400_000
KEY, OTHER = new_data_key(1), new_data_key(2)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def a_file(path: str = "model.onnx", *contents: bytes) -> ModelFile:
    chunks = contents or (b"one", b"two!")
    whole = b"".join(chunks)
    return ModelFile(path, len(whole), digest(whole), tuple(map(digest, chunks)), tuple(map(len, chunks)))


def test_equal_chunks_meet_under_one_key_and_under_no_other() -> None:
    seal = ChunkSeal(KEY, "m")
    name = seal.name(digest(b"one"))
    assert name == ChunkSeal(KEY, "m").name(digest(b"one")) != digest(b"one")
    assert len({name, seal.name(digest(b"two")), ChunkSeal(OTHER, "m").name(digest(b"one"))}) == 3
    assert seal.whole(digest(b"one")) != name, "a file of one chunk does not tell its name"


def test_a_chunk_opens_as_itself_only() -> None:
    """Not as another chunk, of another model, under another key, or with a bit changed; and twice closed it differs."""
    seal, name = ChunkSeal(KEY, "m"), ChunkSeal(KEY, "m").name(digest(b"one"))
    closed = seal.encrypt(name, b"one")
    assert len(closed) == 3 + 41
    assert seal.decrypt(name, closed) == b"one"
    assert closed != seal.encrypt(name, b"one")
    wrong = [
        (ChunkSeal(OTHER, "m"), name, closed),
        (ChunkSeal(KEY, "n"), name, closed),
        (seal, seal.name(digest(b"two")), closed),
        (seal, name, closed[:-1]),
        (seal, name, b""),
        (seal, name, bytes([closed[0] ^ 1]) + closed[1:]),
        (seal, name, closed[:-1] + bytes([closed[-1] ^ 1])),
    ]
    for who, what, stored in wrong:
        with pytest.raises(DecryptionFailed):
            who.decrypt(what, stored)


def test_what_compresses_well_is_compressed_before_it_is_closed() -> None:
    seal, chunk = ChunkSeal(KEY, "m"), b"weights " * 100_000
    closed = seal.encrypt(name := seal.name(digest(chunk)), chunk)
    assert len(closed) < len(chunk) / 100
    assert seal.decrypt(name, closed) == chunk


@pytest.mark.parametrize("inner", [b"", b"\2abc", b"\1abc", b"\1" + zstandard.compress(bytes(LARGEST + 1))])
def test_a_form_that_is_unknown_broken_or_too_large_does_not_open(inner: bytes) -> None:
    """Also when a holder of the key closed it."""
    seal = ChunkSeal(KEY, "m")
    name = seal.name(digest(b"one"))
    with pytest.raises(DecryptionFailed):
        seal.decrypt(name, KEY.close(seal._bound(name), inner))


def test_a_manifest_tells_no_digest_and_gives_them_to_holders_of_the_key() -> None:
    files = (a_file(), a_file("data/w.bin", b"one", b"three"))
    hidden, sealed = seal_files(KEY, "m", files)
    manifest = Manifest("m", 1, "p", hidden, (), (), Batching(), 1.0, "x", sealed=sealed)
    encoded = codec.encode(manifest)
    for file in files:
        for known in (file.digest, *file.chunks):
            assert known.encode() not in encoded
            assert bytes.fromhex(known) not in encoded
    assert [file.sizes for file in hidden] == [file.sizes for file in files]
    assert hidden[0].chunks[0] == hidden[1].chunks[0], "they share a chunk"
    assert opened_manifest(KEY, codec.decode(encoded, Manifest)).files == files
    with pytest.raises(DecryptionFailed):
        opened_manifest(OTHER, manifest)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 8},
        {"path": "other.onnx"},
        {"digest": "0" * 64},
        {"chunks": ("0" * 64, "1" * 64)},
        {"sizes": (4, 3)},
    ],
)
def test_digests_belong_to_the_files_that_they_were_sealed_with(change: dict[str, Any]) -> None:
    hidden, sealed = seal_files(KEY, "m", (a_file(),))
    changed = (msgspec.structs.replace(hidden[0], **change),)
    with pytest.raises(DecryptionFailed):
        open_files(KEY, "m", changed, sealed)
    with pytest.raises(DecryptionFailed):
        open_files(KEY, "n", hidden, sealed)
    assert open_files(KEY, "m", hidden, sealed) == (a_file(),)


@pytest.mark.parametrize(
    "rows", [[], [[b"\0" * 32, b""]], [[b"\0" * 31, b"\0" * 64]], [[b"\0" * 32, b"\0" * 64]], 7, [7]]
)
def test_what_a_holder_of_the_key_closed_wrongly_is_refused(rows: object) -> None:
    """A gateway that is not ours may seal what it likes: names must follow from digests."""
    hidden, _ = seal_files(KEY, "m", (a_file(),))
    from tether.crypto import model_encryption  # noqa: PLC0415 - what only a holder of the key can do

    box = KEY.close(model_encryption._bound_files(KEY, "m", hidden), codec.pack(rows))
    with pytest.raises(DecryptionFailed):
        open_files(KEY, "m", hidden, SealedDigests(KEY.id, box))


def identity(role: Role, name: str = "x") -> crypto.Identity:
    return crypto.new_identity(name, role)


def record(who: crypto.Identity, *, expires_at: int = NOW + YEAR) -> IdentityRecord:
    return who.record(not_before=NOW - 1, expires_at=expires_at)


def test_model_stores_gateways_and_workers_that_are_told_to_hold_it_may_have_keys() -> None:
    people = {role: identity(role) for role in Role}
    other = msgspec.structs.replace(identity(Role.WORKER), name="other")
    records = [record(who) for who in (*people.values(), other)]
    gone = record(identity(Role.WORKER), expires_at=NOW)
    always = {people[role].kid for role in (Role.MODELSTORE, Role.GATEWAY)}
    told = people[Role.WORKER]
    assert set(model_holders([*records, gone], NOW)) == always
    assert set(model_holders([*records, gone], NOW, {told.name})) == always | {told.kid}
    assert set(model_holders([*records, gone], NOW, {"dispatcher", "admin"})) == always
    assert set(model_holders([*records, gone], NOW, None)) == always | {told.kid, other.kid}


def test_keys_are_passed_on_and_withdrawn_without_making_new_ones() -> None:
    store, worker, late = identity(Role.MODELSTORE), identity(Role.WORKER), identity(Role.WORKER)
    opener = KeyOpener(store)

    def of(*who: crypto.Identity) -> dict[bytes, bytes]:
        return model_holders(map(record, who), NOW, None)

    keys = with_new_key(ModelKeys("m", 0, ()), of(store, worker), keyset_version=1, now_ms=NOW)
    keys = with_new_key(keys, of(store, worker), keyset_version=1, now_ms=NOW)
    assert [key.generation for key in keys.keys] == [1, 2]
    assert passed_on(keys, of(store, worker), opener, keyset_version=2) is keys
    changed = passed_on(keys, of(store, late), opener, keyset_version=2)
    assert [key.id for key in changed.keys] == [key.id for key in keys.keys]
    assert {key.holders() for key in changed.keys} == {frozenset({store.kid, late.kid})}
    for before, after in zip(keys.keys, changed.keys, strict=True):
        assert KeyOpener(worker).open(before) is not None
        assert KeyOpener(worker).open(after) is None
        opened = KeyOpener(late).open(after)
        assert opened is not None
        assert opened.id == after.id
    assert passed_on(changed, of(store, worker), opener, keyset_version=1) is changed, "an older keyset"
    assert passed_on(changed, {}, opener, keyset_version=3) is changed, "a keyset that is over takes no keys away"
    assert passed_on(changed, of(worker), opener, keyset_version=3) is changed, "it is not entitled itself"


def test_a_rotated_identity_opens_what_was_boxed_for_its_earlier_signing_key() -> None:
    store = identity(Role.MODELSTORE)
    holders = model_holders([record(store)], NOW)
    keys = with_new_key(ModelKeys("m", 0, ()), holders, keyset_version=1, now_ms=NOW)
    rotated = msgspec.structs.replace(identity(Role.MODELSTORE), box_seed=store.box_seed)
    assert rotated.kid != store.kid
    assert KeyOpener(rotated).open(keys.keys[0]) is not None
    assert KeyOpener(identity(Role.MODELSTORE)).open(keys.keys[0]) is None


def test_an_old_manifest_is_one_that_is_not_encrypted() -> None:
    old = codec.unpack(codec.encode(Manifest("m", 1, "p", (a_file(),), (), (), Batching(), 1.0, "x")))
    del old["sealed"]
    found = codec.decode(codec.pack(old), Manifest)
    assert found.sealed is None
    assert opened_manifest(KEY, found) is found
