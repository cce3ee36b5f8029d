"""The built-in reward for programs: the share of the dataset's tests that the completion's code passes."""

import json
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from rlswitch.rewards.functions import Completion, last_message
from rlswitch.rewards.sandbox.sandbox import Sandbox, SandboxError

BLOCK = re.compile(r"```(?:python|py)?3?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)

# A test passes when its line with the token arrives: a program can leave early with exit code 0. The token is
# read, and its file removed, before the program starts.
HARNESS = """
import json, os, sys, traceback
token, code, tests = json.loads(sys.stdin.read())
report = os.dup(1)
os.dup2(2, 1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
space = {"__name__": "__solution__"}
exec(compile(code, "solution.py", "exec"), space)
for number, test in enumerate(tests):
    try:
        exec(compile(test, f"test {number}", "exec"), space)
    except Exception:
        traceback.print_exc()
    else:
        os.write(report, f"{token} {number}\\n".encode())
"""


class CodeReward:
    """The share of `tests` that pass after the completion's code has run, in a sandbox.

    `tests`, a column of the dataset, is Python source, or a list of it, possibly as JSON; a test fails by
    raising. The code is the completion's last ``` block, or all of it. A program that is stopped keeps the
    tests it passed. rollouts.jsonl says under `code` how each ended.
    """

    def __init__(self, sandbox: Sandbox):
        self._sandbox = sandbox

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        tests: Sequence[str | Sequence[str] | None],
        log_extra: Callable[[str, list[str]], None] | None = None,
        **columns: Any,
    ) -> list[float | Exception | None]:
        pairs = zip(completions, tests, strict=True)
        results = [self._score(last_message(completion), wanted) for completion, wanted in pairs]
        if log_extra is not None:
            log_extra("code", [remark for _, remark in results])
        return [score for score, _ in results]

    def _score(self, text: str, tests: str | Sequence[str] | None) -> tuple[float | Exception | None, str]:
        try:
            wanted = as_list(tests or [])
        except ValueError as error:
            return error, str(error)
        if not wanted:
            return None, "no tests"
        token = secrets.token_hex(16)
        try:
            outcome = self._sandbox.run(HARNESS, stdin=json.dumps([token, code_block(text), wanted]))
        except SandboxError as error:
            return error, str(error)
        reported = set(outcome.output.splitlines())
        passed = sum(f"{token} {number}" in reported for number in range(len(wanted)))
        remark = f"passed {passed} of {len(wanted)}"
        return passed / len(wanted), f"{remark}; {outcome.problem}" if outcome.problem else remark


def as_list(tests: str | Sequence[str]) -> list[str]:
    """Raises ValueError for JSON that is not a list of tests: run as Python source it could not fail."""
    if not isinstance(tests, str):
        return list(tests)
    try:
        decoded = json.loads(tests)
    except ValueError:
        return [tests]
    if not isinstance(decoded, list) or not all(isinstance(test, str) for test in decoded):
        raise ValueError(f"tests = {tests[:40]}: neither Python source nor a list of it")
    return decoded


def code_block(text: str) -> str:
    """The last fenced block of a completion, or all of it without one."""
    blocks = BLOCK.findall(text)
    return blocks[-1] if blocks else text
