"""Run each case in a process of its own, so that a crash or a hang fails that case alone."""

import os
import random
import signal
import sys
import traceback
from collections.abc import Callable

SECONDS = 60  # for a case


def failures(cases: list, run: Callable[[object], None]) -> list[str]:
    """Run each case in a child of this process; return a line for each that raised, crashed or hung.

    The parent must not have started threads: the children would wait for them.
    """
    found = []
    for case in cases:
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            os.close(reading)
            signal.alarm(SECONDS)
            message = b"passed"
            try:
                run(case)
            except BaseException as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                message = f"{type(error).__name__}: {error} ({place.name}:{place.lineno})".encode()[:2000]
            os.write(writing, message)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            message = pipe.read().decode(errors="replace")
        _, status = os.waitpid(child, 0)
        if message != "passed":
            found.append(f"{message or signal.Signals(os.WTERMSIG(status)).name}: {case}")
    return found


def main(draw: Callable[[random.Random], object], run: Callable[[object], None], simple: object) -> None:
    """Run `count` random cases of a `seed`, the arguments of the process; print the failures, and exit with 1 for any.

    First run a simple case in this process, to import what each child would import otherwise.
    """
    seed, count = map(int, sys.argv[1:])
    run(simple)
    randomness = random.Random(seed)
    found = failures([draw(randomness) for _ in range(count)], run)
    print(*found, f"{count - len(found)} of {count} passed", sep="\n", flush=True)
    sys.exit(bool(found))
