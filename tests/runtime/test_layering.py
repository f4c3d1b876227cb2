"""csrc -> ops -> nn -> convert / experts -> t2runtime -> cli: imports go one way."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import t2kernels
import t2runtime

CORE = Path(t2kernels.__file__).parent
RUNTIME = Path(t2runtime.__file__).parent


def imports(folder: Path) -> Iterator[tuple[str, str, bool]]:
    """(file, module, whether at import time) of every import below a folder."""
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = set(tree.body)
        for node in ast.walk(tree):
            where = str(path.relative_to(folder))
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield where, alias.name, node in top
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield where, node.module, node in top


def test_the_kernels_know_neither_transformers_nor_the_runtime() -> None:
    wrong = [
        f"{where}: {module}"
        for where, module, _ in imports(CORE)
        if module.split(".")[0] in {"transformers", "t2runtime", "peft"}
    ]
    assert not wrong


def test_the_kernels_import_triton_lazily_or_in_its_own_folder() -> None:
    wrong = [
        f"{where}: {module}"
        for where, module, at_import in imports(CORE)
        if module.split(".")[0] == "triton" and at_import and "triton" not in where
    ]
    assert not wrong


def test_the_runtime_uses_public_names_only() -> None:
    """`t2kernels` itself and the modules beside it that list what is public in `__all__`."""
    allowed = {"t2kernels", "t2kernels.testing"}
    allowed |= {f"t2kernels.{name}" for name in ("checkpoint", "files", "targets")}
    wrong = [
        f"{where}: {module}"
        for where, module, _ in imports(RUNTIME)
        if module.split(".")[0] == "t2kernels" and module not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize("path", sorted(RUNTIME.rglob("*.py")), ids=lambda p: p.stem)
def test_attributes_of_the_kernels_exist_and_are_public(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "t2k"
        ):
            public = not node.attr.startswith("_") or node.attr == "__version__"
            assert public and hasattr(t2kernels, node.attr), f"{path.name}: t2k.{node.attr}"
