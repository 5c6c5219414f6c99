"""The statistics in scikit-learn: a Parquet file of vectors is loaded, standardized and reduced.

Prints one line of JSON: seconds by stage, explained variances.

    python sklearn_pca.py vectors.parquet --solver covariance_eigh
"""

import argparse
import json
from pathlib import Path
from time import perf_counter

STARTED = perf_counter()  # importing what follows is the start of the process, and told apart

import numpy as np
import pyarrow.parquet as pq
import sklearn
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

SOLVERS = ["covariance_eigh", "full"]


def load(path):
    """The column `v` as a matrix, with little more memory than it takes."""
    file = pq.ParquetFile(path)
    vectors = None
    row = 0
    for group in range(file.num_row_groups):
        for chunk in file.read_row_group(group, columns=["v"])["v"].chunks:
            block = chunk.flatten().to_numpy().reshape(len(chunk), -1)
            if vectors is None:
                vectors = np.empty((file.metadata.num_rows, block.shape[1]), block.dtype)
            vectors[row : row + len(block)] = block
            row += len(block)
    return vectors


def main():
    parser = argparse.ArgumentParser(description="Standardizes vectors and reduces them, with scikit-learn.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--components", type=int, default=25)
    parser.add_argument("--solver", choices=SOLVERS, default=SOLVERS[0])
    args = parser.parse_args()

    seconds = {}
    before = perf_counter()
    seconds["start"] = before - STARTED

    def lap(stage):
        nonlocal before
        now = perf_counter()
        seconds[stage] = now - before
        before = now

    vectors = load(args.path)
    lap("load")
    # In place: the vectors themselves are not needed again.
    scaler = StandardScaler(copy=False).fit(vectors)
    lap("standardize_fit")
    standardized = scaler.transform(vectors)
    pca = PCA(args.components, svd_solver=args.solver).fit(standardized)
    lap("pca_fit")
    features = pca.transform(standardized)
    lap("pca_transform")

    rows = len(features)
    result = {
        "version": f"scikit-learn {sklearn.__version__}, NumPy {np.__version__}",
        "seconds": seconds,
        "count": rows,
        # StandardScaler divides by n where Pomona, as Spark, divides by n - 1.
        "explained_variance": (pca.explained_variance_.astype(float) * (rows - 1) / rows).tolist(),
        "explained_variance_ratio": pca.explained_variance_ratio_.astype(float).tolist(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
