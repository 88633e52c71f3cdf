"""The house: an import never points upwards, there are no circles, and training imports what it uses."""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

HEIGHTS = {  # of the layers; the longest name that a module begins with counts
    "main": 5,
    "visualize": 5,
    "utils.benchmark": 4,
    "utils.pictures": 4,
    "utils": 3,
    "utils.weights": 2,
    "datasets": 1,
    "network": 1,
    "utils.errors": 0,
    "utils.files": 0,
    "utils.cli": 0,
}
# main.py imports them for --test_only and --export.
NOT_IN_TRAINING = {"utils.against", "utils.card", "utils.weights.onnx"}
FILES = [
    *(ROOT / f"{name}.py" for name in ("main", "visualize")),
    *(path for folder in ("datasets", "network", "utils") for path in (ROOT / folder).rglob("*.py")),
]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def is_for_typing(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@cache
def imports(module):
    """Our modules that a module imports, inside functions too, but not for type checking only."""
    found, nodes = set(), [ast.parse(MODULES[module].read_text())]
    while nodes:
        node = nodes.pop()
        nodes += [] if is_for_typing(node) else list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return frozenset(found & MODULES.keys() - {module})


def height(module):
    return HEIGHTS[max((name for name in HEIGHTS if f"{module}.".startswith(f"{name}.")), key=len)]


def reached(module, *, without=frozenset()):
    """All modules that importing one imports."""
    seen, todo = set(), [module]
    while todo:
        new = imports(todo.pop()) - seen - without
        seen |= new
        todo += new
    return seen


@pytest.mark.parametrize("module", MODULES)
def test_no_import_points_upwards(module):
    assert {other for other in imports(module) if height(other) > height(module)} == set()


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_itself_through_others(module):
    assert module not in reached(module)


def test_training_imports_at_most_thirty_files_and_none_that_it_does_not_use():
    used = reached("main", without=NOT_IN_TRAINING)
    assert len([module for module in used if MODULES[module].read_text().strip()]) <= 30
    unused = (
        "network.sam",
        "utils.benchmark",
        "utils.pictures.report",
        "utils.pictures.sam",
        "datasets.prepare.check",
    )
    assert not [module for module in used if module.startswith(unused)]


def test_importing_main_loads_no_optional_package():
    text = "\n".join(Path(MODULES[module]).read_text() for module in reached("main", without=NOT_IN_TRAINING))
    top_level = {line for line in text.splitlines() if line.startswith(("import ", "from "))}
    optional = ("transformers", "onnx", "tensorboard", "scipy", "timm", "visdom", "sklearn")
    assert not [line for line in top_level if line.split()[1].startswith(optional)]
