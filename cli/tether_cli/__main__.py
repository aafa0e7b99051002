"""``python -m tether_cli``: the same as the ``tether`` command."""

from __future__ import annotations

from tether_cli.main import main

if __name__ == "__main__":
    main()
