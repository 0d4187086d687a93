"""Exit statuses and the messages at the end of a run."""

from __future__ import annotations

import ast
import errno
import os
import signal
import socket
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.utils import canonicalize_name

import main
from tests.launched import Trial
from tests.runs import ROOT, run_command
from tests.test_imports import OURS, imports_of
from tests.test_requirements import read
from training import startup
from training.exit_status import FAILED, LOST_PEER, WRONG_INPUT, report_failure

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:1"
LATE = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 6000ms for recv"
BY_HAND = "the same command continues from the last checkpoint"
BY_ITSELF = "the launcher restarts all processes from the last checkpoint"


@pytest.mark.parametrize(
    ("error", "env", "what", "how"),
    [
        (CLOSED, {}, "died: Connection closed", BY_HAND),
        (CLOSED, {"DAT_RESTARTS_LEFT": "1"}, "died: Connection closed", BY_ITSELF),
        (LATE, {"DAT_RESTARTS_LEFT": "0"}, "did not answer within DAT_TIMEOUT_MINUTES = 30", BY_HAND),
        (LATE, {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "2"}, "did not answer", BY_ITSELF),
        (CLOSED, {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "3"}, "died", BY_HAND),
        (LATE, {"TORCHELASTIC_MAX_RESTARTS": "0", "DAT_RESTARTS_LEFT": "2"}, "did not answer", BY_ITSELF),
    ],
)
def test_lost_process_is_reported_with_its_cause(
    logged: list[str], monkeypatch: pytest.MonkeyPatch, error: str, env: dict[str, str], what: str, how: str
) -> None:
    for name in ("DAT_RESTARTS_LEFT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT", "DAT_TIMEOUT_MINUTES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert report_failure(RuntimeError(error)) == LOST_PEER
    assert len(logged) == 1
    assert logged[0].startswith(f"rank 0: another process {what}")
    assert logged[0].endswith(f"; {how}")


def nccl(kind: str, name: str, last: str) -> torch.distributed.DistBackendError:
    """Return an error as PyTorch raises it for one of NCCL."""
    place = "[1] NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94"
    advice = "(run with NCCL_DEBUG=WARN for details), NCCL version 2.27.5"
    text = f"{place}, {kind} {advice}\n{name}: An explanation. \nLast error:\n{last}\nmore"
    return torch.distributed.DistBackendError(text)


REFUSED = "The client socket has failed to connect to any address of (node1, 29400). Connection refused (errno: 111)"
TAKEN = "The server socket has failed to listen on any local address. port: 29400, message: address already in use"


@pytest.mark.parametrize(
    ("error", "status", "what", "reason"),
    [
        (nccl("invalid usage", "ncclInvalidUsage", "Duplicate GPU"), FAILED, "communication failed", "Duplicate GPU"),
        (nccl("invalid argument", "ncclInvalidArgument", "Bad root"), FAILED, "communication failed", "Bad root"),
        (
            nccl("unhandled system error", "ncclSystemError", "Connect to 10.0.0.2 returned 113(No route to host)"),
            LOST_PEER,
            "communication failed",
            "Connect to 10.0.0.2 returned 113(No route to host)",
        ),
        (
            nccl(
                "unhandled system error", "ncclSystemError", "Call to ibv_create_qp failed with error Invalid argument"
            ),
            LOST_PEER,
            "communication failed",
            "Call to ibv_create_qp failed with error Invalid argument",
        ),
        (
            nccl("remote process exited or there was a network error", "ncclRemoteError", "Connection closed by node2"),
            LOST_PEER,
            "another process died",
            "Connection closed by node2",
        ),
        (
            nccl("unhandled system error", "ncclSystemError", "Connection reset by peer"),
            LOST_PEER,
            "another process died",
            "Connection reset by peer",
        ),
        (torch.distributed.DistNetworkError(REFUSED), LOST_PEER, "communication failed", REFUSED),
        (torch.distributed.DistNetworkError(TAKEN), LOST_PEER, "communication failed", TAKEN),
        (
            torch.distributed.DistNetworkError("failed to recv, got 0 bytes"),
            LOST_PEER,
            "another process died",
            "failed to recv, got 0 bytes",
        ),
        (
            torch.distributed.DistStoreError("wait timeout after 60000ms, keys: /default_pg/0"),
            LOST_PEER,
            "another process did not answer within DAT_TIMEOUT_MINUTES = 30",
            "wait timeout after 60000ms, keys: /default_pg/0",
        ),
    ],
)
def test_failed_communication_is_reported_with_its_reason(
    logged: list[str], monkeypatch: pytest.MonkeyPatch, error: RuntimeError, status: int, what: str, reason: str
) -> None:
    for name in ("DAT_RESTARTS_LEFT", "DAT_TIMEOUT_MINUTES"):
        monkeypatch.delenv(name, raising=False)
    assert report_failure(error) == status
    (line,) = logged
    assert line.startswith(f"rank 0: {what}: ")
    assert line.endswith(reason if status == FAILED else f"{reason}; {BY_HAND}")


ADVICE = "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
ECC = "CUDA error: uncorrectable ECC error encountered"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.AcceleratorError(f"{ECC}{ADVICE}"), ECC),
        (torch.AcceleratorError(f"another accelerator failed{ADVICE}"), "another accelerator failed"),
        (RuntimeError(f"Caught AcceleratorError in pin memory thread.\ntorch.AcceleratorError: {ECC}{ADVICE}"), ECC),
        (torch.distributed.DistBackendError(f"Watchdog thread terminated with exception: {ECC}{ADVICE}"), ECC),
        *(
            (RuntimeError(text), text)
            for text in (
                "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
                "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`",
                "CUDA driver error: unknown error",
                "Triton Error [CUDA]: unspecified launch failure",
            )
        ),
    ],
)
def test_a_gpu_that_fails_is_named_and_is_worth_a_restart(
    logged: list[str], monkeypatch: pytest.MonkeyPatch, error: RuntimeError, reason: str
) -> None:
    monkeypatch.delenv("DAT_RESTARTS_LEFT", raising=False)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "2,3"}.items():
        monkeypatch.setenv(name, value)
    assert report_failure(error) == LOST_PEER
    gpu = f"GPU 1 (CUDA_VISIBLE_DEVICES=2,3) of {socket.gethostname()}"
    assert logged == [f"rank 5: {gpu} failed: {reason}; {BY_HAND}"]


@pytest.mark.parametrize(
    "reason",
    [
        "CUDA error: device-side assert triggered",
        "CUDA error: no kernel image is available for execution on the device",
        "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx(handle)`",
        "cuDNN error: CUDNN_STATUS_BAD_PARAM",
    ],
)
def test_a_wrong_call_of_the_gpu_is_an_error_of_the_program(reason: str) -> None:
    error = torch.AcceleratorError(f"{reason}{ADVICE}")
    with pytest.raises(torch.AcceleratorError) as raised:
        report_failure(error)
    assert raised.value is error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError(f"CUDA error: out of memory{ADVICE}"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        nccl("unhandled cuda error", "ncclUnhandledCudaError", "Cuda failure 2 'out of memory'"),
    ],
    ids=repr,
)
def test_out_of_memory_is_told_with_its_cure(logged: list[str], error: Exception) -> None:
    assert report_failure(error) == FAILED
    assert len(logged) == 1
    assert logged[0].startswith("out of memory; reduce --batch-size ")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "DataLoader worker (pid 7) is killed by signal: Killed.",
        ),
        (
            ConnectionResetError(104, "Connection reset by peer"),
            "DataLoader worker died while sending a batch: [Errno 104] Connection reset by peer",
        ),
        (
            ConnectionRefusedError(111, "Connection refused"),
            "DataLoader worker died while sending a batch: [Errno 111] Connection refused",
        ),
        (EOFError(), "DataLoader worker died while sending a batch: EOFError"),
    ],
)
def test_killed_worker_is_reported_at_any_moment(
    logged: list[str], monkeypatch: pytest.MonkeyPatch, error: RuntimeError | OSError | EOFError, reason: str
) -> None:
    monkeypatch.delenv("DAT_RESTARTS_LEFT", raising=False)
    assert report_failure(error) == LOST_PEER
    assert logged == [f"rank 0: {reason} (fewer DATA.NUM_WORKERS need less memory); {BY_HAND}"]


@pytest.mark.parametrize(
    "reason",
    [
        "RuntimeError: unable to allocate shared memory(shm) for file </torch_7_1_4>: No space left on device (28)",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
    ],
)
def test_full_shared_memory_is_reported_with_its_cure(
    logged: list[str], monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.delenv("DAT_RESTARTS_LEFT", raising=False)
    assert report_failure(RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\n{reason}\n")) == LOST_PEER
    cure = "give the container more with --shm-size or --ipc=host, or use smaller batches"
    assert logged == [f"rank 0: {reason} ({cure}); {BY_HAND}"]


def test_an_operation_without_a_deterministic_kernel_is_named(logged: list[str]) -> None:
    error = (
        "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation"
    )
    assert report_failure(RuntimeError(error)) == WRONG_INPUT
    operation = "adaptive_avg_pool2d_backward_cuda"
    assert logged == [f"--deterministic: {operation} has no deterministic kernel on this device; leave the flag out"]


FILE = "images/cat.jpg"


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EREMOTEIO", "ENOLINK", "EHOSTDOWN", "ETIMEDOUT", "ECONNRESET"])
def test_a_file_that_the_machine_fails_to_read_is_named(
    logged: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("DAT_RESTARTS_LEFT", raising=False)
    number = getattr(errno, name)
    assert report_failure(OSError(number, "it failed", FILE)) == LOST_PEER
    assert logged == [f"rank 0: [Errno {number}] it failed: '{FILE}'; {BY_HAND}"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        *((OSError(number, "it failed", FILE), LOST_PEER) for number in (errno.EIO, errno.ESTALE, errno.ECONNRESET)),
        (TimeoutError(), LOST_PEER),
        *((OSError(number, "is wrong", FILE), WRONG_INPUT) for number in (errno.ENOENT, errno.EACCES, errno.ENOSPC)),
        (OSError("is wrong"), WRONG_INPUT),
        (ValueError("is wrong"), WRONG_INPUT),
        (MemoryError(), FAILED),
    ],
    ids=repr,
)
def test_only_a_failure_of_the_machine_while_building_is_worth_a_restart(
    monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(main, "build_job", fail)
    assert main.main(["--cfg", str(ROOT / "configs" / "digits.yaml"), "--device", "cpu"]) == status


def _fail_to_read(*_: object) -> None:
    raise OSError(errno.EIO, "Input/output error", FILE)


def _break_disk_of_rank_1() -> None:
    from tasks import classification

    if os.environ["RANK"] == "1":
        classification.open_dataset = _fail_to_read


def test_all_processes_end_alike_if_one_fails_to_read_while_building(tmp_path: Path) -> None:
    job = Trial(tmp_path / "trial", 2, 0).start(prepare=_break_disk_of_rank_1)
    assert job.wait() == [LOST_PEER, LOST_PEER], job.console()
    reason = f"[Errno {errno.EIO}] Input/output error: '{FILE}'; {BY_HAND}"
    assert sorted(job.console().splitlines()) == [f"rank {rank}: {reason}" for rank in range(2)]


def test_an_unreadable_held_out_image_is_named_in_the_log_of_the_run(tmp_path: Path) -> None:
    trial = Trial(tmp_path / "trial", 1, 0, TRAIN={"EPOCHS": 1, "WARMUP_EPOCHS": 0})
    path = next(trial.images.glob("val/3/*.png"))
    path.write_text("no image")
    job = trial.start()
    assert job.wait() == [FAILED], job.console()
    says = f"cannot read image '{path}': cannot identify image file; repair or delete it"
    assert job.console().count(says) == 1
    assert f"ERROR {says}" in (trial.folder / "log.txt").read_text(encoding="utf-8").splitlines()[-1]


def test_killed_process_is_not_reported_as_timeout(tmp_path: Path) -> None:
    trial = Trial(tmp_path / "trial", 2, 0)
    job = trial.start(DAT_RESTARTS_LEFT="2")
    job.wait_until(lambda: trial.rows() > 0)
    job.signal(signal.SIGKILL, 1)
    assert job.wait() == [LOST_PEER, -signal.SIGKILL]
    last = job.console().splitlines()[-1]
    assert last.startswith("rank 0: another process died: ")
    assert last.endswith(BY_ITSELF)


SETUP = ROOT / "tools" / "setup_env.py"
FILES = [path for folder in ("tools", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
PROGRAMS = [path for path in FILES if "startup.begin(" in path.read_text("utf-8")]


def needs(program: Path) -> set[str]:
    """Return the modules that a program asks for, besides those of every program."""
    calls = [node for node in ast.walk(ast.parse(program.read_text("utf-8"))) if isinstance(node, ast.Call)]
    begins = (call for call in calls if ast.unparse(call.func) == "startup.begin")
    return {ast.literal_eval(word) for begin in begins for word in begin.args}


def loaded_by(path: Path, seen: set[Path]) -> set[str]:
    """Return the modules of other packages that a file imports at once, itself or by files that are not in `seen`."""
    seen.add(path)
    found = set()
    for name in imports_of(path, at_once=True):
        parts = name.split(".")
        if parts[0] not in OURS:
            found.add(parts[0])
            continue
        for place in (ROOT.joinpath(*parts[:length]) for length in range(1, len(parts) + 1)):
            for file in (place.with_suffix(".py"), place / "__init__.py"):
                if file.is_file() and file not in seen:
                    found |= loaded_by(file, seen)
    return found - sys.stdlib_module_names


TOOLS = [path for path in PROGRAMS if path.parent.name == "tools"]


@pytest.mark.parametrize("program", [ROOT / "main.py", *TOOLS], ids=lambda path: path.name)
def test_programs_ask_for_the_packages_that_they_import(program: Path) -> None:
    assert loaded_by(program, set()) - set(startup._MODULES) == needs(program)


def test_programs_check_that_their_packages_are_installed() -> None:
    started = {path for path in FILES if '"__main__"' in path.read_text("utf-8")}
    assert started - set(PROGRAMS) == {SETUP}


@pytest.mark.parametrize("program", [ROOT / "main.py", *PROGRAMS], ids=lambda path: path.name)
def test_python_without_the_packages_gets_one_line(program: Path) -> None:
    done = run_command(sys.executable, "-S", program, "1", PYTHONPATH="")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "has no package torch, torchvision, timm" in done.stderr
    assert ".venv/bin/python" in done.stderr


@pytest.mark.parametrize("program", [ROOT / "main.py", *PROGRAMS], ids=lambda path: path.name)
def test_ctrl_c_ends_a_program_without_a_traceback(program: Path, tmp_path: Path) -> None:
    # Each stands for the package, and for a user who presses Ctrl-C.
    for name in (*startup._MODULES, "matplotlib", *needs(program)):
        (tmp_path / f"{name}.py").write_text("import os, signal\n\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = run_command(sys.executable, "-S", program, "1", PYTHONPATH=str(tmp_path))
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="packages_distributions of Python 3.10 knows only some packages")
def test_the_packages_that_are_asked_for_are_those_that_a_run_imports() -> None:
    loaded = set(run_command(sys.executable, "-c", "import sys, main; print(*sys.modules)").stdout.split())
    assert set(startup._MODULES) <= loaded
    modules: dict[str, set[str]] = {}
    for module, names in metadata.packages_distributions().items():
        for name in names:
            modules.setdefault(canonicalize_name(name), set()).add(module)
    for requirement in read("requirements.txt", "3.11"):
        imported = modules[canonicalize_name(requirement.name)] & loaded
        assert not imported or imported & set(startup._MODULES), requirement.name


def test_a_python_that_is_too_old_is_told_in_one_line() -> None:
    program = "import runpy, sys; sys.version_info = 3, 9, 18; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = run_command(sys.executable, "-c", program, ROOT / "main.py")
    assert done.returncode == 2
    assert done.stderr.startswith(f"main.py: {sys.executable} is Python 3.")
    assert "3.10 or later is needed; run .venv/bin/python" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("program", [ROOT / "main.py", *PROGRAMS, SETUP], ids=lambda path: path.name)
def test_every_program_answers_help(program: Path) -> None:
    done = run_command(sys.executable, program, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert done.stderr == ""
