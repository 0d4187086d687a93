"""Tests that run Triton's kernels on the CPU; they need its interpreter from the first import, see `..test_gpu`."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
