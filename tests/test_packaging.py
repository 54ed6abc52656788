"""What is installed is what is there, and imports point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"unlearn": 0, "attacks": 1, "evaluations": 2, "cli": 3}


def sources(room: str) -> list[Path]:
    skipped = {"attacks", "evaluations", "cli"} if room == "unlearn" else set()
    files = [
        p for p in (ROOT / room).rglob("*.py") if p.relative_to(ROOT / room).parts[0] not in skipped
    ]
    assert files
    return files


def test_every_folder_is_packaged() -> None:
    declared = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = set()
    for room in ROOMS:
        for file in sources(room):
            name = ".".join(file.parent.relative_to(ROOT).parts)
            found.add(name if name.startswith("unlearn") else f"unlearn.{name}")
    assert declared == found


def room_of(module: str) -> str:
    part = module.split(".")[1] if "." in module else ""
    return part if part in ROOMS else "unlearn"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    for file in sources(room):
        if file == ROOT / "unlearn" / "__init__.py":  # the face, see its comment
            continue
        if file.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            elif isinstance(node, ast.Import):
                modules = [a.name for a in node.names]
            for module in modules:
                if module.split(".")[0] == "unlearn":
                    assert ROOMS[room_of(module)] <= ROOMS[room], f"{file} imports {module}"


def test_methods_do_not_import_each_other() -> None:
    for file in (ROOT / "unlearn" / "methods").glob("*.py"):
        assert "unlearn.methods" not in file.read_text().replace('"""', ""), file


@pytest.mark.parametrize("folder", ["attacks", "evaluations", "cli"])
def test_a_folder_imported_by_its_own_name_says_what_to_do(folder: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "import that" in done.stderr


def test_importing_has_no_side_effects() -> None:
    code = (
        "import sys, random; before = random.getstate(); import unlearn, unlearn.cli.main; "
        "assert random.getstate() == before; "
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("recipe", sorted((ROOT / "unlearn" / "recipes").glob("*.yaml")))
def test_every_recipe_builds_and_is_named_by_its_method(recipe: Path) -> None:
    from unlearn import registry
    from unlearn.cli.methods import recipes
    from unlearn.config import read_yaml

    settings = read_yaml(recipe)
    registry.build(settings["method"], settings.get("set", {}))
    assert recipe.name in {Path(r["path"]).name for r in recipes(settings["method"])}
