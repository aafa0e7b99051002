"""TLS to the broker: selects certificates, and refuses plain connections where TLS is expected."""

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
    """Filter asyncio's remark that both sides closed a TLS connection of nats-py."""
    return "eof_received() has no effect" not in str(record.msg)


logging.getLogger("asyncio").addFilter(_worth_saying)


class TlsMismatchError(nats.errors.Error):  # type: ignore[misc] # nats-py has no types
    """Broker and connection require different TLS; the text says what to change."""


@dataclass(frozen=True)
class ClientTls:
    """TLS of a connection; ``certificate``: it has a client certificate."""

    context: ssl.SSLContext
    certificate: bool


class TlsNatsClient(tether.bus.nats_client.NatsClient):
    """nats-py's client without its fallback to plain text and its unclosed sockets."""

    certificate = False

    async def _process_info(self, info: dict[str, Any], *, initial_connection: bool = False) -> None:
        """Refuse a server without TLS; nats-py's own method continues in plain text."""
        if initial_connection and "tls" in self.options and not info.get("tls_required"):
            raise TlsMismatchError(
                "the broker offers no TLS, but nats_ca or a tls:// address asks for it; "
                "configure the broker's TLS or remove ours"
            )
        if initial_connection and info.get("tls_verify") and not self.certificate:
            raise TlsMismatchError("the broker requires a certificate; set nats_ca, nats_cert and nats_key")
        await super()._process_info(info, initial_connection=initial_connection)

    async def _process_connect_init(self) -> None:
        """Explain a closed connection: with TLS 1.3 a server refuses our certificate after the handshake,
        often without a reason.
        """
        try:
            await super()._process_connect_init()
        except ConnectionError as error:
            if "tls" not in self.options:
                raise
            raise TlsMismatchError(
                f"the broker ended the TLS connection ({type(error).__name__}), as it does when it "
                "refuses a certificate; "
                "check nats_cert and nats_key"
            ) from error

    async def _connect_to_server(self, s: Any) -> None:
        """Close the sockets of a failed attempt, including the one below TLS; nats-py leaves them to the
        garbage collector.
        """
        self._abort()
        await super()._connect_to_server(s)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        try:
            await super()._close(status, do_cbs)
        finally:
            self._abort()

    def _abort(self) -> None:
        """Close the sockets immediately, without a TLS goodbye."""
        for writer in (getattr(self._transport, name, None) for name in ("_io_writer", "_bare_io_writer")):
            if writer is not None:
                writer.transport.abort()


def client_context(settings: Settings, home: Home) -> ClientTls | None:
    """Return the TLS context for ``settings.nats_url``; None if neither settings nor address require TLS.

    For a ``tls://`` address the files that ``tether init --tls`` made in ``home`` are the default. Without
    them a server that requires TLS is verified against the machine's authorities.

    Raises:
        ConfigError: a file is missing, readable by others, or invalid.
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
    """Check that the file of a setting exists.

    Raises:
        ConfigError: with the setting's name.
    """
    if path and not Path(path).is_file():
        raise ConfigError(f"setting '{name}' names '{path}', which is not a file", field=name)


def _if_there(path: Path) -> str:
    return str(path) if path.exists() else ""
