"""Whole processes measured from outside, the machine they ran on, and tables of what came out.

The measuring process never imports torch: on Linux a child's peak RSS starts at that of its parent.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

PYTHON = sys.executable
CONSOLE = Console(highlight=False, width=110)


@dataclass(frozen=True, slots=True)
class Run:
    """One process with all its children: seconds on the clock, user and system CPU seconds, peak RSS in bytes.

    ``others``: how many cores anything else kept busy meanwhile, the kernel's own threads among it.
    """

    wall: float
    user: float
    system: float
    rss: int
    others: float


def run(command: Sequence[str | Path], extra: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end. Raises SystemExit with its output where it fails."""
    environment = {**os.environ, **(extra or {})}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling dora-tools anew each time is not what users see
    with tempfile.TemporaryFile() as said:
        busy, start = _busy(), time.perf_counter()
        process = subprocess.Popen([str(c) for c in command], stdout=said, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall, busy = time.perf_counter() - start, _busy() - busy
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{said.read().decode(errors='replace')}")
    unit = 1 if sys.platform == "darwin" else 1024
    others = max(0.0, busy - usage.ru_utime - usage.ru_stime) / wall
    return Run(wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss * unit, others)


def _busy() -> float:
    """CPU seconds that all processes have used since the machine started; 0 where that is not told."""
    try:
        fields = [int(f) for f in Path("/proc/stat").read_text().partition("\n")[0].split()[1:]]
    except OSError:
        return 0.0
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")


def clean(*paths: Path, patience: float = 0.0) -> None:
    """Delete outputs and let the disk come to rest, outside of what is timed.

    Then wait up to ``patience`` seconds for others to leave the cores alone.
    """
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
    os.sync()
    end = time.monotonic() + patience
    while True:
        before = _busy()
        time.sleep(0.5)
        if _busy() - before < 0.1 or time.monotonic() > end:
            return


def warm(folder: Path) -> None:
    """Read every file below a folder once."""
    buffer = bytearray(1 << 22)
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def spread(values: Sequence[float], digits: int = 2) -> list[str]:
    """min, median, max."""
    return [f"{v:.{digits}f}" for v in (min(values), median(values), max(values))]


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    CONSOLE.print(table)
    CONSOLE.print()


def facts(work: Path | None = None, packages: Sequence[str] = ()) -> None:
    """Print what the numbers depend on."""
    load = ", ".join(f"{v:.1f}" for v in os.getloadavg())
    lines = [
        f"machine   {_cpu()}, {os.cpu_count()} cores, {_memory():.0f} GB, {platform.system()} {platform.release()}",
        f"python    {platform.python_version()}; " + ", ".join(f"{p} {_version(p)}" for p in packages),
        f"load      {load} at the start",
    ]
    if work is not None:
        lines.append(f"disk      {_file_system(work)} at {work}, {shutil.disk_usage(work).free / 1e9:.0f} GB free")
    CONSOLE.print("\n".join(lines) + "\n")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    simd = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    return " ".join(filter(None, (names[0] if names else platform.machine(), simd)))


def _memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _file_system(path: Path) -> str:
    try:
        mounts = [line.split()[:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "an unknown file system"
    resolved = path.resolve()
    kinds = [(len(place), kind) for _, place, kind in mounts if resolved.is_relative_to(place)]
    return max(kinds)[1] if kinds else "an unknown file system"
