"""Finds the server's URL and the API key of a client."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

from tether.environment import ClientEnvironment, client_environment
from tether.errors import ConfigError
from tether.process.data_dir import Home, read_secret

DEFAULT_URL = "http://127.0.0.1:8000"
_LOCAL = ("127.0.0.1", "localhost", "::1")


def resolve_url(url: str | None, environment: ClientEnvironment) -> str:
    """Return ``url``, else TETHER_URL, else that of the platform in the data directory, else port 8000 of
    this machine.

    Raises:
        ConfigError: it is not an HTTP URL.
    """
    found = url or environment.url or _running_url(environment) or DEFAULT_URL
    if not _well_formed(found):
        raise ConfigError(f"'{found}' is not a URL like {DEFAULT_URL}", field="url")
    return found.rstrip("/")


def _well_formed(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and len(url.split()) == 1
    except ValueError:
        return False


def _running_url(environment: ClientEnvironment) -> str:
    try:
        return str(json.loads(Home.at(environment.home).endpoints.read_bytes())["http"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def resolve_key(url: str, api_key: str | None, environment: ClientEnvironment) -> str:
    """Return ``api_key``, else TETHER_API_KEY, else the data directory's admin key if ``url`` is this
    machine.

    Strips surrounding white space: files with secrets often end in a newline.

    Raises:
        ConfigError: others may read the admin key's file, or the key has a character that headers cannot
            contain.
    """
    for where, text in (("the argument api_key", api_key), ("TETHER_API_KEY", environment.api_key)):
        if text and (key := text.strip()):
            return _checked(where, key)
    file = Home.at(environment.home).admin_key
    if not is_local(url) or not file.is_file():
        return ""
    return _checked(str(file), read_secret(file).decode("utf-8", "replace").strip())


def _checked(where: str, key: str) -> str:
    for place, letter in enumerate(key, 1):
        if not "!" <= letter <= "~":
            raise ConfigError(
                f"the API key in {where} has the character {letter!a} at position {place} of {len(key)}; "
                "keys have letters, digits, '_' and '-' only",
                field="api_key",
            )
    return key


def where_keys_are(url: str) -> str:
    """Return an error text that lists the places searched for an API key."""
    looked = "the argument api_key, TETHER_API_KEY"
    if is_local(url):
        looked += f" and {Home.at(client_environment().home).admin_key}"
    elsewhere = "; run it in the folder of 'tether up', or set TETHER_API_KEY" if is_local(url) else ""
    return f"no API key found (searched {looked}){elsewhere}"


def is_local(url: str) -> bool:
    """Return True if ``url`` is a loopback address of this machine."""
    return urlsplit(url).hostname in _LOCAL


def resolve(url: str | None, api_key: str | None) -> tuple[str, str]:
    """Return URL and API key (empty: none) from arguments, the environment or the data directory, in this
    order."""
    environment = client_environment()
    found = resolve_url(url, environment)
    return found, resolve_key(found, api_key, environment)
