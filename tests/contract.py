"""What `make lint` asks beyond style: public names, what texts say of them, sizes, and faults that can be planted.

Reads the sources of python/bpo and, to see what names lead to, imports the package: `python tests/contract.py`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "bpo"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("demo/*.md"))]
# What users read.
TEXTS = [ROOT / "README.md", *(path for path in PAGES if path.parent != ROOT), *sorted(ROOT.glob("demo/*.py"))]
# The list of faults that tests must notice.
MUTANTS = ROOT / "tests" / "mutants"

MOST_LINES = 500
MOST_BODY_LINES = 60
MOST_FILES = 12

# Modules that users name beside the names of bpo itself.
PUBLIC_MODULES = ("sklearn", "_core")
# "bpo.X.Y" in a text or in code; not what follows a path, an address or another word.
NAMED = re.compile(r"(?<![\w./-])bpo((?:\.[A-Za-z_]\w*)+)")
# [text](path#heading) in Markdown, but no address.
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")
# `name` (`room/file.py`), below python/bpo, or `name` (`rust/file.rs`).
PLACE = re.compile(r"`([\w.]+)` \(`([\w/]+\.(?:py|rs))`\)")
# :func:`~path.to.it` and the like.
REFERENCE = re.compile(r":(?:func|class|data|meth|attr|exc|mod):`~?([\w.]+)`")

Found = Iterator[tuple[Path, int, str]]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def main() -> int:
    """Prints what is broken, one a line as file:line: what to do; returns 1 if there is anything."""
    found = [
        *public_names(),
        *names_in_texts(),
        *names_in_docstrings(),
        *links(),
        *places(),
        *interface(),
        *references(),
        *docstrings(),
        *sizes(),
        *stale_faults(),
    ]
    for path, line, message in sorted(set(found)):
        print(f"{path.relative_to(ROOT)}:{line}: {message}")
    return int(bool(found))


def public_names() -> Found:
    """The imports for types, `_LAZY` and `__all__` of bpo agree; each name is public, and defined where it is said."""
    path = PACKAGE / "__init__.py"
    typed, lazy = typed_names(path), lazy_names(path)
    for name in typed.keys() | lazy.keys():
        if name not in lazy:
            yield path, typed[name][1], f"{name} is imported for types only: add it to _LAZY"
        elif name not in typed:
            yield path, lazy[name][1], f"{name} is in _LAZY only: import it under TYPE_CHECKING, too"
        elif typed[name][0] != lazy[name][0]:
            yield path, lazy[name][1], f"{name} comes from {lazy[name][0]} here, for types from {typed[name][0]}"
    bpo = importlib.import_module("bpo")
    for name in sorted({*bpo.__all__, *lazy}):
        module, line = lazy.get(name, ("bpo", 1))
        if name not in bpo.__all__:
            yield path, line, f"{name} is in _LAZY but not in __all__"
        if name.startswith("_") and name != "__version__":
            yield path, line, f"{name} is private: give it a public name, or take it out of bpo"
        try:
            value = getattr(bpo, name)
        except (AttributeError, ImportError) as error:
            yield path, line, f"bpo.{name} does not resolve ({error}): name the module that defines it"
            continue
        home = getattr(value, "__module__", None)
        if name in lazy and home is not None and home != module:
            yield path, line, f"{name} is defined in {home}: take it from there, not from {module}"


def typed_names(path: Path) -> dict[str, tuple[str, int]]:
    """What is imported under TYPE_CHECKING: name → module, line."""
    blocks = [
        node for node in parse(path).body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: (str(node.module), node.lineno) for node in imports for alias in node.names}


def lazy_names(path: Path) -> dict[str, tuple[str, int]]:
    """What `_LAZY` holds: name → module, line."""
    for node in parse(path).body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "_LAZY"
            and isinstance(node.value, ast.Dict)
        ):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {ast.literal_eval(key): (ast.literal_eval(value), key.lineno) for key, value in pairs if key}
    return {}


def names_in_texts() -> Found:
    """README, docs and demo name nothing of bpo that is not public."""
    for path in TEXTS:
        yield from not_public(path, 1, path.read_text(encoding="utf-8"))


def names_in_docstrings() -> Found:
    """Neither do the docstrings of public objects and of their public methods."""
    for name, (module, _) in lazy_names(PACKAGE / "__init__.py").items():
        path = source_of(module)
        if path is None:  # of the core, whose docstrings the compiled module holds
            value = getattr(importlib.import_module(module), name)
            yield from not_public(PACKAGE / "_core.pyi", 1, inspect.getdoc(value) or "")
            continue
        for node in parse(path).body:
            if isinstance(node, Definition) and node.name == name:
                methods = node.body if isinstance(node, ast.ClassDef) else []
                for part in (node, *methods):
                    if isinstance(part, Definition) and (part is node or not part.name.startswith("_")):
                        yield from not_public(path, *docstring_of(part))


def not_public(path: Path, first_line: int, text: str) -> Found:
    """Finds the paths below bpo in a text that a user cannot follow."""
    public = {*importlib.import_module("bpo").__all__, *PUBLIC_MODULES}
    for number, line in enumerate(text.splitlines(), start=first_line):
        for match in NAMED.finditer(line):
            named = match[0]
            if match[1].split(".")[1] not in public:
                yield path, number, f"{named} is not public: name what is at bpo, or say it without the path"
            elif not resolves(named):
                yield path, number, f"{named} does not exist: name what it is now"


def links() -> Found:
    """Every link of a page to a file of the repository leads to one."""
    for path in PAGES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for match in LINK.finditer(line):
                if not (path.parent / match[1]).exists():
                    yield path, number, f"{match[1]} is not there: link to where it is now"


def places() -> Found:
    """Every name that a page puts into a file is defined there."""
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md", ROOT / "docs" / "papers.md"):
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
            for name, file in PLACE.findall(line):
                path = ROOT / file if file.endswith(".rs") else PACKAGE / file
                if not path.exists() or not defines(path, name):
                    yield page, number, f"{file} defines no {name}: name where it is now"


def interface() -> Found:
    """The page of the interface has every public name, and no other."""
    page = ROOT / "docs" / "reference" / "api.rst"
    shown = re.findall(r"^\.\. auto\w+:: bpo\.(\w+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    public = {name for name in importlib.import_module("bpo").__all__ if not name.startswith("_")}
    for name in sorted(public - set(shown)):
        yield page, 1, f"{name} is public: show it"
    for name in sorted(set(shown) - public):
        yield page, 1, f"{name} is not public"


def defines(path: Path, name: str) -> bool:
    """Whether a file defines a function or class, or a method as Class.method."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".rs":
        return re.search(rf"\b(?:fn|struct|enum) {name}\b", text) is not None
    bodies = parse(path).body
    for part in name.split("."):
        found = next((node for node in bodies if isinstance(node, Definition) and node.name == part), None)
        if found is None:
            return False
        bodies = found.body
    return True


def references() -> Found:
    """Every reference of a docstring leads to an object: by its full path, or in the module where it stands."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for match in REFERENCE.finditer(line):
                if not (resolves(match[1]) if is_full_path(match[1]) else is_in_module(match[1], path)):
                    yield path, number, f"{match[1]} leads to nothing: give the full path of where it is now"


def is_full_path(name: str) -> bool:
    """Whether a dotted name begins with a module that can be imported."""
    first, dot, _ = name.partition(".")
    return bool(dot) and importlib.util.find_spec(first) is not None


def is_in_module(name: str, path: Path) -> bool:
    """Whether a name without a full path is one of a module, or of a class there."""
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    classes = [value.__qualname__ for value in vars(importlib.import_module(module)).values() if inspect.isclass(value)]
    return any(resolves(f"{prefix}.{name}") for prefix in (module, *(f"{module}.{each}" for each in classes)))


def resolves(name: str) -> bool:
    """Whether a full path leads to an object: a module, what it holds, or an attribute or field of a class."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(value, part):
                # A field of a class without a default is an annotation only.
                return any(part in vars(kind).get("__annotations__", {}) for kind in getattr(value, "__mro__", ()))
            value = getattr(value, part)
        return True
    return False


def docstrings() -> Found:
    """Every file begins with one line that says what it is; the `__init__` of a room holds that line only."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = parse(path)
        first, _, rest = (ast.get_docstring(module) or "").partition("\n")
        if not first.endswith("."):
            yield path, 1, "its docstring does not begin with a line that says what is here: write one"
        if path.name == "__init__.py" and path.parent != PACKAGE and rest:
            yield path, 1, "the docstring of a room has several lines: say in one what the room is"
        if path.name == "__init__.py" and path.parent != PACKAGE and len(module.body) > 1:
            yield path, module.body[1].lineno, "the __init__ of a room holds its docstring only: move this to a file"


def sizes() -> Found:
    """No file, function or room is too large."""
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES:
            yield path, 1, f"has {lines} lines: split it by what it does ({MOST_LINES} at most)"
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_lines(node) > MOST_BODY_LINES:
                message = f"the body of {node.name} has {body_lines(node)} lines: split it ({MOST_BODY_LINES} at most)"
                yield path, node.lineno, message
    for room in sorted(path.parent for path in PACKAGE.rglob("__init__.py")):
        files = [path for path in room.glob("*.py") if path.name not in ("__init__.py", "__main__.py")]
        if len(files) > MOST_FILES:
            yield room / "__init__.py", 1, f"the room has {len(files)} files: split it ({MOST_FILES} at most)"


def stale_faults() -> Found:
    """What `make mutants` replaces in the core is there, once, and its names are too."""
    sys.path.insert(0, str(MUTANTS))
    faults = importlib.import_module("planted").faults()
    sys.path.remove(str(MUTANTS))
    names = [fault.name for fault in faults]
    for fault in faults:
        path = next(path for path in MUTANTS.glob("*.py") if f'"{fault.name}"' in path.read_text(encoding="utf-8"))
        line = path.read_text(encoding="utf-8").partition(f'"{fault.name}"')[0].count("\n") + 1
        if fault.occurrences() != 1:
            message = (
                f"what {fault.name} replaces occurs {fault.occurrences()} times in rust/{fault.file}: quote it anew"
            )
            yield path, line, message
        if names.count(fault.name) > 1:
            yield path, line, f"two faults are called {fault.name}: give each a name of its own"


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function behind its signature and its docstring."""
    first = function.body[0]
    after = (first.end_lineno or 0) + 1 if ast.get_docstring(function) else first.lineno
    return (function.end_lineno or 0) - after + 1


def docstring_of(node: Definition) -> tuple[int, str]:
    """The first line and the text of a docstring, as it stands in the file."""
    if ast.get_docstring(node) is None:
        return node.lineno, ""
    first = node.body[0]
    assert isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first.lineno, str(first.value.value)


def source_of(module: str) -> Path | None:
    """The file of a module of bpo, None for the compiled one."""
    path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return path if path.exists() else None


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


if __name__ == "__main__":
    sys.exit(main())
