"""What a user can read of the package: names, signatures, docstrings, defaults, and what importing it costs."""

import dataclasses
import inspect
import json
import subprocess
import sys
from importlib import metadata, resources

import bpo
import bpo.sklearn
from bpo import _core
from record import observation, plain, without_modules

HEAVY = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "pyarrow",
    "sklearn",
    "scipy",
    "matplotlib",
    "httpx2",
    "yaml",
)


@observation
def names(record, world):
    record.values("bpo", sorted(bpo.__all__))
    record.values("order", bpo.__all__)
    record.values("dir", dir(bpo))
    record.values("core", sorted(_core.__all__))
    record.text("module.txt", bpo.__doc__)
    record.error("unknown", lambda: bpo.nothing)


@observation
def public(record, world):
    for name in sorted(set(bpo.__all__) - {"__version__"}):
        record.text(name, describe(getattr(bpo, name)))
    for name in ("KMeans", "SparseSketch"):
        record.text(f"sklearn.{name}", describe(getattr(bpo.sklearn, name)))


@observation
def core(record, world):
    for name in sorted(set(_core.__all__) - {"__version__"}):
        record.text(name, describe(getattr(_core, name)))


@observation
def fields(record, world):
    """Of every public dataclass; a trainer's has those of TRL, too."""
    for name in sorted(bpo.__all__):
        value = getattr(bpo, name)
        if dataclasses.is_dataclass(value):
            record.values(name, [_field(field) for field in dataclasses.fields(value)])


@observation
def distribution(record, world):
    """What the wheel says of itself beside its long description, which is the README."""
    # The name of the distribution may differ between the two.
    [command] = metadata.entry_points(group="console_scripts", name="bpo")
    found = command.dist
    record.values("metadata", [item for item in found.metadata.items() if item[0] != "Description"])
    record.values("entry_points", [(point.group, point.name) for point in found.entry_points])
    parts = ("py.typed", "_core.pyi")
    record.values("parts", {name: resources.files("bpo").joinpath(name).is_file() for name in parts})


@observation
def imports(record, world):
    """Which large packages come along with the package, with its command, and with names that need little."""
    command = "import bpo.cli.main"
    codes = {"package": "import bpo", "command": command}
    for name in ("SelectConfig", "register_strategy", "allocate_depth", "ChatServer", "compress_breadth", "Scorer"):
        codes[name] = f"from bpo import {name}"
    for name, code in codes.items():
        loaded = f"import sys, json; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
        done = subprocess.run([sys.executable, "-c", f"{code}\n{loaded}"], capture_output=True, text=True, check=True)
        record.values(name, json.loads(done.stdout))


@observation
def first_names(record, world):
    """Whether each name can be had before any other: modules that import one another may allow only some orders."""
    code = f"""
import os, importlib.metadata, datasets, peft, torch, transformers, trl
trl.DPOTrainer, transformers.AutoModelForCausalLM  # what is found only now, every process would load for itself
for name in {sorted(bpo.__all__)} + ["sklearn", "command"]:
    if os.fork() == 0:
        try:
            if name == "command":
                import bpo.cli.main
            else:
                exec(f"from bpo import {{name}}")
            print(name, "is there", flush=True)
        except Exception as error:
            print(name, type(error).__name__, error, flush=True)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    record.text("names.txt", done.stdout)


def describe(value):
    """Signature and docstring, and those of the public members that are bpo's own."""
    lines = [_kind(value), _signature(value), _text(value)]
    if inspect.isclass(value):
        lines.append("bases: " + ", ".join(kind.__name__ for kind in value.__mro__[1:]))
        ours = [kind for kind in value.__mro__ if kind.__module__.split(".")[0] == "bpo"]
        members = {name: member for kind in reversed(ours) for name, member in vars(kind).items()}
        for name in sorted(members):
            member = inspect.unwrap(getattr(members[name], "__func__", members[name]))
            if not name.startswith("_") or name == "__init__":
                if isinstance(member, property):
                    member = member.fget
                documented = callable(member) or inspect.isdatadescriptor(member)
                lines += [f"\n{name}: {_kind(members[name])}", _signature(member)]
                lines += [_text(member)] if documented else [f"= {plain(member)}"]
    return "\n".join(lines) + "\n"


def _kind(value):
    return type(value).__name__


def _signature(value):
    try:
        return without_modules(str(inspect.signature(value)))
    except (ValueError, TypeError):
        return "no signature"


def _text(value):
    return without_modules(inspect.getdoc(value) or "no docstring")


def _field(field):
    default = field.default
    if default is dataclasses.MISSING:
        default = "none" if field.default_factory is dataclasses.MISSING else field.default_factory()
    kind = field.type if isinstance(field.type, str) else repr(field.type)
    return [field.name, without_modules(kind), plain(default), field.init, field.kw_only, plain(dict(field.metadata))]
