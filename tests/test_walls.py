"""The walls between the layers, and how light the package is to import."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import vlm_dagster

PACKAGE = Path(vlm_dagster.__file__).parent
MODULES = sorted(
    path.relative_to(PACKAGE).as_posix()
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"  # importing it runs it
)

CORE = ("sealed/", "history/", "pointers/", "retention/", "events/", "engines/", "cores.py", "errors.py",
        "hashing.py", "schema.py", "storage.py", "windows.py")  # fmt: skip
TORCH_SIDE = ("loaders/", "models/", "training/")
DAGSTER_SIDE = ("assets/", "io_managers/", "definitions.py")


def imports(path: Path, *, at_load: bool) -> set[str]:
    """The modules that a file imports: all of them, or only what loading it imports."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not used here"
            found.add(str(node.module))
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.If) and at_load and "TYPE_CHECKING" in ast.unparse(node.test)
        ) or (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and at_load):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def packages(path: Path, *, at_load: bool = False) -> set[str]:
    return {name.split(".")[0] for name in imports(path, at_load=at_load)}


def below(*parts: str) -> list[str]:
    return [name for name in MODULES if name.startswith(parts)]


def test_every_part_is_there() -> None:
    for part in (*CORE, *TORCH_SIDE, *DAGSTER_SIDE):
        assert below(part), part


@pytest.mark.parametrize("module", below(*CORE))
def test_the_core_knows_neither_dagster_nor_torch_nor_ray(module: str) -> None:
    found = packages(PACKAGE / module)
    assert not found & {"dagster", "dagster_pipes", "torch", "torchdata", "ray"}
    ours = {name for name in imports(PACKAGE / module, at_load=False) if "vlm_dagster." in name}
    above = ("loaders", "models", "training", "assets", "io_managers", "components", "definitions")
    assert not {name for name in ours if name.split(".")[1] in above}


@pytest.mark.parametrize("module", below(*TORCH_SIDE))
def test_the_torch_side_does_not_know_dagster(module: str) -> None:
    assert "dagster" not in packages(PACKAGE / module)
    if not module.startswith("training/"):
        assert "dagster_pipes" not in packages(PACKAGE / module)
    ours = {name for name in imports(PACKAGE / module, at_load=False) if "vlm_dagster." in name}
    assert not {n for n in ours if n.split(".")[1] in ("assets", "io_managers", "definitions")}


@pytest.mark.parametrize("module", below(*DAGSTER_SIDE))
def test_the_dagster_side_does_not_load_torch(module: str) -> None:
    found = imports(PACKAGE / module, at_load=True)
    assert not {name.split(".")[0] for name in found} & {"torch", "torchdata", "safetensors"}
    assert not {n for n in found if n.startswith(("vlm_dagster.loaders", "vlm_dagster.models"))}


def test_only_the_graph_knows_torchdata() -> None:
    assert [m for m in MODULES if "torchdata" in packages(PACKAGE / m)] == ["loaders/graph.py"]


def test_only_the_engine_knows_duckdb_in_the_core() -> None:
    assert [m for m in below(*CORE) if "duckdb" in packages(PACKAGE / m)] == ["engines/external.py"]


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_importing_the_package_is_light() -> None:
    heavy = {
        "torch",
        "torchdata",
        "duckdb",
        "dagster",
        "ray",
        "polars",
        "pandas",
        "obstore",
        "typer",
    }
    assert not loaded_by("import vlm_dagster") & heavy


def test_importing_the_dagster_side_loads_no_torch() -> None:
    loaded = loaded_by("import vlm_dagster.definitions")
    assert "dagster" in loaded
    assert not loaded & {"torch", "torchdata", "duckdb", "ray"}


def test_the_loader_is_loaded_when_it_is_asked_for() -> None:
    assert "torch" in loaded_by("from vlm_dagster import SequenceLoader")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vlm_dagster.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", MODULES)
def test_the_names_of_a_module_are_sorted_and_complete(module: str) -> None:
    name = ".".join(("vlm_dagster", *Path(module).with_suffix("").parts)).removesuffix(".__init__")
    loaded = importlib.import_module(name)
    public = getattr(loaded, "__all__", None)
    if public is None:
        return
    assert sorted(public, key=_as_the_linter_sorts) == list(public)
    assert len(set(public)) == len(public)
    for item in public:
        assert hasattr(loaded, item), item
    if module.endswith("__init__.py"):
        offered = {
            item
            for item, value in vars(loaded).items()
            if (inspect.isclass(value) or inspect.isfunction(value))
            and value.__module__.startswith("vlm_dagster")
            and not item.startswith("_")
        }
        assert offered <= set(public)


def _as_the_linter_sorts(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_class_and_function_says_what_it_is(module: str) -> None:
    tree = ast.parse((PACKAGE / module).read_text())
    if not tree.body:
        return
    assert ast.get_docstring(tree), f"{module} has no docstring"
    public: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            public = set(ast.literal_eval(node.value))
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name in public:
            assert ast.get_docstring(node) or _is_obvious(node), f"{module}: {node.name}"


def _is_obvious(node: ast.AST) -> bool:
    """A function of three lines needs no words."""
    return isinstance(node, ast.FunctionDef) and len(node.body) <= 2
