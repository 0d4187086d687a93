"""Ranks, devices and precision of a process."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import re
import socket
import sys
from pathlib import Path

import pytest
import torch

import main
import utils
from config import load_config
from tests.launched import Trial
from tests.runs import ROOT, run_command, write_config
from training.command_line import parse
from training.device import resolve_options
from training.exit_status import LOST_PEER

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
    "SLURM_NTASKS": "6",
}
BATCH_SCRIPT = {"SLURM_NTASKS": "6", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "77"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Return a monkeypatch without launcher variables; variables set by the test are removed afterwards."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in TORCHRUN:
            monkeypatch.delenv(name)
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "DAT_RESTART_COUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        (TORCHRUN, (5, 8, 1, 4)),
        (SRUN, (4, 6, 1, 3)),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x2),1,3", "SLURM_NODEID": "2"}, (4, 6, 1, 1)),
        (BATCH_SCRIPT, (0, 1, 0, 1)),  # a process of the batch script itself is alone
        ({**SRUN, **TORCHRUN}, (5, 8, 1, 4)),  # torchrun inside a SLURM job
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0, 1)),
    ],
)
def test_the_launcher_is_recognised(
    environment: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[int, ...]
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert utils.launched_as() == expected


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert utils.pick_device("", 1, 2) == torch.device("cuda", 1)
    assert utils.pick_device("cpu", 3, 4) == torch.device("cpu")
    with pytest.raises(ValueError, match="4 processes were started here, but this machine has 2 GPUs; start at most 2"):
        utils.pick_device("", 3, 4)


BOUND = {"CUDA_VISIBLE_DEVICES": "0"}
SHARED = "4 processes were started here, but this machine has 1 GPU;"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({**SRUN, "SLURM_GPUS_ON_NODE": "4"}, ""),  # srun --ntasks=4 --gpus-per-task=1
        ({**SRUN, "SLURM_GPUS_ON_NODE": "4", **BOUND}, ""),
        ({**SRUN, "SLURM_GPUS_ON_NODE": "1", **BOUND}, SHARED),  # srun --ntasks=4 --gpus=1
        ({**SRUN, **BOUND}, SHARED),
        ({**TORCHRUN, **BOUND}, ""),  # another launcher that sets the variables of torchrun
        ({**TORCHRUN, "TORCHELASTIC_RUN_ID": "none", **BOUND}, SHARED),
        ({**TORCHRUN, "SLURM_GPUS_ON_NODE": "4"}, SHARED),
        (TORCHRUN, SHARED),
        ({"LOCAL_WORLD_SIZE": "4", **BOUND}, SHARED),  # the check before a launch
        ({}, SHARED),
    ],
)
def test_a_process_with_a_gpu_of_its_own_uses_that_one(
    environment: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "TORCHELASTIC_RUN_ID"):
        environment.delenv(name, raising=False)
    for name, value in variables.items():
        environment.setenv(name, value)
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: 1)
    if says:
        with pytest.raises(ValueError, match=says):
            utils.pick_device("cuda", 3, 4)
    else:
        assert utils.pick_device("", 3, 4) == torch.device("cuda", 0)


@pytest.mark.parametrize("name", ["", "cuda"])
def test_a_gpu_that_slurm_gave_and_that_does_not_work_is_worth_a_restart(
    environment: pytest.MonkeyPatch, name: str
) -> None:
    """One of four GPUs, or with --device cuda all of them."""
    logged: list[str] = []
    environment.setattr(logging.getLogger("dat"), "error", logged.append)
    for key, value in {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4,2", "SLURM_GPUS_ON_NODE": "4"}.items():
        environment.setenv(key, value)
    environment.setattr(torch.cuda, "is_available", lambda: not name)
    environment.setattr(torch.cuda, "device_count", lambda: 3)
    flags = ["--device", name] if name else []
    assert main.main(["--cfg", str(ROOT / "configs" / "digits.yaml"), *flags]) == LOST_PEER
    sees = f"{socket.gethostname()}: SLURM gave this job 4 of its GPUs, and PyTorch sees {0 if name else 3}; "
    assert len(logged) == 1
    assert logged[0].startswith(f"rank 4: {sees}")


def _lose_gpu_of_rank_1() -> None:
    kind = "cpu" if os.environ["RANK"] == "0" else "meta"  # in place of a GPU
    utils.pick_device = lambda *_: torch.device(kind)


def test_processes_with_and_without_a_gpu_are_refused(tmp_path: Path) -> None:
    job = Trial(tmp_path / "trial", 2, 0).start(prepare=_lose_gpu_of_rank_1)
    assert job.wait() == [2, 2], job.console()
    (line,) = job.console().splitlines()
    assert line.startswith("main.py: some processes have a GPU and others have none; check the drivers (--device cuda ")


class OfALibrary(OSError):
    """An error that does not survive being sent to another process."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}: {reason}")


def fail_together(error: Exception | None) -> None:
    """Raise the error of this rank, if any, where all ranks fail together."""
    with utils.fail_together():
        if error:
            raise error


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (ValueError("is wrong"), ValueError, "is wrong"),
        (ValueError(), ValueError, "ValueError"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), ValueError, "'utf-8' codec can't decode byte 0x78 "),
        (TimeoutError(), TimeoutError, "TimeoutError"),
        (OfALibrary("a.arrow", "is wrong"), OSError, "a.arrow: is wrong"),
        (OSError(errno.EIO, "it failed", "a.jpg"), OSError, f"[Errno {errno.EIO}] it failed: 'a.jpg'"),
        (OSError(errno.EXDEV, "it failed", "a", None, "b"), OSError, f"[Errno {errno.EXDEV}] it failed: 'a' -> 'b'"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("rank", [None, 0, 1])
def test_an_error_of_one_rank_is_raised_on_all(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], says: str, rank: int | None
) -> None:
    def gather(gathered: list, here: object) -> None:
        assert (here is None) == (rank == 1)
        there = None if rank == 0 else utils._as_built_in(error)
        gathered[:] = [pickle.loads(pickle.dumps(value)) for value in (here, there)]

    if rank is not None:
        monkeypatch.setattr(utils.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(utils.dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(utils.dist, "all_gather_object", gather)
    with pytest.raises(kind, match=f"^{re.escape(says)}") as caught:
        fail_together(None if rank == 1 else error)
    assert caught.type is kind
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)


def test_first_host_of_a_slurm_job_is_the_master_address(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "n[1-2]" ] && printf "n1\\nn2\\n"\n', encoding="utf-8")
    scontrol.chmod(0o755)
    environment.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in {**SRUN, "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "24077"}.items():
        environment.setenv(name, value)
    joined = {}
    environment.setattr(
        utils.dist,
        "init_process_group",
        lambda backend, *, rank, world_size, timeout: joined.update(
            backend=backend,
            rank=rank,
            world_size=world_size,
            **{name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")},
        ),
    )
    world = utils.init_world("cpu")
    assert (world.rank, world.size, world.is_main) == (4, 6, False)
    assert os.environ["LOCAL_WORLD_SIZE"] == "3"
    assert joined == {
        "backend": "gloo",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": str(20000 + 77),
        "rank": 4,
        "world_size": 6,
    }


def test_ports_of_jobs_are_not_those_of_outgoing_connections() -> None:
    jobs = [utils._slurm_port({"SLURM_JOB_ID": str(job)}) for job in range(70_000, 130_000, 7)]
    assert min(jobs) >= 20_000
    assert max(jobs) < 32_768
    starts = [{"SLURM_JOB_ID": "24077", "DAT_RESTART_COUNT": str(restart)} for restart in range(4)]
    assert len({utils._slurm_port(env) for env in (*starts, {"SLURM_JOB_ID": "24078"})}) == 5


def test_given_master_address_is_kept(environment: pytest.MonkeyPatch) -> None:
    for name, value in {**SRUN, "MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "29999"}.items():
        environment.setenv(name, value)
    environment.setattr(utils.dist, "init_process_group", lambda *_, **__: None)
    utils.init_world("cpu")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.1.1.1", "29999")


_OTHER_SIGNAL = """
import subprocess, time
from torch.utils.data import DataLoader
from utils import StopSignal
stop = StopSignal()
stop.listen()
next(iter(DataLoader(list(range(8)), num_workers=1)))
subprocess.run(["true"])
time.sleep(0.5)
print(stop.received)
"""


def test_exit_of_a_child_process_is_not_a_request_to_stop() -> None:
    done = run_command(sys.executable, "-c", _OTHER_SIGNAL)
    assert done.stdout == "None\n", done.stderr


@pytest.mark.parametrize(
    ("amp", "device", "native", "expected"),
    [
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp16"),
        ("auto", "cpu", False, "bf16"),
        ("off", "cuda", True, "off"),
    ],
)
def test_automatic_precision_depends_on_the_device(
    monkeypatch: pytest.MonkeyPatch, amp: str, device: str, native: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    config = load_config(ROOT / "configs" / "digits.yaml", ["AMP", amp])
    resolve_options(config, torch.device(device))
    assert expected == config.AMP


def test_check_before_a_launch_resolves_the_precision_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "pick_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    args, config = parse(["--cfg", str(ROOT / "configs" / "digits.yaml"), "--amp"])
    assert main.check(args, config) == 0
    assert config.AMP == "fp16"


def test_check_on_another_machine_leaves_the_precision_open(tmp_path: Path) -> None:
    args, config = parse(["--cfg", str(write_config(tmp_path)), "--output", str(tmp_path / "output"), "--amp"])
    assert main.check(args, config) == 0
    assert config.AMP == "auto"


@pytest.mark.parametrize("option", [("COMPILE", True), ("MODEL.DAT.attn_drop_rate", 0.1)])
def test_options_without_deterministic_kernels_are_rejected(option: tuple[str, object]) -> None:
    config = load_config(ROOT / "configs" / "digits.yaml", ["DETERMINISTIC", True, *option])
    resolve_options(config, torch.device("cpu"))
    with pytest.raises(ValueError, match="--deterministic cannot be combined with --compile or attn_drop_rate on CUDA"):
        resolve_options(config, torch.device("cuda"))
