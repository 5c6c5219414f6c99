"""What the scripts that run systems side by side have in common."""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from threading import Event, Thread
from time import perf_counter
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parent.parent
SAMPLE_SECONDS = 0.2
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Missing(Exception):
    """Something is not installed; says what, and how to get it."""


class Finished(NamedTuple):
    """A command that ran to its end."""

    output: str
    messages: str
    seconds: float
    peak_bytes: int


def require(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Missing(f"no Python package {package}: pip install -r {FOLDER / 'requirements.txt'}")


def require_spark():
    require("pyspark")
    if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        raise Missing("no Java: install 17 or newer, or set JAVA_HOME")


def resident_bytes(root):
    """The resident memory of a process and all its descendants; pages that two of them share count twice."""
    children, resident = {}, {}
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{entry}/stat").read_text(errors="replace")
        except OSError:
            continue  # it has ended
        fields = stat.rpartition(")")[2].split()  # from the third field on: state, parent, ...
        children.setdefault(int(fields[1]), []).append(int(entry))
        resident[int(entry)] = int(fields[21]) * PAGE_BYTES
    total, family = 0, [root]
    while family:
        process = family.pop()
        total += resident.get(process, 0)
        family += children.get(process, [])
    return total


def run(command, cores=None, environment=None):
    """Runs a command to its end, on `cores` alone where they are given."""
    pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    ended, samples = Event(), [0]

    def sample(process):
        while not ended.wait(SAMPLE_SECONDS):
            samples.append(resident_bytes(process))

    started = perf_counter()
    # Files, not pipes: nothing here has to read beside what is measured.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as messages:
        process = subprocess.Popen(
            command, stdout=output, stderr=messages, env={**os.environ, **(environment or {})}, preexec_fn=pin
        )
        sampler = Thread(target=sample, args=[process.pid])
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = perf_counter() - started
        finally:
            ended.set()
            sampler.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        printed = [stream.seek(0) or stream.read() for stream in (output, messages)]
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\nends with {process.returncode}:\n{''.join(printed)}")
    # The system's own figure misses nothing, but tells of the largest process alone.
    return Finished(*printed, seconds, max(usage.ru_maxrss * 1024, *samples))


def run_python(script, *arguments, environment=None):
    """Runs a peer. Returns what its last line, an object of JSON, says, with `process` seconds and `peak_bytes`."""
    finished = run([sys.executable, FOLDER / script, *map(str, arguments)], environment=environment)
    result = json.loads(finished.output.splitlines()[-1])
    return {"process": finished.seconds, "peak_bytes": finished.peak_bytes, **result}


def measure(rounds, jobs, describe):
    """Runs the jobs, functions by name, in turn. Returns the results of every round by name."""
    jobs, results = dict(jobs), {}
    for turn in range(1, rounds + 1):
        for name, job in list(jobs.items()):
            try:
                result = job()
            except Missing as missing:
                print(f"{name} is left out: {missing}", file=sys.stderr)
                del jobs[name]
                continue
            results.setdefault(name, []).append(result)
            print(f"round {turn} of {rounds}: {name}: {describe(result)}", file=sys.stderr)
    return results


def middle(results, value):
    """The median of a value over the rounds."""
    return median(map(value, results))


def markdown(rows):
    """A table, of which the first row is the head and the first column is text."""
    head, *body = rows
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def processor():
    """The processor's name, as far as the system tells it."""
    try:
        return re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M).group(1)
    except (OSError, AttributeError):
        return platform.machine()


def add_arguments(parser):
    """The options of all of these scripts."""
    build = Path(os.environ.get("CARGO_TARGET_DIR", PROJECT / "target"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--pomona", type=Path, default=build / "release" / "pomona", help="the program")
    parser.add_argument("--data", type=Path, default=PROJECT / "target" / "peers", help="where files are kept")


def use_cores(count):
    """Keeps this process and all that it starts, which count their threads by it, to so many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def pomona_version(program):
    if not program.is_file():
        raise Missing(f"no program {program}: cargo build --release, or --pomona PATH")
    return run([program, "--version"]).output.strip()
