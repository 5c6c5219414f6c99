"""Writes Keras's ResNet50 without its top as a model folder for Pomona, and as a file for Keras.

    python make_resnet50.py fruits/Training models

writes models/resnet50/ (model.onnx and preprocessor_config.json) and models/resnet50.keras. The weights are drawn
from a seed, unless --weights imagenet downloads Keras's. Drawn weights get the batch normalization of the images, so
that values stay in range from the first layer to the last, and images of different things differ in the end: no
weight makes a network faster or slower, but 8 bits and the comparison of embeddings need values that mean something.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import onnxruntime
from network import SIDE, pixels

SEED = 20_240_607
TOLERANCE = 1e-4
CONFIG = {
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": False,
    "do_normalize": True,
    "image_mean": [103.939, 116.779, 123.68],
    "image_std": [1.0, 1.0, 1.0],
    "do_flip_channel_order": True,
}


def normalize(model, batch):
    """Sets the statistics of all batch normalizations to those of one batch."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(batch, training=True)


def main():
    parser = argparse.ArgumentParser(description="Writes Keras's ResNet50 without its top as a model folder.")
    parser.add_argument("images", type=Path, help="a folder of JPEGs")
    parser.add_argument("target", type=Path, help="the folder of models")
    parser.add_argument("--weights", choices=["random", "imagenet"], default="random")
    parser.add_argument("--count", type=int, default=64, help="how many of the images")
    args = parser.parse_args()

    files = sorted(args.images.rglob("*.jpg"))
    count = min(args.count, len(files))
    batch = np.stack([pixels(files[i * len(files) // count].read_bytes()) for i in range(count)])
    keras.utils.set_random_seed(SEED)
    weights = None if args.weights == "random" else args.weights
    model = keras.applications.ResNet50(
        weights=weights, include_top=False, pooling="avg", input_shape=(SIDE, SIDE, 3), name="resnet50"
    )
    if weights is None:
        normalize(model, batch)

    args.target.mkdir(parents=True, exist_ok=True)
    # Under its name only when it is whole.
    with tempfile.TemporaryDirectory(dir=args.target) as draft:
        folder = Path(draft) / "resnet50"
        folder.mkdir()
        signature = [keras.InputSpec(shape=(None, SIDE, SIDE, 3), dtype="float32", name="image")]
        model.export(folder / "model.onnx", format="onnx", input_signature=signature, verbose=False)
        (folder / "preprocessor_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        exported = session.run(None, {session.get_inputs()[0].name: batch[:8]})[0]
        expected = model.predict_on_batch(batch[:8])
        difference = np.abs(exported - expected).max() / np.abs(expected).max()
        if not difference < TOLERANCE:
            raise SystemExit(f"the exported network differs from Keras's by {difference:.1e}")
        model.save(args.target / "resnet50.keras")
        shutil.rmtree(args.target / folder.name, ignore_errors=True)
        folder.rename(args.target / folder.name)
    print(f"{args.target / folder.name}: as Keras's to {difference:.1e}")


if __name__ == "__main__":
    main()
