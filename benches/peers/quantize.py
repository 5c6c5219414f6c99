"""Makes a network of 8 bits from a model folder and some images, and reports what that costs and gains.

    python benches/peers/quantize.py models/resnet50 fruits/Training --test fruits/Test

writes models/resnet50-int8/ (model.onnx and preprocessor_config.json) beside models/resnet50/, as Pomona reads it:
`embed(content, 'resnet50-int8')`. The network is quantized by onnxruntime: statically, weights per channel as int8,
activations as uint8. Their ranges come from the calibration images, which should be like those to embed; a few
dozen do. The pool and the classification head stay float32: they take no time, and the embedding keeps its digits.

Needs onnx, onnxruntime, numpy and Pillow (requirements.txt). Prints, with a JSON object in the last line, of images
that were not calibrated with: the cosine of the embeddings of both networks, and how often both networks see an
image in the same class. A class is a folder; an image is seen in the one whose centre, the mean of the calibration
images' embeddings, has the largest cosine with its embedding.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from time import perf_counter

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image, ImageOps

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
FORMATS = {"qoperator": QuantFormat.QOperator, "qdq": QuantFormat.QDQ}
# SqueezeNet 1.1 on 180 fruits, cosine on average and at worst: 0.9991 and 0.998 with the percentile, 0.9988 and
# 0.997 with the extremes, 0.9987 and 0.991 with the entropy. Activations symmetric around 0: 0.995 and 0.985.
METHODS = {
    "percentile": (CalibrationMethod.Percentile, {"CalibPercentile": 99.999}),
    "minmax": (CalibrationMethod.MinMax, {}),
    "entropy": (CalibrationMethod.Entropy, {}),
}


class Preprocess:
    """From an image's file to the network's input, as preprocessor_config.json says (udfs/src/embed/preprocess.rs)."""

    def __init__(self, config, network_input):
        keys = {key: value for key, value in config.items() if value is not None}
        dims = [dim.dim_value for dim in network_input.type.tensor_type.shape.dim]
        self.channels_last = dims[3] == 3 and dims[1] != 3
        height, width = dims[1:3] if self.channels_last else dims[2:4]
        network = {"height": height, "width": width}
        self.size = keys.get("size", network) if keys.get("do_resize", True) else None
        self.crop = keys.get("crop_size", network) if keys.get("do_center_crop", False) else None
        if isinstance(self.crop, int):
            self.crop = {"height": self.crop, "width": self.crop}
        self.resample = keys.get("resample", 2)
        self.flip = keys.get("do_flip_channel_order", False)
        self.factor = keys.get("rescale_factor", 1 / 255) if keys.get("do_rescale", True) else 1.0
        normalize = keys.get("do_normalize", True)
        self.mean = keys.get("image_mean", [0.5] * 3) if normalize else [0.0] * 3
        self.std = keys.get("image_std", [0.5] * 3) if normalize else [1.0] * 3

    def target(self, width, height):
        edge = self.size.get("shortest_edge")
        if edge is None:
            return self.size["width"], self.size["height"]
        return (edge, edge * height // width) if width <= height else (edge * width // height, edge)

    def __call__(self, file):
        image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        if self.size:
            image = image.resize(self.target(*image.size), self.resample)
        if self.crop:
            width, height = self.crop["width"], self.crop["height"]
            x, y = round((image.width - width) / 2), round((image.height - height) / 2)
            image = image.crop((x, y, x + width, y + height))
        values = np.asarray(image, np.float64)[:, :, :: -1 if self.flip else 1]
        values = ((values * self.factor - self.mean) / self.std).astype(np.float32)
        return (values if self.channels_last else values.transpose(2, 0, 1))[None]


class Calibration(CalibrationDataReader):
    """Hands out the network's input for each file; onnxruntime keeps what it has of one range of them."""

    def __init__(self, name, files, preprocess):
        self.name, self.files, self.preprocess = name, files, preprocess
        self.set_range(0, len(files))

    def __len__(self):
        return len(self.files)

    def set_range(self, start_index, end_index):
        self.range = iter(self.files[start_index:end_index])

    def get_next(self):
        return next(({self.name: self.preprocess(file)} for file in self.range), None)


def prepare(model):
    """The network as onnxruntime's quantizer needs it: folded, its shapes inferred, its nodes named."""
    # Old exporters list the weights as inputs, which keeps onnxruntime from folding them.
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    if len(inputs) != 1:
        sys.exit(f"the network has {len(inputs)} inputs, an image network has one")
    # Dequantizing by channel came with opset 13.
    if next(opset.version for opset in model.opset_import if not opset.domain) < 13:
        model = onnx.version_converter.convert_version(model, 13)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.onnx", Path(folder) / "prepared.onnx"
        onnx.save(model, source)
        quant_pre_process(source, target, skip_symbolic_shape=True)
        prepared = onnx.load(target)
    for i, node in enumerate(prepared.graph.node):
        node.name = f"{node.op_type}_{i}"
    return prepared


def trunk(graph):
    """The nodes between image and output, and the positions of those that every way goes through."""
    image, output = graph.input[0].name, graph.output[0].name
    pixels, needed, nodes = {image}, {output}, []
    for node in graph.node:
        if node.op_type not in ("Shape", "Size") and pixels.intersection(node.input):
            pixels.update(node.output)
    for node in reversed(graph.node):
        if (needed & pixels).intersection(node.output):
            needed.update(pixels.intersection(node.input))
            nodes.insert(0, node)
    last_use = {name: i for i, node in enumerate(nodes) for name in node.input}
    last_use[output] = len(nodes)
    shared, in_use_until = [], last_use.get(image, 0)
    for i, node in enumerate(nodes):
        if in_use_until == i:
            shared.append(i)
        in_use_until = max([in_use_until, *(last_use.get(name, 0) for name in node.output)])
    return nodes, shared


def is_global_pool(node, weights):
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in ("ReduceMean", "ReduceMax"):
        axes = attributes.get("axes", [])
        if len(node.input) > 1 and node.input[1] in weights:
            axes = onnx.numpy_helper.to_array(weights[node.input[1]])
        return len(axes) == 2
    if node.op_type == "AveragePool":
        return min(attributes["kernel_shape"]) >= 4
    return node.op_type in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")


def embedding(graph):
    """The names of the embedding and of the last feature map, by the rules of udfs/src/embed/graph.rs."""
    nodes, shared = trunk(graph)
    output = graph.output[0].name
    weights = {tensor.name: tensor for tensor in graph.initializer}
    pools = [i for i in shared if is_global_pool(nodes[i], weights)]
    if pools:
        pool, above = nodes[pools[-1]], nodes[pools[-1] + 1 :]
        if any(node.op_type in ("Conv", "Gemm", "MatMul") for node in above):
            return pool.output[0], pool.input[0]
        between = {"Add", "BatchNormalization", "Clip", "Dropout", "Identity", "LeakyRelu", "Relu", "Transpose"}
        below = next((node for node in reversed(nodes[: pools[-1]]) if node.op_type not in between), None)
        if below is not None and below.op_type == "Conv":
            channels = weights[below.input[1]].dims[0] if below.input[1] in weights else 0
            if channels in (1000, 1001) or any(node.op_type in ("Softmax", "LogSoftmax") for node in above):
                return below.input[0], below.input[0]
        return output, pool.input[0]
    begin = {"Dropout", "Flatten", "Gemm", "MatMul", "Reshape", "Squeeze", "Transpose"}
    dense = begin | {"Add", "BatchNormalization", "Cast", "Clip", "Identity", "LogSoftmax", "Relu", "Softmax", "Tanh"}
    end = len(nodes)
    while end and end - 1 in shared and nodes[end - 1].op_type in dense:
        end -= 1
    if any(node.op_type in ("Gemm", "MatMul") for node in nodes[end:]):
        first = next(node for node in nodes[end:] if node.op_type in begin)
        return first.input[0], first.input[0]
    return output, output


def below(graph, value):
    """The nodes that make a value."""
    needed, nodes = {value}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.insert(0, node)
    return nodes


def quantize(prepared, head, files, preprocess, args):
    """The quantized network; `head` names the nodes that stay float32."""
    method, options = METHODS[args.calibration]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save(prepared, source)
        with redirect_stdout(StringIO()):  # it prints a line for each image
            quantize_static(
                source,
                target,
                Calibration(prepared.graph.input[0].name, files, preprocess),
                quant_format=FORMATS[args.format],
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=args.reduce_range,
                calibrate_method=method,
                nodes_to_exclude=head,
                # One image after the other, otherwise the activations of all are held at once.
                extra_options={**options, "CalibStridedMinMax": 1},
            )
        model = onnx.load(target)
    # onnxruntime imports all operator sets that it knows, which older versions refuse.
    used = {node.domain for node in model.graph.node} | {""}
    opsets = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    model.ir_version = prepared.ir_version
    del model.graph.value_info[:]
    return model


class Embedder:
    """A network on one thread, up to the embedding."""

    def __init__(self, model, value):
        graph = model.graph
        # In the QDQ form a Relu is what quantizing cuts off: the value is what comes after that.
        dequantized = f"{value}_DequantizeLinear_Output"
        if any(dequantized in node.output for node in graph.node):
            value = dequantized
        nodes = below(graph, value)
        last = next(node for node in reversed(nodes) if node.op_type not in ("QuantizeLinear", "DequantizeLinear"))
        channels_last = last.op_type == "Transpose" and list(last.attribute[0].ints) == [0, 2, 3, 1]
        self.positions = (1, 2) if channels_last else (2, 3)
        cut = onnx.ModelProto()
        cut.CopyFrom(model)
        names = {name for node in nodes for name in node.input}
        weights = [tensor for tensor in graph.initializer if tensor.name in names]
        output = onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None)
        for field, kept in [("node", nodes), ("initializer", weights), ("output", [output]), ("value_info", [])]:
            del getattr(cut.graph, field)[:]
            getattr(cut.graph, field).extend(kept)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(cut.SerializeToString(), options, ["CPUExecutionProvider"])
        self.input = graph.input[0].name
        self.seconds = 0.0

    def __call__(self, values):
        started = perf_counter()
        (result,) = self.session.run(None, {self.input: values})
        self.seconds += perf_counter() - started
        if result.ndim == 4:
            result = result.mean(axis=self.positions, dtype=np.float64)
        return result.reshape(-1).astype(np.float64)


def normalized(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)


def seen_as(vectors, centred, labels):
    """The label of each vector, by the nearest centre of those of `centred`."""
    names = sorted(set(labels))
    centres = [normalized(centred)[[label == name for label in labels]].mean(axis=0) for name in names]
    return [names[i] for i in (normalized(vectors) @ normalized(np.array(centres)).T).argmax(axis=1)]


def compare(networks, calibration, test, preprocess):
    """What the float32 and the int8 network make of the images."""

    def embed(files):
        return np.array([[network(values) for network in networks] for values in map(preprocess, files)]).swapaxes(0, 1)

    fitted, held_out = embed(calibration), embed(test)
    cosines = (normalized(held_out[0]) * normalized(held_out[1])).sum(axis=1)
    labels, truth = ([file.parent.name for file in files] for files in (calibration, test))
    float32, int8 = (seen_as(new, known, labels) for new, known in zip(held_out, fitted, strict=True))
    return {
        "images": len(test),
        "dimensions": held_out.shape[2],
        "cosine_mean": cosines.mean(),
        "cosine_min": cosines.min(),
        "classes": len(set(labels)),
        "class_agreement": np.mean([a == b for a, b in zip(float32, int8, strict=True)]),
        "accuracy_float32": np.mean([a == b for a, b in zip(float32, truth, strict=True)]),
        "accuracy_int8": np.mean([a == b for a, b in zip(int8, truth, strict=True)]),
        "speed_ratio": networks[0].seconds / networks[1].seconds,
    }


def images(folder):
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def spread(files, count):
    """So many of the files, from all over the list: of every class."""
    count = min(count, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a folder with model.onnx and preprocessor_config.json")
    parser.add_argument("calibration_images", type=Path, help="a folder, with a folder for each class")
    parser.add_argument("--out", type=Path, help="the new folder; MODEL-int8 where it is not given")
    parser.add_argument("--format", choices=FORMATS, default="qoperator", help="qoperator is faster, tract runs qdq")
    parser.add_argument("--calibration", choices=METHODS, default="percentile", help="how ranges are chosen")
    parser.add_argument("--images", type=int, default=96, help="how many images to calibrate with")
    parser.add_argument("--test", type=Path, help="other images to compare with; else those that are left over")
    parser.add_argument("--reduce-range", action="store_true", help="7-bit weights: for processors without VNNI")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    onnxruntime.set_default_logger_severity(3)

    target = args.out or args.model.parent / f"{args.model.name}-int8"
    found = images(args.calibration_images)
    calibration = spread(found, args.images)
    held_out = set(images(args.test) if args.test else found).difference(calibration)
    if not calibration or not held_out:
        sys.exit(f"{len(calibration)} images to calibrate with and {len(held_out)} to test with: there must be some")

    source = args.model / "model.onnx"
    prepared = prepare(onnx.load(source))
    preprocess = Preprocess(json.loads((args.model / "preprocessor_config.json").read_text()), prepared.graph.input[0])
    value, feature_map = embedding(prepared.graph)
    quantized = {node.name for node in below(prepared.graph, feature_map)}
    head = [node.name for node in prepared.graph.node if node.name not in quantized]
    started = perf_counter()
    model = quantize(prepared, head, calibration, preprocess, args)
    seconds = perf_counter() - started

    target.mkdir(parents=True, exist_ok=True)
    onnx.save(model, target / "model.onnx")
    shutil.copyfile(args.model / "preprocessor_config.json", target / "preprocessor_config.json")

    networks = [Embedder(network, value) for network in (prepared, model)]
    report = compare(networks, calibration, sorted(held_out), preprocess)
    report["size_ratio"] = source.stat().st_size / (target / "model.onnx").stat().st_size
    print(f"{target}: {args.format}, {args.calibration} of {len(calibration)} images, quantized in {seconds:.0f} s")
    print(
        "on {images} other images: cosine {cosine_mean:.4f} on average, {cosine_min:.4f} at worst; same class for "
        "{class_agreement:.1%} (right: float32 {accuracy_float32:.1%}, int8 {accuracy_int8:.1%} of {classes} classes); "
        "{speed_ratio:.2f} times as fast on one thread, {size_ratio:.2f} times as small".format(**report)
    )
    print(json.dumps({"model": str(target), **{key: round(float(number), 6) for key, number in report.items()}}))


main()
