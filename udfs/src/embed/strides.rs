//! Maps that are computed in full, and read at every other position only.
//!
//! Where blocks begin with convolutions of one pixel and stride 2, as in Keras's ResNets, three quarters
//! of what the end of the block below computes is never looked at, and no engine notices. [`skip_unread`]
//! moves such strides up to the convolutions that make the map: what is left computes the same values. It
//! spares Keras's ResNet50 a tenth of its multiplications: tract 14% of its time, onnxruntime 8%, of the
//! original network and of one that was quantized (QOperator) too.

use std::collections::{HashMap, HashSet};

use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::{AttributeProto, GraphProto, ModelProto, NodeProto};

use super::graph::attribute;

/// The largest stride that is moved or made.
const MAX_STRIDE: i64 = 64;
/// From here on (the version of ONNX's operators) pools take quantized values too.
const QUANTIZED_POOLS: i64 = 12;

/// Moves the strides of convolutions of one pixel up to the convolutions that make what they read.
///
/// Other inputs of what is between are thinned out by a pool of one pixel. An input that has a single row
/// or column, as a broadcast map has, keeps it. Graphs with control flow stay as they are.
pub fn skip_unread(model: &mut ModelProto) {
    let version = model
        .opset_import
        .iter()
        .find(|opset| matches!(opset.domain.as_str(), "" | "ai.onnx"));
    let version = version.map_or(1, |opset| opset.version);
    let Some(graph) = &mut model.graph else { return };
    let quantized = graph.node.iter().any(|node| node.op_type.starts_with("QLinear"));
    if quantized && version < QUANTIZED_POOLS {
        return;
    }
    let strides = strides(graph);
    if !strides.is_empty() {
        thin_out(graph, &strides);
    }
}

/// The maps of which a part is enough, and the stride at which it is taken. Each is made by a convolution,
/// or from the values at the same position of other maps.
fn strides(graph: &GraphProto) -> HashMap<String, i64> {
    let mut readers: HashMap<&str, Vec<(&NodeProto, usize)>> = HashMap::new();
    for node in &graph.node {
        if node
            .attribute
            .iter()
            .any(|attribute| attribute.g.is_some() || !attribute.graphs.is_empty())
        {
            return HashMap::new();
        }
        for (slot, input) in node.input.iter().enumerate() {
            readers.entry(input).or_default().push((node, slot));
        }
    }
    let outputs: HashSet<&str> = graph.output.iter().map(|output| output.name.as_str()).collect();

    // Values that are maps, and those that a convolution would compute less for.
    let (mut maps, mut spared) = (HashSet::new(), HashSet::new());
    for node in &graph.node {
        let [output] = node.output.as_slice() else { continue };
        let mut operands = operands(node).peekable();
        let is_map = match operands.peek() {
            Some(_) => operands.all(|(_, operand)| maps.contains(operand)),
            None => makes_map(node),
        };
        if !is_map {
            continue;
        }
        maps.insert(output.as_str());
        let read_once = |operand| readers.get(operand).is_some_and(|readers| readers.len() == 1);
        let mut operands = self::operands(node);
        if stride(node).is_some() || operands.any(|(_, operand)| spared.contains(operand) && read_once(operand)) {
            spared.insert(output.as_str());
        }
    }

    let mut strides = HashMap::new();
    for node in graph.node.iter().rev() {
        let [output] = node.output.as_slice() else { continue };
        if !spared.contains(output.as_str()) || outputs.contains(output.as_str()) {
            continue;
        }
        let mut read_at = readers
            .get(output.as_str())
            .into_iter()
            .flatten()
            .map(|(reader, slot)| {
                let below = reader
                    .output
                    .first()
                    .and_then(|output| strides.get(output))
                    .copied()
                    .unwrap_or(1);
                match stride(reader) {
                    Some(own) if is_pixel(reader) && *slot == 0 => own * below,
                    None if operands(reader).any(|(operand, _)| operand == *slot) => below,
                    _ => 1,
                }
            });
        if let Some(first) = read_at.next()
            && (2..=MAX_STRIDE).contains(&first)
            && read_at.all(|other| other == first)
        {
            strides.insert(output.clone(), first);
        }
    }
    strides
}

/// Has only the parts in `strides` computed.
fn thin_out(graph: &mut GraphProto, strides: &HashMap<String, i64>) {
    let part_of = |value: &String| strides.get(value).copied().unwrap_or(1);
    let (mut nodes, mut pools) = (Vec::with_capacity(graph.node.len()), HashSet::new());
    for mut node in std::mem::take(&mut graph.node) {
        let below = node.output.first().map_or(1, part_of);
        if let Some(own) = stride(&node) {
            let above = node.input.first().filter(|_| is_pixel(&node)).map_or(1, part_of);
            set_stride(&mut node, own * below / above);
        } else if below > 1 {
            let full: Vec<usize> = operands(&node)
                .filter(|(_, operand)| !strides.contains_key(*operand))
                .map(|(slot, _)| slot)
                .collect();
            for slot in full {
                let part = format!("{}/{below}", node.input[slot]);
                if pools.insert(part.clone()) {
                    nodes.push(every(below, &node.input[slot], &part));
                }
                node.input[slot] = part;
            }
        }
        nodes.push(node);
    }
    graph.node = nodes;
    // Their shapes are others now.
    graph.value_info.retain(|value| !strides.contains_key(&value.name));
}

/// The node that takes every `stride`-th row and column of a map.
fn every(stride: i64, map: &str, part: &str) -> NodeProto {
    NodeProto {
        name: part.to_owned(),
        op_type: "MaxPool".to_owned(),
        input: vec![map.to_owned()],
        output: vec![part.to_owned()],
        attribute: vec![ints("kernel_shape", [1; 2]), ints("strides", [stride; 2])],
        ..NodeProto::default()
    }
}

/// The inputs, and their positions among all inputs, of a node that computes each value of a map from the
/// values at the same position.
fn operands(node: &NodeProto) -> impl Iterator<Item = (usize, &str)> {
    let slots: &[usize] = match node.op_type.as_str() {
        "Add" => &[0, 1],
        "BatchNormalization" | "Clip" | "LeakyRelu" | "Relu" => &[0],
        "QLinearAdd" => &[0, 3],
        _ => &[],
    };
    slots
        .iter()
        .filter_map(|&slot| Some((slot, node.input.get(slot)?.as_str())))
}

/// Does a node make a map, `[N, C, H, W]`, whatever it is given?
fn makes_map(node: &NodeProto) -> bool {
    let known = matches!(
        node.op_type.as_str(),
        "AveragePool" | "Conv" | "MaxPool" | "QLinearConv"
    );
    known && attribute(node, "kernel_shape").is_some_and(|kernel| kernel.ints.len() == 2)
}

/// The stride of a convolution, where it is the same down and across and the padding does not depend on it.
fn stride(node: &NodeProto) -> Option<i64> {
    let is_convolution = matches!(node.op_type.as_str(), "Conv" | "QLinearConv") && makes_map(node);
    let padding = attribute(node, "auto_pad").map_or(&b""[..], |padding| &padding.s);
    if !is_convolution || !matches!(padding, b"" | b"NOTSET" | b"VALID") {
        return None;
    }
    match attribute(node, "strides").map_or(&[1, 1][..], |strides| &strides.ints) {
        [down, across] if down == across && (1..=MAX_STRIDE).contains(down) => Some(*down),
        _ => None,
    }
}

/// Does a convolution make each position from one pixel?
fn is_pixel(node: &NodeProto) -> bool {
    node.attribute.iter().all(|attribute| match attribute.name.as_str() {
        "kernel_shape" => attribute.ints.iter().all(|side| *side == 1),
        "pads" => attribute.ints.iter().all(|pad| *pad == 0),
        _ => true,
    })
}

fn set_stride(node: &mut NodeProto, stride: i64) {
    node.attribute.retain(|attribute| attribute.name != "strides");
    node.attribute.push(ints("strides", [stride; 2]));
}

fn ints(name: &str, values: [i64; 2]) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        r#type: AttributeType::Ints as i32,
        ints: values.to_vec(),
        ..AttributeProto::default()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use tract_onnx::prelude::Framework;

    use super::super::engines::Engine;
    use super::super::engines::tract::TractEngine;
    use super::super::networks::onnx;
    use super::*;

    fn network(kind: &str, side: usize) -> ModelProto {
        tract_onnx::onnx()
            .proto_model_for_read(&mut onnx(kind, 8, side).as_slice())
            .unwrap()
    }

    fn convolutions_with_stride(model: &ModelProto, side: i64) -> usize {
        let nodes = model.graph.iter().flat_map(|graph| &graph.node);
        let has_side =
            |node: &&NodeProto| attribute(node, "kernel_shape").is_some_and(|kernel| kernel.ints == [side; 2]);
        nodes.filter(has_side).filter(|node| stride(node) == Some(2)).count()
    }

    #[test]
    fn strides_move_up_and_the_result_stays() {
        // 72 is odd further up: 9, 5 and 3 pixels wide.
        for side in [64, 72] {
            let full = network("resnet50-keras", side);
            let mut part = full.clone();
            skip_unread(&mut part);
            assert_eq!([1, 3].map(|side| convolutions_with_stride(&full, side)), [6, 0]);
            assert_eq!([1, 3].map(|side| convolutions_with_stride(&part, side)), [0, 3]);

            let image: Vec<f32> = (0..side * side * 3).map(|i| (i * 37 % 256) as f32 - 128.0).collect();
            let [full, part] = [full, part].map(|model| {
                let graph = model.graph.as_ref().unwrap();
                let mean = graph
                    .node
                    .iter()
                    .find(|node| node.op_type == "ReduceMean")
                    .unwrap()
                    .output[0]
                    .clone();
                let mut model = model;
                model.graph.as_mut().unwrap().output[0].name = mean;
                let engine = TractEngine::load(&model, [1, side, side, 3]).unwrap();
                let mut output = vec![0.0; engine.output_shape().iter().product()];
                engine.run(&image, 1, &mut output).unwrap();
                output
            });
            let scale = full.iter().fold(0.0f32, |scale, value| scale.max(value.abs()));
            assert!(scale > 0.0);
            for (full, part) in full.iter().zip(&part) {
                assert!((full - part).abs() <= 1e-5 * scale, "{full} {part}");
            }
        }
    }

    #[test]
    fn networks_that_read_everything_stay_as_they_are() {
        for kind in ["resnet50-torchvision", "mobilenet-keras", "squeezenet", "vgg"] {
            let full = network(kind, 64);
            let mut part = full.clone();
            skip_unread(&mut part);
            assert_eq!(full, part, "{kind}");
        }
    }

    #[test]
    fn a_map_that_is_the_output_stays() {
        let mut network = network("resnet50-keras", 64);
        let graph = network.graph.as_mut().unwrap();
        let is_strided_pixel = |node: &&NodeProto| stride(node) == Some(2) && is_pixel(node);
        let map = graph.node.iter().find(is_strided_pixel).unwrap().input[0].clone();
        graph.output[0].name = map;
        skip_unread(&mut network);
        assert_eq!([1, 3].map(|side| convolutions_with_stride(&network, side)), [2, 2]);
    }
}
