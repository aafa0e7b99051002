"""Lists the processes of homes below ``folder`` that were left by a script that was itself killed; with ``--end 1``, ends them."""

from __future__ import annotations

from pathlib import Path

from chaos.platform import processes_below
from chaos.report import arguments, say


def main() -> None:
    given = arguments(__doc__, end=0)
    for process in list(processes_below(Path(given.folder))):
        say(process.pid, " ".join(process.cmdline())[:100])
        if given.end:
            process.kill()


if __name__ == "__main__":
    main()
