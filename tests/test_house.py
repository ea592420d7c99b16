"""The house rules as tests, so that nobody has to nag: levels, sizes, errors, state, words.

Every check reads the source with `ast`; nothing of the package is imported.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sputnik"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BESIDE = sorted(path for folder in ("benchmarks", "scripts") for path in (ROOT / folder).glob("*.py"))

# An import may go down or stay inside its folder. `sputnik/__init__.py` is the door and stands above all.
FLOORS = {
    "errors": 0, "files": 0, "config": 1, "hardware": 1, "cost": 2, "text": 3, "tasks": 3, "model": 4, "engine": 5,
    "eval": 6, "train": 7, "recipe": 8, "serve": 9, "cli": 10, "__main__": 11,
}  # fmt: skip
TORCH_FREE = {"errors", "files", "config", "cost", "text", "tasks"}
OPTIONAL = {"transformers", "reasoning_gym", "math_verify", "matplotlib", "trl", "datasets", "gguf"}
PICKLES = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib"}
MAX_FILE, MAX_FUNCTION, MAX_KNOBS = 400, 80, 20
# What a module may call while it is imported: constructors (a capital letter), patterns, plain work on constants.
IMPORT_TIME_CALLS = {"frozenset", "tuple", "dict", "len", "range", "field", "join", "replace", "maketrans"}
IMPORT_TIME_CALLS |= {"compile", "escape", "getLogger", "partial"}
MUTATORS = {"append", "add", "update", "extend", "insert", "pop", "clear", "remove", "setdefault", "discard"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
INNER = {name: tree for name, tree in TREES.items() if name != "sputnik"}


def imports(tree: ast.Module, module: str) -> Iterator[tuple[str, int]]:
    """Every imported module with its line, also inside functions and under TYPE_CHECKING; ours resolved to the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: write the import in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in MODULES else str(node.module)), node.lineno


def folder_of(module: str) -> str:
    return module.split(".")[1]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def called_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def test_every_folder_has_a_floor() -> None:
    assert {folder_of(module) for module in INNER} <= set(FLOORS)


def test_imports_go_down() -> None:
    wrong = [
        f"{module}:{line} imports {target}"
        for module, tree in INNER.items()
        for target, line in imports(tree, module)
        if target.startswith("sputnik.")
        and folder_of(target) != folder_of(module)
        and FLOORS[folder_of(target)] >= FLOORS[folder_of(module)]
    ]
    assert not wrong, wrong


def test_the_tree_in_the_readme_goes_down_floor_by_floor() -> None:
    """It says that an import only ever goes to a line further down."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.split("\nsputnik/\n", 1)[1].split("\nrecipes/", 1)[0]
    lines = [{word.removesuffix(".py").strip("/") for word in line.split()} & set(FLOORS) for line in tree.splitlines()]
    assert set().union(*lines) == set(FLOORS)
    for above, below in pairwise(lines):
        assert min(FLOORS[name] for name in above) >= max(FLOORS[name] for name in below), (above, below)


def test_no_circles() -> None:
    graph = {
        module: {target for target, _ in imports(tree, module) if target in INNER and target != module}
        for module, tree in INNER.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_ground_and_text_and_tasks_need_no_torch() -> None:
    wrong = [
        f"{module}:{line}"
        for module, tree in INNER.items()
        if folder_of(module) in TORCH_FREE
        for target, line in imports(tree, module)
        if target.split(".")[0] == "torch"
    ]
    assert not wrong, wrong


def test_optional_packages_are_imported_inside_functions() -> None:
    wrong = [
        f"{module}:{node.lineno}"
        for module, tree in INNER.items()
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for target in ([a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)])
        if target.split(".")[0] in OPTIONAL
    ]
    assert not wrong, wrong


def test_no_pickle() -> None:
    wrong = []
    for module, tree in INNER.items():
        wrong += [f"{module}:{line}" for target, line in imports(tree, module) if target.split(".")[0] in PICKLES]
        wrong += [
            f"{module}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
            and node.attr in {"save", "load"}
        ]
    assert not wrong, wrong


@pytest.mark.parametrize("path", SOURCES + TESTS + BESIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    long = [f.name for f in functions(ast.parse(text)) if (f.end_lineno or 0) - f.lineno + 1 > MAX_FUNCTION]
    assert not long, f"over {MAX_FUNCTION} lines: {long}"


def test_every_module_says_what_it_is() -> None:
    assert not [module for module, tree in TREES.items() if not ast.get_docstring(tree)]


def test_no_module_is_called_utils() -> None:
    assert not [module for module in MODULES if re.search(r"util|helper|misc|common$", module)]


def test_a_stage_has_at_most_twenty_knobs() -> None:
    counts = {
        f"{module}.{node.name}": sum(isinstance(line, ast.AnnAssign) for line in node.body)
        for module, tree in INNER.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and node.name != "ModelConfig"
    }
    assert not {name: count for name, count in counts.items() if count > MAX_KNOBS}


def test_no_catch_all_and_no_silent_handler() -> None:
    wrong = []
    for module, tree in INNER.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            names = {getattr(name, "id", "") for name in ast.walk(node.type)} if node.type else {"Exception"}
            returns_or_raises = any(isinstance(inner, ast.Raise | ast.Return) for inner in ast.walk(node))
            if names & {"Exception", "BaseException"} and not returns_or_raises:
                wrong.append(f"{module}:{node.lineno} catches everything and goes on")
            if all(isinstance(line, ast.Pass | ast.Continue) for line in node.body):
                wrong.append(f"{module}:{node.lineno} swallows the error; contextlib.suppress says so aloud")
    assert not wrong, wrong


def test_no_feature_tests_by_hasattr_and_no_globals() -> None:
    wrong = []
    for module, tree in INNER.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                wrong.append(f"{module}:{node.lineno} global")
            if isinstance(node, ast.Call) and called_name(node) == "hasattr":
                wrong.append(f"{module}:{node.lineno} hasattr")
    assert not wrong, wrong


def test_modules_hold_no_mutable_state() -> None:
    """A list, dict or set on module level is a table: its name is in capitals and nobody in the file changes it."""
    wrong = []
    for module, tree in INNER.items():
        tables = set()
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            value = getattr(node, "value", None)
            containers = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, containers):
                for name in (target.id for target in targets if isinstance(target, ast.Name)):
                    tables.add(name)
                    if not (name.lstrip("_").isupper() or name == "__all__"):
                        wrong.append(f"{module}:{node.lineno} {name}")
        for node in ast.walk(tree):
            target = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
                target = node.func.value
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                target = node.value
            if isinstance(target, ast.Name) and target.id in tables:
                wrong.append(f"{module}:{node.lineno} changes {target.id}")
    assert not wrong, wrong


def test_importing_a_module_does_no_work() -> None:
    """On module level: definitions, constants, type names. No loops, no bare calls, no reading of files."""
    wrong = []
    for module, tree in INNER.items():
        for node in tree.body:
            if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
                continue
            if isinstance(node, ast.For | ast.While | ast.With | ast.Try):
                wrong.append(f"{module}:{node.lineno} {type(node).__name__.lower()} on module level")
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                wrong.append(f"{module}:{node.lineno} call on module level")
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                for call in (inner for inner in ast.walk(node.value) if isinstance(inner, ast.Call)):
                    name = called_name(call)
                    if not (name[:1].isupper() or name in IMPORT_TIME_CALLS):
                        wrong.append(f"{module}:{node.lineno} calls {name}() on import")
    assert not wrong, wrong


def test_public_functions_say_what_they_return() -> None:
    wrong = [
        f"{module}.{function.name}"
        for module, tree in INNER.items()
        for function in functions(tree)
        if function.returns is None
    ]
    assert not wrong, wrong


def test_tests_carry_only_the_two_marks() -> None:
    builtin = {"parametrize", "skipif", "skip", "filterwarnings", "timeout", "usefixtures", "xdist_group"}
    marks = {mark for path in TESTS for mark in re.findall(r"pytest\.mark\.(\w+)", path.read_text(encoding="utf-8"))}
    assert marks <= builtin | {"slow", "gpu"}


def test_no_path_of_one_machine_and_nothing_left_to_do() -> None:
    """Texts that ship name no folder of somebody's machine, and carry no unfinished notes."""
    foreign = re.compile(r"(?<![\w.}])/(?:home|work|root|Users|opt/\w+)/|\b(?:FIXME|XXX)\b|\bTODO\b")
    texts = [*SOURCES, *TESTS, *BESIDE, ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.toml")]
    wrong = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in texts
        if path != Path(__file__)
        for match in [foreign.search(path.read_text(encoding="utf-8"))]
        if match
    ]
    assert not wrong, wrong
