"""The images in a Python loop: Pillow on threads, onnxruntime, scikit-learn, Parquet.

    python python_images.py images/ models/resnet50 output/ --cores 2 --sessions 1

With one session, a batch runs on all cores while the next one is decoded. With a session for each core, which share
one network, each thread decodes a batch and runs it. Prints one line of JSON: seconds by stage.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import network
import numpy as np
import onnxruntime
import PIL
import peer


def load(path):
    return network.pixels(Path(path).read_bytes())


def batches(paths, rows):
    return [paths[start : start + rows] for start in range(0, len(paths), rows)]


def one_session(paths, session, cores, rows):
    with ThreadPoolExecutor(cores) as pool:
        ahead = []
        for batch in [*batches(paths, rows), []]:
            current, ahead = ahead, [pool.submit(load, path) for path in batch]
            if current:
                yield network.embed(session, [image.result() for image in current])


def session_per_core(paths, session, cores, rows):
    with ThreadPoolExecutor(cores) as pool:
        yield from pool.map(lambda batch: network.embed(session, [load(path) for path in batch]), batches(paths, rows))


def main():
    parser = peer.arguments("Embeds images and reduces the embeddings, with Pillow, onnxruntime and scikit-learn.")
    parser.add_argument("--sessions", choices=["one", "per-core"], default="one")
    args = parser.parse_args()
    one = args.sessions == "one"
    session = network.session(args.model, args.cores if one else 1)

    watch = peer.Stopwatch()
    paths = sorted(map(str, args.images.rglob("*.jpg")))
    embed = one_session if one else session_per_core
    embeddings = np.concatenate(list(embed(paths, session, args.cores, args.batch)))
    watch.lap("embed")
    features = network.reduce(embeddings, args.components)
    watch.lap("statistics")
    network.write(args.target / peer.FEATURES, paths, features)
    watch.lap("write")
    network.write(args.target / peer.EMBEDDINGS, paths, embeddings)
    watch.report(f"onnxruntime {onnxruntime.__version__}, Pillow {PIL.__version__}")


if __name__ == "__main__":
    main()
