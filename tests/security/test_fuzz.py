"""Random and mutated bytes for every decoder: our own errors or a value, and never a hang, a crash or a swelling.

Each run takes a new seed, which it prints; ``TETHER_TEST_FUZZ_SEED`` repeats one, ``TETHER_TEST_FUZZ`` sets how many
frames each decoder gets.
"""

from __future__ import annotations

import os
import random
import sys
import time
import zlib

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.http.decoders import Decoder, decoders
from support.models import models

from tether.errors import BadEncoding, TetherError
from tether.wire import codec

FRAMES = int(os.environ.get("TETHER_TEST_FUZZ", "8000"))
SEED = int(os.environ.get("TETHER_TEST_FUZZ_SEED", str(random.SystemRandom().randrange(1 << 32))))
SLOWEST_S = 0.5
"""Processor time of one input; the least of three, since now and then the collector of the whole suite's garbage runs in it."""

GROWTH_MB = 40

WORDS = [
    b"\0", b"\xff", b"\x80", b"\x7f", b"\xc1", b"\xc6\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
    b"\xd9\xff", b"\x90" * 40, b"\x91" * 2000, b"\x80" * 40, b"\xca\x7f\xc0\0\0", b"\xcf" + b"\xff" * 8, b"\xd3" + b"\x80" * 8,
    b"[" * 2000, b"{" * 40, b'"', b"\\", b"\\ud800", b":", b"1e999", b"-1", b"NaN", b"18446744073709551616", b"\r\n", b"\n\n",
    b"gzip", b"\x1f\x8b\x08", zlib.compress(b"a" * 10_000), b"\xed\xa0\x80", b"\xe2\x80\xae", b"", b"null", b"true",
]  # fmt: skip


def mutated(random_: random.Random, seeds: tuple[bytes, ...]) -> bytes:
    """A seed after one to six changes; now and then bytes that were never a seed."""
    if random_.random() < 0.05:
        return random_.randbytes(random_.randrange(200))
    data = bytearray(random_.choice(seeds))
    for _ in range(random_.randint(1, 6)):
        start = random_.randrange(len(data) + 1)
        end = min(len(data), start + random_.choice((0, 1, 1, 2, 4, 8, 64)))
        match random_.randrange(7):
            case 0 if data:
                data[start % len(data)] ^= 1 << random_.randrange(8)
            case 1:
                del data[start:end]
            case 2:
                data[start:start] = data[start:end] * random_.choice((1, 2, 50))
            case 3:
                data[start:end] = random_.choice(WORDS)
            case 4:
                data[start:end] = random_.randbytes(end - start)
            case 5:
                other = random_.choice(seeds)
                data[start:] = other[random_.randrange(len(other) + 1) :]
            case _:
                del data[start + random_.randrange(40) :]
    return bytes(data)


def fed(decoder: Decoder, data: bytes, seen: set[str]) -> float:
    """Seconds of processor time that one input took."""
    began, message = time.thread_time(), "fine"
    try:
        decoder.read(data)
        seen.add("fine")
    except TetherError as error:
        message = error.message
    except BaseException as error:
        raise AssertionError(f"{decoder.name}: {type(error).__name__} for {data[:400]!r} (seed {SEED})") from error
    assert 0 < len(message) < 2000, (decoder.name, data[:400], SEED)
    assert "\n" not in message, (decoder.name, data[:400], SEED)
    return time.thread_time() - began


def swelled(decoder: Decoder, seen: set[str]) -> float:
    """Feed a decoder all its frames; megabytes that this process, in which more may run, grew by."""
    random_, process = random.Random(f"{SEED} {decoder.name}"), psutil.Process()
    before = process.memory_info().rss
    for _ in range(FRAMES):
        data = mutated(random_, decoder.seeds)
        took = fed(decoder, data, seen)
        if took >= SLOWEST_S:
            took = min(took, fed(decoder, data, seen), fed(decoder, data, seen))
        assert took < SLOWEST_S, f"{decoder.name}: {took:.3f} s for {data[:400]!r} (seed {SEED})"
    return float(process.memory_info().rss - before) / 1e6


@pytest.mark.parametrize("decoder", decoders(), ids=lambda decoder: decoder.name)
def test_mutated_bytes_only_raise_our_errors(decoder: Decoder, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f" seed {SEED}", end="")  # noqa: T201 - whoever must repeat a failure needs it
    seen = set[str]()
    for data in decoder.seeds:
        fed(decoder, data, seen)
    assert "fine" in seen, f"{decoder.name} takes none of its seeds: they are wrong"
    assert swelled(decoder, seen) < GROWTH_MB or swelled(decoder, seen) < GROWTH_MB, "the same frames, twice"


def test_a_run_is_a_hundred_thousand_frames() -> None:
    assert FRAMES * len(decoders()) >= 100_000 or "TETHER_TEST_FUZZ" in os.environ


@pytest.mark.parametrize("decoder", decoders(), ids=lambda decoder: decoder.name)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_shrinking_bytes_only_raise_our_errors(decoder: Decoder, data: st.DataObject) -> None:
    """The same with a generator that shrinks what it finds."""
    seed = data.draw(st.sampled_from(decoder.seeds))
    start = data.draw(st.integers(0, len(seed)))
    end = data.draw(st.integers(start, len(seed)))
    middle = data.draw(st.binary(max_size=40) | st.sampled_from(WORDS))
    fed(decoder, seed[:start] + middle + seed[end:], set())


FOUND = [
    ("chunk meta", b'{"name":"\x80","bucket":"b","nuid":"c","size":1,"mtime":"","chunks":1,"digest":""}'),
    ("chunk meta", b"[" * 100_000),
    ("ack", b'{"stream":"S","seq":1,"error":{"code":400,"err_code":10071}}'),
    ("ack", b'{"stream":"\xff","seq":1}'),
    ("query", b"state=" + b"a" * 5000),
    ("onnx", models.operator("Run", "evil\r\n\x1b[2J.ops")),
    ("json keys", b'{"a": 1, "\xff": "\\\\"}'),
    ("version note", b'{"' + b"l" * 5000 + b'": 1}'),
]
"""What a run found, kept."""


@pytest.mark.parametrize(("name", "data"), FOUND, ids=[f"{name} {data[:30]!r}" for name, data in FOUND])
def test_what_was_found_stays_mended(name: str, data: bytes) -> None:
    (decoder,) = [decoder for decoder in decoders() if decoder.name == name]
    fed(decoder, data, set())


BOMBS = {
    "a million empty maps": b"\xdd\x00\x0f\x42\x40" + b"\x80" * 1_000_000,
    "a megabyte of 0x80": b"\x80" * (1 << 20),
    "60,000 empty maps": b"\xdc\xea\x60" + b"\x80" * 60_000,
    "ten thousand deep": b"\x91" * 10_000,
    "ten thousand maps deep": b"\x81\xa1a" * 10_000,
    "an array of 2^32-1": b"\xdd\xff\xff\xff\xff",
    "a map of 2^32-1": b"\xdf\xff\xff\xff\xff",
    "bytes of 2^32-1": b"\xc6\xff\xff\xff\xff",
    "an extension of 2^32-1": b"\xc9\xff\xff\xff\xff\x05",
    "an extension": b"\xc7\x03\x05abc",
    "a timestamp": b"\xd6\xff\0\0\0\1",
    "a key twice": b"\x82\xa1a\x01\xa1a\x02",
    "bytes left over": b"\x01\x02",
    "text that is not UTF-8": b"\xa1\xff",
    "a size that is not a number": b"\x94\xa1x\xa4FP32\x91\xcb\x7f\xf8\0\0\0\0\0\0\xc4\0",
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("decoder", decoders(), ids=lambda decoder: decoder.name)
def test_a_bomb_costs_neither_memory_nor_time(decoder: Decoder, bomb: str) -> None:
    """S11: less than 20 MB and 50 ms of processor time (a second for those that read it as dozens of types)."""
    process, data = psutil.Process(), BOMBS[bomb]
    before = process.memory_info().rss
    seen: set[str] = set()
    took = min(fed(decoder, data, seen) for _ in range(3))  # the collector may strike once
    assert (process.memory_info().rss - before) / 1e6 < 20
    assert took < (1.0 if decoder.name in MANY else 0.05) * SLOWER


SLOWER = 5 if "coverage" in sys.modules else 1
"""Every line costs more while it is counted."""

MANY = ("structs", "bodies")


@pytest.mark.parametrize("bomb", [name for name in BOMBS if name != "60,000 empty maps"])
def test_a_bomb_is_bad_encoding(bomb: str) -> None:
    data = BOMBS[bomb]
    if bomb == "a size that is not a number":
        data = b"\x91\x98\xa1j\xa9succeeded\x91" + data + b"\xc0\x01\xa1w" + (b"\xcb" + b"\0" * 8) * 2
    with pytest.raises(BadEncoding) as caught:
        codec.decode_outcomes(data)
    assert caught.value.code == "bad_encoding"
