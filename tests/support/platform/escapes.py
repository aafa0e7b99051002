"""A Python model that tries to leave its process in every way that docs/security.md speaks of, and tells what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from support.models import bundles

from tether import Client
from tether.domain.tensor import Array

TEXT = {"datatype": "BYTES", "shape": [1]}
CODE = """
import ctypes, json, mmap, os, resource, socket, subprocess, sys, tempfile, threading, time
from pathlib import Path

import numpy as np

LIBC = ctypes.CDLL(None, use_errno=True)


def call(x86_64, aarch64, *arguments):
    found = LIBC.syscall(x86_64 if os.uname().machine == "x86_64" else aarch64, *arguments)
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def fork():
    if os.fork() == 0:
        os._exit(0)


class Model:
    def load(self, directory):
        self.own = Path(directory)
        self.home = next((path for path in self.own.parents if (path / "keys").exists()), Path("/nowhere"))
        assert list(self.own.iterdir()) and (self.own / "model.py").read_text()

    def predict(self, inputs):
        ask = json.loads(inputs["ask"].item() or '{"do": "leave"}')
        told = getattr(self, ask.pop("do"))(**ask)
        return {"told": np.array([json.dumps(told).encode()], np.object_)}

    def leave(self, paths=()):
        parent = os.getppid()
        home = self.home
        attempts = {
            "root key": lambda: (home / "keys" / "root.key").read_bytes(),
            "admin key": lambda: (home / "admin.key").read_bytes(),
            "identity": lambda: (home / "keys" / "worker-1.identity").read_bytes(),
            "seed": lambda: (home / "keys" / "nats-worker-1.seed").read_bytes(),
            "endpoints": lambda: (home / "run" / "endpoints.json").read_bytes(),
            "logs": lambda: (home / "logs" / "gateway.log").read_bytes(),
            "list the home": lambda: os.listdir(home),
            "list versions": lambda: os.listdir(self.own.parent),
            "list processes": lambda: os.listdir("/proc"),
            "passwd": lambda: Path("/etc/passwd").read_bytes(),
            "follow a link": lambda: self.follow(home / "admin.key"),
            "write into the home": lambda: (home / "run" / "written").write_text("x"),
            "write into its folder": lambda: (self.own / "model.py").write_text("x"),
            "write a library": lambda: open(os.__file__, "a"),
            "remove a key": lambda: os.unlink(home / "admin.key"),
            "move a key": lambda: os.rename(home / "admin.key", home / "moved"),
            "truncate a key": lambda: os.truncate(home / "admin.key", 0),
            "truncate what it reads": lambda: os.open(os.__file__, os.O_RDONLY | os.O_TRUNC),
            "open up a key": lambda: os.chmod(home / "admin.key", 0o666),
            "open up a file that it reads": lambda: os.fchmod(os.open(os.__file__, os.O_RDONLY), 0),
            "own a key": lambda: os.chown(home / "admin.key", os.getuid(), os.getgid()),
            "mark a key": lambda: os.setxattr(home / "admin.key", "user.x", b"x"),
            "shared memory": lambda: Path("/dev/shm/written").write_text("x"),
            "shared memory of System V": lambda: call(29, 194, 4711, 4096, 0o1600),
            "parent's environment": lambda: Path(f"/proc/{parent}/environ").read_bytes(),
            "parent's memory": lambda: open(f"/proc/{parent}/mem", "rb"),
            "parent's files": lambda: os.listdir(f"/proc/{parent}/fd"),
            "parent's command": lambda: Path(f"/proc/{parent}/cmdline").read_bytes(),
            "copy from the parent": lambda: call(310, 270, parent, 0, 0, 0, 0, 0),
            "trace the parent": lambda: call(101, 117, 0x4206, parent, 0, 0),
            "stop the parent": lambda: os.kill(parent, 19),
            "look for the parent": lambda: os.kill(parent, 0),
            "limit the parent": lambda: resource.prlimit(parent, resource.RLIMIT_NOFILE, (8, 8)),
            "slow the parent": lambda: os.setpriority(os.PRIO_PROCESS, parent, 19),
            "bind the parent": lambda: os.sched_setaffinity(parent, {0}),
            "outlive the parent": lambda: call(157, 167, 1, 0, 0, 0, 0),
            "TCP": lambda: socket.socket(socket.AF_INET).connect(("127.0.0.1", 4222)),
            "UDP": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 53)),
            "Unix sockets": lambda: socket.socket(socket.AF_UNIX).connect("/run/dbus/system_bus_socket"),
            "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0),
            "rings": lambda: call(425, 425, 8, ctypes.create_string_buffer(256)),
            "fork": fork,
            "programs": lambda: subprocess.run(["/bin/true"], check=True),
            "another program": lambda: os.execv(sys.executable, [sys.executable, "-c", ""]),
            "namespaces": lambda: call(272, 97, 0x10000000),
            "mounts": lambda: call(165, 40, b"none", b"/mnt", b"tmpfs", 0, b""),
            "keys of the kernel": lambda: call(250, 219, 0, -3, 1),
            "programs of the kernel": lambda: call(321, 280, 0, 0, 0),
            "performance counters": lambda: call(298, 241, 0, 0, -1, -1, 0),
            **{f"file {path}": lambda path=path: Path(path).read_bytes() for path in paths},
        }
        found = {name: self.tried(attempt) for name, attempt in attempts.items()}
        allowed = [name for name, how in found.items() if not how]
        if allowed:
            raise RuntimeError(f"the model was allowed: {allowed}")
        return found

    def tried(self, attempt):
        try:
            attempt()
        except OSError as error:
            return type(error).__name__
        return ""

    def follow(self, target):
        link = Path(tempfile.gettempdir()) / "link"
        link.symlink_to(target)
        link.read_bytes()

    def here(self):
        return {"pid": os.getpid(), "parent": os.getppid(), "environment": dict(os.environ), "uid": os.getuid()}

    def fill(self):
        written = 0
        try:
            with tempfile.TemporaryFile() as file:
                while written < 1 << 30:
                    written += file.write(bytes(1 << 20))
        except OSError as error:
            return {"written": written, "error": type(error).__name__}
        return {"written": written, "error": ""}

    def count(self):
        made = 0
        try:
            while True:
                open(os.path.join(tempfile.gettempdir(), f"file-{made}"), "w").close()
                made += 1
        except OSError as error:
            return {"made": made, "error": type(error).__name__}

    def threads(self, most):
        over, made = threading.Event(), []
        threading.stack_size(1 << 16)
        try:
            for _ in range(most):
                made.append(threading.Thread(target=over.wait))
                made[-1].start()
        except RuntimeError:
            made.pop()
        finally:
            over.set()
        for thread in made:
            thread.join()
        return len(made)

    def shout(self, megabytes):
        for _ in range(megabytes << 10):
            os.write(2, b"x" * 1023 + b"\\n")
        return megabytes

    def hang(self):
        call(157, 167, 15, b"hanging", 0, 0, 0)
        while True:
            time.sleep(0.01)
"""


def write(folder: Path) -> Path:
    inputs, outputs = [{"name": "ask", **TEXT}], [{"name": "told", **TEXT}]
    return bundles.write(folder, code=CODE, inputs=inputs, outputs=outputs, maxBatchSize=0)


def question(do: str, **more: Any) -> dict[str, Array]:
    return {"ask": np.array([json.dumps({"do": do, **more}).encode()], np.object_)}


def ask(client: Client, do: str, **more: Any) -> Any:
    """What the model, pushed as ``escapes``, tells."""
    return json.loads(client.infer("escapes", question(do, **more))["told"].item())
