"""Requests to stop: `test_interruption.py` sends signals to runs."""

from __future__ import annotations

import errno
import io
import signal
import socket
import sys
import threading
import time

import pytest

from utils import StopSignal


class ClosedTerminal(io.StringIO):
    def write(self, _text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_request_counts_although_the_terminal_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", ClosedTerminal())
    stop, (numbers, written) = StopSignal(), socket.socketpair()
    thread = threading.Thread(target=stop._listen, args=(numbers,), daemon=True)
    thread.start()
    for number in (signal.SIGHUP, signal.SIGTERM):
        written.send(bytes([number]))
        end = time.monotonic() + 10
        while stop.received != number and time.monotonic() < end:
            time.sleep(0.001)
        assert stop.received == number
    assert thread.is_alive()
