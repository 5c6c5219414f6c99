//! The table function `models()`, and adding a model.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::process;
use std::str::FromStr;
use std::sync::{Arc, LazyLock};

use arrow::array::{ArrayRef, Int32Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use datafusion::catalog::memory::MemorySourceConfig;
use datafusion::catalog::{Session, TableFunctionArgs, TableFunctionImpl, TableProvider};
use datafusion::common::runtime::SpawnedTask;
use datafusion::common::{plan_datafusion_err, plan_err};
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::{Expr, TableType};
use datafusion::physical_plan::ExecutionPlan;
use prost::Message;
use serde_json::{Value, json};
use tract_onnx::pb::ModelProto;

use super::graph::{ImageInput, Output, external_entry, image_input, is_external};
use super::protobuf;
use super::registry::{
    self, CONFIG_FILE, Listed, LoadedModel, MAX_MODEL_BYTES, MODEL_FILE, ModelInfo, ModelSettings, ModelSource,
};
use crate::settings::PomonaOptions;

/// `models()`: the models that can be found, with what is wrong with those that are broken.
#[derive(Debug, Default)]
pub struct ModelsFunction;

impl TableFunctionImpl for ModelsFunction {
    fn call_with_args(&self, args: TableFunctionArgs) -> Result<Arc<dyn TableProvider>> {
        if !args.exprs().is_empty() {
            return plan_err!("models() takes no arguments; it looks in pomona.models_dir and the usual folders");
        }
        Ok(Arc::new(ModelsTable))
    }
}

static SCHEMA: LazyLock<SchemaRef> = LazyLock::new(|| {
    Arc::new(Schema::new(vec![
        Field::new("name", DataType::Utf8, false),
        Field::new("input_width", DataType::Int32, true),
        Field::new("input_height", DataType::Int32, true),
        Field::new("layout", DataType::Utf8, true),
        Field::new("dimensions", DataType::Int32, true),
        Field::new("preprocessing", DataType::Utf8, true),
        Field::new("engine", DataType::Utf8, true),
        Field::new("sha256", DataType::Utf8, true),
        Field::new("pinned_name", DataType::Utf8, true),
        Field::new("location", DataType::Utf8, false),
        Field::new("error", DataType::Utf8, true),
    ]))
});

#[derive(Debug)]
struct ModelsTable;

#[async_trait]
impl TableProvider for ModelsTable {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&SCHEMA)
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        _filters: &[Expr],
        _limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let settings = ModelSettings::from(&PomonaOptions::from_config(state.config_options()));
        let described = projection.is_none_or(|columns| columns.iter().any(|column| takes_a_look(*column)));
        // Reads files, and runs each network once.
        let batch = SpawnedTask::spawn_blocking(move || models_batch(&settings, described))
            .join_unwind()
            .await
            .map_err(|e| DataFusionError::ExecutionJoin(Box::new(e)))??;
        Ok(MemorySourceConfig::try_new_exec(
            &[vec![batch]],
            self.schema(),
            projection.cloned(),
        )?)
    }
}

/// Is the model read for this column? One of a URL is copied for that.
fn takes_a_look(column: usize) -> bool {
    let field = SCHEMA.fields().get(column);
    field.is_none_or(|field| !matches!(field.name().as_str(), "name" | "location"))
}

/// One row per model; without `described` only its name and location are there.
fn models_batch(settings: &ModelSettings, described: bool) -> Result<RecordBatch> {
    let listed = registry::list(&settings.models_dir)?;
    let describe = |model: &Listed| registry::describe(&model.source()?, settings.engine);
    let described: Vec<Result<ModelInfo, String>> = listed
        .iter()
        .map(|model| match described {
            true => describe(model).map_err(|e| e.message().into_owned()),
            false => Err(String::new()),
        })
        .collect();

    let strings = |of: fn(&ModelInfo) -> &str| -> ArrayRef {
        Arc::new(StringArray::from_iter(
            described.iter().map(|info| info.as_ref().ok().map(of)),
        ))
    };
    let ints = |of: fn(&ModelInfo) -> Option<i32>| -> ArrayRef {
        Arc::new(Int32Array::from_iter(
            described.iter().map(|info| info.as_ref().ok().and_then(of)),
        ))
    };
    Ok(RecordBatch::try_new(
        Arc::clone(&SCHEMA),
        vec![
            Arc::new(StringArray::from_iter_values(listed.iter().map(Listed::name))),
            ints(|info| i32::try_from(info.input_width).ok()),
            ints(|info| i32::try_from(info.input_height).ok()),
            strings(|info| &info.layout),
            ints(|info| i32::try_from(info.dimensions).ok()),
            strings(|info| &info.preprocessing),
            strings(|info| info.engine),
            strings(|info| &info.sha256),
            strings(|info| &info.pinned_name),
            Arc::new(StringArray::from_iter_values(listed.iter().map(Listed::location))),
            Arc::new(StringArray::from_iter(described.iter().map(|info| info.as_ref().err()))),
        ],
    )?)
}

/// The preprocessing that a family of networks was trained with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// Keras's `caffe` mode (ResNet, VGG): BGR, ImageNet's mean subtracted, no scaling. Images are
    /// resized with Pillow's default, bicubic; `keras.utils.load_img` itself defaults to nearest.
    Keras,
    /// torchvision's classification networks: shorter side 256 (for an input of 224), bilinear,
    /// centre crop; ImageNet's mean and standard deviation.
    Torchvision,
    /// Keras's `tf` mode (MobileNet, Inception, Xception): -1 to 1, bicubic.
    Tf,
    /// 0 to 255 as it is, bicubic; for networks that scale inside.
    Raw,
}

impl FromStr for Preset {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "keras" | "caffe" => Ok(Self::Keras),
            "torchvision" => Ok(Self::Torchvision),
            "tf" => Ok(Self::Tf),
            "raw" => Ok(Self::Raw),
            other => Err(format!("a preset is keras, torchvision, tf or raw, not '{other}'")),
        }
    }
}

impl Preset {
    /// The `preprocessor_config.json` for a network; one that takes images of any size gets 224x224.
    fn config(self, input: &ImageInput) -> Value {
        let (height, width) = (input.height.unwrap_or(224), input.width.unwrap_or(224));
        let mut config = json!({
            "do_resize": true,
            "size": {"height": height, "width": width},
            "resample": 3,
            "do_center_crop": false,
            "do_rescale": false,
            "do_normalize": false,
            "do_flip_channel_order": false,
        });
        let changes = match self {
            Self::Keras => json!({
                "do_normalize": true,
                "image_mean": [103.939, 116.779, 123.68],
                "image_std": [1.0, 1.0, 1.0],
                "do_flip_channel_order": true,
            }),
            Self::Torchvision => json!({
                "size": {"shortest_edge": height.max(width) * 256 / 224},
                "resample": 2,
                "do_center_crop": true,
                "crop_size": {"height": height, "width": width},
                "do_rescale": true,
                "rescale_factor": 1.0 / 255.0,
                "do_normalize": true,
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225],
            }),
            Self::Tf => json!({
                "do_rescale": true,
                "rescale_factor": 1.0 / 255.0,
                "do_normalize": true,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            }),
            Self::Raw => json!({}),
        };
        if let (Value::Object(config), Value::Object(changes)) = (&mut config, changes) {
            config.extend(changes);
        }
        config
    }
}

/// Adds the network in `onnx_path` as the model `name` to the folder `models_dir`, and tells what
/// it is. Weights in other files are packed into one.
///
/// The model appears whole or not at all: it is written to a folder beside, and run once there.
///
/// # Errors
/// Where the name cannot be, the model exists and `force` is not given, the file is no image
/// network that runs, or a file cannot be read or written.
pub fn add_model(name: &str, onnx_path: &Path, preset: Preset, models_dir: &Path, force: bool) -> Result<ModelInfo> {
    registry::check_name(name)?;
    let target = models_dir.join(name);
    if target.exists() && !force {
        return plan_err!("there is a model '{name}' in {}: --force replaces it", target.display());
    }
    let unreadable = |cause: &dyn Display| plan_datafusion_err!("{}: {cause}", onnx_path.display());
    let (network, packed) = read_packed(onnx_path).map_err(|cause| unreadable(&cause))?;
    let input = image_input(&network).map_err(|cause| unreadable(&cause))?;

    fs::create_dir_all(models_dir).map_err(|e| unwritable(models_dir, &e))?;
    let draft = Draft(models_dir.join(format!(".{name}.{}.new", process::id())));
    fs::create_dir(&draft.0).map_err(|e| unwritable(&draft.0, &e))?;
    let file = draft.0.join(MODEL_FILE);
    if packed {
        fs::write(&file, network.encode_to_vec()).map_err(|e| unwritable(&file, &e))?;
    } else {
        fs::copy(onnx_path, &file).map_err(|e| unwritable(&file, &e))?;
    }
    drop(network);
    let file = draft.0.join(CONFIG_FILE);
    fs::write(&file, format!("{:#}\n", preset.config(&input))).map_err(|e| unwritable(&file, &e))?;
    let draft_model = ModelSource::in_folder(name, draft.0.clone());
    let loaded = LoadedModel::open(&draft_model, Output::Pooled, ModelSettings::default().engine)
        .map_err(|e| e.context(format!("{} was not added", onnx_path.display())))?;
    let info = loaded.info().clone();

    let old = Draft(models_dir.join(format!(".{name}.{}.old", process::id())));
    if target.exists() {
        fs::rename(&target, &old.0).map_err(|e| unwritable(&target, &e))?;
    }
    fs::rename(&draft.0, &target).map_err(|e| {
        let _ = fs::rename(&old.0, &target);
        unwritable(&target, &e)
    })?;
    Ok(ModelInfo {
        location: target.display().to_string(),
        ..info
    })
}

fn unwritable(path: &Path, cause: &io::Error) -> DataFusionError {
    plan_datafusion_err!("{}: cannot be written: {cause}", path.display())
}

/// A folder that is removed with all that is in it, unless it was moved away.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        // What cannot be removed begins with a dot, so that no model is looked for in it.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Reads a network with all its weights, and whether some came from other files.
fn read_packed(path: &Path) -> Result<(ModelProto, bool), String> {
    let file = File::open(path).map_err(|e| e.to_string())?;
    let length = file.metadata().map_err(|e| e.to_string())?.len();
    let too_large = || format!("with its weights it is larger than {MAX_MODEL_BYTES} bytes");
    let mut left = MAX_MODEL_BYTES.checked_sub(length).ok_or_else(too_large)?;
    let mut network =
        protobuf::read(file, length as usize).map_err(|e| format!("it is no ONNX network, or cut off: {e}"))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut packed = false;
    for tensor in network
        .graph
        .iter_mut()
        .flat_map(|graph| &mut graph.initializer)
        .filter(|tensor| is_external(tensor))
    {
        let location = external_entry(tensor, "location").unwrap_or_default();
        // The file's author does not get to read other files of the one who adds it.
        if location.is_empty()
            || !Path::new(location)
                .components()
                .all(|part| matches!(part, Component::Normal(_)))
        {
            return Err(format!("its weights are in '{location}', which is not beside it"));
        }
        let number =
            |key| external_entry(tensor, key).map(|value| value.parse::<u64>().map_err(|e| format!("{key}: {e}")));
        let (offset, length) = (
            number("offset").transpose()?.unwrap_or(0),
            number("length").transpose()?,
        );
        let cannot_read = |e: io::Error| format!("its weights in '{location}' cannot be read: {e}");

        let mut file = File::open(folder.join(location)).map_err(cannot_read)?;
        let held = file.metadata().map_err(cannot_read)?.len().saturating_sub(offset);
        let length = length.unwrap_or(held);
        if length > held {
            return Err(format!(
                "its weights in '{location}' are cut off: {held} of {length} bytes from {offset} on"
            ));
        }
        left = left.checked_sub(length).ok_or_else(too_large)?;
        file.seek(SeekFrom::Start(offset)).map_err(cannot_read)?;
        let mut data = vec![];
        file.take(length).read_to_end(&mut data).map_err(cannot_read)?;
        tensor.raw_data = data;
        tensor.data_location = None;
        tensor.external_data.clear();
        packed = true;
    }
    Ok((network, packed))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use tract_onnx::pb::StringStringEntryProto;
    use tract_onnx::pb::tensor_proto::DataLocation;

    use super::super::networks::onnx;
    use tract_onnx::prelude::Framework;

    use super::*;

    #[test]
    fn a_model_is_added_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let models = folder.path().join("models");
        let file = folder.path().join("network.onnx");
        let add = |kind, preset: &str, force| {
            fs::write(&file, onnx(kind, 8, 64)).unwrap();
            add_model("mine", &file, preset.parse().unwrap(), &models, force)
        };

        let info = add("vgg", "torchvision", false).unwrap();
        assert_eq!(
            (info.dimensions, info.input_width, info.layout.as_str()),
            (64, 64, "NCHW")
        );
        assert!(
            info.preprocessing
                .starts_with("resize shortest edge 73 bilinear, crop 64x64, RGB, /255")
        );
        let config = fs::read_to_string(models.join("mine").join(CONFIG_FILE)).unwrap();
        assert!(config.contains("\"do_center_crop\": true"), "{config}");

        assert!(
            add("squeezenet", "tf", false)
                .unwrap_err()
                .to_string()
                .contains("--force")
        );
        assert!(
            add("rank-2", "tf", true)
                .unwrap_err()
                .to_string()
                .contains("network.onnx")
        );
        assert_eq!(add("mobilenet-keras", "tf", true).unwrap().dimensions, 256);
        let left: Vec<_> = fs::read_dir(&models)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["mine"]);
    }

    #[test]
    fn weights_in_another_file_are_packed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("network.onnx");
        let mut network = tract_onnx::onnx()
            .proto_model_for_read(&mut onnx("vgg", 8, 32).as_slice())
            .unwrap();
        let mut weights = vec![0; 16];
        for tensor in &mut network.graph.as_mut().unwrap().initializer {
            let data = std::mem::take(&mut tensor.raw_data);
            let entry = |key: &str, value: String| StringStringEntryProto {
                key: key.to_owned(),
                value,
            };
            tensor.data_location = Some(DataLocation::External as i32);
            tensor.external_data = vec![
                entry("location", "network.onnx.data".to_owned()),
                entry("offset", weights.len().to_string()),
                entry("length", data.len().to_string()),
            ];
            weights.extend(data);
        }
        fs::write(&file, network.encode_to_vec()).unwrap();
        let add = |name| add_model(name, &file, Preset::Raw, &folder.path().join("models"), false);

        assert!(
            image_input(&network)
                .unwrap_err()
                .to_string()
                .contains("'network.onnx.data'")
        );
        assert!(add("lost").unwrap_err().to_string().contains("cannot be read"));
        fs::write(folder.path().join("network.onnx.data"), &weights[1..]).unwrap();
        assert!(add("short").unwrap_err().to_string().contains("cut off"));
        fs::write(folder.path().join("network.onnx.data"), &weights).unwrap();
        assert_eq!(add("whole").unwrap().dimensions, 64);

        network.graph.as_mut().unwrap().initializer[0].external_data[0].value = "../secret".to_owned();
        fs::write(&file, network.encode_to_vec()).unwrap();
        assert!(add("elsewhere").unwrap_err().to_string().contains("not beside it"));
    }
}
