"""Confine this process, then run a module: ``python -m tether.sandbox.enter PLAN MODULE ARGUMENT...``.

It must not import anything that starts a thread: Landlock binds only the calling thread and those that it
starts later.
"""

from __future__ import annotations

import os
import resource
import runpy
import signal
import sys

import msgspec

from tether.process.os_process import lower_thread_priority, prefer_oom_kill
from tether.sandbox import kernel, landlock, namespaces, seccomp
from tether.sandbox.plan import OFF, REQUIRED, ConfinementPlan

_SET_PARENT_DEATH_SIGNAL = 1
_FILES = 4096


def main(arguments: list[str]) -> None:
    """Confine the process and run the module. Raises OSError if the kernel refuses; then nothing is run."""
    plan = msgspec.json.decode(arguments[0], type=ConfinementPlan)
    sys.argv = arguments[1:]
    confine(plan)
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


def confine(plan: ConfinementPlan) -> None:
    if plan.dies_first:
        prefer_oom_kill()
    if plan.behind:
        lower_thread_priority(os.getpid())
    _limit(plan)
    scratch = namespaces.leave(plan.scratch_mb, [path for path, _ in plan.rules])
    if scratch:
        os.environ.update(TMPDIR=scratch, HOME=scratch)
    if plan.mode != OFF and kernel.machine():
        namespaces.give_up_privileges()
    _die_with(plan.parent)  # set again: it was set at the start, and new privileges, as in a namespace, reset it
    if plan.mode != OFF:
        _restrict(plan, scratch)


def _limit(plan: ConfinementPlan) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_NOFILE, _FILES)
    if plan.file_mb:
        _lower(resource.RLIMIT_FSIZE, plan.file_mb << 20)


def _lower(what: int, limit: int) -> None:
    most = resource.getrlimit(what)[1]
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(what, (limit, limit))


def _die_with(parent: int) -> None:
    if kernel.machine():
        kernel.control(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def _restrict(plan: ConfinementPlan, scratch: str) -> None:
    abi, filters = landlock.abi(), seccomp.available()
    if plan.mode == REQUIRED and not (abi and filters):
        raise OSError("the kernel cannot confine this process")
    if abi:
        own = [(scratch, landlock.SCRATCH)] if scratch else []
        landlock.restrict([*plan.rules, *own], abi)
    if filters:
        seccomp.install(seccomp.models(os.getpid(), processes=plan.processes, abi=abi))


if __name__ == "__main__":
    main(sys.argv[1:])
