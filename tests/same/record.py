"""What is observed of a wheel, as files that are compared byte for byte."""

import contextlib
import dataclasses
import io
import json
import re
import traceback
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch

# What JSON files say of time and of the memory of the process, which no two runs share.
_MEASURED = re.compile(
    r'("(?:\w*_)?(?:seconds|runtime|per_second|peak_memory_bytes)": )(?:[-+.\de]+|\{[^{}]*\}|null)', re.MULTILINE
)
# Pickles: they name classes by module, which may move, and nothing here is unpickled. The weights are in other files.
_PICKLES = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
# Text in which the working directory or the address of a server may stand.
_TEXT = {".json", ".jsonl", ".txt", ".md", ".html", ".svg", ".yaml"}
_PROGRESS_BAR = re.compile(r"^(?P<name>.*?):?\s+\d+%\|.*$|^(?P<counter>.*?): \d+ ?\w* \[.*$")

OBSERVATIONS = []


def observation(function):
    """Registers a function of (record, world) that writes down what it sees."""
    OBSERVATIONS.append(function)
    return function


class Record:
    """A directory of observations.

    Arguments:
        directory: Where they go.
        replaced: What differs between two runs wherever it stands, and what is written instead.
    """

    def __init__(self, directory, replaced):
        self.directory, self.replaced = directory, replaced

    def within(self, name):
        """Returns the record of something with several files."""
        return Record(self.directory / name, self.replaced)

    def text(self, name, text, *, hidden=()):
        """Writes text; ``hidden`` are further patterns and what stands in their place."""
        for found, instead in self.replaced.items():
            text = text.replace(found, instead)
        for pattern, instead in ((_MEASURED, r"\1TIME"), *hidden):
            text = re.sub(pattern, instead, text)
        self.data(name, text.encode("utf-8", "surrogatepass"))

    def data(self, name, data):
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            raise FileExistsError(f"{path} was observed before; give every observation a name of its own.")
        path.write_bytes(data)

    def values(self, name, values, *, hidden=()):
        """Writes anything as JSON, numbers with all their digits."""
        self.text(f"{name}.json", json.dumps(plain(values), indent=1, ensure_ascii=False) + "\n", hidden=hidden)

    def files(self, name, path, *, hidden=(), without=None):
        """Copies a file, or all files of a directory but those whose names match the pattern ``without``."""
        path = Path(path)
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in found:
            inner = file.relative_to(path).as_posix() if path.is_dir() else ""
            if not file.is_file() or file.name in _PICKLES or (without and re.fullmatch(without, inner)):
                continue
            place = f"{name}/{inner}" if inner else name
            if file.suffix == ".npz":  # an archive says when each array was added
                with np.load(file, allow_pickle=False) as arrays:
                    self.values(place, dict(arrays))
            elif file.suffix in _TEXT:
                self.text(place, file.read_text(encoding="utf-8"), hidden=hidden)
            else:
                self.data(place, file.read_bytes())

    def error(self, name, call, *, hidden=()):
        """Writes down what a call raises, by name and text."""
        try:
            result = call()
        except Exception as error:
            kinds = " < ".join(kind.__name__ for kind in type(error).__mro__ if kind not in (BaseException, object))
            self.text(f"{name}.txt", f"{kinds}\n{error}\n", hidden=hidden)
        else:
            self.values(name, {"nothing was raised": result})

    def selection(self, name, selection):
        """Writes down everything that a selection gives, saved and loaded again, too."""
        record, scratch = self.within(name), Path(f"saved-{name}")
        record.values("dataset", selection.dataset)
        record.values("pairs", selection.pairs)
        record.values("rest", [selection.depth, selection.skipped, selection.noted, selection.config, repr(selection)])
        record.values("counts", [selection.fates(), selection.lengths(), len(selection)])
        record.text("summary.txt", selection.summary())
        record.files("saved", selection.save(scratch))
        try:
            record.files("report.html", selection.report(scratch / "report.html"))
        except TypeError as error:  # of pairs that length control exchanged in, no strategy said how useful they are
            record.text("report.txt", f"{type(error).__name__}: {error}")
        again = type(selection).load(scratch)
        if again.pairs != selection.pairs or again.summary() != selection.summary():
            record.text("loaded.txt", again.summary())

    def observe(self, function, world):
        """Runs an observation and writes down what it warns of; returns whether it came to its end."""
        finished = True
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                function(self, world)
            except Exception as error:
                finished = False
                traceback.print_exc()
                self.text("raised.txt", f"{type(error).__name__}: {error}\n")
        self.text("warnings.txt", "".join(map(_warning, caught)))
        return finished


def _warning(entry):
    """A warning for users and whose line it is said to come from; those for developers are of other libraries."""
    if not issubclass(entry.category, UserWarning):
        return ""
    place = Path(entry.filename)
    elsewhere = "bpo" if "bpo" in place.parts else "elsewhere"
    where = "the caller" if place.parent == Path(__file__).parent else elsewhere
    return f"{entry.category.__name__} at {where}: {entry.message}\n"


def plain(value):
    """Returns a value as what JSON has, without losing a digit."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, torch.Tensor):
        return plain(value.detach().cpu().numpy())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, np.ndarray):
        return _array(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, pa.Table):
        return {"table": str(value.schema), "columns": {name: value[name].to_pylist() for name in value.column_names}}
    if isinstance(value, datasets.Dataset):
        return {"dataset": str(value.features), "rows": plain(value.to_list())}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"is": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value))
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return without_modules(re.sub(r" at 0x[0-9a-f]+", "", repr(value)))


def _array(values):
    """An array, one string a row."""
    if values.dtype.names:
        return {name: _array(values[name]) for name in values.dtype.names}
    if values.dtype == np.uint8 and values.ndim == 2:  # ids
        rows = [row.tobytes().hex() for row in values]
    else:
        flat = values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values.reshape(-1, 1)
        rows = [" ".join(map(repr, row)) for row in flat.tolist()]
    return {"array": f"{values.dtype} {values.shape}", "rows": rows}


def without_modules(text):
    """Takes the modules out of names such as ``bpo.module.Name``: they are no part of what a wheel promises."""
    return re.sub(r"\bbpo(?:\.[a-z_]+)+\.(?=\w)", "bpo.", text)


@contextlib.contextmanager
def captured():
    """Yields what is printed, as two streams; progress bars are told by their names."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err


def without_bars(text):
    """Returns printed text with each progress bar as its name, for how often it was drawn is a matter of time."""
    lines, named = [], set()
    for line in re.split(r"[\r\n]+", text):
        bar = _PROGRESS_BAR.match(line.replace("\x1b[A", ""))
        if bar is None:
            lines.append(line.rstrip())
        elif bar.group(0) and (name := bar.group("name") or bar.group("counter")) not in named:
            named.add(name)
            lines.append(f"[progress bar: {name}]")
    return "\n".join(line for line in lines if line) + "\n"
