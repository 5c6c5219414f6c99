"""Makes statistics/*.json: vectors, and what standardizing and PCA must give for them.

Run once, with scikit-learn 1.9; the results are kept beside this script:

    python3 -m venv venv && venv/bin/pip install scikit-learn==1.9.1 numpy==2.4.6
    venv/bin/python make_statistics.py

Means and standard deviations are computed in exact fractions of the given floating-point values
(sample standard deviation, n - 1, as Spark's StandardScaler has it), the components by
sklearn.decomposition.PCA(svd_solver="full"). `clusters` groups the components whose eigenvalues
are equal: only the subspace that a group spans is determined. `spectrum` is the variance of all
components, and `components_for` the fewest that explain a share of it.
"""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA

FOLDER = Path(__file__).parent / "statistics"
SHOWN = 3  # rows of transformed vectors that are kept
SHARES = [0.3, 0.8, 0.95, 0.999]


def orthogonal(rng, d):
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def separated(rng, n, d):
    """Standard deviations fall by a factor of 2 from axis to axis of a rotated frame."""
    x = rng.standard_normal((n, d)) * 8.0 / 2.0 ** np.arange(d)
    return np.round(x @ orthogonal(rng, d).T + rng.standard_normal(d), 3)


def clustered():
    """Eigenvalues that are equal in threes and twos: every value is an integer, so exactly equal."""
    hadamard = np.array([[1]])
    for _ in range(3):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    axes = hadamard * np.array([9, 9, 9, 5, 5, 2, 1, 1])
    return np.tile(np.concatenate([axes.T, -axes.T]), (4, 1)) + np.arange(8)


def exact_moments(x):
    means, stds = [], []
    for column in x.T:
        values = [Fraction(float(v)) for v in column]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        # A square root with 40 more bits than a float holds.
        scale = 1 << 200
        root = Fraction(math.isqrt(int(variance * scale * scale)), scale)
        means.append(float(mean))
        stds.append(float(root))
    return np.array(means), np.array(stds)


def components_for(ratio):
    """By share, as sklearn.decomposition.PCA(n_components=share) has it."""
    cumulative = np.cumsum(ratio)
    assert all(np.abs(cumulative - share).min() > 1e-6 for share in SHARES), "a share that rounding decides"
    return [[share, int(np.searchsorted(cumulative, share, side="right")) + 1] for share in SHARES]


def write(name, x, k, element="f64", clusters=None, distinct=None):
    x = x.astype(np.float32 if element == "f32" else np.float64)
    values = x.astype(np.float64)
    mean, std = exact_moments(values)
    pca = PCA(n_components=k, svd_solver="full").fit(values)
    scaled = np.divide(values - mean, std, out=np.zeros_like(values), where=std > 0)
    full = PCA(svd_solver="full").fit(values)
    case = {
        "element": element,
        "k": k,
        "clusters": clusters or [[i] for i in range(distinct or k)],
        "mean": mean.tolist(),
        "std": std.tolist(),
        "standardized": scaled[:SHOWN].tolist(),
        "total_variance": float(values.var(axis=0, ddof=1).sum()),
        "explained_variance": pca.explained_variance_.tolist(),
        "explained_variance_ratio": pca.explained_variance_ratio_.tolist(),
        "singular_values": pca.singular_values_.tolist(),
        "spectrum": full.explained_variance_.tolist(),
        "components_for": components_for(full.explained_variance_ratio_),
        "components": pca.components_.tolist(),
        "transformed": pca.transform(values)[:SHOWN].tolist(),
        # The shortest decimals of a Float32 are exact again once they are read as Float32.
        "vectors": [[json.loads(str(v)) for v in row] for row in x],
    }
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(case, separators=(",", ":")) + "\n")
    print(f"{path.name:20} {x.shape} {path.stat().st_size:>8} bytes")


def main():
    rng = np.random.default_rng(20240607)
    FOLDER.mkdir(exist_ok=True)
    x = separated(rng, 300, 8)
    write("separated", x, 5)
    write("separated_f32", x, 5, element="f32")
    write("offset", np.round(x + 1e6, 3), 5)
    write("clustered", clustered(), 5, clusters=[[0, 1, 2], [3, 4]])
    factors = rng.integers(-9, 10, (60, 3)) * np.array([7, 3, 1])
    write("rank_3", factors @ rng.integers(-9, 10, (3, 50)), 5, distinct=3)
    signal = separated(rng, 40, 6) @ rng.integers(-1, 2, (6, 512))
    write("few_rows", np.round(signal + rng.standard_normal((40, 512)) / 4, 3), 4)
    x = separated(rng, 50, 6)
    x[:, 2] = 7.25
    write("constant", x, 4)


main()
