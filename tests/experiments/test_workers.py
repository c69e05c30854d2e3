"""Worker processes end with the program that started them, however it ended."""

import os
import subprocess
import sys
import time

import pytest

PROGRAM = """
import time
from equinorm.experiments.workers import Place, Pool
if __name__ == "__main__":
    pool = Pool(2, Place())
    print(*[process.pid for process in pool._processes], flush=True)
    time.sleep(120)
"""


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes through /proc")
def test_workers_end_when_the_program_is_killed(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as program:
        workers = [int(pid) for pid in program.stdout.readline().split()]
        assert len(workers) == 2
        program.kill()
    for _ in range(600):  # a worker that is still importing looks for its parent afterwards
        if not any(map(is_running, workers)):
            return
        time.sleep(0.1)
    raise AssertionError(f"{workers} are still running")
