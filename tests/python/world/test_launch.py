"""What launchers say of a process."""

import pytest

from bpo.world.launch import Launch, launched

SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
}


def test_a_process_by_itself_is_alone():
    assert launched({}) == Launch(0, 1, 1)


def test_torchrun_and_accelerate():
    given = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert launched(given) == Launch(3, 4, 2)
    assert launched({**SLURM, **given}) == Launch(3, 4, 2), "within a SLURM step they are what started the process"


def test_a_step_of_slurm_says_what_torch_distributed_reads():
    launch = launched(SLURM)
    assert (launch.rank, launch.size, launch.local_size) == (5, 8, 4)
    assert launch.variables == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": str(20_000 + 1234567 % 30_000),
    }
    assert "MASTER_PORT" not in launched({**SLURM, "MASTER_PORT": "29500"}).variables


def test_the_batch_script_of_a_slurm_job_is_alone():
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert launched({**batch, "SLURM_PROCID": "0"}).size == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', and should be a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "process 2 of 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "process -1 of 2"),
    ],
)
def test_what_cannot_be_is_refused(given, expected):
    with pytest.raises(ValueError, match=expected):
        launched(given)
