"""Writes settings.md: every setting of bpo, its default and what it does, from the docstrings of the classes.

`python docs/settings.py` writes it; with `--check` it only says whether what is there is still true.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "bpo"
PAGE = ROOT / "docs" / "settings.md"
CLASSES = (
    ("SelectConfig", "config.py", "of `bpo.select`, as `config={...}`; `--set FIELD=VALUE` of the command"),
    ("BPOConfig", "training/config.py", "of `bpo.BPOTrainer`, beside those of TRL's `DPOConfig`"),
    ("CompareConfig", "evidence/compare/config.py", "of `bpo.compare`, the keys of its YAML file"),
)
HEAD = """# Settings

Every setting, its default, and what it does. This page is written by `make tables` from the docstrings, which
`help(bpo.SelectConfig)` and an editor show as well.
*(ours)* marks a choice of this reconstruction, where the paper leaves it open.
"""


def main() -> int:
    """Writes the page, or compares it; returns 1 if what is there is out of date."""
    page = "\n".join([HEAD, *(part(*each) for each in CLASSES)])
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    print("docs/settings.md is out of date: run `make tables`")
    return 1


def part(name: str, file: str, where: str) -> str:
    """The settings of one class."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    texts, defaults = attributes(ast.get_docstring(found) or ""), dict(fields(found))
    missing = sorted(defaults.keys() - texts.keys())
    if missing:
        raise SystemExit(f"{file}: of {name}, no text says what {', '.join(missing)} does")
    rows = [
        f"| `{field}` | {defaults[field]} | {markdown(text)} |" for field, text in texts.items() if field in defaults
    ]
    return "\n".join(
        [
            f"\n## `bpo.{name}`\n",
            f"{where[0].upper()}{where[1:]}.\n",
            "| setting | default | |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def attributes(docstring: str) -> dict[str, str]:
    """Name and text of each attribute that a docstring documents."""
    section = re.split(r"^(?:Example|Raises):$", docstring.partition("Attributes:\n")[2], flags=re.MULTILINE)[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*|\n(?=\n        ))*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def fields(found: ast.ClassDef) -> list[tuple[str, str]]:
    """Name and default of each field."""
    return [
        (node.target.id, shown(node.value))
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not computed(node.value)
    ]


def computed(value: ast.expr | None) -> bool:
    """Whether a field is none that is given."""
    return isinstance(value, ast.Call) and "init" in {keyword.arg for keyword in value.keywords}


def shown(value: ast.expr | None) -> str:
    """A default as a reader would write it."""
    if value is None:
        return "required"
    if isinstance(value, ast.Call):
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default" in given:
            return shown(given["default"])
        factory = given.get("default_factory")
        if isinstance(factory, ast.Lambda):
            return shown(factory.body)
        return {"dict": "`{}`", "list": "`[]`", "tuple": "`()`"}.get(
            ast.unparse(factory) if factory else "", f"`{ast.unparse(value)}`"
        )
    return f"`{ast.unparse(value)}`"


def markdown(text: str) -> str:
    """A docstring in Markdown."""
    text = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r"(?<![`\w/])docs/([\w-]+\.md)", r"[docs/\1](\1)", text)
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
