"""Makes classifiers/*.json: labelled vectors, and what classifiers fitted on them must say of them.

Run once, with scikit-learn 1.9; the results are kept beside this script:

    python3 -m venv venv && venv/bin/pip install scikit-learn==1.9.1 numpy==2.4.6
    venv/bin/python make_classifiers.py

Linear discriminant analysis is sklearn.discriminant_analysis.LinearDiscriminantAnalysis(solver="lsqr",
shrinkage=...). scikit-learn's shrinkage="auto" is Ledoit and Wolf's, of each label apart; Pomona's is
the Rao-Blackwellized one of Chen, Wiesel, Eldar and Hero (2010), "Shrinkage Algorithms for MMSE
Covariance Estimation", IEEE Transactions on Signal Processing 58 (10), 5016-5029, equation 17, of the
pooled correlations, so that no feature's unit matters: computed here as published, then handed to
scikit-learn with features of unit variance. The covariance is so shrunk towards its own diagonal; a
feature that is constant within every label, whose variance is 0, takes the mean of all variances there.
Such a covariance NumPy solves. Without shrinkage, a singular covariance is inverted by NumPy's
pseudo-inverse.

Logistic regression is sklearn.linear_model.LogisticRegression(C=1/l2); the gradient confirms that it
is at its optimum, where its usual solver stops 4e-7 short of these probabilities. Its coefficients and those of LDA are kept less their mean over the labels, which
no probability depends on.
"""

import json
from pathlib import Path

import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

FOLDER = Path(__file__).parent / "classifiers"


def within_class_covariance(x, y):
    means = {label: x[y == label].mean(axis=0) for label in np.unique(y)}
    deviations = x - np.array([means[label] for label in y])
    return deviations.T @ deviations / len(x)


def diagonal(s):
    """The variances of the features, and which of them are 0: there the mean of all stands."""
    variances = np.diag(s).copy()
    constant = variances <= 1e-20 * variances.max()
    variances[constant] = np.trace(s) / len(s)
    return variances, constant


def rao_blackwell_ledoit_wolf(x, y):
    n, p = x.shape
    s = within_class_covariance(x, y)
    variances, constant = diagonal(s)
    r = s / np.sqrt(np.outer(variances, variances))
    r[constant, :] = r[:, constant] = 0.0
    of_square, square_of = np.trace(r @ r), np.trace(r) ** 2
    rho = ((n - 2) / n * of_square + square_of) / ((n + 2) * (of_square - square_of / p))
    return float(min(1.0, rho))


def softmax(scores):
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def discriminants(x, y, shrinkage):
    """Coefficients (labels x features) and intercepts."""
    labels, counts = np.unique(y, return_counts=True)
    if shrinkage == 0:
        # scikit-learn solves by least squares, whose cut-off lets through what rounding has left of a zero.
        means = np.array([x[y == label].mean(axis=0) for label in labels])
        coefficients = means @ np.linalg.pinv(within_class_covariance(x, y), rcond=1e-10, hermitian=True)
        intercepts = -0.5 * (means * coefficients).sum(axis=1) + np.log(counts / len(y))
        return coefficients, intercepts
    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x, y)
    return of_each_label(fitted)


def scale_free_discriminants(x, y, rho):
    """The covariance is (1 - rho) S + rho D, with D as `diagonal` has it."""
    s = within_class_covariance(x, y)
    variances, constant = diagonal(s)
    labels, counts = np.unique(y, return_counts=True)
    means = np.array([x[y == label].mean(axis=0) for label in labels])
    covariance = (1 - rho) * s + rho * np.diag(variances)
    coefficients = np.linalg.solve(covariance, means.T).T
    intercepts = -0.5 * (means * coefficients).sum(axis=1) + np.log(counts / len(y))
    if constant.any():
        return coefficients, intercepts
    scale = np.sqrt(variances)
    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=rho).fit(x / scale, y)
    solved = coefficients, intercepts
    coefficients, intercepts = of_each_label(fitted)
    coefficients = coefficients / scale
    for ours, theirs in zip(map(less_mean, solved), map(less_mean, (coefficients, intercepts))):
        assert np.abs(ours - theirs).max() < 1e-9 * np.abs(theirs).max()
    return coefficients, intercepts


def less_mean(numbers):
    """Of each label, less their mean over the labels."""
    return numbers - numbers.mean(axis=0)


def of_each_label(fitted):
    """Of two labels scikit-learn keeps the difference."""
    if len(fitted.classes_) > 2:
        return fitted.coef_, fitted.intercept_
    return np.vstack([-fitted.coef_, fitted.coef_]) / 2, np.concatenate([-fitted.intercept_, fitted.intercept_]) / 2


def logistic(x, y, l2):
    c = 1 / l2 if l2 > 0 else np.inf
    fitted = LogisticRegression(C=c, solver="newton-cg", tol=1e-12, max_iter=10000).fit(x, y)
    coefficients, intercepts = of_each_label(fitted)
    # Two labels share one vector of coefficients, which is penalized once.
    penalty = l2 * (2 if len(fitted.classes_) == 2 else 1)
    off = softmax(x @ coefficients.T + intercepts) - (y[:, None] == fitted.classes_)
    gradient = np.hstack([off.T @ x + penalty * coefficients, off.sum(axis=0)[:, None]])
    assert np.abs(gradient).max() < 1e-8, np.abs(gradient).max()
    return coefficients, intercepts


def described(x, y, coefficients, intercepts):
    probabilities = softmax(x @ coefficients.T + intercepts)
    predicted = np.unique(y)[probabilities.argmax(axis=1)]
    return {
        "coefficients": less_mean(coefficients).tolist(),
        "intercepts": less_mean(intercepts).tolist(),
        "training_accuracy": float((predicted == y).mean()),
        "probabilities": np.round(probabilities, 12).tolist(),
    }


def write(name, x, y, penalties):
    automatic = rao_blackwell_ledoit_wolf(x, y)
    shrinkages = [(amount, discriminants(x, y, amount)) for amount in (0.0, 0.1, 0.5)]
    shrinkages.append(("auto", scale_free_discriminants(x, y, automatic)))
    case = {
        "element": "f64",
        "lda": [
            {
                "shrinkage": given,
                "regularization": automatic if given == "auto" else given,
                **described(x, y, *fitted),
            }
            for given, fitted in shrinkages
        ],
        "logistic": [{"l2": l2, "regularization": l2, **described(x, y, *logistic(x, y, l2))} for l2 in penalties],
        "labels": y.tolist(),
        "vectors": x.tolist(),
    }
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(case, separators=(",", ":")) + "\n")
    accuracies = [round(model["training_accuracy"], 3) for model in case["lda"] + case["logistic"]]
    print(f"{path.name:12} {x.shape} {path.stat().st_size:>8} bytes, shrinkage {automatic:.6f}, {accuracies}")


def blobs(rng, sizes, features):
    """Labels around means of their own, with one covariance; shuffled."""
    y = np.repeat(np.arange(len(sizes)), sizes)
    means = rng.standard_normal((len(sizes), features))
    rotation = np.linalg.qr(rng.standard_normal((features, features)))[0]
    mixed = rng.standard_normal((len(y), features)) * np.linspace(1.0, 2.5, features) @ rotation
    order = rng.permutation(len(y))
    return np.round(means[y] + mixed, 3)[order], y[order]


def main():
    rng = np.random.default_rng(20100917)
    FOLDER.mkdir(exist_ok=True)
    x, y = blobs(rng, [60, 40, 25, 15], 6)
    write("strings", x, np.array(["apple", "Banana", "kiwi", "äpfel"])[y], [1.0, 0.1, 0.0])
    x, y = blobs(rng, [50, 30], 5)
    x[:, 2] = 7.25
    write("booleans", x, y == 0, [1.0, 0.1])
    x, y = blobs(rng, [5, 5, 5, 5], 50)
    write("integers", x, np.array([-5, 10, 20, 3])[y], [1.0, 0.1])


main()
