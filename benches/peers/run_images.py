"""Runs the images' whole chain in Pomona and its peers side by side, and prints tables of rates and of figures.

The work is the same for all: a folder of JPEGs is embedded with ResNet50, the embeddings are standardized and
reduced to their principal components, which are written to Parquet with path and label. The network and its int8
form are made where they are not there. One process runs at a time, each on the same cores, the systems in turn for
several rounds. A system that is not installed is left out, and said so. Ends with an error where the embeddings or
the components of two systems differ.

    python benches/peers/run_images.py --images fruits/
    python benches/peers/run_images.py --images fruits/ --quick --systems pomona python
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from common import FOLDER, PROJECT, Missing, add_arguments, markdown, measure, middle, pomona_version, processor
from common import require, require_spark, run, run_python, use_cores
from peer import EMBEDDINGS, FEATURES

COMPONENTS = 25
IMAGES, QUICK_IMAGES = 1_000, 48
LIMIT, FIRST_ROW = "sgemm", "SELECT 1"
# The least cosine of two systems' embeddings of one image, and how far the components' shares of the variance may
# differ in all. The shares, because scikit-learn standardizes with n where the others do with n - 1.
COSINE, COSINE_INT8, TOLERANCE = 0.999, 0.98, 0.01


@dataclass
class Work:
    """What all systems work on."""

    images: Path
    few: Path
    models: Path
    # Multiplications and additions of the network for one image.
    operations: float


def library():
    """onnxruntime's shared library, the one that the peers in Python use."""
    require("onnxruntime")
    folder = Path(importlib.util.find_spec("onnxruntime").origin).parent / "capi"
    return next(folder.glob("libonnxruntime.so*"))


def run_pomona(args, work, model="resnet50", engine="onnxruntime", few=False, cores=None):
    version = pomona_version(args.pomona)
    environment = {"ORT_DYLIB_PATH": str(library())} if engine == "onnxruntime" else {}
    images = work.few if few else work.images
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        plan = f"EXPLAIN SELECT embed(content, '{model}') FROM images('{images}/')"
        command = [args.pomona, "--models-dir", work.models, "-c", f"SET pomona.engine = '{engine}'; {plan}"]
        variables = {"source": f"{images}/", "model": model, "k": COMPONENTS, "target": f"{target}/"}
        script = ["-f", PROJECT / "sql" / "fruits.sql"]
        script += [option for item in variables.items() for option in ("-v", "=".join(map(str, item)))]
        finished = run(command + script, sorted(os.sched_getaffinity(0))[:cores], environment)
        outcome = read(target)
    found = re.findall(r"(written\. )?Elapsed ([\d.]+) seconds", finished.messages)
    # The engine is set and the network loaded, which is the start, by two statements before those of the script.
    chain = [(bool(written), float(seconds)) for written, seconds in found][2:]
    embed = next(seconds for written, seconds in chain if written)
    seconds = {"embed": embed, "rest": sum(seconds for _, seconds in chain) - embed}
    times = {"seconds": seconds, "process": finished.seconds}
    return {"version": f"{version}, {engine}", **times, "peak_bytes": finished.peak_bytes, **outcome}


def run_peer(args, work, script, model, *options):
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        arguments = [work.images, work.models / model, target, "--components", COMPONENTS, "--cores", args.cores]
        result = run_python(script, *arguments, *options)
        outcome = read(target)
    result["process"] -= result.pop("check")
    return {**result, **outcome}


def run_onnxruntime(args, work, script, model="resnet50", sessions="one"):
    require("numpy", "onnxruntime", "PIL", "pyarrow", "sklearn")
    return run_peer(args, work, script, model, "--sessions", sessions)


def run_daft(args, work, **options):
    require("daft")
    return run_onnxruntime(args, work, "daft_images.py", **options)


def run_spark(args, work):
    require("keras", "numpy", "pandas", "PIL", "pyarrow", "tensorflow")
    require_spark()
    return run_peer(args, work, "spark_images.py", "resnet50.keras")


INT8 = {"model": "resnet50-int8"}
PER_CORE = {"sessions": "per-core"}
run_loop = partial(run_onnxruntime, script="python_images.py")
# By the name of --systems: what the table says, and what runs it.
SYSTEMS = {
    "pomona": ("Pomona", run_pomona),
    "python": ("Python loop, one session", run_loop),
    "python-per-core": ("Python loop, a session per core", partial(run_loop, **PER_CORE)),
    "daft": ("Daft, one session", run_daft),
    "daft-per-core": ("Daft, a session per core", partial(run_daft, **PER_CORE)),
    "spark": ("the study's chain (Spark, Keras)", run_spark),
    "pomona-int8": ("Pomona, int8", partial(run_pomona, **INT8)),
    "python-int8": ("Python loop, int8, one session", partial(run_loop, **INT8)),
    "python-int8-per-core": ("Python loop, int8, a session per core", partial(run_loop, **INT8, **PER_CORE)),
    "pomona-tract": ("Pomona with tract", partial(run_pomona, engine="tract", few=True)),
    "pomona-tract-1": ("Pomona with tract, on one core", partial(run_pomona, engine="tract", few=True, cores=1)),
}
# Ratios of the whole chain's rates: at least, of which system, to which others.
RATIOS = [
    (1.10, "pomona", ("python", "python-per-core")),
    (1.6, "pomona", ("daft", "daft-per-core")),
    (3.3, "pomona", ("spark",)),
    (1.25, "pomona-int8", ("python-int8", "python-int8-per-core")),
    (10, "pomona-int8", ("spark",)),
]


def run_limit(args, _):
    """The processor's GFLOP/s with Float32: a multiplication on each core, or one on all, whichever is faster."""
    require("numpy")

    def gflops(processes, threads):
        return run_python("sgemm.py", "--threads", processes, environment={"OPENBLAS_NUM_THREADS": str(threads)})

    return {"gflops": max(gflops(args.cores, 1)["gflops"], gflops(1, args.cores)["gflops"])}


def run_first_row(args, _):
    """From the start of the program to its end with one row, on a warm disk."""
    pomona_version(args.pomona)
    return {"first_row": median(run([args.pomona, "-q", "-c", "SELECT 1"]).seconds for _ in range(11))}


def read(target):
    """The embeddings by the images' names, and the share that each component has of the components' variance."""
    import numpy as np
    import pyarrow.parquet as pq

    def vectors(file):
        table = pq.read_table(target / file)
        values = table.column(2).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        names = [Path(path).name for path in table["path"].to_pylist()]
        return names, values.reshape(len(names), -1)

    embeddings = dict(zip(*vectors(EMBEDDINGS), strict=True))
    variance = np.var(vectors(FEATURES)[1], axis=0)
    shares = (variance / variance.sum()).tolist()
    return {"images": len(embeddings), "shares": shares, "embeddings": embeddings}


def cosine(one, other):
    """The least cosine of two systems' embeddings of one image."""
    import numpy as np

    a, b = (np.array([vectors[name] for name in one], float) for vectors in (one, other))
    return ((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min()


def spread(files, count):
    """So many of the files, from all over the list."""
    count = min(count, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def link(names, folder):
    """Makes a folder of images, files by name, without copying what can be linked; they are in the page cache then."""
    for name, file in names.items():
        target = folder / file.parent.name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except OSError:  # another file system
            shutil.copyfile(file, target)
        target.read_bytes()
    return folder


def make_models(args):
    """The folder of models, which is whole afterwards."""
    models = args.data / f"models-{args.weights}"
    if not (models / "resnet50").is_dir():
        require("keras", "onnxruntime", "sklearn", "tensorflow", "tf2onnx")
        print(f"makes {models / 'resnet50'}", file=sys.stderr)
        arguments = [args.images, models, "--weights", args.weights]
        run([sys.executable, FOLDER / "make_resnet50.py", *map(str, arguments)])
    int8 = any("int8" in system for system in args.systems)
    # The configuration is what is written last.
    if int8 and not (models / "resnet50-int8" / "preprocessor_config.json").is_file():
        require("onnx", "onnxruntime")
        print(f"makes {models / 'resnet50-int8'}", file=sys.stderr)
        quantized = run([sys.executable, FOLDER / "quantize.py", models / "resnet50", args.images])
        print(quantized.output.strip(), file=sys.stderr)
    return models


def operations(model):
    """Multiplications and additions of the convolutions of a network, which are nearly all it does, for one image."""
    require("onnx")
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(model)).graph
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.value_info}
    total = 0
    for node in graph.node:
        if node.op_type == "Conv":
            outputs, inputs, *kernel = weights[node.input[1]]
            height, width = shapes[node.output[0]][2:]
            total += 2 * outputs * inputs * kernel[0] * kernel[1] * height * width
    return total


def chain(result):
    return sum(result["seconds"].values())


def chain_rate(result):
    return result["images"] / chain(result)


def embed_rate(result):
    return result["images"] / result["seconds"]["embed"]


def process_rate(result):
    return result["images"] / result["process"]


def describe(result):
    if "gflops" in result:
        return f"{result['gflops']:.0f} GFLOP/s"
    if "first_row" in result:
        return f"{result['first_row'] * 1e3:.0f} ms"
    rates = f"embed {embed_rate(result):.1f}, chain {chain_rate(result):.1f}, process {process_rate(result):.1f} img/s"
    return f"{rates}, {result['peak_bytes'] / 1e6:.0f} MB"


def ratios(results, one, other, rate=chain_rate):
    """Of two systems, round by round."""
    return [rate(a) / rate(b) for a, b in zip(results[one], results[other], strict=True)]


def table(results, systems, cosines):
    """Markdown: medians of the rounds, and how many times as fast Pomona is."""
    heads = ["system", "images", "embed, img/s", "whole chain, img/s", "lowest to highest", "Pomona /"]
    heads += ["process, img/s", "Pomona /", "start, s", "peak memory", "least cosine"]
    rows = [heads]
    for system in systems:
        rounds = results[system]
        rates = sorted(map(chain_rate, rounds))

        def ratio(rate, system=system):
            comparable = "pomona" in systems and results["pomona"][0]["images"] == results[system][0]["images"]
            return f"{median(ratios(results, 'pomona', system, rate)):.2f}" if comparable else ""

        rows.append(
            [
                SYSTEMS[system][0],
                str(rounds[0]["images"]),
                f"{middle(rounds, embed_rate):.1f}",
                f"{middle(rounds, chain_rate):.1f}",
                f"{rates[0]:.1f} to {rates[-1]:.1f}",
                ratio(chain_rate),
                f"{middle(rounds, process_rate):.1f}",
                ratio(process_rate),
                f"{middle(rounds, lambda result: result['process'] - chain(result)):.1f}",
                f"{max(result['peak_bytes'] for result in rounds) / 1e6:.0f} MB",
                f"{cosines[system]:.5f}" if system in cosines else "",
            ]
        )
    return markdown(rows)


def figures(args, work, results):
    """What the project asks of itself: what, asked, the values found by round, and whether more is better."""
    for asked, one, others in RATIOS:
        for other in others:
            if one in results and other in results:
                what = f"whole chain: {SYSTEMS[one][0]} / {SYSTEMS[other][0]}"
                yield what, asked, ratios(results, one, other), True
    if "pomona" in results and LIMIT in results:
        pairs = zip(results["pomona"], results[LIMIT], strict=True)
        found = [embed_rate(result) * work.operations / (limit["gflops"] * 1e9) for result, limit in pairs]
        yield "embed alone, fp32: Pomona / the processor's limit", 0.90, found, True
    if "pomona-tract" in results and "pomona-tract-1" in results:
        found = [ratio / args.cores for ratio in ratios(results, "pomona-tract", "pomona-tract-1", embed_rate)]
        yield "Pomona with tract / tract on one core x cores", 0.95, found, True
    if "pomona" in results:
        yield "peak memory, fp32, MB", 700, [result["peak_bytes"] / 1e6 for result in results["pomona"]], False
    if FIRST_ROW in results:
        yield "start to first row, ms", 50, [result["first_row"] * 1e3 for result in results[FIRST_ROW]], False


def figures_table(found):
    rows = [["what", "asked", "found", "lowest to highest", ""]]
    for what, asked, values, more in found:
        middling = median(values)
        met = middling >= asked if more else middling < asked
        digits = 2 if more else 0
        rows.append(
            [
                what,
                f"{'at least' if more else 'below'} {asked}",
                f"{middling:.{digits}f}",
                f"{min(values):.{digits}f} to {max(values):.{digits}f}",
                "" if met else "missed",
            ]
        )
    return markdown(rows)


def compare(results, systems):
    """The least cosines with the Python loop's embeddings, and what differs too much."""
    reference = next((results[system][0] for system in ("python", "python-per-core") if system in systems), None)
    if reference is None:
        return {}, []
    cosines, wrong = {}, []
    for system in systems:
        int8 = "int8" in system
        for result in results[system]:
            if not result["embeddings"].keys() <= reference["embeddings"].keys():
                wrong.append(f"{system}: images that the Python loop does not have")
                continue
            worst = cosine(result["embeddings"], reference["embeddings"])
            cosines[system] = min(worst, cosines.get(system, 1.0))
            if not worst >= (COSINE_INT8 if int8 else COSINE):
                wrong.append(f"{system}: an embedding has the cosine {worst:.5f} with the Python loop's")
            same_images = result["images"] == reference["images"]
            differs = sum(abs(a - b) for a, b in zip(result["shares"], reference["shares"], strict=True))
            if same_images and not int8 and not differs <= TOLERANCE:
                wrong.append(f"{system}: the components' shares of the variance differ by {differs:.1%} in all")
    return cosines, wrong


def save(file, args, results, found):
    """Everything that was measured, as JSON."""
    rounds = {
        name: [{key: value for key, value in result.items() if key != "embeddings"} for result in of_name]
        for name, of_name in results.items()
    }
    rows = [{"what": what, "asked": asked, "found": values} for what, asked, values, _ in found]
    machine = {"processor": processor(), "cores": args.cores}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**machine, "results": rounds, "figures": rows}, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Compares the images' whole chain in Pomona with its peers'.")
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEGs, by label")
    parser.add_argument("--copies", type=int, help=f"how often each is there; as makes about {IMAGES} images")
    parser.add_argument("--weights", choices=["random", "imagenet"], default="random", help="imagenet is downloaded")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--quick", action="store_true", help=f"one round, {QUICK_IMAGES} images: a try")
    add_arguments(parser)
    parser.add_argument("--json", type=Path, help="where all results are written to; images.json in --data")
    args = parser.parse_args()
    args.pomona, args.data = args.pomona.resolve(), args.data.resolve()
    rounds = 1 if args.quick else args.rounds

    use_cores(args.cores)
    files = sorted(args.images.rglob("*.jpg"))
    if len(files) < QUICK_IMAGES:
        raise SystemExit(f"{args.images}: {len(files)} images (*.jpg), {QUICK_IMAGES} are needed")
    if args.quick:
        files = spread(files, QUICK_IMAGES)
    copies = 1 if args.quick else args.copies or max(1, round(IMAGES / len(files)))
    names = {f"{i:06}.jpg": file for i, file in enumerate(files * copies)}
    few = {name: names[name] for name in spread(list(names), max(QUICK_IMAGES, len(names) // 8))}
    args.data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.data) as folder:
        try:
            require("numpy", "pyarrow")
            models = make_models(args)
            network = operations(models / "resnet50" / "model.onnx")
        except Missing as missing:
            raise SystemExit(f"cannot make the networks: {missing}") from None
        work = Work(link(names, Path(folder) / "all"), link(few, Path(folder) / "few"), models, network)
        jobs = {system: partial(SYSTEMS[system][1], args, work) for system in args.systems}
        jobs |= {LIMIT: partial(run_limit, args, work), FIRST_ROW: partial(run_first_row, args, work)}
        results = measure(rounds, jobs, describe)
    systems = [system for system in args.systems if system in results]
    if not systems:
        raise SystemExit("nothing to compare: no system is there")

    cosines, wrong = compare(results, systems)
    found = list(figures(args, work, results))
    save(args.json or args.data / "images.json", args, results, found)
    print(f"{len(names)} JPEGs, {len(set(names.values()))} of them different, {rounds} round(s)")
    print(f"ResNet50 ({args.weights} weights), {work.operations / 2e9:.2f} billion multiply-adds for an image")
    print(f"{args.cores} core(s) of {processor()}")
    print("; ".join(dict.fromkeys(results[system][0]["version"] for system in systems)), end="\n\n")
    print(table(results, systems, cosines), end="\n\n")
    if LIMIT in results:
        limits = [result["gflops"] for result in results[LIMIT]]
        rate = median(limits) * 1e9 / work.operations
        print(f"The processor's limit, fp32: {rate:.1f} img/s ({median(limits):.0f} GFLOP/s by sgemm)", end="\n\n")
    print(figures_table(found))
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
