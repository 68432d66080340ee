"""The layout: which files stand where, what may import what, and how long things may get (CONTRIBUTING.md)."""

import ast
import functools
import subprocess
from pathlib import Path

import pytest
from golden import ROOT

ROOMS = ("clips", "kernels", "pictures", "runs", "weights", "tools")
PARSERS = ("get_args_parser", "common_parser", "inference_parser")  # functions that only list flags
METHOD = (  # what a reader of the papers must read
    *("masking_generator.py", "sampling.py", "modeling_blocks.py", "modeling_pretrain.py"),
    *("modeling_finetune.py", "targets.py", "engine_for_pretraining.py"),
)
LEVELS = (  # a file imports from its own level or below
    ("utils",),
    ("clips",),
    ("kernels", "modeling_blocks"),
    ("augment", "masking_generator", "modeling_finetune", "modeling_pretrain", "sampling", "targets", "probes"),
    ("optim", "datasets", "loaders"),
    ("runs", "pictures"),
    ("weights",),
    ("engine_for_pretraining", "engine_for_finetuning", "evaluation"),
    ("run_mae_pretraining", "run_class_finetuning", "tools", "benchmarks", "hubconf"),
)


@functools.cache
def product() -> list[Path]:
    """The Python files of the product: all but the tests, without what git ignores."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is not a git checkout")
    files = [ROOT / name for name in listed.stdout.splitlines() if not name.startswith("tests/")]
    return [file for file in files if file.is_file()]


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> set[str]:
    """The project's modules that a file imports, anywhere in it."""
    known, found = {module_name(f) for f in product()}, set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found & known if name not in ROOMS}


def level(module: str) -> int:
    room = module.split(".")[0]
    return next(number for number, names in enumerate(LEVELS) if room in names)


def test_the_top_level_holds_what_a_reader_of_the_papers_looks_for():
    files = [file for file in product() if file.parent == ROOT]
    assert len(files) <= 18
    assert {file.stem for file in files} == {
        name for names in LEVELS for name in names if (ROOT / f"{name}.py").is_file()
    }


def test_imports_run_downward():
    wrong = [
        (module_name(file), name)
        for file in product()
        for name in imports(file)
        if level(name) > level(module_name(file))
    ]
    assert not wrong


def test_imports_have_no_circles():
    graph = {module_name(file): imports(file) for file in product()}
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            path.append(module)
            for name in sorted(graph[module]):
                visit(name)
            done.add(path.pop())

    for module in graph:
        visit(module)


def test_rooms_import_no_loop_and_nobody_imports_a_program():
    for file in product():
        names = imports(file)
        assert not any(name.startswith("run_") for name in names), file
        if file.parent.name in ("clips", "runs", "weights", "pictures"):
            assert not any(name.startswith(("engine_", "tools", "evaluation")) for name in names), file
        if file.parent.name == "clips":
            assert all(name == "utils" or name.startswith("clips.") for name in names), file


def test_packages_hold_one_docstring():
    for file in product():
        if file.name == "__init__.py":
            (node,) = ast.parse(file.read_text()).body
            assert isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant), file


def length(node: ast.AST) -> int:
    """Lines of a function without its docstring."""
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node):
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


def test_no_function_is_longer_than_40_lines_and_no_file_than_300():
    """Functions that only list flags may be longer, and are not counted in their file."""
    long = []
    for file in product():
        text, flags = file.read_text(), 0
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if node.name in PARSERS:
                flags += length(node)
            elif length(node) > 40:
                long.append(f"{file.name}:{node.lineno} {node.name}: {length(node)} lines")
        if text.count("\n") - flags > 300:
            long.append(f"{file.name}: {text.count(chr(10)) - flags} lines")
    assert not long, "\n".join(long)


def test_the_method_stays_short():
    assert sum((ROOT / name).read_text().count("\n") for name in METHOD) < 1600
