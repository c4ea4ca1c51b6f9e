"""Rules that hold the house together: import direction, sizes, packaging, no unsafe loading."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gspn2convert"
TOOLKIT = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
SOURCES = [*TOOLKIT, *KERNELS, *sorted((ROOT / "recipes" / "scripts").glob("*.py"))]

# Each layer may import itself and those below it.
LAYERS = (
    {"__main__"},
    {"cli"},
    {"commands"},
    {"distill", "export", "bench", "doctor", "plan", "infer"},
    {"conversion", "given", "lock", "export_sizes", "onnx_graph"},
    {"selection", "curriculum", "recover", "supply", "cost"},
    {"evaluate", "held_out"},
    {"stage", "train"},
    {"convert", "checkpoint", "optim"},
    {"fit", "taps", "losses", "graphs", "muon"},
    {"moments", "probes"},
    {"__init__", "artifact", "teachers"},
    {"weights", "config", "unfinished"},
    {"model", "session", "image_files", "fsdp"},
    {"block", "embedding"},
    {"mixer", "cache"},
    {"prefix", "onnx_norms"},
    {"vit", "data", "views", "images", "recipe", "mixing", "hub", "stream"},
    {"recipe_values", "differences", "shards", "tally", "demo_data", "regions", "onnx_function"},
    {"keep", "environment", "interrupt", "options", "processes", "progress", "providers"},
    {"recipe_parser", "splits"},
    {"errors"},
)
# The files that may know timm's insides; the others may only name its types.
KNOWS_TIMM = {"vit.py", "block.py", "model.py", "teachers.py", "config.py"}
TIMM_TYPE = re.compile(r"timm\.(models(\.vision_transformer)?\.VisionTransformer|layers\.Attention)")

every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run: those under `if TYPE_CHECKING` do not."""
    yield node
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield from walk(child)


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, at its top or inside a function."""
    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str | None:
    """The toolkit's module that a dotted name lies in; a subpackage counts as one module."""
    package, _, rest = name.partition(".")
    if package != "gspn2convert":
        return None
    module = rest.partition(".")[0] or "__init__"
    return module if (PACKAGE / module).is_dir() or (PACKAGE / f"{module}.py").exists() else "__init__"


def toolkit_imports() -> dict[str, set[str]]:
    """For each module of the toolkit the modules that it imports."""
    graph: dict[str, set[str]] = {}
    for path in TOOLKIT:
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        others = {module_of(name) for name in imported_names(path)} - {None, module}
        graph.setdefault(module, set()).update(others)
    return graph


def test_kernels_never_import_the_toolkit() -> None:
    for path in (ROOT / "kernels" / "gspn2_kernels").rglob("*.py"):
        assert not [name for name in imported_names(path) if name.startswith("gspn2convert")], path


def test_imports_of_the_toolkit_have_no_cycle() -> None:
    try:
        TopologicalSorter(toolkit_imports()).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_every_module_is_in_a_layer() -> None:
    assert sorted(toolkit_imports()) == sorted(module for layer in LAYERS for module in layer)


def test_imports_point_down_the_layers() -> None:
    level = {module: number for number, layer in enumerate(LAYERS) for module in layer}
    upward = [
        f"{module} imports {other}"
        for module, others in toolkit_imports().items()
        for other in others
        if module in level and other in level and level[other] < level[module]
    ]
    assert not upward


def test_only_commands_are_built_on_click_and_nothing_is_built_on_commands() -> None:
    for module, others in toolkit_imports().items():
        assert module in {"cli", "commands", "__main__"} or not others & {"cli", "commands"}, module


@every_source
def test_timm_is_known_in_one_place(path: Path) -> None:
    inside = [
        name
        for name in imported_names(path)
        if name.startswith(("timm.models", "timm.layers")) and not TIMM_TYPE.fullmatch(name)
    ]
    assert path.name in KNOWS_TIMM or not inside


@every_source
def test_nothing_is_unpickled(path: Path) -> None:
    imports = {name.partition(".")[0] for name in imported_names(path)}
    assert not imports & {"pickle", "cPickle", "dill", "joblib", "shelve"}
    assert not re.search(r"\btorch\.load\(|allow_pickle=True", path.read_text())


@every_source
def test_modules_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 300
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = len(node.body[0].value.value.splitlines()) if ast.get_docstring(node) else 0
            assert node.end_lineno - node.lineno + 1 - docstring < 40, f"{node.name}, line {node.lineno}"


def test_folder_of_the_kernels_is_no_package() -> None:
    # It would shadow PyPI's `kernels` for whoever works in the root of this repository.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_package_is_in_the_wheel() -> None:
    listed = re.search(r"^packages = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert listed
    folders = {path.parent.relative_to(ROOT).as_posix() for path in TOOLKIT if path.name == "__init__.py"}
    assert set(re.findall(r'"([^"]+)"', listed[1])) == {
        *(folder.replace("/", ".") for folder in folders),
        "gspn2convert.recipes",
        "gspn2_kernels",
    }
