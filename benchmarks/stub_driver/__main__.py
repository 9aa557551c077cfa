"""Print the host time of one call of a GPU backend, as JSON: microseconds by direction and contender.

    python -m benchmarks.stub_driver [triton|native] [rounds]

The minimum over rounds, each of 100 consecutive calls. `fastroute` is the public operator, `kernel` the launches
without checks and autograd, for Triton from Python, and `eager` plain PyTorch, whose time includes its computation on
the CPU. `launches` is the number of native kernels that one call launches; a launch takes no time here.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def measure(backend: str, rounds: int) -> dict[str, dict[str, float]]:
    import torch

    from benchmarks import stub_driver
    from benchmarks.stub_driver import native
    from fastroute import use_backend
    from fastroute.bench import overhead
    from fastroute.bench.operators import FORWARD, FORWARD_BACKWARD
    from fastroute.bench.results import OURS

    stub = native.install() if backend == "native" else stub_driver.install()
    torch.set_num_threads(1)
    found = {}
    for direction in (FORWARD, FORWARD_BACKWARD):
        contest = overhead.contest({"backend": backend, "direction": direction}, torch.device("cpu"))
        with use_backend(backend):
            for contender in contest.contenders.values():
                contender()
            contest.run(rounds)
            found[direction] = {name: 1e6 * min(times) for name, times in contest.seconds.items()}
            if backend == "native":
                before = stub.emulator_launches()
                contest.contenders[OURS]()
                found[direction]["launches"] = stub.emulator_launches() - before
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stub_driver", description=__doc__.splitlines()[0])
    parser.add_argument("backend", nargs="?", default="triton", choices=("triton", "native"))
    parser.add_argument("rounds", nargs="?", default=20, type=int)
    parser.add_argument("--on-the-stub", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.on_the_stub:
        print(json.dumps(measure(args.backend, args.rounds)))
        return
    from benchmarks import stub_driver
    from benchmarks.stub_driver import native

    with tempfile.TemporaryDirectory() as folder:
        environment = native.environment() if args.backend == "native" else stub_driver.environment(Path(folder))
        command = [sys.executable, "-m", "benchmarks.stub_driver", args.backend, str(args.rounds), "--on-the-stub"]
        subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
