"""`spa-lite chat` in a terminal of its own, and `spa-lite serve` as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pexpect

LATE = 60.0
"""Seconds after which a test gives up waiting."""
READY = "\x1b\\[\\?2004h"
"""The line editor switches bracketed paste on when it waits for a message."""


class Terminal:
    """A `spa-lite chat` in a terminal of its own. Its folder holds the run `t`."""

    def __init__(self, folder: Path, *words: str, width: int = 80, timeout: int = 30) -> None:
        env = os.environ | {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "COLUMNS": "", "LINES": ""}
        command = ["-m", "spa_lite.cli", "chat", *words]
        self.child = pexpect.spawn(
            sys.executable, command, cwd=str(folder), env=env, dimensions=(40, width), timeout=timeout, encoding="utf-8"
        )
        self.greeting = self.ready()

    def ready(self) -> str:
        """Wait for the prompt; what was shown until then, without colours and cursor movements."""
        self.child.expect(READY)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.child.before).replace("\r", "")

    def says(self, message: str) -> str:
        """Send a message, wait for the next prompt, and return what came after the message."""
        self.child.send(message + "\r")
        return self.ready()

    def ends(self) -> int:
        """Wait for the end: the exit code."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        return int(self.child.exitstatus)


def answer(shown: str, stage: str = "round 2") -> str:
    """What a stage said last."""
    return str(re.findall(rf"^{stage}: (.*)$", shown, re.MULTILINE)[-1])


class Command:
    """`spa-lite serve` as a process of its own."""

    def __init__(self, *args: str) -> None:
        command = [sys.executable, "-m", "spa_lite.cli", "serve", *args, "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.welcome = [self.process.stdout.readline() for _ in range(5)]
        assert self.welcome[-1], self.process.communicate()[1]
        self.url = self.welcome[2].split()[0].removeprefix("OPENAI_BASE_URL=")

    def end(self, by: int = signal.SIGINT) -> tuple[int, str]:
        """Exit code, and what was on stderr."""
        self.process.send_signal(by)
        _, err = self.process.communicate(timeout=LATE)
        return self.process.returncode, err
