"""Makes the references that tests/images.rs and tests/models.rs compare Pomona with.

    python -m venv venv && venv/bin/pip install pillow numpy onnxruntime scikit-learn pyarrow
    venv/bin/python tests/references/make_images.py SHARED

SHARED is the folder that holds data/ and models/ (POMONA_REAL_DATA in the tests). Made with
Pillow 13.0, onnxruntime 1.32, scikit-learn 1.9.1, numpy 2.4.6, pyarrow 26.

| file | what | made by |
|---|---|---|
| picture.png | a drawn picture with smooth areas, edges and noise: nothing but resizing is compared | numpy, seeded |
| resize/<filter>_<width>x<height>.png | picture.png resized | Pillow |
| decode.json | of each real image: its size, the mean of each channel and 64 pixels | Pillow |
| resnet-mini.parquet | label, file, embedding of picture.png and some real images | Pillow and onnxruntime |
| squeezenet1.1.parquet | label, file, embedding of fruits/Training | Pillow and onnxruntime |
| components.parquet | label, file, the 25 principal components of the embeddings in squeezenet1.1.parquet, standardized | scikit-learn |
| components.json | the explained variance and its ratio of those components | scikit-learn |
| accuracy.json | of classifiers trained on fruits/Training: the share of fruits/Test that they tell right | scikit-learn |
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

HERE = Path(__file__).parent
SHARED = Path(sys.argv[1])
DATA = SHARED / "data"

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
# Smaller, larger, one axis each way, one axis untouched, and one pixel.
SIZES = [(20, 14), (131, 101), (23, 96), (90, 31), (61, 20), (1, 1)]


def draw():
    """A 61 x 47 picture: gradients, a disc and a grid with hard edges, a patch of noise."""
    height, width = 47, 61
    y, x = np.mgrid[0:height, 0:width].astype(float)
    picture = np.stack([255 * x / width, 255 * y / height, 127 + 120 * np.sin(x / 5) * np.cos(y / 7)], axis=-1)
    picture[(x - 20) ** 2 + (y - 18) ** 2 < 11**2] = (230, 40, 25)
    picture[((x // 3 + y // 3) % 2 == 0) & (x > 38) & (y < 20)] = (0, 0, 0)
    noise = np.random.default_rng(360).integers(0, 256, (18, 22, 3))
    picture[27:45, 36:58] = noise
    return Image.fromarray(picture.round().astype(np.uint8), "RGB")


def resized(picture):
    folder = HERE / "resize"
    folder.mkdir(exist_ok=True)
    for name, resample in FILTERS.items():
        for width, height in SIZES:
            picture.resize((width, height), resample).save(folder / f"{name}_{width}x{height}.png", optimize=True)


def decode(path):
    image = Image.open(path)
    # A palette's transparency is dropped as an alpha channel is.
    return ImageOps.exif_transpose(image).convert("RGB")


def decoded(paths):
    rng = np.random.default_rng(8)
    facts = {}
    for path in paths:
        pixels = np.asarray(decode(path))
        height, width, _ = pixels.shape
        at = [(int(rng.integers(width)), int(rng.integers(height))) for _ in range(min(64, width * height))]
        facts[path.relative_to(DATA).as_posix()] = {
            "width": width,
            "height": height,
            "mean": [round(float(v), 3) for v in pixels.mean(axis=(0, 1))],
            "pixels": [[x, y, *map(int, pixels[y, x])] for x, y in at],
        }
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in facts.items())
    (HERE / "decode.json").write_text("{\n" + lines + "\n}\n")


class Model:
    """A model folder, run as its preprocessor_config.json says (keys of the two test models)."""

    def __init__(self, name):
        folder = SHARED / "models" / name
        self.config = json.loads((folder / "preprocessor_config.json").read_text())
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def embed(self, image):
        config = self.config
        size = (config["size"]["width"], config["size"]["height"])
        values = np.asarray(image.resize(size, Image.Resampling(config["resample"]))).astype(np.float32)
        if config["do_flip_channel_order"]:
            values = values[..., ::-1]
        if config["do_normalize"]:
            values = (values - np.float32(config["image_mean"])) / np.float32(config["image_std"])
        feed = {self.session.get_inputs()[0].name: np.ascontiguousarray(values[None])}
        return self.session.run(None, feed)[0].reshape(-1)


def list_of(values, dtype):
    values = np.asarray(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(dtype).reshape(-1)), values.shape[1])


def write(name, columns):
    pq.write_table(pa.table(columns), HERE / name, compression="zstd", use_dictionary=["label"])


def embeddings(model, paths):
    return np.stack([model.embed(decode(path)) for path in paths])


def standardizer(features):
    """Spark's StandardScaler: the sample's standard deviation; a constant column gives 0."""
    mean, deviation = features.mean(axis=0), features.std(axis=0, ddof=1)
    constant = deviation == 0
    return lambda x: np.where(constant, 0, (x - mean) / np.where(constant, 1, deviation))


# With its default tolerance, scikit-learn leaves the logistic regression of the standardized embeddings
# after 11 steps, where one image more is right than at the optimum, which both of us look for.
CLASSIFIERS = {
    "lda_fit(v, label)": LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
    "lda_fit(v, label, 0.1)": LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1),
    "logistic_fit(v, label)": LogisticRegression(C=1.0, tol=1e-8, max_iter=10000),
}


def accuracies(train, labels, test, truth):
    return {call: float(classifier.fit(train, labels).score(test, truth)) for call, classifier in CLASSIFIERS.items()}


def main():
    picture = draw()
    picture.save(HERE / "picture.png", optimize=True)
    resized(picture)

    fruits = sorted((DATA / "fruits" / "Training").glob("*/*.jpg"))
    photos = sorted((DATA / "photos").glob("*/*.jpg"))
    formats = sorted((DATA / "decoder" / "formats").iterdir())
    landscape = DATA / "decoder" / "orientation" / "Landscape_1.jpg"
    decoded([*fruits[::40], *photos, *formats, landscape])

    mini, squeezenet = Model("resnet-mini"), Model("squeezenet1.1")
    few = [*fruits[::40], *photos[::8], landscape]
    write(
        "resnet-mini.parquet",
        {
            "label": ["references", *(p.parent.name for p in few)],
            "file": ["picture.png", *(p.name for p in few)],
            "embedding": list_of(np.vstack([mini.embed(picture), embeddings(mini, few)]), np.float32),
        },
    )

    features = embeddings(squeezenet, fruits).astype(np.float64)
    write(
        "squeezenet1.1.parquet",
        {
            "label": [p.parent.name for p in fruits],
            "file": [p.name for p in fruits],
            "embedding": list_of(features, np.float32),
        },
    )

    standardize = standardizer(features)
    standardized = standardize(features)
    pca = PCA(n_components=25, svd_solver="full").fit(standardized)
    write(
        "components.parquet",
        {
            "label": [p.parent.name for p in fruits],
            "file": [p.name for p in fruits],
            "features": list_of(pca.transform(standardized), np.float32),
        },
    )
    (HERE / "components.json").write_text(
        json.dumps(
            {
                "constant_features": int((features.std(axis=0) == 0).sum()),
                "explained_variance": pca.explained_variance_.tolist(),
                "explained_variance_ratio": pca.explained_variance_ratio_.tolist(),
            },
            indent=1,
        )
        + "\n"
    )

    tested = sorted((DATA / "fruits" / "Test").glob("*/*.jpg"))
    test = standardize(embeddings(squeezenet, tested).astype(np.float64))
    labels, truth = [p.parent.name for p in fruits], [p.parent.name for p in tested]
    (HERE / "accuracy.json").write_text(
        json.dumps(
            {
                "standardized": accuracies(standardized, labels, test, truth),
                "components": accuracies(pca.transform(standardized), labels, pca.transform(test), truth),
            },
            indent=1,
        )
        + "\n"
    )


main()
