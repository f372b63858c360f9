"""The command as launchers start it, and functions that one process calls for all or for itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bpo
import job
from bpo.world.world import world
from store_writer import contents
from tiny import build_tokenizer, tiny_llama

COMMAND = ["-m", "bpo", "select", "model", "rows.jsonl", "--budget", "30", "--set", "sketch_dim=64"]
COMMAND += ["--set", "tokens_per_batch=24", "--set", "device=cpu"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model, data, and what one process makes of them."""
    path = tmp_path_factory.mktemp("launched")
    tokenizer = build_tokenizer()
    tiny_llama(tokenizer).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in job.ROWS))
    settings = {"sketch_dim": 64, "tokens_per_batch": 24, "device": "cpu"}
    selection = bpo.select(
        str(path / "model"),
        str(path / "rows.jsonl"),
        budget=30,
        store=path / "store",
        config=bpo.SelectConfig(**settings),
        progress=False,
    )
    selection.save(path / "one")
    return path


def assert_as_one(directory, name, outputs):
    assert sum("dataset  " in output for output in outputs) == 1, "only the first process says what it did"
    assert contents(directory / f"store-{name}") == contents(directory / "store")
    found, one = (bpo.Selection.load(directory / path) for path in (name, "one"))
    assert found.pairs.equals(one.pairs) and found.dataset.to_list() == one.dataset.to_list()


def test_torchrun(directory, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={job.free_port()}"]
    command = [sys.executable, *launcher, *COMMAND, "--store", "store-launched", "--output", "launched"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert_as_one(directory, "launched", [done.stdout])


def stepping(rank, directory, step):
    """The command in a step of SLURM."""
    from bpo.cli.main import main

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ.update(step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
    os.chdir(directory)
    assert main([*COMMAND[2:], "--store", "store-step", "--output", "step"]) == 0


def test_a_step_of_slurm(directory, tmp_path):
    step = {
        "SLURM_JOB_ID": str(job.free_port()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    job.finish(job.start(2, tmp_path, stepping, directory, step), tmp_path)
    assert_as_one(directory, "step", [job.said(tmp_path, rank) for rank in range(2)])


def together(rank, output):
    """What each process finds, written down."""
    found = {"rank": world().rank, "size": world().size}
    scored = bpo.score_responses(
        [{"prompt": "a", "responses": ["b", "cc"]}], Counted(output), output=output / "scored.jsonl", progress=False
    )
    found["scored"] = list(scored)
    with bpo.alone():
        found["alone"] = world().size
    try:
        bpo.compare({"model": "model", "dataset": [], "budget": 1, "arms": ["random"]}, output / "comparison")
    except ValueError as error:
        found["compare"] = str(error)
    try:
        bpo.doctor("no/such/model", job.ROWS)
    except Exception as error:
        found["doctor"] = f"{type(error).__name__}: {error}"
    (output / f"{rank}.json").write_text(json.dumps(found))


class Counted:
    """A scorer that leaves a trace of each response."""

    def __init__(self, output):
        self.output = output

    def __call__(self, prompt, response):
        with (self.output / "calls").open("a") as file:
            file.write(response)
        return float(len(response))


def test_what_one_process_does_all_get(tmp_path):
    job.finish(job.start(2, tmp_path, together, tmp_path), tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (first.pop("rank"), second.pop("rank")) == (0, 1)
    assert first == second
    assert first["size"] == 2 and first["alone"] == 1
    assert (tmp_path / "calls").read_text() == "bcc"
    assert "this is one of 2 that a launcher started" in first["compare"]
    assert "no/such/model" in first["doctor"]


SRUN = """\
#!/bin/bash
# As srun on a machine of two GPUs: a task for each, or one where one a node is asked for.
tasks=2; while [[ $1 == --* ]]; do [[ $1 == --ntasks-per-node=1 ]] && tasks=1; shift; done
export SLURM_STEP_ID=$tasks SLURM_STEP_NUM_TASKS=$tasks SLURM_STEP_TASKS_PER_NODE=$tasks
export SLURM_STEP_NODELIST=localhost SLURM_NODEID=0
for ((task = 0; task < tasks; task++)); do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & done
failed=0; for ((task = 0; task < tasks; task++)); do wait -n || failed=1; done; exit $failed
"""
ACCELERATE = """\
#!{python}
# As accelerate, which understands all that it is told, and starts one process on a CPU.
import json, os, sys
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
given = launch_command_parser().parse_args(sys.argv[2:])
asked, _, _ = _validate_launch_command(given)
with open("asked.json", "w") as file:
    json.dump({{key: str(value) for key, value in vars(asked).items()}}, file)
rest = sys.argv[sys.argv.index("-m"):]
more = ["--bf16", "False", "--max_steps", "1", "--report_to", "none", "--use_cpu", "True"]
os.execv(sys.executable, [sys.executable, *rest, *more])
"""


@pytest.mark.skipif(not os.environ.get("BPO_TORTURE"), reason="two more starts of two processes, and TRL")
def test_the_example_of_slurm_runs_as_far_as_one_machine_can(directory):
    """All but the second machine and the GPUs: srun, scontrol and accelerate's processes are played."""
    import trl  # noqa: F401

    shims = directory / "bin"
    shims.mkdir()
    examples = Path(__file__).parents[3] / "examples"
    (directory / "examples").symlink_to(examples)
    played = {
        "srun": SRUN,
        "scontrol": "#!/bin/bash\necho localhost\n",
        "accelerate": ACCELERATE.format(python=sys.executable),
    }
    played["python"] = (
        f'#!/bin/bash\nexec {sys.executable} "$@" --set sketch_dim=64 --set tokens_per_batch=24 --set device=cpu\n'
    )
    for name, text in played.items():
        (shims / name).write_text(text)
        (shims / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{shims}{os.pathsep}{os.environ['PATH']}",
        "MODEL": "model",
        "DATA": "rows.jsonl",
        "SCRATCH": str(directory / "scratch"),
        "SLURM_JOB_ID": str(job.free_port()),
        "SLURM_JOB_NODELIST": "localhost",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    script = (examples / "slurm.sh").read_text().replace("--budget 5000", "--budget 30")
    done = subprocess.run(
        ["bash", "-c", script], cwd=directory, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(directory / "scratch" / "gradients") == contents(directory / "store")
    assert (directory / "scratch" / "selection" / "trained" / "model.safetensors").exists()
    asked = json.loads((directory / "asked.json").read_text())
    wanted = {
        "num_processes": "16",
        "num_machines": "2",
        "machine_rank": "0",
        "main_process_ip": "localhost",
        "mixed_precision": "bf16",
    }
    assert {name: asked[name] for name in wanted} == wanted and asked["multi_gpu"] == "True"
