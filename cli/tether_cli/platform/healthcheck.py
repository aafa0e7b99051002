"""``python -m tether_cli.platform.healthcheck URL``: exit 0 when the URL answers 200. For container health checks.

It needs only the standard library, so that a check every few seconds costs little.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

TIMEOUT_S = 3.0


def healthy(url: str) -> tuple[bool, str]:
    """Return whether the URL answers 200, and the error otherwise."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            return answer.status == 200, f"{url} answered {answer.status}"
    except urllib.error.HTTPError as error:
        return False, f"{url} answered {error.code}: {error.read(500).decode(errors='replace')}"
    except (OSError, ValueError) as error:
        return False, f"{url} does not answer: {error}"


def main() -> int:
    """Check the URL of the command line; return 0 if healthy, 1 if not, 2 on wrong usage."""
    if len(sys.argv) != 2 or not sys.argv[1].startswith(("http://", "https://")):
        print("usage: python -m tether_cli.platform.healthcheck http://HOST:PORT/readyz", file=sys.stderr)
        return 2
    good, words = healthy(sys.argv[1])
    if not good:
        print(words, file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
