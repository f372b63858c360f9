"""The blocks of code that users read, found and run as printed: a page in one process, in a folder of its own."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.M | re.S)
# In front of a block that no test can run, with the reason.
MARK = re.compile(r"<!-- not run: (.+?) -->\s*\Z", re.S)
# A command within a sentence, and what stands for something of the reader's own.
INLINE = re.compile(r"(?<!`)`(bpo [a-z][^`]*)`(?!`)")
# Programs that start others; what they start comes after these words.
LAUNCHERS = ("accelerate", "torchrun", "srun")
STEPS = 2
# Where the pages have a server; the tests have theirs at a port that is free.
SERVER = "http://localhost:8000"


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str
    code: str
    reason: str | None


def blocks(path):
    """The blocks of a page, or the cells of a notebook."""
    text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        return [Block(name, number, "python", "".join(cell["source"]), None) for number, cell in enumerate(cells, 1)]
    found = []
    for match in FENCE.finditer(text):
        mark = MARK.search(text, 0, match.start())
        line = text[: match.start()].count("\n") + 2
        found.append(Block(name, line, match[1], match[2], mark[1] if mark else None))
    return found


def inline(path):
    """The commands within sentences of a page."""
    return INLINE.findall(path.read_text(encoding="utf-8"))


def lines(code):
    """The commands of a block of the shell, each as its words."""
    joined = code.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in joined) if words]


def bpo_words(words):
    """What a command gives to bpo, by whatever it is started; None where it does not."""
    if words[0] == "bpo":
        return words[1:]
    if words[0] in LAUNCHERS and "bpo" in words:
        return words[words.index("bpo") + 1 :]
    return None


def check_words(words):
    """Checks that bpo has such a command, and each option that is printed."""
    import bpo.cli.main as cli

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli._parsed(words)
        except SystemExit as ended:
            assert not ended.code, f"bpo {shlex.join(words)}: {errors.getvalue()}"


def check_options(words):
    """The same for a command within a sentence, which may be a part of one."""
    import argparse

    import bpo.cli.main as cli

    parser, words = cli.build_parser(), [word for word in words if word != "…"]
    while commands := [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]:
        if not words or words[0].isupper() or words[0].startswith("-"):
            break
        assert words[0] in commands[0].choices, f"there is no command {words[0]}"
        parser, words = commands[0].choices[words[0]], words[1:]
    if not getattr(parser, "passes_on", False):
        known = parser._options() if hasattr(parser, "_options") else parser._option_string_actions
        for word in words:
            name = word.partition("=")[0]
            assert not name.startswith("--") or name.replace("_", "-") in known, f"there is no option {name}"


def _run_shell(words):
    if words[0] == "bpo":
        import bpo.cli.main as cli

        assert cli.main(words[1:]) == 0, shlex.join(words)
    elif words[:2] == ["trl", "dpo"]:
        _run_trl(words[2:])
    elif words[0] == "python":
        _run_script(words[1], words[2:])
    elif words[0] == "make":
        made = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert words[1] in made, f"make has no {words[1]}"
    elif words[0] in LAUNCHERS:
        given = bpo_words(words)
        assert given or any(word.endswith(".py") for word in words), shlex.join(words)
        if given:
            check_words(given)
    elif words[0] == "pip":
        pass  # test_install.py reads these
    else:
        raise AssertionError(f"no test knows how to run {words[0]}: {shlex.join(words)}")


def _run_trl(arguments):
    """What ``trl dpo`` runs once accelerate has started it."""
    from trl.scripts.dpo import main, make_parser

    parser = make_parser()
    main(*parser.parse_args_and_config(arguments)[:4])


def _run_script(path, arguments):
    import runpy

    before, sys.argv = sys.argv, [path, *arguments]
    try:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    finally:
        sys.argv = before


def _run_block(block, namespace):
    if block.kind in ("sh", "bash"):
        for words in lines(block.code):
            _run_shell(words)
    elif block.kind == "python":
        code = "\n" * (block.line - 1) + block.code
        exec(compile(code, block.page, "exec"), namespace)
    elif block.kind == "json":
        import bpo

        rows = [json.loads(line) for line in block.code.splitlines()]
        found = bpo.read_candidates(rows)
        assert len(found.pairs) and not found.skipped
    elif block.kind == "yaml":
        import bpo

        name = re.match(r"# ([\w-]+\.yaml)\n", block.code)
        path = Path(name[1] if name else "compare.yaml")
        path.write_text(block.code, encoding="utf-8")
        if path.name == "compare.yaml":
            bpo.CompareConfig.of(path)
    else:
        raise AssertionError(f"blocks of {block.kind} are not run")


def _make_small():
    """Cuts small data into blocks that several machines can share, as a block of the default size holds all of it."""
    import bpo.policy.batches

    bpo.policy.batches._BLOCK_TOKENS = 1 << 10


def _end_trainings():
    """Has every training end after a few steps: what is tested is that it begins as printed, and gets there."""
    import transformers.trainer
    from transformers import TrainerCallback

    class End(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= STEPS

    transformers.trainer.DEFAULT_CALLBACKS.append(End)


def _serve():
    """A server of chat completions whose answers, if it is taken for a judge, are ratings; returns its address."""
    from chat_server import ProtocolServer

    server = ProtocolServer()
    server.script = lambda request, number: json.dumps({"rating": number % 10 + 1})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.url


def run(folder, found, output):
    """Runs the blocks of a page in order, in one namespace; ends the process, with 1 after the first that fails."""
    os.chdir(folder)
    stream = Path(output).open("w", encoding="utf-8")  # noqa: SIM115 - open to the end of the process
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    _make_small()
    _end_trainings()
    server = _serve() if any(SERVER in block.code for block in found) else None
    namespace = {"__name__": "__main__"}
    for block in found:
        print(f"{block.page}:{block.line} ({time.process_time():.1f} s)", flush=True)
        try:
            _run_block(dataclasses.replace(block, code=block.code.replace(SERVER, server or SERVER)), namespace)
        except BaseException:
            traceback.print_exc()
            stream.flush()
            os._exit(1)
    print(f"all ({time.process_time():.1f} s)", flush=True)
    os._exit(0)
