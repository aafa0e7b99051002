"""Refuse what turns data into code, or switches a check off: pickle and its kin, eval, shells, unverified TLS.

Reads every Python file as a syntax tree, so a name in a string or a comment is no finding. Exceptions are named, with a
reason.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("tether", "cli", "bench", "examples", "ops", "scripts", "tests")

EXCEPTIONS: dict[str, str] = {
    "tests/unit/cli/test_cli.py: allow_pickle=True loads code with its data": "writes what must be refused",
}
"""``path: finding`` -> why it is right there."""

MODULES = {
    **dict.fromkeys(
        ("pickle", "_pickle", "cPickle", "dill", "joblib", "cloudpickle", "jsonpickle", "shelve", "marshal"),
        "loads code with its data; use msgspec or tether.codec",
    ),
    "imp": "is gone from Python; use importlib",
    "telnetlib": "sends in the clear",
}
"""Modules that may not be imported, and why."""

CALLS = {
    "eval": "runs its argument",
    "exec": "runs its argument",
    "compile": "makes code of its argument",
    "os.system": "goes through a shell; use subprocess.run with a list",
    "os.popen": "goes through a shell; use subprocess.run with a list",
    "subprocess.getoutput": "goes through a shell; use subprocess.run with a list",
    "subprocess.getstatusoutput": "goes through a shell; use subprocess.run with a list",
    "asyncio.create_subprocess_shell": "goes through a shell; use create_subprocess_exec",
    "ssl._create_unverified_context": "verifies nobody",
    "tempfile.mktemp": "names a file that somebody else may make first",
    "yaml.load": "makes objects that the file names; use a JSON or TOML file",
    "yaml.unsafe_load": "makes objects that the file names; use a JSON or TOML file",
    "yaml.full_load": "makes objects that the file names; use a JSON or TOML file",
    "shutil.unpack_archive": "writes where the archive says",
}
"""Calls that may not be made, whatever their arguments, and why."""

METHODS = {
    "extractall": "writes where the archive says",
    "register_custom_ops_library": "loads a library into the process",
}
"""Methods that no object is asked for."""

REQUIRED = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
    "np.load": ("allow_pickle", False),
}
"""Calls that need an argument to be safe."""

FORBIDDEN = {
    "shell": (True, "goes through a shell"),
    "allow_pickle": (True, "loads code with its data"),
    "weights_only": (False, "loads code with its data"),
    "check_hostname": (False, "does not look whose certificate it is"),
}
"""Arguments that may not have this value in any call."""


HTTP_CLIENTS = ("httpx", "requests")


def findings(source: str, path: str) -> Iterator[str]:
    """One line for everything in a file that is refused."""
    tree = ast.parse(source, filename=path)
    aliases = dict(_imported(tree))
    for node in ast.walk(tree):
        for what in _judge(node, aliases):
            yield f"{path}:{getattr(node, 'lineno', 0)}: {what}"


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What names mean that the file imported: ``from subprocess import run as go`` makes ``go`` subprocess.run."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _judge(node: ast.AST, aliases: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from _modules(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield from _modules([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    elif isinstance(node, ast.Call):
        yield from _call(node, aliases)
    elif isinstance(node, ast.Attribute) and node.attr == "CERT_NONE":
        yield "CERT_NONE verifies nobody"
    elif isinstance(node, ast.Assign):
        yield from _assigned(node)


def _modules(names: Iterator[str] | list[str]) -> Iterator[str]:
    for name in names:
        root = name.partition(".")[0]
        for found in {name, root} & set(MODULES):
            yield f"import of {found}: it {MODULES[found]}"


def _call(node: ast.Call, aliases: dict[str, str]) -> Iterator[str]:
    name = _name(node.func, aliases)
    if name in CALLS:
        yield f"{name}() {CALLS[name]}"
    if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
        yield f".{node.func.attr}() {METHODS[node.func.attr]}"
    if name in ("__import__", "importlib.import_module") and node.args:
        yield from _modules([str(_constant(node.args[0]))])
    given = {keyword.arg: _constant(keyword.value) for keyword in node.keywords if keyword.arg}
    if name in REQUIRED:
        argument, value = REQUIRED[name]
        if given.get(argument) is not value:
            yield f"{name}() without {argument}={value}"
    if name.partition(".")[0] in HTTP_CLIENTS and given.get("verify") is False:
        yield "verify=False verifies nobody"
    for argument, (value, why) in FORBIDDEN.items():
        if argument in given and given[argument] is value:
            yield f"{argument}={value} {why}"


def _assigned(node: ast.Assign) -> Iterator[str]:
    for target in node.targets:
        if isinstance(target, ast.Attribute) and target.attr in FORBIDDEN:
            value, why = FORBIDDEN[target.attr]
            if _constant(node.value) is value:
                yield f"{target.attr} = {value} {why}"


def _name(node: ast.expr, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value, aliases)}.{node.attr}"
    return ""


def _constant(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else node


def main() -> int:
    """Print what is refused; 1 when anything is."""
    root = Path(__file__).resolve().parent.parent
    paths = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    found = [line for path in paths for line in findings(path.read_text(), str(path.relative_to(root)))]
    unnumbered = {line: f"{line.split(':')[0]}: {line.split(': ', 1)[1]}" for line in found}
    complaints = [line for line in found if unnumbered[line] not in EXCEPTIONS]
    complaints += [f"{key}: not found; remove its exception" for key in EXCEPTIONS.keys() - set(unnumbered.values())]
    for complaint in complaints:
        print(complaint)
    print(f"safety: {len(paths)} files, {len(complaints)} findings", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
