"""The rooms of docs/architecture.md: imports point down the table, never back."""

import ast
import re
from pathlib import Path

import pytest

import turbopi

PACKAGE = Path(turbopi.__file__).parent
PICTURE = PACKAGE.parent / "docs" / "architecture.md"
ROOT = {"config", "errors", "files", "__init__"}
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "errors": set(),
    "files": set(),
    "kernels": {"errors", "files"},
    "model": ROOT,
    "transforms": ROOT,
    "checkpoint": ROOT | {"model", "transforms"},
    "quant": ROOT | {"model", "kernels"},
    "export": ROOT | {"model", "checkpoint", "quant"},
    "engine": ROOT | {"model", "kernels", "quant", "export"},
    "runtime": ROOT | {"model", "engine"},
    "policy": ROOT | {"model", "transforms", "checkpoint", "quant", "engine", "runtime"},
    "audit": ROOT | {"model", "checkpoint", "kernels", "quant", "engine", "policy", "frames", "sim"},
    "bench": ROOT | {"model", "checkpoint", "engine", "kernels", "quant", "policy"},
    "frames": ROOT | {"model", "transforms", "policy", "sim"},
    "serve": ROOT,
    "sim": ROOT | {"transforms", "quant", "policy", "serve"},
    "train": ROOT | {"model", "transforms", "checkpoint", "policy", "sim"},
    "report": ROOT,
    "cli": {"*"},
}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(file: Path) -> set[str]:
    """The rooms of this package that a file imports, at its top or inside functions."""
    package = ("turbopi", *file.relative_to(PACKAGE).parts[:-1])
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            path = (*base, *(node.module.split(".") if node.module else ()))
            names = [path] if len(path) > 1 else [(*path, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        rooms |= {name[1] if len(name) > 1 else "__init__" for name in names if name[0] == "turbopi"}
    return {room if room in MAY_IMPORT else "__init__" for room in rooms}


FILES = sorted(f for f in PACKAGE.rglob("*.py") if f != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    room = room_of(file)
    assert room in MAY_IMPORT, f"{room} is a new room: give it a line in docs/architecture.md and here"
    allowed = {*MAY_IMPORT, "__init__"} if MAY_IMPORT[room] == {"*"} else MAY_IMPORT[room]
    assert imported_rooms(file) <= allowed | {room}


def test_the_picture_shows_every_room() -> None:
    shown = set(re.findall(r"`([a-z]+)(?:/|\.py)`", PICTURE.read_text()))
    assert set(MAY_IMPORT) <= shown


def test_the_reader_sees_imports() -> None:
    assert imported_rooms(PACKAGE / "policy.py") >= {"model", "transforms", "checkpoint", "engine"}
    assert imported_rooms(PACKAGE / "cli" / "infer.py") >= {"errors"}
    assert "kernels" in imported_rooms(PACKAGE / "engine" / "turbo" / "ops.py")
