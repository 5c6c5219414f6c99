"""What the peers with onnxruntime have in common: from an image to the network, and from embeddings to a file."""

import io
from functools import cache

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

SIDE = 224
MEANS = np.array([103.939, 116.779, 123.68], np.float32)


def pixels(content):
    """The network's input from an encoded image: SIDE x SIDE, BGR, less the means of ImageNet."""
    with Image.open(io.BytesIO(content)) as image:
        resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(resized, np.float32)[..., ::-1] - MEANS


@cache
def session(model, threads):
    """The network; a session may run on several threads at the same time."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model / "model.onnx", options, ["CPUExecutionProvider"])


def embed(network, images):
    """The embeddings of a list of inputs."""
    return network.run(None, {network.get_inputs()[0].name: np.stack(images)})[0]


def reduce(embeddings, components):
    """The principal components of standardized embeddings."""
    return PCA(components).fit_transform(StandardScaler().fit_transform(embeddings))


def write(file, paths, vectors):
    """Writes path, label and features of all images."""
    values = pa.array(vectors.astype(np.float32, copy=False).reshape(-1))
    features = pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])
    labels = [path.split("/")[-2] for path in paths]
    pq.write_table(pa.table({"path": paths, "label": labels, "features": features}), file)
