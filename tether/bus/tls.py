"""TLS to the broker: which certificates a connection uses, and that none is made in plain where TLS is expected."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats.errors

import tether.bus.nats_client
from tether.errors import ConfigError
from tether.process.data_dir import Home, read_secret
from tether.settings import Settings


def _worth_saying(record: logging.LogRecord) -> bool:
    """asyncio remarks on each closed TLS connection of nats-py that it was closed on both sides."""
    return "eof_received() has no effect" not in str(record.msg)


logging.getLogger("asyncio").addFilter(_worth_saying)


class TlsMismatchError(nats.errors.Error):  # type: ignore[misc] # nats-py has no types
    """Broker and connection do not want the same of TLS; the text says what to change."""


@dataclass(frozen=True)
class ClientTls:
    """TLS of a connection; ``certificate``: it has one to show."""

    context: ssl.SSLContext
    certificate: bool


class TlsNatsClient(tether.bus.nats_client.NatsClient):
    """nats-py's client, where that goes on in plain text or leaves its sockets open."""

    certificate = False

    async def _process_info(self, info: dict[str, Any], *, initial_connection: bool = False) -> None:
        """Its own goes on in plain text when the server says that it needs no TLS."""
        if initial_connection and "tls" in self.options and not info.get("tls_required"):
            raise TlsMismatchError(
                "the broker offers no TLS, but nats_ca or a tls:// address asks for it; "
                "configure the broker's TLS or remove ours"
            )
        if initial_connection and info.get("tls_verify") and not self.certificate:
            raise TlsMismatchError("the broker wants a certificate; set nats_ca, nats_cert and nats_key")
        await super()._process_info(info, initial_connection=initial_connection)

    async def _process_connect_init(self) -> None:
        """With TLS 1.3 a server refuses our certificate after the handshake, and its reason is often lost."""
        try:
            await super()._process_connect_init()
        except ConnectionError as error:
            if "tls" not in self.options:
                raise
            raise TlsMismatchError(
                f"the broker ended the TLS connection ({type(error).__name__}), as it does when it refuses a certificate; "
                "check nats_cert and nats_key"
            ) from error

    async def _connect_to_server(self, s: Any) -> None:
        """Its own leaves the socket of an attempt that failed, and the one below TLS, to the garbage collector."""
        self._abort()
        await super()._connect_to_server(s)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        try:
            await super()._close(status, do_cbs)
        finally:
            self._abort()

    def _abort(self) -> None:
        """Close the sockets now; whoever should be told goodbye was."""
        for writer in (getattr(self._transport, name, None) for name in ("_io_writer", "_bare_io_writer")):
            if writer is not None:
                writer.transport.abort()


def client_context(settings: Settings, home: Home) -> ClientTls | None:
    """The TLS of a connection to ``settings.nats_url``; None when neither settings nor address ask for any.

    For a ``tls://`` address the files that ``tether init --tls`` made in ``home`` are the default. Then a server that
    wants TLS all the same is checked against the authorities of the machine.

    Raises:
        ConfigError: a file is missing, open to others, or not what it should be.
    """
    if not (settings.nats_ca or settings.nats_cert or "tls://" in settings.nats_url):
        return None
    authority = settings.nats_ca or _if_there(home.tls_file("ca.crt"))
    certificate = settings.nats_cert or _if_there(home.tls_file("client.crt"))
    key = settings.nats_key or _if_there(home.tls_file("client.key"))
    with_file("nats_ca", authority)
    try:
        context = ssl.create_default_context(cafile=authority or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"nats_ca '{authority}' is not a PEM certificate", field="nats_ca") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if certificate:
        with_file("nats_cert", certificate)
        read_secret(Path(key))
        try:
            context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"nats_cert '{certificate}' and nats_key '{key}' are not a PEM certificate and its key",
                field="nats_cert",
            ) from error
    return ClientTls(context, bool(certificate))


def with_file(name: str, path: str) -> None:
    """Insist that the file a setting names is there.

    Raises:
        ConfigError: with the setting's name.
    """
    if path and not Path(path).is_file():
        raise ConfigError(f"setting '{name}' names '{path}', which is not a file", field=name)


def _if_there(path: Path) -> str:
    return str(path) if path.exists() else ""
