"""Processes that work together as torchrun would start them, forked from one that has imported everything."""

import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from pathlib import Path

import torch

import bpo
import bpo.cli.main
from tiny import build_tokenizer, scored_rows, tiny_llama

ROWS = scored_rows(14, 5)
SETTINGS = {"sketch_dim": 64, "tokens_per_batch": 24, "threads": 1, "process_timeout": 600.0}


def context():
    """A server of processes, which start in a moment: one for all tests of a process, whichever comes first."""
    server = multiprocessing.get_context("forkserver")
    modules = ("bpo.gradients.collect", "bpo.training.trainer", "bpo.evidence.compare.compare", "job", "row_writer")
    server.set_forkserver_preload(["torch", "transformers", "trl", "peft", "accelerate", *modules])
    return server


def command(arguments, **settings):
    """The command ``bpo`` as a program, which was not started yet."""
    return program(bpo.cli.main.main, ["bpo", *arguments], **settings)


def program(main, command, output=None, directory=None, environment=None):
    """A program of a session of its own, which was not started yet; what it prints goes to files of ``output``."""
    arguments = (main, list(map(str, command)), output, directory, environment)
    return context().Process(target=_program, args=arguments)


def _program(main, command, output, directory, environment):
    os.setsid()
    os.environ.update(environment or {})
    tempfile.tempdir = None  # what TMPDIR said before
    os.chdir(directory or os.curdir)
    sys.argv = command
    if output is not None:
        for stream, file in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(output / file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
    sys.exit(main())


def result(function, *arguments):
    """What a function returns in a process of its own."""
    ours, theirs = context().Pipe(duplex=False)
    process = context().Process(target=_result, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"the process ended with {process.exitcode}") from None
    finally:
        process.join()


def _result(connection, function, arguments):
    torch.set_num_threads(1)
    connection.send(function(*arguments))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(rank, size, port):
    """What torchrun tells a process."""
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    if size == 1:
        return alone
    return {**alone, "RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_RANK": f"{rank}", "LOCAL_WORLD_SIZE": f"{size}"}


def _member(rank, size, port, output, work, arguments):
    os.environ.update(environment(rank, size, port))
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = (output / f"{rank}.out").open("w")
    try:
        work(rank, *arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stderr.flush()
    os._exit(0)


def start(size, output, work, *arguments):
    """Starts processes that call ``work(rank, *arguments)``, and write what they say to ``output``."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    port, server = free_port(), context()
    members = [
        server.Process(target=_member, args=(rank, size, port, output, work, arguments), daemon=True)
        for rank in range(size)
    ]
    for member in members:
        member.start()
    return members


def said(output, rank):
    return (Path(output) / f"{rank}.out").read_text()


def finish(members, output):
    """Waits until all have ended, and well."""
    for member in members:
        member.join(600)
    assert [member.exitcode for member in members] == [0] * len(members), [said(output, r) for r in range(len(members))]


def refused(members, output, expected):
    """Waits until all have ended, and badly, and said why."""
    for rank, member in enumerate(members):
        member.join(600)
        assert member.exitcode == 1 and expected in said(output, rank), (member.exitcode, said(output, rank))


def kill(members):
    for member in members:
        member.kill()
        member.join()


def collect(rank, store, rows=ROWS, shard=None, **settings):
    """The gradients of a tiny model, with a commit after every batch."""
    import bpo.store.writer

    bpo.store.writer._COMMIT_SECONDS = 0
    tokenizer = build_tokenizer()
    return bpo.collect_gradients(
        tiny_llama(tokenizer),
        rows,
        processing_class=tokenizer,
        store=store,
        shard=shard,
        config=bpo.SelectConfig(**{**SETTINGS, **settings}),
        progress=False,
    )


def select(rank, store, output):
    """A selection, which each process writes down."""
    tokenizer = build_tokenizer()
    selection = bpo.select(
        tiny_llama(tokenizer),
        ROWS,
        budget=30,
        breadth=9,
        processing_class=tokenizer,
        store=store,
        config=bpo.SelectConfig(**SETTINGS),
        progress=False,
    )
    selection.save(Path(output) / f"selection-{rank}")
