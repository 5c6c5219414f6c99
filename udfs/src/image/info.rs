//! What is known of an image without its pixels, and why it cannot be decoded.

use std::sync::{Arc, LazyLock};

use arrow::array::{ArrayRef, Int8Builder, Int32Builder, NullBufferBuilder, StringBuilder, StructArray};
use arrow::datatypes::{DataType, Field, Fields};
use datafusion::error::Result as DataFusionResult;
use datafusion::logical_expr::{
    ColumnarValue, Documentation, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use datafusion_macros::user_doc;

use super::ContentColumn;
use super::decode::{decode, read_header};
use super::rows::{Kind, coerce, evaluate, for_each_row};
use crate::policy::{RowError, Stage};

pub(super) fn functions() -> Vec<Arc<ScalarUDF>> {
    vec![
        Arc::new(ScalarUDF::from(ImageInfo::new())),
        Arc::new(ScalarUDF::from(ImageErrorFunction::new())),
    ]
}

static INFO_FIELDS: LazyLock<Fields> = LazyLock::new(|| {
    Fields::from(vec![
        Field::new("width", DataType::Int32, true),
        Field::new("height", DataType::Int32, true),
        Field::new("channels", DataType::Int8, true),
        Field::new("format", DataType::Utf8, true),
        Field::new("orientation", DataType::Int8, true),
    ])
});

/// A header in SQL's types.
struct Info {
    width: i32,
    height: i32,
    channels: i8,
    format: String,
    orientation: i8,
}

fn info(content: &[u8], max_pixels: u64) -> Result<Info, RowError> {
    let header = read_header(content, max_pixels)?;
    let orientation = header.orientation.to_exif().cast_signed();
    match (
        i32::try_from(header.width),
        i32::try_from(header.height),
        i8::try_from(header.channels),
    ) {
        (Ok(width @ 1..), Ok(height @ 1..), Ok(channels)) => Ok(Info {
            width,
            height,
            channels,
            format: header.format.to_ascii_lowercase(),
            orientation,
        }),
        _ => Err(RowError::new(
            Stage::Decode,
            format!(
                "the header says that the image is {} x {} pixels with {} channels",
                header.width, header.height, header.channels
            ),
        )),
    }
}

#[derive(Default)]
struct InfoBuilder {
    width: Int32Builder,
    height: Int32Builder,
    channels: Int8Builder,
    format: StringBuilder,
    orientation: Int8Builder,
}

impl InfoBuilder {
    fn append(&mut self, info: Option<&Info>) {
        self.width.append_option(info.map(|info| info.width));
        self.height.append_option(info.map(|info| info.height));
        self.channels.append_option(info.map(|info| info.channels));
        self.format.append_option(info.map(|info| info.format.as_str()));
        self.orientation.append_option(info.map(|info| info.orientation));
    }

    fn finish(mut self, mut nulls: NullBufferBuilder) -> ArrayRef {
        Arc::new(StructArray::new(
            INFO_FIELDS.clone(),
            vec![
                Arc::new(self.width.finish()),
                Arc::new(self.height.finish()),
                Arc::new(self.channels.finish()),
                Arc::new(self.format.finish()),
                Arc::new(self.orientation.finish()),
            ],
            nulls.finish(),
        ))
    }
}

/// `image_info(content)`
#[user_doc(
    doc_section(label = "Images"),
    description = "Reads an image's header alone: a struct {width, height, channels, format, orientation}. Width and \
                   height are those of the file, before the EXIF orientation (1 to 8; 1 is upright) is applied. \
                   Channels are those of the file (1 grey, 2 grey and alpha, 3 RGB, 4 RGBA or CMYK), of the palette \
                   where it has one. It says nothing about the pixels: see `image_error`.",
    syntax_example = "image_info(content)",
    sql_example = r#"```sql
SELECT image_info(content) AS info FROM images('sample://fruits/Training/') ORDER BY path LIMIT 1;
```"#,
    argument(name = "content", description = "The encoded bytes of an image.")
)]
#[derive(Debug, PartialEq, Eq, Hash)]
struct ImageInfo {
    signature: Signature,
}

impl ImageInfo {
    fn new() -> Self {
        Self {
            signature: Signature::user_defined(Volatility::Immutable),
        }
    }
}

impl ScalarUDFImpl for ImageInfo {
    fn name(&self) -> &str {
        "image_info"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, types: &[DataType]) -> DataFusionResult<Vec<DataType>> {
        coerce(self.name(), &[("content", Kind::Content)], 0, types)
    }

    fn return_type(&self, _types: &[DataType]) -> DataFusionResult<DataType> {
        Ok(DataType::Struct(INFO_FIELDS.clone()))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> DataFusionResult<ColumnarValue> {
        evaluate(&args, |columns, options| {
            let contents = ContentColumn::try_new(columns[0].as_ref())?;
            let rows = columns[0].len();
            let mut builder = InfoBuilder::default();
            let mut nulls = NullBufferBuilder::new(rows);
            let outcome = |row| Ok(contents.get(row).map(|content| info(content, options.max_image_pixels)));
            for_each_row(rows, options, outcome, |info: Option<Info>| {
                nulls.append(info.is_some());
                builder.append(info.as_ref());
                Ok(())
            })?;
            Ok(builder.finish(nulls))
        })
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

/// `image_error(content)`
#[user_doc(
    doc_section(label = "Images"),
    description = "Tells why an image cannot be decoded; NULL where it can. It decodes the image to find out, and never \
                   fails, whatever `pomona.on_error` is.",
    syntax_example = "image_error(content)",
    sql_example = r#"```sql
SELECT count(*) AS broken FROM images('sample://fruits/Test/') WHERE image_error(content) IS NOT NULL;
```"#,
    argument(name = "content", description = "The encoded bytes of an image.")
)]
#[derive(Debug, PartialEq, Eq, Hash)]
struct ImageErrorFunction {
    signature: Signature,
}

impl ImageErrorFunction {
    fn new() -> Self {
        Self {
            signature: Signature::user_defined(Volatility::Immutable),
        }
    }
}

impl ScalarUDFImpl for ImageErrorFunction {
    fn name(&self) -> &str {
        "image_error"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, types: &[DataType]) -> DataFusionResult<Vec<DataType>> {
        coerce(self.name(), &[("content", Kind::Content)], 0, types)
    }

    fn return_type(&self, _types: &[DataType]) -> DataFusionResult<DataType> {
        Ok(DataType::Utf8)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> DataFusionResult<ColumnarValue> {
        evaluate(&args, |columns, options| {
            let contents = ContentColumn::try_new(columns[0].as_ref())?;
            let mut causes = StringBuilder::new();
            for row in 0..columns[0].len() {
                let error = contents
                    .get(row)
                    .and_then(|content| decode(content, options.max_image_pixels).err());
                causes.append_option(error.map(|error| error.cause));
            }
            Ok(Arc::new(causes.finish()))
        })
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}
