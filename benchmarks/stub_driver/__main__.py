"""Print what the host spends on one call through Triton, as JSON: microseconds by direction and contender.

    python -m benchmarks.stub_driver [rounds]

The least of the rounds, each of 100 calls in a row. `fastroute` is the operator as users call it, `kernel` the launches
by Python alone, `eager` plain PyTorch, which computes beside the time that it takes on the host.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HOSTED = "--on-the-stub"


def measure(rounds: int) -> dict[str, dict[str, float]]:
    import torch

    from benchmarks import stub_driver
    from fastroute import use_backend
    from fastroute.bench import overhead
    from fastroute.bench.operators import FORWARD, FORWARD_BACKWARD

    stub_driver.install()
    torch.set_num_threads(1)
    found = {}
    with use_backend("triton"):
        for direction in (FORWARD, FORWARD_BACKWARD):
            contest = overhead.contest({"backend": "triton", "direction": direction}, torch.device("cpu"))
            for contender in contest.contenders.values():
                contender()
            contest.run(rounds)
            found[direction] = {name: 1e6 * min(times) for name, times in contest.seconds.items()}
    return found


def main() -> None:
    *rounds, last = ["20", *sys.argv[1:]]
    if last == HOSTED:
        print(json.dumps(measure(int(rounds[-1]))))
        return
    from benchmarks import stub_driver

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.stub_driver", last, HOSTED]
        subprocess.run(command, env=stub_driver.environment(Path(folder)), check=True)


if __name__ == "__main__":
    main()
