"""The peak memory of one arm, in a process of its own.

    python -m benchmarks.peak step B=64 "functional, eager, float32" --device cpu --threads 2

On a CPU it is the operating system's count of the pages that the process holds, on a GPU the allocator's count of
bytes: how far they rise during calls above where they stand between calls, with gradients let go.
"""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from . import command, measure, questions

WARMUPS, CALLS = 3, 5


def in_own_process(question: str, case: str, arm: str, setup: measure.Setup) -> int:
    """The peak of an arm, in bytes.

    Raises:
        RuntimeError: the process did not end well.
    """
    line = [sys.executable, "-m", "benchmarks.peak", question, case, arm, *command.options_of(setup)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(f"{arm}: its own process ended with {done.returncode}.\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def of(work: measure.Work, device: str) -> int:
    """The peak of a work's calls, in bytes, in this process."""
    for _ in range(WARMUPS):
        work.call()
    work.release()
    gc.collect()
    base, peak = (_resident if device == "cpu" else _allocated)()
    for _ in range(CALLS):
        work.call()
        work.release()
    return max(0, peak() - base)


def _resident() -> tuple[int, Callable[[], int]]:
    """What the process holds now, and a function of what it will have held at most."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted again
    return _status("VmRSS"), lambda: _status("VmHWM")


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def _allocated() -> tuple[int, Callable[[], int]]:
    """The same for the GPU's allocator."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated


def main() -> None:
    parser = command.Parser("python -m benchmarks.peak", __doc__)
    parser.add_argument("question")
    parser.add_argument("case")
    parser.add_argument("arm")
    command.add_setup(parser)
    options = parser.parse_args()
    setup = command.setup(parser, options)
    cases = questions.load(options.question).cases(setup)
    case = next(case for case in cases if case.name == options.case)
    case.compared()  # what is measured is what is timed
    arm = next(arm for arm in case.arms if arm.name == options.arm)
    print(json.dumps(of(arm.make(), setup.device)))


if __name__ == "__main__":
    main()
