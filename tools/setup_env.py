"""Set up `.venv`: a virtual environment with the tested versions of all requirements.

The environment is stored in a cache, under a name derived from the requirements and the Python version, and `.venv`
links to it: a second clone reuses it, and changed requirements create another one. Only needs Python's standard
library.

    python3 tools/setup_env.py
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = ROOT / ".venv"
FILES = ("requirements.txt", "requirements-dev.txt", "constraints.txt")
PYTHONS = ((3, 10), (3, 13))


def cached_environment() -> Path:
    """Return the path of the environment for these requirements and this Python."""
    key = hashlib.sha256(sys.version.encode() + sys.prefix.encode())
    for name in FILES:
        key.update((ROOT / name).read_bytes())
    cache = (
        os.environ.get("DAT_ENV_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dat-env"
    )
    return Path(cache) / key.hexdigest()[:16]


def install(environment: Path) -> None:
    """Create `environment` and install the requirements, removing the remains of an interrupted installation."""
    print(f"setup: installing the requirements into {environment}")
    print(
        "setup: about 6 GB with PyTorch's CUDA libraries, one to five minutes; later calls find them there", flush=True
    )
    begin = time.monotonic()
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraints = ["--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, "--requirement", ROOT / "requirements-dev.txt", *constraints], check=True)
    # Optional: it is built against the torch installed above, and only needed to compare with it.
    natten = (
        subprocess.run([*pip, "setuptools", "wheel"], check=False).returncode
        or subprocess.run(
            [*pip, "--no-build-isolation", "--no-deps", "natten", *constraints], check=False, capture_output=True
        ).returncode
    )
    if natten:
        print("setup: NATTEN did not install; it is optional, and the tests that compare with it are skipped")
    (environment / "complete").touch()
    print(f"setup: done in {time.monotonic() - begin:.0f} s")


def refuse(problem: str, *, status: int = 2) -> int:
    """Print why there is no environment on standard error, and return the exit status."""
    print(f"setup: {problem}", file=sys.stderr)
    return status


def main() -> int:
    """Set up the environment, and return the exit status."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        low, high = (".".join(map(str, version)) for version in PYTHONS)
        return refuse(
            f"Python {low} to {high} is needed, this is {sys.version.split()[0]}; try make PYTHON=python{high}"
        )
    if LINK.exists() and not LINK.is_symlink():
        return refuse(".venv is a folder of your own; move it away, then make setup puts its link there")
    environment = cached_environment()
    environment.parent.mkdir(parents=True, exist_ok=True)
    with environment.with_suffix(".lock").open("w") as lock:  # a concurrent call waits for the first
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (environment / "complete").exists():
            try:
                install(environment)
            except subprocess.CalledProcessError as error:
                return refuse(f"the installation failed (pip ended with {error.returncode}); see above", status=1)
        LINK.unlink(missing_ok=True)
        LINK.symlink_to(environment, target_is_directory=True)
    print("setup: .venv is ready; its interpreter is .venv/bin/python")
    return 0


if __name__ == "__main__":
    sys.exit(main())
