"""TLS to a real broker, and what a service says, within seconds, when it cannot get through (S27)."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from support.brokers.brokers import Broker, embedded, temporary_home, wait_until

from tether.broker.embedded_server import Binary, EmbeddedServer, reload_embedded
from tether.bus.session import connect
from tether.errors import BrokerUnavailable, ConfigError
from tether.identity.certificates import expires_at, make_certificates
from tether.identity.keys import create_home
from tether.process.data_dir import Home
from tether.settings import Settings
from tether.streams.layout import ensure_platform


@pytest.fixture
async def secure(home: Home, nats_binary: Binary) -> AsyncIterator[Broker]:
    """An embedded broker that speaks TLS, with the certificates of its home."""
    make_certificates(home, [])
    async with embedded(home, nats_binary, embedded_tls="on") as broker:
        yield broker


async def test_services_and_broker_show_each_other_certificates(secure: Broker) -> None:
    assert secure.url.startswith("tls://127.0.0.1:")
    async with connect(secure.settings, secure.home, "dispatcher") as bus:
        await ensure_platform(bus, secure.settings)
        assert bus._client._transport._io_writer.get_extra_info("ssl_object").version() == "TLSv1.3"
    assert await asyncio.to_thread(reload_embedded, secure.home, secure.settings)


async def test_a_connection_over_tls_comes_back_over_tls(secure: Broker) -> None:
    assert secure.server is not None
    async with connect(secure.settings, secure.home, "gateway") as bus:
        await secure.server.kill()
        await secure.server.start()
        assert await bus.wait_connected(10)
        await bus.flush()


async def test_certificates_are_renewed_while_the_broker_runs(secure: Broker) -> None:
    """A reload takes the new ones; the authority stays, so whoever trusted it still does."""
    authority = secure.home.tls_file("ca.crt").read_bytes()
    before = secure.home.tls_file("server.crt").read_bytes()
    make_certificates(secure.home, ["broker.example"])
    assert secure.home.tls_file("server.crt").read_bytes() != before
    assert secure.home.tls_file("ca.crt").read_bytes() == authority
    assert await asyncio.to_thread(reload_embedded, secure.home, secure.settings)
    async with connect(secure.settings, secure.home, "gateway") as bus:
        await bus.flush()


async def test_the_embedded_broker_says_which_certificate_is_missing(home: Home, nats_binary: Binary) -> None:
    settings = Settings(home=str(home.root), embedded_tls="on")
    with pytest.raises(ConfigError, match="tether init --tls"):
        await EmbeddedServer(home, settings, binary=nats_binary).start()


def test_the_authority_is_locked_with_the_passphrase(tmp_path: Path) -> None:
    home = Home(tmp_path)
    make_certificates(home, ["a.example", "10.0.0.1"], passphrase="open sesame")
    assert b"ENCRYPTED" in home.authority_key.read_bytes()
    make_certificates(home, [], passphrase="open sesame")
    for wrong in ("", "other"):
        with pytest.raises(ConfigError, match="passphrase"):
            make_certificates(home, [], passphrase=wrong)
    for file in (home.authority_key, home.tls_file("server.key"), home.tls_file("client.key")):
        assert file.stat().st_mode & 0o077 == 0
    assert timedelta(days=390) < expires_at(home) - datetime.now(UTC) < timedelta(days=400)


@pytest.mark.parametrize("host", ["", "a b", "https://a", "a,b", "é.example"])
def test_a_host_that_is_none_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="host name"):
        make_certificates(Home(tmp_path), [host])


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r"tether\[tls\]"):
        make_certificates(Home(tmp_path), [])


@pytest.mark.parametrize("passphrase", ["", "open sesame"])
async def test_a_service_elsewhere_gets_a_certificate_of_its_own(
    home: Home, nats_binary: Binary, tmp_path: Path, passphrase: str
) -> None:
    make_certificates(home, [], passphrase=passphrase)
    folder = tmp_path / "elsewhere"
    words = ["identity", "add", "worker-9", "--role", "worker", "--out", str(folder), "--data-dir", str(home.root)]
    async with embedded(home, nats_binary, embedded_tls="on") as broker:
        status, said, _ = await service(*words, root_passphrase=passphrase)
        assert status == 0, said
        assert await asyncio.to_thread(reload_embedded, home, broker.settings)
        there = Home(folder)
        names = {path.name for path in folder.rglob("*") if path.is_file()}
        assert names == {
            *("root.pub", "keyset", "worker-9.identity", "nats-worker-9.seed"),
            *("ca.crt", "client.crt", "client.key"),
        }
        assert there.tls_file("client.crt").read_bytes() != home.tls_file("client.crt").read_bytes()
        settings = Settings(nats_url=broker.url, home=str(folder))
        async with connect(settings, there, "worker-9") as bus:
            await bus.flush()


# what nats-py does not do


async def test_an_answer_that_comes_after_its_asker_left_does_no_harm(broker: Broker) -> None:
    async with connect(broker.settings, broker.home, "gateway", follow=False) as bus:
        asker = asyncio.create_task(bus.flush())
        while not bus._client._pongs:
            await asyncio.sleep(0)
        asker.cancel()
        await asyncio.gather(asker, return_exceptions=True)
        assert asker.cancelled()
        await asyncio.wait_for(bus.flush(), 2)


async def test_refused_connections_leave_no_socket_open(secure: Broker, other_authority: Path) -> None:
    """Not even until the garbage collector comes by."""
    port = int(secure.url.rpartition(":")[2])
    settings = dataclasses.replace(secure.settings, nats_ca=str(other_authority))
    gc.disable()
    try:
        for _ in range(3):
            with pytest.raises(BrokerUnavailable):
                async with connect(settings, secure.home, "gateway"):
                    pass

        def left() -> list[object]:
            found = psutil.Process().net_connections("tcp")
            return [one for one in found if one.raddr and one.raddr.port == port]

        await wait_until(lambda: not left(), "every socket is closed", 2)
    finally:
        gc.enable()


# what goes wrong


@asynccontextmanager
async def forwarded(broker: Broker, address: str) -> AsyncIterator[int]:
    """A port on another address of this machine behind which the broker answers."""
    target = int(broker.url.rpartition(":")[2])

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            return  # one side hung up
        finally:
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    server = await asyncio.start_server(connected, address, 0)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


@pytest.fixture
def other_authority(tmp_path: Path) -> Path:
    stranger = Home(tmp_path / "stranger")
    make_certificates(stranger, [])
    return stranger.tls_file("ca.crt")


async def service(*words: str, **given: str) -> tuple[int | None, bytes, float]:
    """Exit status, errors and seconds of a service's own process."""
    started = asyncio.get_running_loop().time()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TETHER_")}
    environment |= {f"TETHER_{name.upper()}": value for name, value in given.items() if value}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tether_cli", *words), env=environment, stdout=-1, stderr=-1
    )
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, errors, asyncio.get_running_loop().time() - started


async def refused(settings: Settings, home: Home) -> str:
    """What a service's own process prints when it cannot connect: one line, within five seconds."""
    names = ("nats_url", "nats_ca", "nats_cert", "nats_key")
    given = {name: getattr(settings, name) for name in names} | {"ops_port": "0", "log_level": "error"}
    status, errors, took = await service("dispatcher", home=str(home.root), **given)
    assert status != 0
    if took >= 5:  # a busy machine needs as long to start Python alone
        _, _, start = await service("dispatcher", "--help")
        assert took < 5 + 2 * start, f"it took {took:.1f} s"
    assert b"Traceback" not in errors
    lines = errors.decode().strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


async def test_another_nkey_is_named_as_the_cause(broker: Broker, tmp_path: Path) -> None:
    stranger = Home(tmp_path)
    create_home(stranger, workers=1)
    assert "refused this identity" in await refused(broker.settings, stranger)


async def test_a_service_without_tls_says_what_a_broker_with_tls_wants(secure: Broker) -> None:
    """It would go on with the authorities of the machine, which do not know ours."""
    plain = dataclasses.replace(secure.settings, nats_url=secure.url.replace("tls://", "nats://"))
    assert "set nats_ca" in await refused(plain, secure.home)


async def test_a_service_with_tls_does_not_go_on_in_plain(broker: Broker, other_authority: Path) -> None:
    settings = dataclasses.replace(broker.settings, nats_ca=str(other_authority))
    assert "the broker offers no TLS" in await refused(settings, broker.home)


async def test_another_authority_is_not_trusted(secure: Broker, other_authority: Path) -> None:
    settings = dataclasses.replace(secure.settings, nats_ca=str(other_authority))
    assert "certificate is not accepted" in await refused(settings, secure.home)


async def test_another_host_name_is_not_accepted(secure: Broker) -> None:
    """The certificate is for loopback; an address that it does not name is refused."""
    shifted = secure.url.replace("127.0.0.1", "127.0.0.2")
    for file in ("ca.crt", "client.crt", "client.key"):
        assert secure.home.tls_file(file).exists()
    async with forwarded(secure, "127.0.0.2") as port:
        settings = dataclasses.replace(secure.settings, nats_url=f"{shifted.rpartition(':')[0]}:{port}")
        assert "not valid for '127.0.0.2'" in await refused(settings, secure.home)


async def test_a_client_of_another_authority_is_not_let_in(secure: Broker, other_authority: Path) -> None:
    theirs = Home(other_authority.parents[1])
    settings = dataclasses.replace(
        secure.settings,
        nats_ca=str(secure.home.tls_file("ca.crt")),
        nats_cert=str(theirs.tls_file("client.crt")),
        nats_key=str(theirs.tls_file("client.key")),
    )
    assert "nats_cert and nats_key" in await refused(settings, secure.home)


async def test_an_expired_certificate_is_named_as_the_cause(home: Home, nats_binary: Binary) -> None:
    make_certificates(home, [], now=datetime.now(UTC) - timedelta(days=10), days=9)
    async with embedded(home, nats_binary, embedded_tls="on") as broker:
        assert "certificate has expired" in await refused(broker.settings, home)


async def test_a_broker_that_wants_a_certificate_says_so(secure: Broker) -> None:
    authority = secure.home.tls_file("ca.crt")
    with temporary_home() as bare:
        shutil.copytree(secure.home.keys, bare.keys, dirs_exist_ok=True)
        settings = dataclasses.replace(secure.settings, nats_ca=str(authority))
        assert "nats_cert and nats_key" in await refused(settings, bare)


async def test_a_setting_that_names_no_file_is_named(broker: Broker) -> None:
    settings = dataclasses.replace(broker.settings, nats_ca="/nonexistent/ca.crt")
    with pytest.raises(ConfigError, match="nats_ca"):
        async with connect(settings, broker.home, "gateway"):
            pass


async def test_a_key_that_others_may_read_is_refused(secure: Broker) -> None:
    secure.home.tls_file("client.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        async with connect(secure.settings, secure.home, "gateway"):
            pass


async def test_a_login_is_never_sent_to_a_broker_without_tls(broker: Broker, other_authority: Path) -> None:
    settings = dataclasses.replace(broker.settings, nats_ca=str(other_authority))
    with pytest.raises(BrokerUnavailable, match="offers no TLS"):
        async with connect(settings, broker.home, "gateway"):
            pass
