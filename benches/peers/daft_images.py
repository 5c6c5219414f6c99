"""The images in Daft: its scan and its download, a user-defined function with Pillow and onnxruntime, scikit-learn.

    python daft_images.py images/ models/resnet50 output/ --cores 2 --sessions one

With one session, the network is a Daft class, as Daft's documentation has models: Daft runs it in a process of its
own, which loads it inside of the query. With a session for each core, Daft calls a function on its own threads,
which share one network. Daft has no principal components: the statistics and the file are the Python loop's. Prints
one line of JSON: seconds by stage.
"""

import os
import sys
from pathlib import Path

os.environ["DAFT_PROGRESS_BAR"] = "0"
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent)  # for Daft's processes
# Daft imports TensorFlow where it is installed, as it is for Keras: 500 MB that this program has no use for.
sys.modules["tensorflow"] = None

import daft
import network
import onnxruntime
import peer
from daft import DataType, col

DIMENSIONS = 2_048
EMBEDDING = DataType.fixed_size_list(DataType.float32(), DIMENSIONS)


def embed(session, contents):
    return network.embed(session, [network.pixels(content) for content in contents.to_pylist()])


def one_session(model, cores, rows):
    @daft.cls(max_concurrency=1)
    class Network:
        def __init__(self):
            self.session = network.session(model, cores)

        @daft.method.batch(return_dtype=EMBEDDING, batch_size=rows)
        def embed(self, contents):
            return embed(self.session, contents)

    return Network().embed


def session_per_core(model, rows):
    network.session(model, 1)  # loaded before the clock starts, and kept

    @daft.func.batch(return_dtype=EMBEDDING, batch_size=rows, use_process=False)
    def embed_batch(contents):
        return embed(network.session(model, 1), contents)

    return embed_batch


def main():
    parser = peer.arguments("Embeds images with Daft and onnxruntime and reduces the embeddings.")
    parser.add_argument("--sessions", choices=["one", "per-core"], default="one")
    args = parser.parse_args()
    one = args.sessions == "one"
    function = one_session(args.model, args.cores, args.batch) if one else session_per_core(args.model, args.batch)

    watch = peer.Stopwatch()
    images = daft.from_glob_path(f"{args.images}/**/*.jpg")
    table = images.select("path", function(col("path").download()).alias("embedding")).sort("path").to_arrow()
    paths = table["path"].to_pylist()
    embeddings = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(paths), DIMENSIONS)
    watch.lap("embed")
    features = network.reduce(embeddings, args.components)
    watch.lap("statistics")
    network.write(args.target / peer.FEATURES, paths, features)
    watch.lap("write")
    network.write(args.target / peer.EMBEDDINGS, paths, embeddings)
    watch.report(f"Daft {daft.__version__}, onnxruntime {onnxruntime.__version__}")


if __name__ == "__main__":
    main()
