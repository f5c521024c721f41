"""Which file may import what: the table of docs/DESIGN section 2, read from the sources.

Imports inside functions count as well: a lazy import is still a dependency.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from experiments.runs import MODELS

ROOT = Path(__file__).resolve().parent.parent
FILES = ("config", "settings", "util", "main", "data_utils", "metrics")
PACKAGES = ("our_models", "baseline_models", "model_parts", "experiments", "data_readers")

# layer -> (modules of the project, third-party packages; None = any)
MAY_IMPORT: dict[str, tuple[set[str], set[str] | None]] = {
    "main": ({"config", "experiments"}, set()),
    "experiments": (
        {"our_models", "baseline_models", "model_parts.base", "data_utils", "metrics", "config",
         "util", "experiments"},
        None,
    ),
    "our_models": ({"model_parts", "config", "our_models"}, {"torch", "numpy"}),
    "baseline_models": ({"model_parts", "config", "baseline_models"}, {"torch", "numpy", "scipy"}),
    "model_parts": ({"model_parts"}, {"torch", "numpy"}),
    "data_utils": ({"data_readers", "config", "util"}, {"numpy", "pandas"}),
    "data_readers": ({"data_readers", "config", "util"}, {"numpy", "pandas", "yaml"}),
    "metrics": (set(), {"numpy", "scipy"}),
    "config": ({"settings"}, {"yaml", "torch"}),
    "settings": (set(), {"yaml"}),
    "util": (set(), {"yaml", "torch"}),
}  # fmt: skip
# Extras that are imported on use only and may be missing.
OPTIONAL = {
    "data_readers/encoders.py": {"torch", "torchvision", "sentence_transformers", "PIL",
                                 "transformers", "huggingface_hub"},
}  # fmt: skip


def sources() -> list[Path]:
    files = [ROOT / f"{name}.py" for name in FILES]
    for package in PACKAGES:
        files += sorted((ROOT / package).rglob("*.py"))
    return files


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{label(path)} uses a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if (ROOT / f"{name.replace('.', '/')}.py").exists()}
            found |= modules or {node.module}
    return found


def within(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("path", sources(), ids=label)
def test_imports_only_what_its_layer_may(path):
    layer = label(path).removesuffix(".py").split("/")[0]
    project, third_party = MAY_IMPORT[layer]
    for module in imports(path):
        top = module.split(".")[0]
        if top in FILES + PACKAGES:
            assert within(module, project), f"{label(path)} imports {module}"
        elif top not in sys.stdlib_module_names and third_party is not None:
            allowed = third_party | OPTIONAL.get(label(path), set())
            assert top in allowed, f"{label(path)} imports {module}"


LOOP_AND_MODES = [
    path for path in [*sorted((ROOT / "experiments").glob("*.py")), ROOT / "main.py"]
    if path.name not in ("mcrl.py", "__init__.py")  # a mode is about two models, and named so
]  # fmt: skip


@pytest.mark.parametrize("path", LOOP_AND_MODES, ids=label)
def test_no_model_is_known_by_name(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    logger_names = {
        id(argument)
        for node in nodes
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getLogger"
        for argument in node.args
    }
    constants = [n for n in nodes if isinstance(n, ast.Constant) and id(n) not in logger_names]
    assert not {str(node.value) for node in constants} & set(MODELS)


def test_every_listed_model_has_a_file_of_its_own():
    files = [target.split(":")[0] for target in MODELS.values()]
    for module in files:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
