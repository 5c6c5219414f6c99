"""Runs the statistics in Pomona, scikit-learn and Spark MLlib side by side, and prints a table.

The work is the same for all: a Parquet file of Float32 vectors is standardized and reduced to its
principal components. The file is made where it is not there. One process runs at a time, each on the
same cores, the systems in turn for several rounds. A system that is not installed is left out, and
said so. Ends with an error where the explained variances of two systems differ.

    python benches/peers/run_statistics.py
    python benches/peers/run_statistics.py --rows 5000 --features 256 --rounds 1
"""

import argparse
import json
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

from common import FOLDER, Missing, add_arguments, markdown, measure, middle, pomona_version, processor, require
from common import require_spark, run, run_python, use_cores

STAGES = ["load", "standardize_fit", "pca_fit", "pca_transform"]


def run_pomona(args, vectors):
    version = pomona_version(args.pomona)
    with tempfile.TemporaryDirectory() as target:
        script = [args.pomona, "-f", FOLDER / "pomona_pca.sql"]
        variables = {"file": vectors, "k": args.components, "target": f"{target}/"}
        options = [option for item in variables.items() for option in ("-v", "=".join(map(str, item)))]
        finished = run(script + options)
        model = json.loads((Path(target) / "model.json").read_text())
    seconds = [float(text) for text in re.findall(r"Elapsed ([\d.]+) seconds", finished.messages)]
    stages = dict(zip(finished.output.split(), seconds, strict=True))
    stages["start"] = finished.seconds - sum(seconds)
    times = {"seconds": stages, "process": finished.seconds}
    return {"version": version, **times, "peak_bytes": finished.peak_bytes, **model}


def run_sklearn(args, vectors, solver):
    require("numpy", "pyarrow", "sklearn")
    return run_python("sklearn_pca.py", vectors, "--components", args.components, "--solver", solver)


def run_spark(args, vectors):
    require_spark()
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


def describe(result):
    return f"{whole(result):.2f} s, {result['peak_bytes'] / 1e6:.0f} MB"


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
    rows = [heads]
    for name, rounds in results.items():

        def ratio(value):
            return f"{middle(rounds, value) / middle(results[reference], value):.2f}" if reference in results else ""

        stages = [middle(rounds, lambda result, stage=stage: result["seconds"].get(stage, 0.0)) for stage in STAGES]
        all_whole = sorted(map(whole, rounds))
        rows.append(
            [
                name,
                *(f"{seconds:.2f}" if seconds else "" for seconds in stages),
                f"{middle(rounds, whole):.2f}",
                f"{all_whole[0]:.2f} to {all_whole[-1]:.2f}",
                ratio(whole),
                f"{middle(rounds, from_memory):.2f}",
                ratio(from_memory),
                f"{middle(rounds, lambda result: result['process']):.2f}",
                f"{max(result['peak_bytes'] for result in rounds) / 1e6:.0f} MB",
            ]
        )
    return markdown(rows)


def main():
    parser = argparse.ArgumentParser(description="Compares the statistics of Pomona with its peers'.")
    parser.add_argument("--rows", type=int, default=67_692)
    parser.add_argument("--features", type=int, default=2_048)
    parser.add_argument("--components", type=int, default=25)
    add_arguments(parser)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["pomona", "sklearn", "spark"])
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of explained variances, relative")
    args = parser.parse_args()
    args.pomona = args.pomona.resolve()

    use_cores(args.cores)
    pomona, quarter = SYSTEMS["pomona"][0], "Pomona, a quarter of the rows"
    try:
        vectors = make_vectors(args, args.rows)
        systems = [SYSTEMS[system] for system in args.systems]
        jobs = {name: partial(function, args, vectors) for name, function in systems}
        if "pomona" in args.systems:
            jobs[quarter] = partial(run_pomona, args, make_vectors(args, args.rows // 4))
    except Missing as missing:
        raise SystemExit(f"cannot make the vectors: {missing}") from None
    results = measure(args.rounds, jobs, describe)
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
