"""Imports point one way, and the source stays free of a few things that no reader wants to find in it.

Reads the source as text, imports nothing of it: `scripts/check` runs this file before every commit.
"""

import ast
import gzip
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SOURCE = REPO / "src" / "coreseg"
MODULES = sorted(SOURCE.rglob("*.py"))

# From the ground up. A unit is a module or a folder of `coreseg`; it may import what stands on a line above its own.
LEVELS = (
    {"errors", "types", "nouns"},
    {"answer", "sentences", "statements", "questions", "masks", "metrics", "imaging", "config"},
    {"sam2"},
    {"nano"},
    {"model"},
    {"segmenter", "outputs"},
    {"data", "train", "evaluate", "serve"},
    {"cli_options", "testing", "testing_models"},
    {"cli_data"},
    {"fit"},
    {"cli"},
)
KNOWN = frozenset[str]().union(*LEVELS)
# (importer, imported) on one line.
SIDEWAYS = {
    ("imaging", "masks"),
    ("questions", "masks"),
    ("questions", "sentences"),
    ("statements", "masks"),
    ("statements", "sentences"),
    ("evaluate", "data"),
    ("train", "data"),
    ("train", "evaluate"),
}
# (importer, imported) against the direction, and only inside a function.
UPWARDS = {
    ("types", "imaging"): "Result.overlay() is where a user looks for the picture",
}
# The facade gathers the public names from wherever they live; nothing but its version may be taken back from it.
FACADE = "__init__"


def unit_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Every unit of the package that a module imports, and whether it does so inside a function."""
    lazy = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write it out from `coreseg`"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "coreseg" and rest != ["__version__"]:
                yield (rest[0] if rest and rest[0] in KNOWN else FACADE), id(node) in lazy


def level_of(unit: str) -> int:
    return next(level for level, members in enumerate(LEVELS) if unit in members)


def complaint(importer: str, imported: str, inside_function: bool) -> str | None:
    """Why this import breaks the rules, or None."""
    if importer in (FACADE, imported):
        return None
    if imported == FACADE:
        return "takes a name from `coreseg` itself: import it from the module that it lives in"
    if level_of(imported) < level_of(importer) or (importer, imported) in SIDEWAYS:
        return None
    if (importer, imported) in UPWARDS:
        return None if inside_function else "may do so inside a function only"
    return "is against the direction of imports"


def broken_rules(source: str, importer: str) -> list[str]:
    found = []
    for imported, inside_function in imports(ast.parse(source)):
        reason = complaint(importer, imported, inside_function)
        if reason:
            found.append(f"{importer} imports {imported}: {reason}")
    return found


def test_every_unit_has_its_level() -> None:
    assert {unit_of(path) for path in MODULES} <= KNOWN | {FACADE}, "a new module or folder: give it a line in LEVELS"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    assert broken_rules(path.read_text(encoding="utf-8"), unit_of(path)) == []


@pytest.mark.parametrize(
    ("importer", "source", "count"),
    [
        ("cli", "from coreseg.segmenter import Segmenter", 0),
        ("model", "from coreseg.nano.vision import register", 0),
        ("nano", "from coreseg.model.core_seg import CoreSeg", 1),
        ("masks", "from coreseg.segmenter import Segmenter", 1),
        ("masks", "def late():\n    import coreseg.segmenter", 1),
        ("masks", "from coreseg import segmenter, errors", 1),
        ("masks", "from coreseg import Segmenter", 1),
        ("cli", "from coreseg import __version__", 0),
        ("types", "def late():\n    from coreseg.imaging import overlay", 0),
        ("types", "from coreseg.imaging import overlay", 1),
        ("masks", "from coreseg.metrics import dice", 1),
        ("masks", "from coreseg.masks import tight_box", 0),
        ("masks", "import numpy, coresegment", 0),
    ],
)
def test_the_rules_catch_what_they_should(importer: str, source: str, count: int) -> None:
    assert len(broken_rules(source, importer)) == count


def test_no_ring_of_imports() -> None:
    """The allowed sideways steps must not add up to a circle."""
    graph: dict[str, set[str]] = {unit: set() for unit in KNOWN}
    for importer, imported in SIDEWAYS:
        assert level_of(importer) == level_of(imported), f"{importer} and {imported} are not on one line"
        graph[importer].add(imported)
    assert list(TopologicalSorter(graph).static_order())


def calls(tree: ast.Module) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    """Every call in a module: its dotted name as written, and its keyword arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: word.value for word in node.keywords if word.arg}


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def unsafe(source: str) -> list[str]:
    """What in this source runs, or could run, code that came with data."""
    tree = ast.parse(source)
    found = []
    for name, keywords in calls(tree):
        if name in ("eval", "exec"):
            found.append(f"{name}()")
        if name == "torch.load" and not is_true(keywords.get("weights_only")):
            found.append("torch.load without weights_only=True")
        if is_true(keywords.get("trust_remote_code")):
            found.append("trust_remote_code=True")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_runs_foreign_code(path: Path) -> None:
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source", ["eval(text)", "torch.load(path)", "AutoModel.from_pretrained(name, trust_remote_code=True)"]
)
def test_foreign_code_is_caught(source: str) -> None:
    assert len(unsafe(source)) == 1


def test_a_model_in_eval_mode_is_fine() -> None:
    assert unsafe("model.eval(); torch.load(path, weights_only=True)") == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_annotations_stay_objects(path: Path) -> None:
    """The tests check shapes through the annotations, which the future import would turn into strings."""
    assert "from __future__ import annotations" not in path.read_text(encoding="utf-8")


MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home|Users)/\w")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".sh", ".txt", ".json", ".jsonl", ".gz", ".cff", ""}
FOLDERS = (".ci", "src", "tests", "scripts", "recipes", "benchmarks", "docs", "examples")


def text_of(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", errors="replace")


def test_no_path_of_a_machine() -> None:
    files = [path for path in REPO.iterdir() if path.is_file() and path.name != ".git"]  # a file in a git worktree
    files += [path for folder in FOLDERS for path in (REPO / folder).rglob("*") if path.is_file()]
    found = [
        f"{path.relative_to(REPO)}:{number}"
        for path in files
        if path.suffix in TEXT_SUFFIXES and path.stat().st_size < 1_000_000
        for number, line in enumerate(text_of(path).splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert not found, "a path of somebody's machine: write it relative to the repository"


def test_a_machine_path_is_caught() -> None:
    assert MACHINE_PATH.search("cd " + "/".join(["", "work", "main"]))
    assert not MACHINE_PATH.search(
        "/".join(["see docs", "work", "home", "page.md or https://example.org", "work", "it"])
    )
