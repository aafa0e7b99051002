"""Run the ``tether`` command as ``python -m tether_cli``."""

from __future__ import annotations

from tether_cli.main import main

if __name__ == "__main__":
    main()
