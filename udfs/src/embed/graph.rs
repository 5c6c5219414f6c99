//! What an ONNX graph takes, and where in it the embedding is.
//!
//! Everything here works on the ONNX protobuf before an engine sees it, so that every engine runs
//! the same network.
//!
//! # Where the head begins
//! Call *trunk* the nodes that every way from the image to the (first) output goes through.
//!
//! 1. The last global pool of the trunk decides. Weighted layers above it (Gemm, MatMul, Conv) are
//!    the classification head: the embedding is the pool's output. ResNet, MobileNet, EfficientNet
//!    and DenseNet are of this kind; the pools inside squeeze-and-excitation blocks are not in the
//!    trunk.
//! 2. A global pool without weighted layers above it may average *class maps*, as SqueezeNet does:
//!    a Softmax above it, or a convolution to the 1,000 (1,001) ImageNet classes right below it,
//!    says so. The head is that convolution, the embedding the pooled map below it.
//! 3. Otherwise such a network has no head, and its output is the embedding.
//! 4. Without a global pool, the dense layers that end the network are the head, with the Flatten
//!    below them (VGG, AlexNet, vision transformers). What is below is the embedding, pooled where
//!    it is a map.
//!
//! # Quantized networks
//! A QLinear operator counts as the operator that it quantizes, and QuantizeLinear and
//! DequantizeLinear change nothing. Where the embedding is a value of 8 bits, a DequantizeLinear with
//! its scale and zero point becomes the output, so that a vector is float32 in any case.
//!
//! An ONNX graph says nothing of what its layers are for: the projection of an embedding network
//! looks like a classifier, and its result is what `'logits'` gives.

use std::collections::{HashMap, HashSet};
use std::fmt::{self, Display};
use std::str::FromStr;

use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::tensor_shape_proto::dimension::Value as Dimension;
use tract_onnx::pb::{
    AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, TypeProto, ValueInfoProto,
    type_proto,
};

/// The longest side of an image that a network may take, in pixels.
pub const MAX_SIDE: u32 = 4096;

/// What is wrong with a network, for a person; the caller names the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GraphError {
    /// There is no graph in the file.
    #[error("there is no graph in it: it is no ONNX network, or the file is cut off")]
    Empty,
    /// Weights are kept outside the file.
    #[error("its weights are in another file, '{0}': `pomona model add` packs them into one")]
    ExternalData(String),
    /// Not exactly one input.
    #[error("it has {} inputs ({}), an image network has one", .0.len(), .0.join(", "))]
    Inputs(Vec<String>),
    /// The input is no image.
    #[error("its input '{name}' is {found}, an image network takes float32 [N,3,H,W] or [N,H,W,3], sides up to 4096")]
    Input {
        /// The input's name.
        name: String,
        /// What was found instead.
        found: String,
    },
    /// The output does not depend on the image.
    #[error("nothing leads from its input '{0}' to its output")]
    Disconnected(String),
    /// Logits were asked of a network without a head.
    #[error("it has no classification head, so there are no logits: use 'pooled' or 'flatten'")]
    NoHead,
    /// The features are neither a vector nor a map.
    #[error("its features have the shape {0:?} (without the batch), neither a vector nor a map to pool: use 'flatten'")]
    Shape(Vec<usize>),
}

/// Which output of a network is the embedding.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Output {
    /// The last feature map, averaged over its positions (or pooled as the network does it).
    #[default]
    Pooled,
    /// The last feature map, unpooled, in the order of the network's own input layout: H, W, C for
    /// networks that take `[N,H,W,3]` (as Keras flattens), C, H, W for `[N,3,H,W]` (as PyTorch).
    Flatten,
    /// What the classification head gives, before its Softmax.
    Logits,
}

impl FromStr for Output {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "pooled" => Ok(Self::Pooled),
            "flatten" => Ok(Self::Flatten),
            "logits" => Ok(Self::Logits),
            other => Err(format!(
                "the output of a network is 'pooled', 'flatten' or 'logits', not '{other}'"
            )),
        }
    }
}

/// The order of the axes of a batch of images or maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `[N, channels, height, width]`
    Nchw,
    /// `[N, height, width, channels]`
    Nhwc,
}

impl Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nchw => "NCHW",
            Self::Nhwc => "NHWC",
        })
    }
}

/// The one image input of a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInput {
    /// The value's name in the graph.
    pub name: String,
    /// The order of its axes.
    pub layout: Layout,
    /// Rows of pixels; `None` where the network takes any.
    pub height: Option<u32>,
    /// Columns of pixels; `None` where the network takes any.
    pub width: Option<u32>,
}

impl ImageInput {
    /// The input's shape for one image.
    pub fn shape(&self, height: u32, width: u32) -> [usize; 4] {
        let (height, width) = (height as usize, width as usize);
        match self.layout {
            Layout::Nchw => [1, 3, height, width],
            Layout::Nhwc => [1, height, width, 3],
        }
    }
}

/// Finds the one image input of a network.
///
/// # Errors
/// Where there is not exactly one input, or it is no image; where weights are in another file.
pub fn image_input(model: &ModelProto) -> Result<ImageInput, GraphError> {
    let graph = model.graph.as_ref().ok_or(GraphError::Empty)?;
    let functions = || {
        model
            .functions
            .iter()
            .find_map(|function| external_constant(&function.node))
    };
    if let Some(tensor) = external_tensor(graph).or_else(functions) {
        return Err(GraphError::ExternalData(
            external_entry(tensor, "location").unwrap_or_default().to_owned(),
        ));
    }
    // Exporters before ONNX IR 4 list the weights among the inputs.
    let weights: HashSet<&str> = graph.initializer.iter().map(|tensor| tensor.name.as_str()).collect();
    let inputs: Vec<&ValueInfoProto> = graph
        .input
        .iter()
        .filter(|i| !weights.contains(i.name.as_str()))
        .collect();
    let [input] = inputs.as_slice() else {
        return Err(GraphError::Inputs(
            inputs.iter().map(|input| input.name.clone()).collect(),
        ));
    };
    let wrong = |found: String| GraphError::Input {
        name: input.name.clone(),
        found,
    };

    let Some(type_proto::Value::TensorType(tensor)) = input.r#type.as_ref().and_then(|t| t.value.as_ref()) else {
        return Err(wrong("no tensor".to_owned()));
    };
    if tensor.elem_type != DataType::Float as i32 {
        let found = DataType::try_from(tensor.elem_type).map_or("of an unknown type", |t| t.as_str_name());
        return Err(wrong(found.to_owned()));
    }
    let Some(shape) = &tensor.shape else {
        return Err(wrong("a tensor of unknown rank".to_owned()));
    };
    let dimensions: Vec<Option<&Dimension>> = shape.dim.iter().map(|dim| dim.value.as_ref()).collect();
    let shown: Vec<String> = dimensions
        .iter()
        .map(|dim| match dim {
            Some(Dimension::DimValue(value)) => value.to_string(),
            Some(Dimension::DimParam(name)) => name.clone(),
            None => "?".to_owned(),
        })
        .collect();
    let wrong_shape = || wrong(format!("[{}]", shown.join(",")));
    let sizes: Vec<Option<u32>> = dimensions
        .iter()
        .map(|dim| match dim {
            Some(Dimension::DimValue(value)) if *value > 0 => Some(u32::try_from(*value).unwrap_or(u32::MAX)),
            _ => None,
        })
        .collect();
    let [_, second, third, fourth] = sizes[..] else {
        return Err(wrong_shape());
    };

    let layout = match (second == Some(3), fourth == Some(3)) {
        (true, false) => Some(Layout::Nchw),
        (false, true) => Some(Layout::Nhwc),
        _ => layout_by_use(graph, &input.name).filter(|layout| match layout {
            Layout::Nchw => matches!(second, None | Some(3)),
            Layout::Nhwc => matches!(fourth, None | Some(3)),
        }),
    };
    let (layout, height, width) = match layout {
        Some(Layout::Nchw) => (Layout::Nchw, third, fourth),
        Some(Layout::Nhwc) => (Layout::Nhwc, second, third),
        None => return Err(wrong_shape()),
    };
    if [height, width].into_iter().flatten().any(|side| side > MAX_SIDE) {
        return Err(wrong_shape());
    }
    Ok(ImageInput {
        name: input.name.clone(),
        layout,
        height,
        width,
    })
}

/// The layout of the image that its first layers ask for, where its shape does not tell.
fn layout_by_use(graph: &GraphProto, image: &str) -> Option<Layout> {
    let mut value = image;
    // The nodes of a graph are sorted topologically: one pass follows a chain.
    for node in &graph.node {
        if !node.input.iter().any(|input| input == value) {
            continue;
        }
        match operator(node) {
            "Conv" | "MaxPool" | "AveragePool" | "BatchNormalization" => return Some(Layout::Nchw),
            "Transpose" if ints(node, "perm") == [0, 3, 1, 2] => return Some(Layout::Nhwc),
            "Add" | "Sub" | "Mul" | "Div" | "Cast" | "Clip" | "Identity" | "Pad" | QUANTIZE | DEQUANTIZE => {
                value = node.output.first()?;
            }
            _ => return None,
        }
    }
    None
}

/// A network that ends where the embedding is.
#[derive(Debug)]
pub struct Headless {
    /// The network, with one output and nothing that is not needed for it.
    pub model: ModelProto,
    /// The order of the output's axes, where it is a map.
    pub layout: Layout,
}

/// Cuts a network off where `output` is; see the module for the rules.
///
/// # Errors
/// Where nothing leads from the image to the output, or there is no head to take logits from.
pub fn headless(mut model: ModelProto, input: &ImageInput, output: Output) -> Result<Headless, GraphError> {
    let graph = model.graph.as_mut().ok_or(GraphError::Empty)?;
    let trunk = Trunk::new(graph, input)?;
    let head = trunk.head();
    let value = match output {
        Output::Pooled => head.pooled,
        Output::Flatten => head.map,
        Output::Logits if head.exists => trunk.logits(),
        Output::Logits => return Err(GraphError::NoHead),
    };
    let layout = trunk.layout_of(value);
    let dequantize = trunk.dequantize(value);
    let mut value = value.to_owned();
    if let Some(node) = dequantize {
        value.clone_from(&node.name);
        graph.node.push(node);
    }
    keep_only(graph, value);
    Ok(Headless { model, layout })
}

/// Makes `value` the only output, and drops what it does not need.
fn keep_only(graph: &mut GraphProto, value: String) {
    let mut needed = HashSet::from([value.clone()]);
    graph.node.reverse();
    graph.node.retain(|node| {
        let kept = node.output.iter().any(|output| needed.contains(output));
        if kept {
            collect_inputs(node, &mut needed);
        }
        kept
    });
    graph.node.reverse();
    graph.initializer.retain(|tensor| needed.contains(&tensor.name));
    graph.input.retain(|input| needed.contains(&input.name));
    // Declared shapes of inner values often fix a batch size that the values do not have.
    graph.value_info.clear();
    let tensor = type_proto::Tensor {
        elem_type: DataType::Float as i32,
        shape: None,
    };
    let r#type = TypeProto {
        value: Some(type_proto::Value::TensorType(tensor)),
        ..TypeProto::default()
    };
    graph.output = vec![ValueInfoProto {
        name: value,
        r#type: Some(r#type),
        ..ValueInfoProto::default()
    }];
}

/// The inputs of a node, with those of the graphs inside it (If, Loop), which see outer values.
fn collect_inputs(node: &NodeProto, inputs: &mut HashSet<String>) {
    inputs.extend(node.input.iter().filter(|input| !input.is_empty()).cloned());
    for attribute in &node.attribute {
        for graph in attribute.g.iter().chain(&attribute.graphs) {
            inputs.extend(graph.output.iter().map(|output| output.name.clone()));
            for inner in &graph.node {
                collect_inputs(inner, inputs);
            }
        }
    }
}

/// Where the head of a network begins.
struct Head<'a> {
    /// The value that is the embedding, once maps are averaged.
    pooled: &'a str,
    /// The last feature map.
    map: &'a str,
    /// Is there a classification head?
    exists: bool,
}

/// From float32 to 8 bits.
const QUANTIZE: &str = "QuantizeLinear";
/// And back.
const DEQUANTIZE: &str = "DequantizeLinear";
/// Operators with weights: without one there is no classifier.
const WEIGHTED: [&str; 3] = ["Conv", "Gemm", "MatMul"];
/// Operators of which the dense end of a network is made.
const DENSE_END: [&str; 18] = [
    "Add",
    "BatchNormalization",
    "Cast",
    "Clip",
    DEQUANTIZE,
    "Dropout",
    "Flatten",
    "Gemm",
    "Identity",
    "LogSoftmax",
    "MatMul",
    QUANTIZE,
    "Relu",
    "Reshape",
    "Softmax",
    "Squeeze",
    "Tanh",
    "Transpose",
];
/// Those among them that can be the first: an activation before them belongs to the features.
const DENSE_BEGIN: [&str; 7] = [
    "Dropout",
    "Flatten",
    "Gemm",
    "MatMul",
    "Reshape",
    "Squeeze",
    "Transpose",
];
/// Operators that may stand between the classifier of class maps and their pool.
const BETWEEN_CLASS_MAPS: [&str; 10] = [
    "Add",
    "BatchNormalization",
    "Clip",
    DEQUANTIZE,
    "Dropout",
    "Identity",
    "LeakyRelu",
    QUANTIZE,
    "Relu",
    "Transpose",
];
/// ImageNet's classes, without and with one for the background.
const IMAGENET_CLASSES: [i64; 2] = [1000, 1001];

/// The nodes between the image and the output.
struct Trunk<'a> {
    graph: &'a GraphProto,
    input: &'a ImageInput,
    output: &'a str,
    /// The values that are computed from the image's pixels.
    pixels: HashSet<&'a str>,
    /// The nodes on the ways from the image to the output, sorted topologically.
    nodes: Vec<&'a NodeProto>,
    /// Does every way go through the node?
    shared: Vec<bool>,
}

impl<'a> Trunk<'a> {
    fn new(graph: &'a GraphProto, input: &'a ImageInput) -> Result<Self, GraphError> {
        let image = input.name.as_str();
        let disconnected = || GraphError::Disconnected(image.to_owned());
        let output = graph
            .output
            .first()
            .map(|output| output.name.as_str())
            .ok_or_else(disconnected)?;

        let mut pixels = HashSet::from([image]);
        for node in &graph.node {
            // The shape of a value does not depend on pixels: `x.view(x.size(0), -1)` is no shortcut.
            let reads_pixels = !matches!(node.op_type.as_str(), "Shape" | "Size");
            if reads_pixels && node.input.iter().any(|input| pixels.contains(input.as_str())) {
                pixels.extend(
                    node.output
                        .iter()
                        .map(String::as_str)
                        .filter(|output| !output.is_empty()),
                );
            }
        }
        if output == image || !pixels.contains(output) {
            return Err(disconnected());
        }

        let mut needed = HashSet::from([output]);
        let mut nodes = vec![];
        for node in graph.node.iter().rev() {
            let mut outputs = node.output.iter().map(String::as_str);
            if outputs.any(|output| needed.contains(output) && pixels.contains(output)) {
                needed.extend(
                    node.input
                        .iter()
                        .map(String::as_str)
                        .filter(|input| pixels.contains(input)),
                );
                nodes.push(node);
            }
        }
        nodes.reverse();

        // All ways go through a node if no value made before it is used after it.
        let mut last_use = HashMap::new();
        for (position, node) in nodes.iter().enumerate() {
            last_use.extend(node.input.iter().map(|input| (input.as_str(), position)));
        }
        last_use.insert(output, nodes.len());
        let mut in_use_until = last_use.get(image).copied().unwrap_or_default();
        let mut shared = Vec::with_capacity(nodes.len());
        for (position, node) in nodes.iter().enumerate() {
            shared.push(in_use_until == position);
            for output in &node.output {
                in_use_until = in_use_until.max(last_use.get(output.as_str()).copied().unwrap_or_default());
            }
        }
        Ok(Self {
            graph,
            input,
            output,
            pixels,
            nodes,
            shared,
        })
    }

    /// The input of a node that carries the image's features: the first computed from pixels.
    fn features(&self, node: &'a NodeProto) -> &'a str {
        let mut inputs = node.input.iter().map(String::as_str);
        inputs.find(|input| self.pixels.contains(input)).unwrap_or_default()
    }

    fn head(&self) -> Head<'a> {
        let last_pool = self
            .nodes
            .iter()
            .zip(&self.shared)
            .rposition(|(&node, &shared)| shared && self.is_global_pool(node));
        let Some(position) = last_pool else {
            return match self.dense_end() {
                Some(first) => {
                    let below = self.features(first);
                    Head {
                        pooled: below,
                        map: below,
                        exists: true,
                    }
                }
                None => Head {
                    pooled: self.output,
                    map: self.output,
                    exists: false,
                },
            };
        };
        let (pool, above) = (self.nodes[position], &self.nodes[position + 1..]);
        let map = self.features(pool);
        if above.iter().any(|node| WEIGHTED.contains(&operator(node))) {
            let pooled = pool.output.first().map_or(map, String::as_str);
            return Head {
                pooled,
                map,
                exists: true,
            };
        }
        match self.class_maps(position) {
            Some(classifier) => {
                let map = self.features(classifier);
                Head {
                    pooled: map,
                    map,
                    exists: true,
                }
            }
            None => Head {
                pooled: self.output,
                map,
                exists: false,
            },
        }
    }

    /// Does a node of the trunk pool a whole map?
    fn is_global_pool(&self, node: &'a NodeProto) -> bool {
        match operator(node) {
            "GlobalAveragePool" | "GlobalMaxPool" | "GlobalLpPool" => true,
            // Caffe and older exporters name the size of the map. Without inferring shapes a large
            // kernel is the sign: pools between layers have 2 or 3.
            "AveragePool" => {
                let kernel = ints(node, "kernel_shape");
                kernel.len() == 2 && kernel.iter().all(|side| *side >= 4)
            }
            "ReduceMean" | "ReduceMax" => {
                // The axes are an attribute before opset 18 and in QLinearReduceMean, an input otherwise.
                let axes = match node.input.get(1).filter(|_| operator(node) == node.op_type) {
                    Some(axes) => self.constant_ints(axes).unwrap_or_default(),
                    None => ints(node, "axes").to_vec(),
                };
                let mut axes: Vec<i64> = axes
                    .into_iter()
                    .map(|axis| if axis < 0 { axis.saturating_add(4) } else { axis })
                    .collect();
                axes.sort_unstable();
                axes == match self.layout_of(self.features(node)) {
                    Layout::Nchw => [2, 3],
                    Layout::Nhwc => [1, 2],
                }
            }
            _ => false,
        }
    }

    /// The convolution that makes the class maps which the pool at `position` averages.
    fn class_maps(&self, position: usize) -> Option<&'a NodeProto> {
        let below = (0..position)
            .rev()
            .find(|i| !(self.shared[*i] && BETWEEN_CLASS_MAPS.contains(&operator(self.nodes[*i]))))?;
        let classifier = self.nodes[below];
        if !self.shared[below] || operator(classifier) != "Conv" {
            return None;
        }
        let above = &self.nodes[position + 1..];
        let softmax = above
            .iter()
            .any(|node| matches!(operator(node), "Softmax" | "LogSoftmax"));
        let imagenet = self
            .channels(classifier)
            .is_some_and(|channels| IMAGENET_CLASSES.contains(&channels));
        (softmax || imagenet).then_some(classifier)
    }

    /// The channels that a convolution makes: the first dimension of its weights.
    fn channels(&self, convolution: &NodeProto) -> Option<i64> {
        let position = if convolution.op_type == "QLinearConv" { 3 } else { 1 };
        let mut weights = convolution.input.get(position)?;
        // In the QDQ form 8-bit weights are dequantized by nodes of their own.
        for node in self.graph.node.iter().rev() {
            if matches!(node.op_type.as_str(), QUANTIZE | DEQUANTIZE) && node.output.first() == Some(weights) {
                weights = node.input.first()?;
            }
        }
        let tensor = self.graph.initializer.iter().find(|tensor| tensor.name == *weights)?;
        tensor.dims.first().copied()
    }

    /// The first node of the dense layers that end the network.
    fn dense_end(&self) -> Option<&'a NodeProto> {
        let is_end = |i: &usize| self.shared[*i] && DENSE_END.contains(&operator(self.nodes[*i]));
        let length = (0..self.nodes.len()).rev().take_while(is_end).count();
        let end = &self.nodes[self.nodes.len() - length..];
        if !end.iter().any(|node| matches!(operator(node), "Gemm" | "MatMul")) {
            return None;
        }
        end.iter().copied().find(|node| DENSE_BEGIN.contains(&operator(node)))
    }

    /// The output, or what goes into the Softmax that ends the network.
    fn logits(&self) -> &'a str {
        // The last node of the trunk makes the output, and the one before it what that takes, as long
        // as they have one input each.
        for &node in self.nodes.iter().rev() {
            match operator(node) {
                "Softmax" | "LogSoftmax" => return self.features(node),
                "Cast" | "Flatten" | "Identity" | "Reshape" | "Squeeze" | "Transpose" | QUANTIZE | DEQUANTIZE => {}
                _ => break,
            }
        }
        self.output
    }

    /// The order of the axes of a map. ONNX's own layers are channels-first: only a Transpose
    /// changes that, and what works on single values keeps what it is given.
    fn layout_of(&self, mut value: &'a str) -> Layout {
        for &node in self.nodes.iter().rev() {
            if !node.output.iter().any(|output| output == value) {
                continue;
            }
            match operator(node) {
                _ if attribute(node, "channels_last").is_some_and(|last| last.i == 1) => return Layout::Nhwc,
                "Transpose" if ints(node, "perm") == [0, 2, 3, 1] => return Layout::Nhwc,
                "Transpose" if ints(node, "perm") == [0, 3, 1, 2] => return Layout::Nchw,
                "AveragePool"
                | "BatchNormalization"
                | "Conv"
                | "ConvTranspose"
                | "GlobalAveragePool"
                | "GlobalMaxPool"
                | "InstanceNormalization"
                | "MaxPool" => return Layout::Nchw,
                _ => value = self.features(node),
            }
        }
        self.input.layout
    }

    /// The node that makes a quantized value float32; `None` where it already is.
    fn dequantize(&self, value: &'a str) -> Option<NodeProto> {
        let mut input = vec![value.to_owned()];
        input.extend(self.quantization(value)?.iter().cloned());
        let mut name = format!("{value}_dequantized");
        while self.graph.node.iter().any(|node| node.output.contains(&name)) {
            name.push('_');
        }
        Some(NodeProto {
            input,
            output: vec![name.clone()],
            name,
            op_type: DEQUANTIZE.to_owned(),
            ..NodeProto::default()
        })
    }

    /// Scale and, unless it is 0, zero point of a quantized value; `None` where it is float32. The
    /// node that made the value has them among its inputs.
    fn quantization(&self, mut value: &'a str) -> Option<&'a [String]> {
        for &node in self.nodes.iter().rev() {
            if !node.output.iter().any(|output| output == value) {
                continue;
            }
            let position = match node.op_type.as_str() {
                "QLinearConcat" => 0,
                QUANTIZE => 1,
                "QLinearAveragePool"
                | "QLinearGlobalAveragePool"
                | "QLinearLeakyRelu"
                | "QLinearReduceMean"
                | "QLinearSigmoid"
                | "QLinearSoftmax" => 3,
                "QLinearAdd" | "QLinearConv" | "QLinearMatMul" | "QLinearMul" => 6,
                // Without them, it makes float32.
                "QGemm" => 7,
                // These take values of 8 bits and keep their scale.
                "Clip" | "Concat" | "Dropout" | "Flatten" | "Gather" | "Identity" | "MaxPool" | "Pad" | "Relu"
                | "Reshape" | "Resize" | "Slice" | "Split" | "Squeeze" | "Transpose" | "Unsqueeze" => {
                    value = self.features(node);
                    continue;
                }
                _ => return None,
            };
            let inputs = node.input.get(position..)?;
            let given = inputs.iter().take(2).take_while(|input| !input.is_empty()).count();
            return inputs.get(..given).filter(|inputs| !inputs.is_empty());
        }
        None
    }

    /// The values of a constant list of integers: an initializer or a Constant node.
    fn constant_ints(&self, name: &str) -> Option<Vec<i64>> {
        if let Some(tensor) = self.graph.initializer.iter().find(|tensor| tensor.name == name) {
            return Some(tensor_ints(tensor));
        }
        let is_it = |node: &&NodeProto| node.op_type == "Constant" && node.output.iter().any(|output| output == name);
        let node = self.graph.node.iter().find(is_it)?;
        match attribute(node, "value").and_then(|value| value.t.as_ref()) {
            Some(tensor) => Some(tensor_ints(tensor)),
            None => Some(ints(node, "value_ints").to_vec()),
        }
    }
}

/// What a node computes, quantized or not: `Conv` for a QLinearConv.
fn operator(node: &NodeProto) -> &str {
    match node.op_type.as_str() {
        "QGemm" => "Gemm",
        name => name.strip_prefix("QLinear").unwrap_or(name),
    }
}

/// An attribute by its name.
pub(super) fn attribute<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute.iter().find(|attribute| attribute.name == name)
}

/// The integers of an attribute; none where it is absent.
fn ints<'a>(node: &'a NodeProto, name: &str) -> &'a [i64] {
    attribute(node, name)
        .map(|attribute| attribute.ints.as_slice())
        .unwrap_or_default()
}

fn tensor_ints(tensor: &TensorProto) -> Vec<i64> {
    if tensor.raw_data.is_empty() {
        return tensor.int64_data.clone();
    }
    let (values, _) = tensor.raw_data.as_chunks::<8>();
    values.iter().copied().map(i64::from_le_bytes).collect()
}

/// A tensor whose data is in another file: among the weights, or in a node, where constants are. Graphs in
/// graphs are as deep as the protobuf decoder lets them be.
fn external_tensor(graph: &GraphProto) -> Option<&TensorProto> {
    let sparse = graph.sparse_initializer.iter().flat_map(sparse_tensors);
    let mut weights = graph.initializer.iter().chain(sparse);
    weights
        .find(|tensor| is_external(tensor))
        .or_else(|| external_constant(&graph.node))
}

fn external_constant(nodes: &[NodeProto]) -> Option<&TensorProto> {
    nodes.iter().flat_map(|node| &node.attribute).find_map(|attribute| {
        let sparse = attribute.sparse_tensor.iter().flat_map(sparse_tensors);
        let mut tensors = attribute.t.iter().chain(&attribute.tensors).chain(sparse);
        let mut graphs = attribute.g.iter().chain(&attribute.graphs);
        tensors
            .find(|tensor| is_external(tensor))
            .or_else(|| graphs.find_map(external_tensor))
    })
}

fn sparse_tensors(sparse: &SparseTensorProto) -> impl Iterator<Item = &TensorProto> {
    sparse.values.iter().chain(&sparse.indices)
}

/// Is the data of a tensor in another file?
pub(crate) fn is_external(tensor: &TensorProto) -> bool {
    tensor.data_location == Some(DataLocation::External as i32)
}

/// What a tensor says about the file that holds its data.
pub(crate) fn external_entry<'a>(tensor: &'a TensorProto, key: &str) -> Option<&'a str> {
    tensor
        .external_data
        .iter()
        .find(|entry| entry.key == key)
        .map(|entry| entry.value.as_str())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::fs;

    use tract_onnx::prelude::Framework;

    use super::super::networks::onnx;
    use super::*;

    fn network(kind: &str) -> ModelProto {
        tract_onnx::onnx()
            .proto_model_for_read(&mut onnx(kind, 8, 64).as_slice())
            .unwrap()
    }

    #[test]
    fn a_network_is_cut_where_its_output_is() {
        for (kind, pooled, flatten, logits) in [
            ("resnet50-keras", "ReduceMean", "Relu", "Add"),
            ("resnet50-torchvision", "GlobalAveragePool", "Relu", "Gemm"),
            ("mobilenet-keras", "ReduceMean", "Clip", "Squeeze"),
            ("squeezenet", "Dropout", "Dropout", "GlobalAveragePool"),
            ("vgg", "MaxPool", "MaxPool", "Gemm"),
        ] {
            for (output, last) in [
                (Output::Pooled, pooled),
                (Output::Flatten, flatten),
                (Output::Logits, logits),
            ] {
                let whole = network(kind);
                let input = image_input(&whole).unwrap();
                let weights = whole.graph.as_ref().unwrap().initializer.len();
                let cut = headless(whole, &input, output).unwrap();
                let graph = cut.model.graph.unwrap();
                assert_eq!(graph.node.last().unwrap().op_type, last, "{kind} {output:?}");
                assert_eq!(
                    graph.output[0].name,
                    graph.node.last().unwrap().output[0],
                    "{kind} {output:?}"
                );
                assert_eq!(cut.layout, Layout::Nchw, "{kind} {output:?}");
                if output != Output::Logits {
                    assert!(graph.initializer.len() < weights, "{kind} {output:?}");
                }
            }
        }
    }

    #[test]
    fn a_headless_network_stays_as_it_is() {
        let whole = network("resnet50-torchvision");
        let input = image_input(&whole).unwrap();
        let pooled = headless(whole, &input, Output::Pooled).unwrap().model;
        let nodes = pooled.graph.as_ref().unwrap().node.len();
        assert_eq!(
            headless(pooled.clone(), &input, Output::Logits).unwrap_err(),
            GraphError::NoHead
        );
        let again = headless(pooled.clone(), &input, Output::Pooled).unwrap().model;
        assert_eq!(again.graph.unwrap().node.len(), nodes);
        let map = headless(pooled, &input, Output::Flatten).unwrap().model;
        assert_eq!(map.graph.unwrap().node.len(), nodes - 1);
    }

    /// A small network that onnxruntime has quantized, see `tests/references/make_quantized.py`.
    fn quantized(name: &str) -> ModelProto {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/references/quantized");
        let file = fs::read(format!("{folder}/{name}/model.onnx")).unwrap();
        tract_onnx::onnx().proto_model_for_read(&mut file.as_slice()).unwrap()
    }

    #[test]
    fn a_quantized_network_is_cut_where_its_output_is_and_gives_float32() {
        let (pooled, flatten, logits) = (Output::Pooled, Output::Flatten, Output::Logits);
        for (name, output, value, scale) in [
            // Values of 8 bits: the quantizer names their scales after the values that they quantize.
            ("residual-qoperator", pooled, "pooled_quantized", "pooled"),
            ("residual-qoperator", flatten, "map_quantized", "map"),
            ("residual-qoperator", logits, "logits_quantized", "logits"),
            (
                "class-maps-qoperator",
                pooled,
                "map_before_relu_quantized",
                "map_before_relu",
            ),
            (
                "class-maps-qoperator",
                flatten,
                "map_before_relu_quantized",
                "map_before_relu",
            ),
            ("class-maps-qoperator", logits, "flatten8_quantized", "logits"),
            ("dense-qoperator", pooled, "map_quantized", "map_before_relu"),
            ("dense-qoperator", flatten, "map_quantized", "map_before_relu"),
            ("dense-qoperator", logits, "logits_quantized", "logits"),
            // Values of float32, most of them made of 8 bits by the network itself.
            ("residual-qdq", pooled, "pooled", ""),
            ("residual-qdq", flatten, "map_DequantizeLinear_Output", ""),
            ("residual-qdq", logits, "logits_DequantizeLinear_Output", ""),
            ("class-maps-qdq", pooled, "map_DequantizeLinear_Output", ""),
            ("class-maps-qdq", flatten, "map_DequantizeLinear_Output", ""),
            ("class-maps-qdq", logits, "flatten8_DequantizeLinear_Output", ""),
            ("dense-qdq", pooled, "map_DequantizeLinear_Output", ""),
            ("dense-qdq", flatten, "map_DequantizeLinear_Output", ""),
            ("dense-qdq", logits, "logits", ""),
        ] {
            let what = format!("{name} {output:?}");
            let whole = quantized(name);
            let input = image_input(&whole).unwrap();
            let cut = headless(whole, &input, output).unwrap();
            assert_eq!(cut.layout, Layout::Nchw, "{what}");
            let domains = cut.model.opset_import.iter().map(|set| set.domain.clone());
            let domains: HashSet<String> = domains.collect();
            let graph = cut.model.graph.unwrap();
            assert!(graph.node.iter().all(|node| domains.contains(&node.domain)), "{what}");

            let last = graph.node.last().unwrap();
            assert_eq!(graph.output[0].name, last.output[0], "{what}");
            if scale.is_empty() {
                assert_eq!(last.output[0], value, "{what}");
                continue;
            }
            assert_eq!(last.op_type, DEQUANTIZE, "{what}");
            let [scale, zero_point] = ["scale", "zero_point"].map(|part| format!("{scale}_{part}"));
            assert_eq!(last.input, [value, scale.as_str(), zero_point.as_str()], "{what}");
            for constant in [scale, zero_point] {
                assert!(graph.initializer.iter().any(|tensor| tensor.name == constant), "{what}");
            }
        }
    }

    #[test]
    fn class_maps_are_told_by_quantized_weights() {
        for (name, logits) in [
            ("class-maps-qoperator", "flatten8_quantized_dequantized"),
            ("class-maps-qdq", "flatten8_DequantizeLinear_Output"),
        ] {
            let mut whole = quantized(name);
            let input = image_input(&whole).unwrap();
            let graph = whole.graph.as_mut().unwrap();
            // Without its Softmax, it classifies only if these are ImageNet's classes.
            let softmax = graph.node.iter().position(|node| operator(node) == "Softmax").unwrap();
            graph.output[0].name = graph.node[softmax].input[0].clone();
            let without = headless(whole.clone(), &input, Output::Logits);
            assert_eq!(without.unwrap_err(), GraphError::NoHead, "{name}");

            let weights = &mut whole.graph.as_mut().unwrap().initializer;
            let weights = weights.iter_mut().find(|tensor| tensor.name == "w4_quantized");
            weights.unwrap().dims[0] = IMAGENET_CLASSES[0];
            let cut = headless(whole, &input, Output::Logits).unwrap();
            let output = cut.model.graph.unwrap().output.remove(0).name;
            assert_eq!(output, logits, "{name}");
        }
    }

    #[test]
    fn broken_quantized_networks_do_no_harm() {
        for name in [
            "residual-qoperator",
            "class-maps-qoperator",
            "dense-qoperator",
            "residual-qdq",
        ] {
            let whole = quantized(name);
            let nodes = whole.graph.as_ref().unwrap().node.len();
            for (broken, inputs) in (0..nodes).flat_map(|node| (0..10).map(move |inputs| (node, inputs))) {
                let mut whole = whole.clone();
                let graph = whole.graph.as_mut().unwrap();
                let last = graph.node[nodes - 1].output[0].clone();
                let node = &mut graph.node[broken];
                // Fewer inputs, then a cycle, then the name that a dequantized value would get.
                node.input.truncate(inputs);
                match inputs {
                    8 => node.input.push(last),
                    9 => node.output[0].push_str("_dequantized"),
                    _ => {}
                }
                let Ok(input) = image_input(&whole) else { continue };
                for output in [Output::Pooled, Output::Flatten, Output::Logits] {
                    if let Ok(cut) = headless(whole.clone(), &input, output) {
                        assert_eq!(cut.model.graph.unwrap().output.len(), 1, "{name}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_image_input_is_found_and_others_are_refused() {
        let input = |kind| image_input(&network(kind));
        let keras = input("resnet50-keras").unwrap();
        assert_eq!(
            (keras.layout, keras.height, keras.width),
            (Layout::Nhwc, Some(64), Some(64))
        );
        assert_eq!(input("squeezenet").unwrap().layout, Layout::Nchw);

        let two = input("two-inputs").unwrap_err().to_string();
        assert!(two.contains("2 inputs (left, right)"), "{two}");
        let rank = input("rank-2").unwrap_err().to_string();
        assert!(rank.contains("'features' is [batch_size,16]"), "{rank}");
        assert_eq!(image_input(&ModelProto::default()).unwrap_err(), GraphError::Empty);
    }
}
