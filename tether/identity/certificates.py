"""Creates a private certificate authority, and the certificates of the broker and its clients."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from tether.errors import ConfigError
from tether.process.data_dir import Home, read_secret, write_secret

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names in every server certificate."""

AUTHORITY_DAYS = 3650
DAYS = 397
"""Validity of broker and service certificates, in days."""

_EARLIER = timedelta(minutes=5)
"""Start of validity before now, because clocks differ."""


@dataclass(frozen=True)
class Issuer:
    """An unlocked authority: its certificates are valid from ``now`` for ``days``."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    now: datetime
    days: int


def make_certificates(
    home: Home, hosts: Sequence[str], *, passphrase: str = "", days: int = DAYS, now: datetime | None = None
) -> None:
    """Create the authority unless it exists, then new certificates for the broker under ``hosts`` and for services.

    The authority's key lies beside the root key, encrypted with ``passphrase`` if one is given. A second call
    renews the other two, which is safe while everything runs.

    Raises:
        ConfigError: 'cryptography' is not installed, a host is not a name, or the authority's key cannot be
    decrypted.
    """
    _require_library()
    now = datetime.now(UTC) if now is None else now
    if not home.authority_key.exists():
        _make_authority(home, passphrase, now)
    issuer = Issuer(*_open_authority(home, passphrase), now, days)
    names = [_host(name) for name in dict.fromkeys((*hosts, *LOOPBACK))]
    # servers of a cluster also act as clients of one another
    _issue(home, "server", issuer, names)
    _issue(home, "client", issuer, [])


def issue_client(home: Home, target: Home, name: str, *, passphrase: str = "") -> None:
    """Issue a certificate for the identity ``name`` to ``target``, another data directory, with the authority
    of ``home``.

    Raises:
        ConfigError: 'cryptography' is not installed, or the authority's key cannot be decrypted.
    """
    _require_library()
    issuer = Issuer(*_open_authority(home, passphrase), datetime.now(UTC), DAYS)
    write_secret(target.tls_file("ca.crt"), home.tls_file("ca.crt").read_bytes())
    _issue(target, "client", issuer, [], common=name)


def authority_locked(home: Home) -> bool:
    """Return whether the authority's key needs a passphrase."""
    return b"ENCRYPTED" in read_secret(home.authority_key)


def expires_at(home: Home) -> datetime:
    """Return when the first of the home's certificates expires.

    Raises:
        ConfigError: one is missing or unreadable, or 'cryptography' is not installed.
    """
    _require_library()
    from cryptography import x509  # noqa: PLC0415 - an optional dependency

    ends = []
    for name in ("ca", "server", "client"):
        path = home.tls_file(f"{name}.crt")
        try:
            ends.append(x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc)
        except (OSError, ValueError) as error:
            raise ConfigError(f"certificate {path} cannot be read; make it with 'tether init --tls'") from error
    return min(ends)


def _require_library() -> None:
    try:
        import cryptography  # noqa: F401, PLC0415 - an optional dependency
    except ImportError as error:
        raise ConfigError("certificates need the package 'cryptography'; install tether[tls]") from error


def _host(name: str) -> x509.GeneralName:
    from cryptography import x509  # noqa: PLC0415

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        if not name or len(name) > 253 or set(name) & set(" /:,"):
            raise ValueError(name)
        return x509.DNSName(name)
    except ValueError as error:
        raise ConfigError(f"'{name[:64]}' is neither a host name nor an IP address", field="host") from error


def _make_authority(home: Home, passphrase: str, now: datetime) -> None:
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415

    key = _new_key()
    name = _name("Tether broker authority")
    certificate = (
        _builder(name, name, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_secret(home.authority_key, _pem(key, passphrase))
    write_secret(home.tls_file("ca.crt"), _certificate_pem(certificate))


def _open_authority(home: Home, passphrase: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    data, locked = read_secret(home.authority_key), authority_locked(home)
    try:
        key = load_pem_private_key(data, passphrase.encode() if locked and passphrase else None)
        certificate = x509.load_pem_x509_certificate(home.tls_file("ca.crt").read_bytes())
    except (OSError, ValueError, TypeError) as error:
        hint = "give the passphrase of the root key" if locked else "restore both from their backup"
        raise ConfigError(f"{home.authority_key} and {home.tls_file('ca.crt')} cannot be opened; {hint}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise ConfigError(f"{home.authority_key} is not the key of {home.tls_file('ca.crt')}")
    return certificate, key


def _issue(home: Home, name: str, issuer: Issuer, hosts: list[x509.GeneralName], *, common: str = "") -> None:
    """Write a key and a certificate, issued to ``common``; with ``hosts`` it is a server certificate."""
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
    from cryptography.x509.oid import ExtendedKeyUsageOID  # noqa: PLC0415

    key = _new_key()
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH] + ([ExtendedKeyUsageOID.SERVER_AUTH] if hosts else [])
    builder = (
        _builder(
            _name(f"Tether {common or name}"), issuer.certificate.subject, key.public_key(), issuer.now, issuer.days
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    write_secret(home.tls_file(f"{name}.key"), _pem(key, ""))
    write_secret(home.tls_file(f"{name}.crt"), _certificate_pem(builder.sign(issuer.key, hashes.SHA256())))


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    from cryptography import x509  # noqa: PLC0415

    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    from cryptography import x509  # noqa: PLC0415

    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    from cryptography import x509  # noqa: PLC0415

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)])


def _new_key() -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    return ec.generate_private_key(ec.SECP256R1())


def _pem(key: ec.EllipticCurvePrivateKey, passphrase: str) -> bytes:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    lock: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        lock = serialization.BestAvailableEncryption(passphrase.encode())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    return certificate.public_bytes(Encoding.PEM)
