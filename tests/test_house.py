"""The structure of the program: which file imports which, and that importing does nothing."""

import ast
import re

import pytest
from conftest import ROOT

APART = {ROOT / "tests", ROOT / "benchmarks", *(found.parent for found in ROOT.glob("*/pyvenv.cfg"))}
FILES = sorted(path for path in ROOT.glob("**/*.py") if not APART & set(path.parents))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
FLOORS = [
    ["support"],
    ["losses", "googlenet", "auxiliaries", "data"],
    ["netlib", "datasets"],
    ["run"],
    ["report"],
    ["evaluate"],
    ["main"],
]
"""The rooms, files and folders, from the ground up: each imports from its own floor or one below."""


def imports_of(path):
    """Return the modules of the program that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= submodules or {node.module}
    return found & set(MODULES)


GRAPH = {name: imports_of(path) for name, path in MODULES.items()}


def test_imports_close_no_circle():
    done = set()

    def visit(name, way):
        assert name not in way, f"imports in a circle: {' -> '.join([*way, name])}"
        if name not in done:
            for other in sorted(GRAPH[name]):
                visit(other, [*way, name])
            done.add(name)

    for name in GRAPH:
        visit(name, [])
    assert done == set(MODULES)


def test_imports_go_down():
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    room_of = {name: name.split(".")[0] for name in MODULES}
    assert set(room_of.values()) == set(floor)
    upwards = [(name, other) for name in GRAPH for other in GRAPH[name] if floor[room_of[other]] > floor[room_of[name]]]
    assert not upwards


def test_no_module_is_run_by_its_name_in_a_string():
    for name, path in MODULES.items():
        assert not re.search(r"runpy|import_module\(\s*[\"']|__import__", path.read_text()), name


def test_nothing_imports_main():
    assert not [name for name in GRAPH if "main" in GRAPH[name]]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_importing_does_nothing(name):
    """At the top level stand definitions, constants and what runs as a program: no call by itself, no loop."""
    for node in ast.parse(MODULES[name].read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_program = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        allowed = (
            ast.Import,
            ast.ImportFrom,
            ast.FunctionDef,
            ast.ClassDef,
            ast.Assign,
            ast.AnnAssign,
            ast.AugAssign,
            ast.Try,
        )
        assert is_docstring or is_program or isinstance(node, allowed), f"{name}:{node.lineno}"
