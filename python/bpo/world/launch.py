"""What launchers tell a process about the others: ``torchrun``, ``accelerate launch`` and SLURM's ``srun``."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_PORTS = range(20_000, 50_000)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A process among those that were launched together.

    Attributes:
        rank: Its number, from 0 on.
        size: How many there are.
        local_size: How many of them share its machine.
        variables: What ``torch.distributed`` reads from the environment and lacks there.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)


def launched(environment: Mapping[str, str] | None = None) -> Launch:
    """Reads the environment.

    The variables of ``torchrun`` and ``accelerate launch`` come first; else those of a SLURM step of several tasks, as
    ``srun`` starts it. What the batch script of a SLURM job itself runs is alone, whatever the job has asked for.

    Raises:
        ValueError: A number that is none, or a rank outside the world.

    Example:
        >>> launched({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
        Launch(rank=1, size=4, local_size=2, variables={})
        >>> launched({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}).size
        1
    """
    given = os.environ if environment is None else environment
    if "RANK" in given and "WORLD_SIZE" in given:
        size = _number(given, "WORLD_SIZE")
        return _checked(Launch(_number(given, "RANK"), size, _number(given, "LOCAL_WORLD_SIZE", size)))
    if "SLURM_PROCID" in given and _number(given, "SLURM_STEP_NUM_TASKS", 1) > 1:
        rank, size = _number(given, "SLURM_PROCID"), _number(given, "SLURM_STEP_NUM_TASKS")
        local_size = int(re.split(r"\D", given.get("SLURM_STEP_TASKS_PER_NODE", str(size)))[0] or 1)
        job = _number(given, "SLURM_JOB_ID", 0) + _number(given, "SLURM_STEP_ID", 0)
        wanted = {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": given.get("SLURM_LOCALID", "0"),
            "LOCAL_WORLD_SIZE": str(local_size),
            "MASTER_ADDR": first_host(given.get("SLURM_STEP_NODELIST", given.get("SLURM_NODELIST", "localhost"))),
            "MASTER_PORT": str(_PORTS[job % len(_PORTS)]),
        }
        return _checked(Launch(rank, size, local_size, {name: wanted[name] for name in wanted if name not in given}))
    return Launch()


def first_host(nodes: str) -> str:
    """Returns the first host of a list as SLURM writes them.

    Example:
        >>> first_host("gpu[007-012,020],cpu1"), first_host("node-a,node-b"), first_host("rack[1-2]n[05,07]")
        ('gpu007', 'node-a', 'rack1n05')
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else nodes)


def _number(given: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = given.get(name, None if default is None else str(default))
    try:
        return int(str(text))
    except ValueError:
        raise ValueError(f"The environment variable {name} is {text!r}, and should be a number.") from None


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.size:
        raise ValueError(
            f"The environment says that this is process {launch.rank} of {launch.size} (RANK, WORLD_SIZE)."
        )
    return launch
