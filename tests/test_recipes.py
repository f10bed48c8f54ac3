"""Recipes fit the package: their settings load, and what their scripts import is there.

The scripts themselves need libraries and pictures that the tests do without.
"""

import ast
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from coreseg.config import GrpoConfig, SftConfig, load
from coreseg.data.build.build import BuildConfig

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


SETTINGS = {path: tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(RECIPES.glob("*/*.toml"))}
EXTENDED = {path.parent / values["extends"] for path, values in SETTINGS.items() if "extends" in values}


@pytest.mark.parametrize("recipe", [path for path in SETTINGS if path not in EXTENDED], ids=named)
def test_settings_are_valid(recipe: Path) -> None:
    kind = BuildConfig if recipe.parent.name == "data" else GrpoConfig if "grpo" in recipe.stem else SftConfig
    load(kind, recipe)


SCRIPTS = [path for path in sorted(RECIPES.rglob("*.py")) if "from coreseg" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_what_a_script_takes_from_the_package_is_there(script: Path) -> None:
    taken = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("coreseg")
        for alias in node.names
    ]
    for module, name in taken:
        assert hasattr(import_module(module), name), f"{module}.{name}"
