import os
import signal
import socket
import subprocess
import sys

SCRIPT = """
import os, signal
from torch import distributed as dist
from fastroute.training import roll_call
from fastroute.training.distributed import ProcessLost, process_group
roll_call.ANSWER = 1
try:
    with process_group():
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()
except ProcessLost as error:
    print(error)
"""


def test_names_a_stopped_process():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | common | {"RANK": str(rank), "FASTROUTE_TIMEOUT": "10", "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in (0, 1)
    ]
    try:
        output, _ = processes[0].communicate(timeout=120)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
    assert "process 1 of this run did not answer within 10 s" in output
