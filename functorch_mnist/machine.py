"""The properties of this machine on which measurements depend."""

import platform
from pathlib import Path


def vendor() -> str:
    """Who made the CPU, as `GenuineIntel`; what Python calls it where that is not known."""
    return _of_cpu("vendor_id") or platform.processor()


def processor() -> str:
    """The CPU's name; what Python calls it where that is not known."""
    return _of_cpu("model name") or platform.processor() or platform.machine()


def _of_cpu(name: str) -> str:
    """What Linux says of the first core; else nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
