"""Print the host time of one call through Triton, as JSON: microseconds by direction and contender.

    python -m benchmarks.stub_driver [rounds]

The minimum over rounds, each of 100 consecutive calls. `fastroute` is the public operator, `kernel` the launches from
Python only, and `eager` plain PyTorch, whose time includes its computation on the CPU.
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
