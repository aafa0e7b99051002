"""Checks the confinement of model processes for ``tether doctor``: kernel features, and a trial."""

from __future__ import annotations

from collections.abc import Iterator

from tether.errors import ModelRejected
from tether.process.data_dir import Home
from tether.sandbox import plan, trial
from tether.settings import Settings
from tether_cli.platform.doctor_finding import Finding

_FIX = "run Linux 5.13 or newer with Landlock (add it to 'lsm=' of the boot), or set TETHER_MODEL_CONFINEMENT=available"
_FULL_ABI = 6
"""From this ABI on Landlock isolates signals and abstract sockets; before, seccomp does."""


def confinement(settings: Settings, home: Home) -> Iterator[Finding]:
    """Return a finding for the kernel, one for the trial, and one for each limitation of models."""
    mode = settings.model_confinement
    if mode == plan.OFF:
        fix = (
            "set TETHER_MODEL_CONFINEMENT=required, or grant the scope models:code only to people whom you "
            "trust with the root key"
        )
        yield Finding(
            "warn", "models: model_confinement is off, so a pushed program can read every key of this home", fix
        )
        return
    if lacking := plan.missing():
        if mode == plan.REQUIRED:
            yield Finding("warn", f"models: programs are refused, the kernel has no {lacking}", _FIX)
        else:
            yield Finding("warn", f"models: a pushed program can read keys, the kernel has no {lacking}", _FIX)
    else:
        abi, _ = plan.offered()
        older = "" if abi >= _FULL_ABI else f" (older than {_FULL_ABI}: seccomp does the rest)"
        yield Finding("ok", f"models: the kernel has Landlock ABI {abi}{older} and seccomp")
        yield from _trial(settings)
    for path in plan.hidden_paths(str(home.root)):
        what = f"models: their processes import nothing from {path}, because the data directory lies in it"
        yield Finding("warn", what, "choose another TETHER_HOME if models need modules from there")


def _trial(settings: Settings) -> Iterator[Finding]:
    try:
        result = trial.tried(settings.model_confinement, settings.model_scratch_mb)
    except (OSError, ModelRejected) as error:
        yield Finding("fail", f"models: {error}", "give this user the right to read Python and its packages")
        return
    if result.allowed:
        what = f"models: a confined process was allowed to {', '.join(result.allowed)}"
        yield Finding("fail", what, "allow no pushes of programs here, and report it")
    else:
        yield Finding("ok", "models: a confined process tried to leave (files, processes, network) and was refused")
    if settings.model_scratch_mb and not result.scratch:
        what = "models: no folder for temporary files, because the kernel allows no mount namespace here"
        yield Finding("warn", what, "allow user namespaces, or ignore it where no model needs such files")
