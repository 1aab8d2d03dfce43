"""Which room may import which, no import circles, and few entries at the top of a package: read from the source."""

import ast
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

# A room is a package, or a file at the top of one of these. It imports only what stands above it.
ROOMS = """
fourier_moe.errors
fourier_moe.config
fourier_moe.models
fourier_moe.adapter
fourier_moe.routing fourier_moe.report
fourier_moe.spectral
fourier_moe.analysis fourier_moe.baselines fourier_moe.inject
fourier_moe.files
fourier_moe.serving fourier_moe.integrations
fourier_moe
datamodules.shared
datamodules.mixture
datamodules.glue datamodules.images datamodules.instructions
datamodules
lightning_modules.interruption lightning_modules.tables lightning_modules.strategies
lightning_modules.run_directory lightning_modules.optimization lightning_modules.tasks
lightning_modules.training lightning_modules.evaluation_sets
lightning_modules.adaptation
lightning_modules.callbacks
lightning_modules.cli
lightning_modules.experiments
lightning_modules.commands
lightning_modules
train fourier_moe.__main__
"""
LEVELS = {room: level for level, line in enumerate(ROOMS.split("\n")) for room in line.split()}

# The method works without a trainer and without the libraries that its models come from.
FOREIGN = ("lightning", "pytorch_lightning", "lightning_fabric", "transformers", "open_clip", "datasets", "peft")
# What a function of the method may import, with a comment that says why: what is not always there, or slow to import.
OPTIONAL = ("peft", "triton", "bitsandbytes", "huggingface_hub", "tqdm", "axolotl")
# The one file that imports peft at its top: nothing imports it but its users.
PEFT_TUNER = "fourier_moe.integrations.peft"


class Import(NamedTuple):
    """One import in a file; `kind` is `top`, `function` or `typing` (under TYPE_CHECKING)."""

    source: str
    target: str
    kind: str


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PACKAGES = ("fourier_moe", "datamodules", "lightning_modules")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))] + [ROOT / "train.py"]
MODULES = {module_name(path): path for path in FILES}


def imports_in(node: ast.AST, source: str, kind: str = "top") -> list[Import]:
    found: list[Import] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found += [Import(source, alias.name, kind) for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{source} imports relatively"
            whole = [(f"{child.module}.{alias.name}", child.module or "") for alias in child.names]
            found += [Import(source, name if name in MODULES else module, kind) for name, module in whole]
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found += imports_in(child, source, "function")
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            found += imports_in(child, source, "typing")
        else:
            found += imports_in(child, source, kind)
    return found


IMPORTS = [imp for name, path in MODULES.items() for imp in imports_in(ast.parse(path.read_text(encoding="utf-8")), name)]
OWN = [imp for imp in IMPORTS if imp.target in MODULES and imp.target != imp.source]


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def circles(edges: set[tuple[str, str]]) -> set[frozenset[str]]:
    """Groups of nodes that reach each other."""
    following: dict[str, set[str]] = {}
    for source, target in edges:
        following.setdefault(source, set()).add(target)

    def reached(start: str) -> set[str]:
        seen, left = set[str](), [start]
        while left:
            new = following.get(left.pop(), set()) - seen
            seen |= new
            left += new
        return seen

    reach = {node: reached(node) for node in following}
    return {frozenset(other for other in reach[node] if node in reach.get(other, ())) for node in reach if node in reach[node]}


def test_circles_are_found():
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "e")}) == {frozenset("abc"), frozenset("e")}
    code = "import a\ndef f():\n    import b\nif TYPE_CHECKING:\n    from c import d\nclass X:\n    def g(self): import e"
    kinds = {(imp.target, imp.kind) for imp in imports_in(ast.parse(code), "m")}
    assert kinds == {("a", "top"), ("b", "function"), ("c", "typing"), ("e", "function")}


def test_every_room_has_a_level_and_every_level_a_room():
    assert LEVELS.keys() == {room_of(module) for module in MODULES}


@pytest.mark.parametrize("room", LEVELS)
def test_a_room_imports_only_rooms_below_it(room):
    upward = [
        f"{imp.source} imports {imp.target}"
        for imp in OWN
        if imp.kind != "typing" and room_of(imp.source) == room != room_of(imp.target)
        if LEVELS[room_of(imp.target)] >= LEVELS[room]
    ]
    assert not upward, f"allowed are the rooms of the lines above {room} in ROOMS"


def test_no_file_imports_in_a_circle():
    """Imports for types count where they are mutual: then two files know each other's insides."""
    edges = {(imp.source, imp.target) for imp in OWN if imp.kind != "typing"}
    everything = {(imp.source, imp.target) for imp in OWN}
    mutual = {edge for edge in everything if edge[::-1] in everything}
    assert circles(edges | mutual) == set()


def test_functions_of_the_method_import_only_what_is_optional():
    wrong = [
        f"{imp.source} imports {imp.target} in a function"
        for imp in IMPORTS
        if imp.kind == "function" and room_of(imp.source).startswith("fourier_moe")
        if imp.target.split(".")[0] not in OPTIONAL and not imp.target.startswith("fourier_moe.spectral.kernels")
    ]
    assert not wrong


def test_the_method_imports_no_trainer_and_no_library_of_models():
    wrong = [
        f"{imp.source} imports {imp.target}"
        for imp, foreign in product(IMPORTS, FOREIGN)
        if imp.source.startswith("fourier_moe") and imp.target.split(".")[0] == foreign
        if not (foreign == "peft" and (room_of(imp.source) == "fourier_moe.baselines" or imp.source == PEFT_TUNER))
    ]
    assert not wrong
    assert [imp.source for imp in OWN if imp.target == PEFT_TUNER] == []


def test_packages_have_at_most_13_entries():
    entries: dict[str, set[str]] = {}
    for path in FILES:
        parts = path.relative_to(ROOT).parts
        for depth in range(1, len(parts)):
            entries.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
    crowded = {package: len(names - {"__init__.py", "__main__.py", "py.typed"}) for package, names in entries.items()}
    assert {package: count for package, count in crowded.items() if count > 13} == {}
