"""What a Python function is made of, so that two runs can tell whether they were given the same one."""

from __future__ import annotations

import contextlib
import copyreg
import dis
import functools
import hashlib
import inspect
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

NOT_COMPARED = "not compared"
"""How the entry of something begins that has no content to compare, such as a connection."""

CHANGES = "changes by itself"
"""The entry of something that the work itself changes, such as a counter."""

# What makes an object of nothing but its class, which the types of the standard library do not know of.
_NEW_OBJECT: Any = vars(copyreg)["__newobj__"]

# Levels of names that are told apart; what lies deeper is one hash.
_LEVELS = 4


def identity_of(function: Any) -> dict[str, Any]:
    """Returns what the results of something that is called follow from, as JSON without its texts.

    Code is compared as Python runs it, so that comments and spaces do not count. What a function, a ``partial`` or an
    object holds goes by name: values of closures, defaults, attributes, and the globals that code of the user's names,
    other functions, classes and modules among them; of installed packages the names alone. Numbers stand as they are,
    all else as hashes, so that no key that a function holds is written. Weights of a model count, where it runs does
    not. What cannot be compared, a lock or a connection, is an entry that begins with :data:`NOT_COMPARED`.
    """
    try:
        parts = _told(_Parts().of(function), 0)
    except RecursionError:
        parts = f"{NOT_COMPARED}: {_named(type(function))}, which holds itself too deeply"
    return parts if isinstance(parts, dict) else {"function": parts}


def _told(parts: Any, level: int) -> Any:
    """Names down to a level, and hashes of what lies deeper."""
    if isinstance(parts, _Unknown):
        return f"{NOT_COMPARED}: {parts}"
    if isinstance(parts, dict) and level < _LEVELS:
        return {name: _told(part, level + 1) for name, part in parts.items()}
    if not isinstance(parts, (dict, list)):
        return parts
    if not _has_unknown(parts):
        return _hash(parts)
    # What holds a connection mostly holds its state, too, which no two runs share.
    return NOT_COMPARED if isinstance(parts, dict) else f"{NOT_COMPARED} in part: {_hash(_without_unknown(parts))}"


def _has_unknown(parts: Any) -> bool:
    items = parts.values() if isinstance(parts, dict) else parts if isinstance(parts, list) else ()
    return isinstance(parts, _Unknown) or any(map(_has_unknown, items))


def _without_unknown(parts: Any) -> Any:
    if isinstance(parts, list):
        return list(map(_without_unknown, parts))
    return NOT_COMPARED if _has_unknown(parts) else parts


class _Unknown(str):
    """The name of something that has no content to compare."""


class _Parts:
    """Takes values apart: dictionaries are parts by name, lists are contents, and the rest is final."""

    def __init__(self) -> None:
        # By address, so each is kept for as long as its address stands for it.
        self._above: dict[int, Any] = {}
        self._known: dict[int, tuple[Any, str]] = {}

    def of(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, float, complex, str, bytes, bytearray):
            return _scalar(value)
        if kind in (set, frozenset):
            return ["set", *sorted(_hash(self.of(item)) for item in value)]
        if id(value) in self._known:
            return self._known[id(value)][1]
        if id(value) in self._above:
            return f"within itself {_named(kind)}"
        self._above[id(value)] = value
        try:
            if kind in (list, tuple):
                parts: Any = [kind.__name__, *map(self.of, value)]
            elif kind is dict:
                items = [[_hash(self.of(key)), self.of(item)] for key, item in value.items()]
                parts = ["dict", *sorted(items, key=lambda item: item[0])]
            else:
                parts = self._composed(value)
        except RecursionError:
            raise
        except Exception:  # objects may fail in every way when they are looked into
            parts = _Unknown(_named(kind))
        finally:
            del self._above[id(value)]
        if isinstance(parts, (dict, list)):
            self._known[id(value)] = (value, _Unknown(_named(kind)) if _has_unknown(parts) else _hash(parts))
        return parts

    def _composed(self, value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return {"method": self.of(value.__func__), "of": self.of(value.__self__)}
        if isinstance(value, functools.partial):
            given = dict(enumerate(value.args)) | value.keywords
            return {"partial": self.of(value.func), **{str(name): self.of(item) for name, item in given.items()}}
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.ModuleType):
            return _module(value)
        if isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
            owner = value.__self__
            name = f"{getattr(value, '__module__', None)}.{value.__qualname__}"
            return name if owner is None or isinstance(owner, types.ModuleType) else {name: self.of(owner)}
        return self._array(value) or self._object(value)

    def _function(self, function: types.FunctionType) -> Any:
        code = function.__code__
        parts: dict[str, Any] = {"function": f"{function.__module__}.{function.__qualname__}"}
        if not _is_installed(function.__globals__.get("__name__")):
            parts["code"] = _hash(self._code(code))
            names = [name for name in _global_names(code) if name in function.__globals__]
            parts["globals"] = {name: self.of(function.__globals__[name]) for name in names}
        parts["closure"] = {
            name: self.of(_contents(cell))
            for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
        }
        positional = code.co_varnames[: code.co_argcount]
        defaults = function.__defaults__ or ()
        given = dict(zip(positional[len(positional) - len(defaults) :], defaults, strict=True))
        given.update(function.__kwdefaults__ or {})
        parts["defaults"] = {name: self.of(item) for name, item in given.items()}
        # What functools.wraps leaves is in the closure, too.
        attributes = {name: item for name, item in vars(function).items() if name != "__wrapped__"}
        parts["attributes"] = {name: self.of(item) for name, item in attributes.items()}
        return {name: part for name, part in parts.items() if part != {}}

    def _code(self, code: types.CodeType) -> Any:
        names = [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
        counts = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
        return ["code", _scalar(code.co_code), self.of(code.co_consts), *map(list, names), counts]

    def _class(self, kind: type) -> Any:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if _is_installed(kind.__module__):
            return name
        members: dict[str, Any] = {}
        for attribute, member in sorted(vars(kind).items()):
            member = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
            if isinstance(member, types.FunctionType) or not attribute.startswith(("__", "_abc_")):
                members[attribute] = self.of(member)
        return f"{name} {_hash([members, [self.of(base) for base in kind.__bases__]])}"

    def _array(self, value: Any) -> Any:
        """Returns the contents of an array, a tensor or a model; None of anything else."""
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)) and not value.dtype.hasobject:
            return f"{value.dtype} {value.shape} {_digest(value.tobytes())}"
        if torch is None:
            return None
        if isinstance(value, torch.Tensor):
            return _tensor(value)
        if isinstance(value, torch.nn.Module) and not isinstance(value, torch.jit.ScriptModule):
            return self._model(value)
        return None

    def _model(self, model: Any) -> Any:
        """Weights, and of each layer its class and its settings; hooks and what loaders add do not count."""
        layers = []
        for name, layer in model.named_modules():
            settings = {key: item for key, item in vars(layer).items() if not key.startswith("_") and _is_plain(item)}
            layers.append([name, self.of(type(layer)), self.of(settings)])
        to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
        weights = [[name, self.of(item)] for name, item in model.state_dict().items()]
        return {
            "model": _named(type(model)),
            "layers": _hash(layers),
            "config": _digest(json.dumps(to_dict(), sort_keys=True, default=str).encode()),
            "weights": _Unknown("weights elsewhere") if _has_unknown(weights) else _hash(weights),
        }

    def _object(self, value: Any) -> Any:
        kind = type(value)
        wrapped = getattr(value, "__dict__", {}).get("__wrapped__")
        if callable(wrapped):  # functools.cache and the like, which keep nothing else that counts
            return {"wrapper": _named(kind), "wrapped": self.of(wrapped)}
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # whatever says that it cannot be copied
            return _Unknown(_named(kind))
        if isinstance(reduced, str):
            return f"{_named(kind)} {reduced}"
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        parts: dict[str, Any] = {"class": self.of(kind)}
        if make is not _NEW_OBJECT or arguments[1:]:
            parts["made by"] = self.of([make, *arguments])
        dictionaries = state if isinstance(state, tuple) else (state,)
        if all(isinstance(part, (dict, type(None))) for part in dictionaries):
            for part in dictionaries:
                parts.update({str(name): self.of(item) for name, item in (part or {}).items()})
        else:
            parts["state"] = self.of(state)
        for name, rest in (("items", items), ("pairs", pairs)):
            if rest is not None:
                parts[name] = self.of(list(rest))
        return parts


def _scalar(value: Any) -> Any:
    """Numbers as they are; texts as their hashes, since they may be keys."""
    if isinstance(value, str):
        return f"text {_digest(value.encode(errors='surrogatepass'))}"
    if isinstance(value, (bytes, bytearray)):
        return f"bytes {_digest(bytes(value))}"
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return hex(value)
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        return repr(value)
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, complex, str))


def _tensor(tensor: Any) -> str:
    torch = sys.modules["torch"]
    try:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    except (RuntimeError, NotImplementedError, TypeError):  # on no device, or sparse
        return _Unknown(_named(type(tensor)))
    return f"{tensor.dtype} {tuple(tensor.shape)} {_digest(data)}"


def _global_names(code: types.CodeType) -> list[str]:
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(_global_names(constant))
    return sorted(names)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return None


def _module(module: types.ModuleType) -> str:
    if not _is_installed(module.__name__):
        with contextlib.suppress(OSError, TypeError):
            return f"{module.__name__} {_digest(Path(inspect.getfile(module)).read_bytes())}"
    return module.__name__


@functools.cache
def _is_installed(name: str | None) -> bool:
    """Whether a module is Python's own, bpo's or of an installed package; others are the user's."""
    top = (name or "").partition(".")[0]
    if top in sys.stdlib_module_names or top == "bpo":
        return True
    file = getattr(sys.modules.get(name or ""), "__file__", None) or ""
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _hash(parts: Any) -> str:
    return _digest(json.dumps(parts, sort_keys=True).encode())


def _digest(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
