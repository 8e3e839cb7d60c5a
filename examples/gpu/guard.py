"""Runs a command in a process group that ends with the process that asked for the command.

A queue that is killed cannot end its children, and children that go on would write into the
checkpoints of the next call. The queue holds the other end of this process's standard input.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence


def main(command: Sequence[str]) -> int:
    """Returns the exit code of the command."""
    os.setpgrp()
    # An interrupt is for the command, which shows what it has; this process waits for the end.
    signal.signal(signal.SIGINT, lambda *_: None)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        threading.Thread(target=_end_with_the_queue, daemon=True).start()
        code = process.wait()
    return code if code >= 0 else 128 - code


def _end_with_the_queue() -> None:
    os.read(0, 1)  # returns when the other end is closed
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
