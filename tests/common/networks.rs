//! ONNX networks as exporters write them: the topology is right, the weights come from a seed.

use prost::Message;
use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::tensor_shape_proto::{Dimension, dimension::Value};
use tract_onnx::pb::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto,
    ValueInfoProto, type_proto,
};

/// ImageNet's.
const CLASSES: usize = 1000;

/// The file of a network that takes images of `side` x `side`. `width` scales its channels: with
/// the 64 (32 for `mobilenet-keras`) of the original the pooled features are 32 times as many,
/// 8 times for `squeezenet` and `vgg`.
///
/// | kind | layout | how it ends |
/// |---|---|---|
/// | `resnet50-keras` | NHWC | mean (an attribute names the axes), MatMul, Add, Softmax |
/// | `resnet50-torchvision` | NCHW | global pool, Flatten, Gemm |
/// | `mobilenet-keras` | NHWC | mean (an input names the axes), 1x1 Conv, Squeeze, Softmax |
/// | `squeezenet` | NCHW, a batch of 1, weights listed as inputs | 1x1 Conv, Relu, global pool, Softmax |
/// | `vgg` | NCHW | Flatten, Gemm, Relu, Gemm |
/// | `two-inputs`, `rank-2`, `truncated` | | broken |
#[expect(clippy::panic, reason = "a test that asks for another network is wrong")]
pub(crate) fn onnx(kind: &str, width: usize, side: usize) -> Vec<u8> {
    let network = match kind {
        "resnet50-keras" => resnet50_keras(width, side),
        "resnet50-torchvision" => resnet50_torchvision(width, side),
        "mobilenet-keras" => mobilenet_keras(width, side),
        "squeezenet" => squeezenet(width, side),
        "vgg" => vgg(width, side),
        "two-inputs" => two_inputs(side),
        "rank-2" => rank_2(),
        "truncated" => {
            let mut whole = squeezenet(width, side).encode_to_vec();
            whole.truncate(whole.len() / 2);
            return whole;
        }
        other => panic!("there is no network '{other}'"),
    };
    network.encode_to_vec()
}

#[derive(Clone, Copy)]
struct Conv {
    from: usize,
    to: usize,
    kernel: usize,
    stride: usize,
    /// Top, left, bottom, right.
    pads: [i64; 4],
    groups: usize,
    /// Of the variance that keeps the size of activations through a Relu.
    gain: f32,
}

impl Conv {
    fn new(from: usize, to: usize, kernel: usize, stride: usize) -> Self {
        let pad = (kernel / 2) as i64;
        Self {
            from,
            to,
            kernel,
            stride,
            pads: [pad; 4],
            groups: 1,
            gain: 1.0,
        }
    }
}

/// A network in the making.
struct Network {
    opset: i64,
    nodes: Vec<NodeProto>,
    weights: Vec<TensorProto>,
    random: u64,
}

impl Network {
    fn new(opset: i64) -> Self {
        Self {
            opset,
            nodes: vec![],
            weights: vec![],
            random: 360,
        }
    }

    /// SplitMix64, as -1 to 1.
    fn random(&mut self) -> f32 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.random;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^= bits >> 31;
        (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn tensor(&mut self, tensor: TensorProto) -> String {
        let name = format!("w{}", self.weights.len());
        self.weights.push(TensorProto {
            name: name.clone(),
            ..tensor
        });
        name
    }

    /// Weights around `mean`, `spread` to both sides.
    fn weights(&mut self, dims: &[usize], mean: f32, spread: f32) -> String {
        let length: usize = dims.iter().product();
        let raw_data = (0..length)
            .flat_map(|_| (mean + spread * self.random()).to_le_bytes())
            .collect();
        let dims = dims.iter().map(|dim| *dim as i64).collect();
        self.tensor(TensorProto {
            dims,
            data_type: DataType::Float as i32,
            raw_data,
            ..TensorProto::default()
        })
    }

    fn scalar(&mut self, value: f32) -> String {
        let float_data = vec![value];
        self.tensor(TensorProto {
            data_type: DataType::Float as i32,
            float_data,
            ..TensorProto::default()
        })
    }

    fn integers(&mut self, values: &[i64]) -> String {
        let (dims, int64_data) = (vec![values.len() as i64], values.to_vec());
        self.tensor(TensorProto {
            dims,
            data_type: DataType::Int64 as i32,
            int64_data,
            ..TensorProto::default()
        })
    }

    /// Adds a node; the name of its output.
    fn node(&mut self, op_type: &str, input: &[&str], attribute: Vec<AttributeProto>) -> String {
        let name = format!("{op_type}_{}", self.nodes.len());
        self.nodes.push(NodeProto {
            input: input.iter().map(|input| (*input).to_owned()).collect(),
            output: vec![name.clone()],
            name: name.clone(),
            op_type: op_type.to_owned(),
            attribute,
            ..NodeProto::default()
        });
        name
    }

    fn relu(&mut self, x: &str) -> String {
        self.node("Relu", &[x], vec![])
    }

    fn conv(&mut self, x: &str, conv: Conv) -> String {
        let Conv {
            from,
            to,
            kernel,
            stride,
            pads,
            groups,
            gain,
        } = conv;
        let inputs = from / groups * kernel * kernel;
        let weights = self.weights(
            &[to, from / groups, kernel, kernel],
            0.0,
            gain * (6.0 / inputs as f32).sqrt(),
        );
        let bias = self.weights(&[to], 0.0, 0.1);
        let attributes = vec![
            ints("kernel_shape", &[kernel as i64; 2]),
            ints("strides", &[stride as i64; 2]),
            ints("pads", &pads),
            int("group", groups as i64),
        ];
        self.node("Conv", &[x, &weights, &bias], attributes)
    }

    fn batch_norm(&mut self, x: &str, channels: usize) -> String {
        let around = [(1.0, 0.2), (0.0, 0.1), (0.0, 0.1), (1.0, 0.2)];
        let [scale, bias, mean, variance] = around.map(|(mean, spread)| self.weights(&[channels], mean, spread));
        self.node(
            "BatchNormalization",
            &[x, &scale, &bias, &mean, &variance],
            vec![float("epsilon", 1.001e-5)],
        )
    }

    fn max_pool(&mut self, x: &str, kernel: i64, pad: i64) -> String {
        self.node(
            "MaxPool",
            &[x],
            vec![
                ints("kernel_shape", &[kernel; 2]),
                ints("strides", &[2; 2]),
                ints("pads", &[pad; 4]),
            ],
        )
    }

    fn gemm(&mut self, x: &str, from: usize, to: usize) -> String {
        let weights = self.weights(&[to, from], 0.0, (3.0 / from as f32).sqrt());
        let bias = self.weights(&[to], 0.0, 0.1);
        self.node("Gemm", &[x, &weights, &bias], vec![int("transB", 1)])
    }

    fn channels_first(&mut self, x: &str) -> String {
        self.node("Transpose", &[x], vec![ints("perm", &[0, 3, 1, 2])])
    }

    /// The network from `image` to `output`; a dimension of 0 is symbolic.
    fn finish(self, images: &[(&str, &[usize])], output: &str) -> ModelProto {
        let graph = GraphProto {
            name: "network".to_owned(),
            node: self.nodes,
            initializer: self.weights,
            input: images.iter().map(|(name, dims)| value(name, dims)).collect(),
            output: vec![value(output, &[])],
            ..GraphProto::default()
        };
        ModelProto {
            ir_version: 8,
            opset_import: vec![OperatorSetIdProto {
                domain: String::new(),
                version: self.opset,
            }],
            graph: Some(graph),
            ..ModelProto::default()
        }
    }
}

fn ints(name: &str, values: &[i64]) -> AttributeProto {
    let (name, ints) = (name.to_owned(), values.to_vec());
    AttributeProto {
        name,
        r#type: AttributeType::Ints as i32,
        ints,
        ..AttributeProto::default()
    }
}

fn int(name: &str, i: i64) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        r#type: AttributeType::Int as i32,
        i,
        ..AttributeProto::default()
    }
}

fn float(name: &str, f: f32) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        r#type: AttributeType::Float as i32,
        f,
        ..AttributeProto::default()
    }
}

/// A float32 value; of unknown shape without dimensions.
fn value(name: &str, dims: &[usize]) -> ValueInfoProto {
    let dimension = |dim: &usize| {
        let value = if *dim == 0 {
            Value::DimParam("batch_size".to_owned())
        } else {
            Value::DimValue(*dim as i64)
        };
        Dimension {
            value: Some(value),
            ..Dimension::default()
        }
    };
    let shape = (!dims.is_empty()).then(|| TensorShapeProto {
        dim: dims.iter().map(dimension).collect(),
    });
    let tensor = type_proto::Tensor {
        elem_type: DataType::Float as i32,
        shape,
    };
    let r#type = TypeProto {
        value: Some(type_proto::Value::TensorType(tensor)),
        ..TypeProto::default()
    };
    ValueInfoProto {
        name: name.to_owned(),
        r#type: Some(r#type),
        ..ValueInfoProto::default()
    }
}

/// Bottlenecks per stage, and the stride of the stage.
const STAGES: [(usize, usize); 4] = [(3, 1), (4, 2), (6, 2), (3, 2)];

/// As tf2onnx writes `keras.applications.ResNet50`: the stride is in a block's first convolution.
fn resnet50_keras(width: usize, side: usize) -> ModelProto {
    let mut net = Network::new(13);
    let x = net.channels_first("input_1");
    let x = net.conv(&x, Conv::new(3, width, 7, 2));
    let x = net.batch_norm(&x, width);
    let x = net.relu(&x);
    let pads = net.integers(&[0, 0, 1, 1, 0, 0, 1, 1]);
    let x = net.node("Pad", &[&x, &pads], vec![]);
    let mut x = net.max_pool(&x, 3, 0);
    let mut from = width;
    for (stage, (blocks, stride)) in STAGES.into_iter().enumerate() {
        let inner = width << stage;
        for block in 0..blocks {
            let stride = if block == 0 { stride } else { 1 };
            let shortcut = if block == 0 {
                let shortcut = net.conv(
                    &x,
                    Conv {
                        gain: 0.7,
                        ..Conv::new(from, inner * 4, 1, stride)
                    },
                );
                net.batch_norm(&shortcut, inner * 4)
            } else {
                x.clone()
            };
            let y = net.conv(&x, Conv::new(from, inner, 1, stride));
            let y = net.batch_norm(&y, inner);
            let y = net.relu(&y);
            let y = net.conv(&y, Conv::new(inner, inner, 3, 1));
            let y = net.batch_norm(&y, inner);
            let y = net.relu(&y);
            let y = net.conv(
                &y,
                Conv {
                    gain: 0.3,
                    ..Conv::new(inner, inner * 4, 1, 1)
                },
            );
            let y = net.batch_norm(&y, inner * 4);
            let y = net.node("Add", &[&shortcut, &y], vec![]);
            x = net.relu(&y);
            from = inner * 4;
        }
    }
    let x = net.node("ReduceMean", &[&x], vec![ints("axes", &[2, 3]), int("keepdims", 0)]);
    let weights = net.weights(&[from, CLASSES], 0.0, (3.0 / from as f32).sqrt());
    let x = net.node("MatMul", &[&x, &weights], vec![]);
    let bias = net.weights(&[CLASSES], 0.0, 0.1);
    let x = net.node("Add", &[&x, &bias], vec![]);
    let x = net.node("Softmax", &[&x], vec![int("axis", -1)]);
    net.finish(&[("input_1", &[0, side, side, 3])], &x)
}

/// As `torch.onnx.export` writes `torchvision.models.resnet50`: the stride is in a block's 3x3
/// convolution, and the batch normalizations are folded into the convolutions.
fn resnet50_torchvision(width: usize, side: usize) -> ModelProto {
    let mut net = Network::new(17);
    let x = net.conv("input", Conv::new(3, width, 7, 2));
    let x = net.relu(&x);
    let mut x = net.max_pool(&x, 3, 1);
    let mut from = width;
    for (stage, (blocks, stride)) in STAGES.into_iter().enumerate() {
        let inner = width << stage;
        for block in 0..blocks {
            let stride = if block == 0 { stride } else { 1 };
            let y = net.conv(&x, Conv::new(from, inner, 1, 1));
            let y = net.relu(&y);
            let y = net.conv(&y, Conv::new(inner, inner, 3, stride));
            let y = net.relu(&y);
            let y = net.conv(
                &y,
                Conv {
                    gain: 0.3,
                    ..Conv::new(inner, inner * 4, 1, 1)
                },
            );
            let shortcut = if block == 0 {
                net.conv(
                    &x,
                    Conv {
                        gain: 0.7,
                        ..Conv::new(from, inner * 4, 1, stride)
                    },
                )
            } else {
                x
            };
            let y = net.node("Add", &[&y, &shortcut], vec![]);
            x = net.relu(&y);
            from = inner * 4;
        }
    }
    let x = net.node("GlobalAveragePool", &[&x], vec![]);
    let x = net.node("Flatten", &[&x], vec![int("axis", 1)]);
    let x = net.gemm(&x, from, CLASSES);
    net.finish(&[("input", &[0, 3, side, side])], &x)
}

/// As tf2onnx writes `keras.applications.MobileNet`: depthwise and pointwise convolutions, ReLU6.
fn mobilenet_keras(width: usize, side: usize) -> ModelProto {
    const BLOCKS: [(usize, usize); 13] = [
        (2, 1),
        (4, 2),
        (4, 1),
        (8, 2),
        (8, 1),
        (16, 2),
        (16, 1),
        (16, 1),
        (16, 1),
        (16, 1),
        (16, 1),
        (32, 2),
        (32, 1),
    ];
    let mut net = Network::new(18);
    let (zero, six) = (net.scalar(0.0), net.scalar(6.0));
    let block = |net: &mut Network, x: &str, conv: Conv| {
        // TensorFlow's SAME padding of an even image: where the stride is 2, one side only.
        let pads = if conv.stride == 2 { [0, 0, 1, 1] } else { conv.pads };
        let x = net.conv(x, Conv { pads, ..conv });
        let x = net.batch_norm(&x, conv.to);
        net.node("Clip", &[&x, &zero, &six], vec![])
    };
    let x = net.channels_first("input_1");
    let mut x = block(&mut net, &x, Conv::new(3, width, 3, 2));
    let mut from = width;
    for (times, stride) in BLOCKS {
        x = block(
            &mut net,
            &x,
            Conv {
                groups: from,
                ..Conv::new(from, from, 3, stride)
            },
        );
        x = block(&mut net, &x, Conv::new(from, width * times, 1, 1));
        from = width * times;
    }
    let axes = net.integers(&[2, 3]);
    let x = net.node("ReduceMean", &[&x, &axes], vec![int("keepdims", 1)]);
    let x = net.conv(&x, Conv::new(from, CLASSES, 1, 1));
    let x = net.node("Squeeze", &[&x, &axes], vec![]);
    let x = net.node("Softmax", &[&x], vec![int("axis", -1)]);
    net.finish(&[("input_1", &[0, side, side, 3])], &x)
}

/// SqueezeNet 1.1 as Caffe's converter wrote it: the classifier makes maps, which the pool averages.
fn squeezenet(width: usize, side: usize) -> ModelProto {
    /// Channels that are squeezed to, in quarters of the width, and where the map is halved.
    const FIRES: [(usize, bool); 8] = [
        (1, false),
        (1, true),
        (2, false),
        (2, true),
        (3, false),
        (3, false),
        (4, false),
        (4, false),
    ];
    let mut net = Network::new(12);
    let x = net.conv(
        "data",
        Conv {
            pads: [0; 4],
            ..Conv::new(3, width, 3, 2)
        },
    );
    let x = net.relu(&x);
    let mut x = net.max_pool(&x, 3, 0);
    let mut from = width;
    for (quarters, halve) in FIRES {
        let (squeezed, expanded) = (quarters * width / 4, quarters * width);
        let y = net.conv(&x, Conv::new(from, squeezed, 1, 1));
        let y = net.relu(&y);
        let [one, three] = [1, 3].map(|kernel| {
            let expand = net.conv(&y, Conv::new(squeezed, expanded, kernel, 1));
            net.relu(&expand)
        });
        x = net.node("Concat", &[&one, &three], vec![int("axis", 1)]);
        if halve {
            x = net.max_pool(&x, 3, 0);
        }
        from = expanded * 2;
    }
    let x = net.node("Dropout", &[&x], vec![]);
    let x = net.conv(&x, Conv::new(from, CLASSES, 1, 1));
    let x = net.relu(&x);
    let x = net.node("GlobalAveragePool", &[&x], vec![]);
    let x = net.node("Softmax", &[&x], vec![int("axis", 1)]);
    let mut model = net.finish(&[("data", &[1, 3, side, side])], &x);
    if let Some(graph) = &mut model.graph {
        let dims = |tensor: &TensorProto| tensor.dims.iter().map(|dim| *dim as usize).collect::<Vec<_>>();
        graph.input.extend(
            graph
                .initializer
                .iter()
                .map(|tensor| value(&tensor.name, &dims(tensor))),
        );
    }
    model
}

/// A network without a global pool: dense layers over a flattened map of `side / 4`.
fn vgg(width: usize, side: usize) -> ModelProto {
    let mut net = Network::new(13);
    let x = net.conv("input", Conv::new(3, width, 3, 1));
    let x = net.relu(&x);
    let x = net.max_pool(&x, 2, 0);
    let x = net.conv(&x, Conv::new(width, width * 8, 3, 1));
    let x = net.relu(&x);
    let x = net.max_pool(&x, 2, 0);
    let x = net.node("Flatten", &[&x], vec![int("axis", 1)]);
    let x = net.gemm(&x, width * 8 * (side / 4) * (side / 4), 64);
    let x = net.relu(&x);
    let x = net.gemm(&x, 64, CLASSES);
    net.finish(&[("input", &[0, 3, side, side])], &x)
}

fn two_inputs(side: usize) -> ModelProto {
    let mut net = Network::new(13);
    let x = net.node("Add", &["left", "right"], vec![]);
    let x = net.conv(&x, Conv::new(3, 8, 3, 1));
    net.finish(&[("left", &[0, 3, side, side]), ("right", &[0, 3, side, side])], &x)
}

fn rank_2() -> ModelProto {
    let mut net = Network::new(13);
    let x = net.gemm("features", 16, 4);
    net.finish(&[("features", &[0, 16])], &x)
}
