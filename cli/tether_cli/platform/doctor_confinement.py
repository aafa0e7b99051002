"""What ``tether doctor`` says about the confinement of models' processes: what the kernel offers, and what a trial came to."""

from __future__ import annotations

from collections.abc import Iterator

from tether.errors import ModelRejected
from tether.process.data_dir import Home
from tether.sandbox import plan, trial
from tether.settings import Settings
from tether_cli.platform.doctor_finding import Finding

_FIX = "run Linux 5.13 or newer with Landlock (add it to 'lsm=' of the boot), or set TETHER_MODEL_CONFINEMENT=available"
_FULL_ABI = 6
"""From here on Landlock keeps signals and abstract sockets apart; before that seccomp does."""


def confinement(settings: Settings, home: Home) -> Iterator[Finding]:
    """One line for what the kernel has, one for the trial, one for each thing that models will miss."""
    mode = settings.model_confinement
    if mode == plan.OFF:
        fix = "set TETHER_MODEL_CONFINEMENT=required, or give the scope models:code only to people you trust with the root key"
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
        yield Finding("fail", f"models: {error}", "see that Python and the packages can be read by this user")
        return
    if result.allowed:
        what = f"models: a confined process was allowed to {', '.join(result.allowed)}"
        yield Finding("fail", what, "do not let anybody push programs here, and report it")
    else:
        yield Finding("ok", "models: a confined process tried to leave (files, processes, network) and was refused")
    if settings.model_scratch_mb and not result.scratch:
        what = "models: they have no folder for temporary files, the kernel allows no mount namespace here"
        yield Finding("warn", what, "allow user namespaces, or ignore it where no model needs such files")
