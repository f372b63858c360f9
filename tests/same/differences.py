"""Two directories of observations, file by file."""

import difflib

_SHOWN = 12


def compare(base, other):
    """Prints a line for each thing that was observed; returns how many of them differ."""
    names = sorted({path.relative_to(side).as_posix() for side in (base, other) for path in files_of(side)})
    things = {}
    for name in names:
        things.setdefault("/".join(name.split("/")[:3]), []).append(name)
    different = 0
    for thing, members in things.items():
        found = [text for name in members if (text := _difference(base / name, other / name, name))]
        different += bool(found)
        counted = f"{len(members)} file{'s' if len(members) > 1 else ''}"
        print(f"{'DIFFERENT' if found else 'same':<9} {thing:<70} {counted:>9}", flush=True)
        for text in found:
            print(text, flush=True)
    said = f"{different} of them differ" if different else "all are the same"
    print(f"\n{len(things)} things in {len(names)} files: {said}")
    return different


def files_of(directory):
    return [path for path in directory.rglob("*") if path.is_file()]


def _difference(base, other, name):
    """Says how two files differ; an empty text where they do not."""
    if not base.exists() or not other.exists():
        return f"    {name}: only of the {'first' if base.exists() else 'second'} wheel"
    one, two = base.read_bytes(), other.read_bytes()
    if one == two:
        return ""
    try:
        lines = [data.decode().splitlines() for data in (one, two)]
        if lines[0] == lines[1] or b"\0" in one + two:
            raise UnicodeError
    except UnicodeError:
        pairs = enumerate(zip(one, two, strict=False))
        first = next((place for place, (left, right) in pairs if left != right), min(len(one), len(two)))
        return f"    {name}: {len(one)} and {len(two)} bytes, the first that differs at {first}"
    diff = list(difflib.unified_diff(*lines, n=0, lineterm=""))[2:]
    shown = [f"    {line[:220]}" for line in diff[:_SHOWN]]
    more = [f"    … {len(diff) - _SHOWN} lines more"] if len(diff) > _SHOWN else []
    return "\n".join([f"    {name}:", *shown, *more])
