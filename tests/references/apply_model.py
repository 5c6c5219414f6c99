"""Applies a model that Pomona has saved, without Pomona: in NumPy.

    python -m venv venv && venv/bin/pip install numpy==2.4.6 pyarrow==26.0.1
    venv/bin/python tests/references/apply_model.py FUNCTION MODEL VECTORS

FUNCTION is standardize, pca_transform, pca_inverse, classify or classify_proba. MODEL is a file with
one row and a column `model`, as `COPY (SELECT lda_fit(v, label) AS model FROM …) TO 'model.parquet'`
writes it, or the same as .json. VECTORS is a Parquet file with a column `v`. Prints a JSON array
with what the function gives for each vector, in the file's order.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


def read_model(path):
    if path.suffix == ".json":
        (line,) = path.read_text().splitlines()
        return json.loads(line)["model"]
    return pq.read_table(path)["model"][0].as_py()


def standardize(v, model):
    std = np.array(model["std"])
    centred = v - np.array(model["mean"])
    return np.divide(centred, std, out=np.zeros_like(centred), where=std != 0).tolist()


def pca_transform(v, model):
    return ((v - np.array(model["mean"])) @ np.array(model["components"]).T).tolist()


def pca_inverse(scores, model):
    return (scores @ np.array(model["components"]) + np.array(model["mean"])).tolist()


def label_scores(v, model):
    return v @ np.array(model["coefficients"]).T + np.array(model["intercepts"])


def classify(v, model):
    return [model["labels"][i] for i in label_scores(v, model).argmax(axis=1)]


def classify_proba(v, model):
    scores = label_scores(v, model)
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    order = np.argsort(-scores, axis=1, kind="stable")
    return [
        [{"label": model["labels"][i], "probability": float(row[i])} for i in best]
        for row, best in zip(probabilities, order)
    ]


FUNCTIONS = {f.__name__: f for f in (standardize, pca_transform, pca_inverse, classify, classify_proba)}


def main():
    function, model, vectors = sys.argv[1:]
    v = np.array(pq.read_table(vectors)["v"].to_pylist(), dtype=np.float64)
    print(json.dumps(FUNCTIONS[function](v, read_model(Path(model)))))


main()
