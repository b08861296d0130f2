"""The shape of the house: who may import whom, and what must stay out of a quick start."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dora_tools"

# From the ground up; a module may import those of lower floors, and its own folder's.
FLOORS = [
    {"errors"},
    {"dtypes"},
    {"checkpoint"},
    {"adapter"},
    {"deltas"},
    {"lowrank"},
    {"layout", "names"},
    {"binding", "formats", "containers", "recipes"},
    {"templates"},
    {"merging", "write", "companions"},
    {"compare", "evidence"},
    {"operations", "summary", "hub", "selftest", "storing"},
    {"opening"},
    {"planning"},
    {"api"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
TORCH_ROOMS = {"lowrank", "merging", "compare", "evidence", "operations"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool, int]]:
    """(dotted name from the package or outside, inside the package, column): lazy imports have a column > 0."""
    found = []
    typing_only: set[int] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            typing_only |= {id(child) for child in ast.walk(node)}
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, False, node.col_offset) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = node.level == depth
            names = [node.module] if node.module else [alias.name for alias in node.names]
            if node.level == 0 or inside:
                found += [(name or "", inside, node.col_offset) for name in names]
    return found


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name != "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_down_only(path: Path) -> None:
    here = room_of(path)
    for name, inside, column in imports(path):
        room = name.split(".")[0]
        if inside and room in FLOOR and room != here:
            assert FLOOR[room] < FLOOR[here], f"{path.name} imports {name}"
        if not inside and room == "torch" and not column:
            assert here in TORCH_ROOMS, f"{path.name} imports torch when it is loaded"


def test_formats_do_not_import_each_other() -> None:
    for path in (PACKAGE / "formats").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and path.name != "__init__.py":
                assert node.module is None, f"{path.name} imports the format {node.module}"


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in MODULES} == set(FLOOR)


def test_only_blocks_starts_threads() -> None:
    using = {room_of(p) for p in PACKAGE.rglob("*.py") if "threading.Thread(" in p.read_text()}
    assert using == {"checkpoint"}


HEAVY = ("torch", "gguf", "huggingface_hub", "transformers", "numpy")


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], HEAVY),
        (["merge", "--help"], HEAVY),
        (["inspect", "fixtures/minilm-dora"], ("torch", "gguf", "huggingface_hub", "transformers")),
        (["inspect", "fixtures/minilm-dora", "--json"], ("torch", "gguf", "huggingface_hub", "transformers")),
    ],
)
def test_quick_commands_import_nothing_heavy(arguments: list[str], absent: tuple[str, ...]) -> None:
    code = (
        "import sys; from dora_tools.cli import main; code = main(sys.argv[1:]); "
        f"loaded = [m for m in {absent!r} if m in sys.modules]; assert not loaded, loaded; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_line_offers_the_scale_rules_that_there_are() -> None:
    """It has its own list, so that --help need not import the formats."""
    from dora_tools.cli import options
    from dora_tools.formats import SCALE_RULES

    assert list(SCALE_RULES) == options._RULES
