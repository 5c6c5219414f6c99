"""Makes quantized/: small quantized networks, and what onnxruntime makes of picture.png with them.

Run once, with onnxruntime 1.32; the results are kept beside this script:

    python3 -m venv venv && venv/bin/pip install onnx==1.23.2 onnxruntime==1.32.0 pillow==13.0.0 numpy==2.4.6
    venv/bin/python tests/references/make_quantized.py

A folder quantized/<network>-<form>/ is a model. The networks have seeded weights, 7 bits wide (reduce_range), so
that the sums of two products do not saturate on processors without VNNI either:

| network | layout | how it ends |
|---|---|---|
| residual | NHWC | Add, Relu, Concat, global pool, Flatten, Gemm, Softmax |
| class-maps | NCHW | 1x1 Conv, Relu, global pool, Softmax, as SqueezeNet |
| dense | NCHW | max pool, Flatten, Gemm, Relu, Gemm, as VGG |

quantized/vectors.json has what `embed` must give for each model and output. The cut is not made here: the whole
networks run, with the values that are the embedding as further outputs. What has 8 bits there is made float32 with
the scale and the zero point that onnxruntime's quantizer named after the value.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, load, numpy_helper, save
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from PIL import Image

HERE = Path(__file__).parent
SIDE = 32
CLASSES = 10
CONFIG = {
    "size": {"height": SIDE, "width": SIDE},
    "resample": 2,
    "do_rescale": True,
    "image_mean": [0.5, 0.4, 0.6],
    "image_std": [0.25, 0.25, 0.25],
}
FORMS = {"qoperator": QuantFormat.QOperator, "qdq": QuantFormat.QDQ}


class Network:
    def __init__(self):
        self.nodes, self.weights = [], []
        self.random = np.random.default_rng(360)

    def tensor(self, *shape, spread):
        name = f"w{len(self.weights)}"
        values = self.random.uniform(-spread, spread, shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def node(self, operator, *inputs, output=None, **attributes):
        output = output or f"{operator.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], f"n{len(self.nodes)}", **attributes))
        return output

    def conv(self, x, channels, to, side=3, stride=1, output=None):
        weights = self.tensor(to, channels, side, side, spread=(6 / (channels * side * side)) ** 0.5)
        pads = [side // 2] * 4
        bias = self.tensor(to, spread=0.1)
        shape = {"kernel_shape": [side, side], "strides": [stride, stride], "pads": pads}
        return self.node("Conv", x, weights, bias, output=output, **shape)

    def gemm(self, x, features, to, output=None):
        weights = self.tensor(to, features, spread=(6 / features) ** 0.5)
        return self.node("Gemm", x, weights, self.tensor(to, spread=0.1), output=output, transB=1)

    def relu(self, x, output=None):
        return self.node("Relu", x, output=output)

    def pool(self, x, output=None):
        return self.node("MaxPool", x, output=output, kernel_shape=[2, 2], strides=[2, 2])

    def finish(self, image, output):
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, image)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", CLASSES])],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def residual():
    net = Network()
    x = net.node("Transpose", "image", perm=[0, 3, 1, 2])
    x = net.pool(net.relu(net.conv(x, 3, 8, stride=2)))
    y = net.conv(net.relu(net.conv(x, 8, 8)), 8, 8)
    x = net.relu(net.node("Add", x, y))
    one, three = net.relu(net.conv(x, 8, 8, side=1)), net.relu(net.conv(x, 8, 8))
    x = net.node("Concat", one, three, axis=1, output="map")
    x = net.node("GlobalAveragePool", x, output="pooled")
    x = net.node("Flatten", x, axis=1)
    x = net.gemm(x, 16, CLASSES, output="logits")
    return net.finish(["N", SIDE, SIDE, 3], net.node("Softmax", x, axis=1))


def class_maps():
    net = Network()
    x = net.pool(net.relu(net.conv("image", 3, 8, stride=2)))
    x = net.relu(net.conv(x, 8, 16, output="map_before_relu"), output="map")
    x = net.relu(net.conv(x, 16, CLASSES, side=1))
    x = net.node("GlobalAveragePool", x, output="logits")
    x = net.node("Flatten", x, axis=1)
    return net.finish(["N", 3, SIDE, SIDE], net.node("Softmax", x, axis=1))


def dense():
    net = Network()
    x = net.pool(net.relu(net.conv("image", 3, 8, stride=2)))
    x = net.pool(net.relu(net.conv(x, 8, 8, output="map_before_relu")), output="map")
    x = net.node("Flatten", x, axis=1)
    x = net.relu(net.gemm(x, 8 * 4 * 4, 16))
    return net.finish(["N", 3, SIDE, SIDE], net.gemm(x, 16, CLASSES, output="logits"))


NETWORKS = {"residual": residual, "class-maps": class_maps, "dense": dense}


def batch(pixels, model):
    """What the network sees of 32 x 32 pixels."""
    values = (pixels / 255 - CONFIG["image_mean"]) / CONFIG["image_std"]
    nhwc = model.graph.input[0].type.tensor_type.shape.dim[3].dim_value == 3
    return (values if nhwc else values.transpose(2, 0, 1)).astype(np.float32)[None]


class Calibration(CalibrationDataReader):
    def __init__(self, batches):
        self.batches = iter(batches)

    def get_next(self):
        return next(({"image": values} for values in self.batches), None)


def quantize(model, form, picture):
    random = np.random.default_rng(8)
    shades = [picture * random.uniform(0.5, 1.0, 3) for _ in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        float32, int8 = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        save(model, float32)
        quantize_static(
            float32,
            int8,
            Calibration(batch(shade, model) for shade in shades),
            quant_format=FORMS[form],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        return load(int8)


def run(model, values, name):
    """A value of the network, as float32."""
    names = {output for node in model.graph.node for output in node.output}
    # Of a Relu that QLinearConv computes too, only the value before it has kept its name. QDQ has every value
    # before it is quantized and after; a network that ends in the pool has no need to quantize that.
    after = [] if name == "pooled" else [f"{name}_DequantizeLinear_Output"]
    chosen = next(n for n in [*after, f"{name}_quantized", f"{name}_before_relu_quantized", name] if n in names)
    is_quantized = chosen.endswith("_quantized")
    extended = ModelProto()
    extended.CopyFrom(model)
    del extended.graph.output[:]
    dtype = TensorProto.UINT8 if is_quantized else TensorProto.FLOAT
    extended.graph.output.append(helper.make_tensor_value_info(chosen, dtype, None))
    session = onnxruntime.InferenceSession(extended.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"image": values})
    if is_quantized:
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        value = name if f"{name}_scale" in constants else f"{name}_before_relu"
        result = (result.astype(np.float32) - constants[f"{value}_zero_point"]) * constants[f"{value}_scale"]
    return result[0]


def outputs(model, kind, values):
    last = run(model, values, "map")
    pooled = run(model, values, "pooled") if kind == "residual" else last.mean(axis=(1, 2))
    # Maps are flattened in the order of the network's input.
    flatten = last.transpose(1, 2, 0) if kind == "residual" else last
    vectors = {"pooled": pooled, "flatten": flatten, "logits": run(model, values, "logits")}
    return {name: [round(float(value), 6) for value in vector.ravel()] for name, vector in vectors.items()}


def main():
    folder = HERE / "quantized"
    picture = Image.open(HERE / "picture.png").convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    picture = np.asarray(picture, np.float64)
    vectors = {}
    for kind, make in NETWORKS.items():
        for form in FORMS:
            model = quantize(make(), form, picture)
            name = f"{kind}-{form}"
            (folder / name).mkdir(parents=True, exist_ok=True)
            save(model, folder / name / "model.onnx")
            (folder / name / "preprocessor_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
            vectors[name] = outputs(model, kind, batch(picture, model))
    (folder / "vectors.json").write_text(json.dumps(vectors) + "\n")


main()
