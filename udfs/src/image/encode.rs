//! Encoding: from pixels to the bytes of a PNG or JPEG file.

use std::sync::Arc;

use arrow::array::BinaryBuilder;
use arrow::datatypes::{DataType, Field, FieldRef};
use datafusion::common::{exec_err, plan_err};
use datafusion::error::Result as DataFusionResult;
use datafusion::logical_expr::{
    ColumnarValue, Documentation, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use datafusion_macros::user_doc;
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};

use super::ImageView;
use super::rows::{Kind, coerce, constant_integer, constant_text, evaluate, for_each_image, integers, text};
use crate::policy::{RowError, Stage};

pub(super) fn functions() -> Vec<Arc<ScalarUDF>> {
    vec![Arc::new(ScalarUDF::from(EncodeImage::new()))]
}

/// The quality of a JPEG where the caller does not say.
const QUALITY: i64 = 90;

/// A file format and how it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Png,
    /// With a quality from 1 to 100.
    Jpeg(u8),
}

impl Encoding {
    fn new(format: &str, quality: i64) -> Result<Self, String> {
        let quality = match u8::try_from(quality) {
            Ok(quality @ 1..=100) => quality,
            _ => return Err(format!("encode_image: a quality is from 1 to 100, not {quality}")),
        };
        match format.to_ascii_lowercase().as_str() {
            "png" => Ok(Self::Png),
            "jpeg" => Ok(Self::Jpeg(quality)),
            _ => Err(format!("encode_image: the format is 'png' or 'jpeg', not '{format}'")),
        }
    }
}

/// Encodes an image. JPEG has no alpha: it is dropped.
fn encode(image: ImageView<'_>, encoding: Encoding) -> Result<Vec<u8>, RowError> {
    let failed = |cause: String| RowError::new(Stage::Encode, cause);
    let (width, height) = (image.width, image.height);
    let mut color = match image.channels {
        1 => ExtendedColorType::L8,
        3 => ExtendedColorType::Rgb8,
        _ => ExtendedColorType::Rgba8,
    };
    let mut bytes = Vec::new();
    let written = match encoding {
        Encoding::Png => PngEncoder::new(&mut bytes).write_image(image.data, width, height, color),
        Encoding::Jpeg(_) if width.max(height) > u32::from(u16::MAX) => {
            return Err(failed(format!(
                "a JPEG has at most {max} x {max} pixels, not {width} x {height}: encode it as 'png', or resize it",
                max = u16::MAX
            )));
        }
        Encoding::Jpeg(quality) => {
            let rgb: Vec<u8>;
            let mut data = image.data;
            if color == ExtendedColorType::Rgba8 {
                rgb = data
                    .chunks_exact(4)
                    .flat_map(|pixel| [pixel[0], pixel[1], pixel[2]])
                    .collect();
                data = &rgb;
                color = ExtendedColorType::Rgb8;
            }
            JpegEncoder::new_with_quality(&mut bytes, quality).write_image(data, width, height, color)
        }
    };
    written.map_err(|e| failed(e.to_string()))?;
    Ok(bytes)
}

/// `encode_image(image, format [, quality])`
#[user_doc(
    doc_section(label = "Images"),
    description = "Encodes an image as the bytes of a PNG or JPEG file. PNG keeps every pixel; JPEG has no alpha, which \
                   is dropped.",
    syntax_example = "encode_image(image, format [, quality])",
    sql_example = r#"```sql
SELECT image_info(encode_image(resize(content, 32, 32), 'png')) AS info
FROM images('sample://fruits/Training/')
ORDER BY path
LIMIT 1;
```"#,
    argument(name = "image", description = "A decoded image."),
    argument(name = "format", description = "`png` or `jpeg`."),
    argument(
        name = "quality",
        description = "Of a JPEG, from 1 to 100; 90 where it is not given. It changes nothing in a PNG."
    )
)]
#[derive(Debug, PartialEq, Eq, Hash)]
struct EncodeImage {
    signature: Signature,
}

impl EncodeImage {
    fn new() -> Self {
        Self {
            signature: Signature::user_defined(Volatility::Immutable),
        }
    }
}

impl ScalarUDFImpl for EncodeImage {
    fn name(&self) -> &str {
        "encode_image"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, types: &[DataType]) -> DataFusionResult<Vec<DataType>> {
        let parameters = [
            ("image", Kind::Image),
            ("format", Kind::Text),
            ("quality", Kind::Integer),
        ];
        coerce(self.name(), &parameters, 1, types)
    }

    fn return_type(&self, _types: &[DataType]) -> DataFusionResult<DataType> {
        Ok(DataType::Binary)
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> DataFusionResult<FieldRef> {
        if let Some(format) = constant_text(&args, 1)
            && let Err(cause) = Encoding::new(format, constant_integer(&args, 2).unwrap_or(QUALITY))
        {
            return plan_err!("{cause}");
        }
        Ok(Arc::new(Field::new(self.name(), DataType::Binary, true)))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> DataFusionResult<ColumnarValue> {
        evaluate(&args, |columns, options| {
            let formats = text(&columns[1]);
            let qualities = columns.get(2).map(|column| integers([column]));
            let parameters = |row| {
                let quality = match &qualities {
                    None => Some(QUALITY),
                    Some(qualities) => qualities(row).map(|[quality]| quality),
                };
                let encoding = formats(row)
                    .zip(quality)
                    .map(|(format, quality)| Encoding::new(format, quality));
                encoding.transpose().or_else(|cause| exec_err!("{cause}"))
            };
            let mut builder = BinaryBuilder::new();
            for_each_image(
                &columns[0],
                Stage::Encode,
                options,
                parameters,
                encode,
                |bytes: Option<Vec<u8>>| {
                    let held = builder.values_slice().len();
                    if held + bytes.as_ref().map_or(0, Vec::len) > i32::MAX as usize {
                        return exec_err!(
                            "a batch of encoded images is larger than 2 GiB: use a smaller datafusion.execution.batch_size"
                        );
                    }
                    builder.append_option(bytes);
                    Ok(())
                },
            )?;
            Ok(Arc::new(builder.finish()))
        })
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}
