"""Runs the statistics in Pomona, scikit-learn and Spark MLlib side by side, and prints a table.

The work is the same for all: a Parquet file of Float32 vectors is standardized and reduced to its
principal components. The file is made where it is not there. One process runs at a time, each on the
same cores, the systems in turn for several rounds. A system that is not installed is left out, and
said so. Ends with an error where the explained variances of two systems differ.

    python benches/peers/run_statistics.py
    python benches/peers/run_statistics.py --rows 5000 --features 256 --rounds 1
"""

import argparse
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
from time import perf_counter

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parent.parent
STAGES = ["load", "standardize_fit", "pca_fit", "pca_transform"]


class Missing(Exception):
    """Something is not installed; says what, and how to get it."""


def require(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Missing(f"no Python package {package}: pip install -r {FOLDER / 'requirements.txt'}")


def run(command):
    """Runs a command to its end. Returns its output, its messages, its seconds and its peak memory in bytes."""
    started = perf_counter()
    # Files, not pipes: nothing here has to run beside what is measured.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        printed = [stream.seek(0) or stream.read() for stream in (output, errors)]
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\nends with {process.returncode}:\n{''.join(printed)}")
    return *printed, seconds, usage.ru_maxrss * 1024


def run_pomona(args, vectors):
    if not args.pomona.is_file():
        raise Missing(f"no program {args.pomona}: cargo build --release, or --pomona PATH")
    version = run([args.pomona, "--version"])[0].strip()
    with tempfile.TemporaryDirectory() as target:
        script = [args.pomona, "-f", FOLDER / "pomona_pca.sql"]
        variables = {"file": vectors, "k": args.components, "target": f"{target}/"}
        options = [option for item in variables.items() for option in ("-v", "=".join(map(str, item)))]
        headings, times, process, peak = run(script + options)
        model = json.loads((Path(target) / "model.json").read_text())
    seconds = [float(text) for text in re.findall(r"Elapsed ([\d.]+) seconds", times)]
    stages = dict(zip(headings.split(), seconds, strict=True))
    stages["start"] = process - sum(seconds)
    return {"version": version, "seconds": stages, "process": process, "peak_bytes": peak, **model}


def run_python(script, *arguments):
    output, _, process, _ = run([sys.executable, FOLDER / script, *map(str, arguments)])
    return {"process": process, **json.loads(output.splitlines()[-1])}


def run_sklearn(args, vectors, solver):
    require("numpy", "pyarrow", "sklearn")
    return run_python("sklearn_pca.py", vectors, "--components", args.components, "--solver", solver)


def run_spark(args, vectors):
    require("pyspark")
    if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        raise Missing("no Java: install 17 or newer, or set JAVA_HOME")
    return run_python("spark_pca.py", vectors, "--components", args.components, "--cores", args.cores)


# By the name of --systems: what the table says, and what runs it.
SYSTEMS = {
    "pomona": ("Pomona", run_pomona),
    "sklearn": ("scikit-learn, covariance_eigh", lambda args, vectors: run_sklearn(args, vectors, "covariance_eigh")),
    "sklearn-full": ("scikit-learn, full", lambda args, vectors: run_sklearn(args, vectors, "full")),
    "spark": ("Spark MLlib", run_spark),
}


def make_vectors(args, rows):
    """The file of vectors, which is there afterwards and in the page cache."""
    path = args.data / f"vectors-{rows}x{args.features}.parquet"
    if not path.exists():
        require("numpy", "pyarrow")
        args.data.mkdir(parents=True, exist_ok=True)
        print(f"makes {path}", file=sys.stderr)
        run([sys.executable, FOLDER / "make_vectors.py", path, "--rows", str(rows), "--features", str(args.features)])
    with path.open("rb") as file:
        while file.read(1 << 20):
            pass
    return path


def measure(args, jobs):
    """Runs the jobs, (name, function, vectors) each, in turn. Returns the results of every round by name."""
    results = {}
    for turn in range(1, args.rounds + 1):
        for job in list(jobs):
            name, function, vectors = job
            try:
                result = function(args, vectors)
            except Missing as missing:
                print(f"{name} is left out: {missing}", file=sys.stderr)
                jobs.remove(job)
                continue
            results.setdefault(name, []).append(result)
            peak = result["peak_bytes"] / 1e6
            print(f"round {turn} of {args.rounds}: {name}: {whole(result):.2f} s, {peak:.0f} MB", file=sys.stderr)
    return results


def whole(result):
    """Seconds from the file to the components of every row, without the start of the process."""
    return sum(seconds for stage, seconds in result["seconds"].items() if stage != "start")


def from_memory(result):
    return whole(result) - result["seconds"].get("load", 0.0)


def difference(one, other):
    """The largest relative difference of what both say of the variances."""
    largest = 0.0 if one["count"] == other["count"] else float("inf")
    for key in ("explained_variance", "explained_variance_ratio"):
        if key in one and key in other:
            pairs = zip(one[key], other[key], strict=True)
            largest = max(largest, *(abs(a - b) / max(abs(a), abs(b)) for a, b in pairs))
    return largest


def table(results, reference):
    """Markdown: medians of the rounds, and ratios to the reference."""
    heads = ["system (times in seconds)", *STAGES, "whole", "lowest to highest", "ratio", "from memory", "ratio"]
    heads += ["process", "peak memory"]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name, rounds in results.items():

        def middle(value):
            return median(value(result) for result in rounds)

        def ratio(value):
            return f"{middle(value) / median(map(value, results[reference])):.2f}" if reference in results else ""

        stages = [middle(lambda result, stage=stage: result["seconds"].get(stage, 0.0)) for stage in STAGES]
        all_whole = sorted(map(whole, rounds))
        rows.append(
            [
                name,
                *(f"{seconds:.2f}" if seconds else "" for seconds in stages),
                f"{middle(whole):.2f}",
                f"{all_whole[0]:.2f} to {all_whole[-1]:.2f}",
                ratio(whole),
                f"{middle(from_memory):.2f}",
                ratio(from_memory),
                f"{middle(lambda result: result['process']):.2f}",
                f"{max(result['peak_bytes'] for result in rounds) / 1e6:.0f} MB",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def processor():
    """The processor's name, as far as the system tells it."""
    try:
        return re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M).group(1)
    except (OSError, AttributeError):
        return platform.machine()


def main():
    build = Path(os.environ.get("CARGO_TARGET_DIR", PROJECT / "target"))
    parser = argparse.ArgumentParser(description="Compares the statistics of Pomona with its peers'.")
    parser.add_argument("--rows", type=int, default=67_692)
    parser.add_argument("--features", type=int, default=2_048)
    parser.add_argument("--components", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--pomona", type=Path, default=build / "release" / "pomona", help="the program")
    parser.add_argument("--data", type=Path, default=PROJECT / "target" / "peers", help="where the vectors are kept")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["pomona", "sklearn", "spark"])
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of explained variances, relative")
    args = parser.parse_args()
    args.pomona = args.pomona.resolve()

    # Inherited: all systems count their threads by it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    pomona, quarter = SYSTEMS["pomona"][0], "Pomona, a quarter of the rows"
    try:
        vectors = make_vectors(args, args.rows)
        jobs = [(*SYSTEMS[system], vectors) for system in args.systems]
        if "pomona" in args.systems:
            jobs.append((quarter, run_pomona, make_vectors(args, args.rows // 4)))
    except Missing as missing:
        raise SystemExit(f"cannot make the vectors: {missing}") from None
    results = measure(args, jobs)
    if not results:
        raise SystemExit("nothing to compare: no system is there")

    print(f"{args.rows} x {args.features} Float32, {args.components} components, {args.rounds} round(s)")
    print(f"{args.cores} core(s) of {processor()}")
    print("; ".join(dict.fromkeys(rounds[0]["version"] for rounds in results.values())), end="\n\n")
    print(table(results, pomona))
    if pomona not in results:
        return

    reference = results[pomona][0]
    few, many = (max(result["peak_bytes"] for result in results[name]) for name in (quarter, pomona))
    print(f"\nPomona's peak memory: {many / few:.2f} times that of a quarter of the rows")
    differs = False
    for name, rounds in results.items():
        if name != quarter and name != pomona:
            largest = max(difference(result, reference) for result in rounds)
            print(f"{name}: explained variances differ from Pomona's by {largest:.1e} at most")
            differs |= not largest <= args.tolerance
    if differs:
        raise SystemExit(f"explained variances differ by more than {args.tolerance:.0e}")


if __name__ == "__main__":
    main()
