//! Cutting a rectangle out of an image: a given one, the middle, or what is inside of a uniform border.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, FieldRef};
use datafusion::common::{exec_err, plan_err};
use datafusion::error::Result as DataFusionResult;
use datafusion::logical_expr::{
    ColumnarValue, Documentation, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use datafusion_macros::user_doc;

use super::rows::{Kind, coerce, constant_integer, evaluate, integers, map_images};
use super::{Image, ImageView, image_type};
use crate::policy::{RowError, Stage};

pub(super) fn functions() -> Vec<Arc<ScalarUDF>> {
    vec![
        Arc::new(ScalarUDF::from(Crop::new())),
        Arc::new(ScalarUDF::from(CenterCrop::new())),
        Arc::new(ScalarUDF::from(TrimBackground::new())),
    ]
}

/// How many levels a background's pixels may differ where the caller does not say: the white of the
/// JPEGs of Fruits-360 is 245 to 255.
const TOLERANCE: u8 = 10;

/// Columns and rows of pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rectangle {
    x: usize,
    y: usize,
    width: usize,
    height: usize,
}

impl Rectangle {
    /// The pixels, row by row; the rectangle lies inside of the image.
    pub(crate) fn rows(self, image: ImageView<'_>) -> impl Iterator<Item = &[u8]> {
        let pixel = usize::from(image.channels).max(1);
        let stride = (image.width as usize * pixel).max(1);
        let rows = image.data.chunks_exact(stride).skip(self.y).take(self.height);
        rows.map(move |row| &row[self.x * pixel..][..self.width * pixel])
    }

    /// Copies the pixels.
    fn cut(self, image: ImageView<'_>) -> Image {
        let mut data = Vec::with_capacity(self.width * self.height * usize::from(image.channels));
        self.rows(image).for_each(|row| data.extend_from_slice(row));
        Image {
            width: self.width as u32,
            height: self.height as u32,
            channels: image.channels,
            data,
        }
    }
}

/// Cuts out the rectangle whose upper left corner is (x, y).
fn crop(image: ImageView<'_>, x: i64, y: i64, width: u32, height: u32) -> Result<Image, RowError> {
    let inside = |start: i64, length: u32, whole: u32| {
        let start = u32::try_from(start).ok()?;
        (length <= whole && start <= whole - length).then_some(start as usize)
    };
    match (inside(x, width, image.width), inside(y, height, image.height)) {
        (Some(x), Some(y)) => Ok(Rectangle {
            x,
            y,
            width: width as usize,
            height: height as usize,
        }
        .cut(image)),
        _ => Err(RowError::new(
            Stage::Crop,
            format!(
                "the rectangle of {width} x {height} at ({x}, {y}) does not lie inside of the image of {} x {}",
                image.width, image.height
            ),
        )),
    }
}

/// The middle, as torchvision's `CenterCrop` has it: offsets that are no whole pixels are rounded half
/// to even.
///
/// # Errors
/// Where the image is smaller.
pub(crate) fn center(image: ImageView<'_>, width: u32, height: u32) -> Result<Rectangle, RowError> {
    if width > image.width || height > image.height {
        return Err(RowError::new(
            Stage::Crop,
            format!(
                "the image of {} x {} is smaller than the {width} x {height} to cut out of its middle: resize it first",
                image.width, image.height
            ),
        ));
    }
    let offset = |whole: u32, length: u32| {
        let border = whole - length;
        let half = border / 2;
        (half + border % 2 * (half % 2)) as usize
    };
    Ok(Rectangle {
        x: offset(image.width, width),
        y: offset(image.height, height),
        width: width as usize,
        height: height as usize,
    })
}

/// Cuts rows and columns away at the edges in which every pixel is background.
///
/// The background is, channel by channel, the lower median of the four corner pixels; a pixel is
/// background where no channel differs from it by more than `tolerance`. An image that is all
/// background stays as it is.
fn trim_background(image: ImageView<'_>, tolerance: u8) -> Image {
    let pixel = usize::from(image.channels);
    let stride = image.width as usize * pixel;
    let end = image.data.len();
    let corners = [0, stride - pixel, end - stride, end - pixel];
    let background: Vec<u8> = (0..pixel)
        .map(|channel| {
            let mut levels = corners.map(|corner| image.data[corner + channel]);
            levels.sort_unstable();
            levels[1]
        })
        .collect();
    let is_content = |pixel: &[u8]| {
        pixel
            .iter()
            .zip(&background)
            .any(|(level, background)| level.abs_diff(*background) > tolerance)
    };

    let mut content: Option<[usize; 4]> = None;
    for (y, row) in image.data.chunks_exact(stride).enumerate() {
        let mut pixels = row.chunks_exact(pixel);
        let Some(first) = pixels.position(is_content) else {
            continue;
        };
        // What is left begins behind the first one.
        let last = pixels.rposition(is_content).map_or(first, |last| first + 1 + last);
        content = Some(match content {
            None => [first, y, last, y],
            Some([left, top, right, _]) => [left.min(first), top, right.max(last), y],
        });
    }
    let Some([left, top, right, bottom]) = content else {
        return image.to_image();
    };
    Rectangle {
        x: left,
        y: top,
        width: right - left + 1,
        height: bottom - top + 1,
    }
    .cut(image)
}

/// The size that a call asks for.
fn target(function: &str, width: i64, height: i64) -> Result<(u32, u32), String> {
    match (u32::try_from(width), u32::try_from(height)) {
        (Ok(width @ 1..), Ok(height @ 1..)) => Ok((width, height)),
        _ => Err(format!(
            "{function} to {width} x {height}: a side has at least 1 pixel and at most {}",
            u32::MAX
        )),
    }
}

/// The field of a function that returns an image, where the constants among arguments `width` and
/// `width + 1` are a size.
fn sized_field(function: &str, args: &ReturnFieldArgs<'_>, width: usize) -> DataFusionResult<FieldRef> {
    if let (Some(width), Some(height)) = (constant_integer(args, width), constant_integer(args, width + 1))
        && let Err(cause) = target(function, width, height)
    {
        return plan_err!("{cause}");
    }
    Ok(Arc::new(Field::new(function, image_type(), true)))
}

/// `crop(image, x, y, width, height)`
#[user_doc(
    doc_section(label = "Images"),
    description = "Cuts a rectangle out of an image. It must lie inside of the image: else the row fails, and \
                   `pomona.on_error` says what happens.",
    syntax_example = "crop(image, x, y, width, height)",
    sql_example = r#"```sql
SELECT image['height'] AS height, image['width'] AS width
FROM (
    SELECT crop(decode_image(content), 10, 20, 64, 48) AS image
    FROM images('sample://fruits/Training/')
    ORDER BY path
    LIMIT 1
);
```"#,
    argument(name = "image", description = "A decoded image."),
    argument(name = "x", description = "Columns to the left of the rectangle."),
    argument(name = "y", description = "Rows above the rectangle."),
    argument(name = "width", description = "Columns of the rectangle."),
    argument(name = "height", description = "Rows of the rectangle.")
)]
#[derive(Debug, PartialEq, Eq, Hash)]
struct Crop {
    signature: Signature,
}

impl Crop {
    fn new() -> Self {
        Self {
            signature: Signature::user_defined(Volatility::Immutable),
        }
    }
}

impl ScalarUDFImpl for Crop {
    fn name(&self) -> &str {
        "crop"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, types: &[DataType]) -> DataFusionResult<Vec<DataType>> {
        let parameters = [
            ("image", Kind::Image),
            ("x", Kind::Integer),
            ("y", Kind::Integer),
            ("width", Kind::Integer),
            ("height", Kind::Integer),
        ];
        coerce(self.name(), &parameters, 0, types)
    }

    fn return_type(&self, _types: &[DataType]) -> DataFusionResult<DataType> {
        Ok(image_type())
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> DataFusionResult<FieldRef> {
        sized_field(self.name(), &args, 3)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> DataFusionResult<ColumnarValue> {
        evaluate(&args, |columns, options| {
            let rectangles = integers([&columns[1], &columns[2], &columns[3], &columns[4]]);
            let parameters = |row| {
                let Some([x, y, width, height]) = rectangles(row) else {
                    return Ok(None);
                };
                match target(self.name(), width, height) {
                    Ok((width, height)) => Ok(Some((x, y, width, height))),
                    Err(cause) => exec_err!("{cause}"),
                }
            };
            map_images(
                &columns[0],
                Stage::Crop,
                options,
                parameters,
                |image, (x, y, width, height)| crop(image, x, y, width, height),
            )
        })
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

/// `center_crop(image, width, height)`
#[user_doc(
    doc_section(label = "Images"),
    description = "Cuts the middle out of an image, as torchvision's `CenterCrop`. An image that is smaller fails, and \
                   `pomona.on_error` says what happens.",
    syntax_example = "center_crop(image, width, height)",
    sql_example = r#"```sql
SELECT image['height'] AS height, image['width'] AS width
FROM (
    SELECT center_crop(resize(content, 256, 256), 224, 224) AS image
    FROM images('sample://fruits/Training/')
    ORDER BY path
    LIMIT 1
);
```"#,
    argument(name = "image", description = "A decoded image."),
    argument(name = "width", description = "Columns to keep."),
    argument(name = "height", description = "Rows to keep.")
)]
#[derive(Debug, PartialEq, Eq, Hash)]
struct CenterCrop {
    signature: Signature,
}

impl CenterCrop {
    fn new() -> Self {
        Self {
            signature: Signature::user_defined(Volatility::Immutable),
        }
    }
}

impl ScalarUDFImpl for CenterCrop {
    fn name(&self) -> &str {
        "center_crop"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, types: &[DataType]) -> DataFusionResult<Vec<DataType>> {
        let parameters = [
            ("image", Kind::Image),
            ("width", Kind::Integer),
            ("height", Kind::Integer),
        ];
        coerce(self.name(), &parameters, 0, types)
    }

    fn return_type(&self, _types: &[DataType]) -> DataFusionResult<DataType> {
        Ok(image_type())
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> DataFusionResult<FieldRef> {
        sized_field(self.name(), &args, 1)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> DataFusionResult<ColumnarValue> {
        evaluate(&args, |columns, options| {
            let sizes = integers([&columns[1], &columns[2]]);
            let parameters = |row| {
                let size = sizes(row).map(|[width, height]| target(self.name(), width, height));
                size.transpose().or_else(|cause| exec_err!("{cause}"))
            };
            map_images(
                &columns[0],
                Stage::Crop,
                options,
                parameters,
                |image, (width, height)| Ok(center(image, width, height)?.cut(image)),
            )
        })
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

/// `trim_background(image [, tolerance])`
#[user_doc(
    doc_section(label = "Images"),
    description = "Cuts a uniform border away: rows and columns at the edges of which every pixel is background. The \
                   background's color is, channel by channel, the lower median of the four corner pixels; a pixel is \
                   background where no channel differs from it by more than the tolerance. An image that is all \
                   background stays as it is.",
    syntax_example = "trim_background(image [, tolerance])",
    sql_example = r#"```sql
SELECT image['height'] < 100 OR image['width'] < 100 AS trimmed
FROM (
    SELECT trim_background(decode_image(content)) AS image
    FROM images('sample://fruits/Training/')
    ORDER BY path
    LIMIT 1
);
```"#,
    argument(name = "image", description = "A decoded image."),
    argument(
        name = "tolerance",
        description = "Levels, 0 to 255, that a background's pixel may differ; 10 where it is not given, which is \
                       enough for the white of a JPEG."
    )
)]
#[derive(Debug, PartialEq, Eq, Hash)]
struct TrimBackground {
    signature: Signature,
}

impl TrimBackground {
    fn new() -> Self {
        Self {
            signature: Signature::user_defined(Volatility::Immutable),
        }
    }
}

fn tolerance(levels: i64) -> Result<u8, String> {
    u8::try_from(levels).map_err(|_| format!("trim_background: a tolerance is from 0 to 255 levels, not {levels}"))
}

impl ScalarUDFImpl for TrimBackground {
    fn name(&self) -> &str {
        "trim_background"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, types: &[DataType]) -> DataFusionResult<Vec<DataType>> {
        coerce(
            self.name(),
            &[("image", Kind::Image), ("tolerance", Kind::Integer)],
            1,
            types,
        )
    }

    fn return_type(&self, _types: &[DataType]) -> DataFusionResult<DataType> {
        Ok(image_type())
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> DataFusionResult<FieldRef> {
        if let Some(Err(cause)) = constant_integer(&args, 1).map(tolerance) {
            return plan_err!("{cause}");
        }
        Ok(Arc::new(Field::new(self.name(), image_type(), true)))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> DataFusionResult<ColumnarValue> {
        evaluate(&args, |columns, options| {
            let tolerances = columns.get(1).map(|column| integers([column]));
            let parameters = |row| match &tolerances {
                None => Ok(Some(TOLERANCE)),
                Some(tolerances) => {
                    let levels = tolerances(row).map(|[levels]| tolerance(levels));
                    levels.transpose().or_else(|cause| exec_err!("{cause}"))
                }
            };
            map_images(&columns[0], Stage::Crop, options, parameters, |image, tolerance| {
                Ok(trim_background(image, tolerance))
            })
        })
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn grey(width: u32, data: &[u8]) -> ImageView<'_> {
        ImageView {
            width,
            height: data.len() as u32 / width,
            channels: 1,
            data,
        }
    }

    #[test]
    fn offsets_are_rounded_half_to_even() {
        let data: Vec<u8> = (0..10).collect();
        // torchvision: int(round((10 - n) / 2)).
        for (width, first) in [
            (10, 0),
            (9, 0),
            (8, 1),
            (7, 2),
            (6, 2),
            (5, 2),
            (4, 3),
            (3, 4),
            (2, 4),
            (1, 4),
        ] {
            let image = grey(10, &data);
            let cropped = center(image, width, 1).unwrap().cut(image);
            assert_eq!(cropped.data[0], first, "to {width}");
            assert_eq!(cropped.data.len(), width as usize);
        }
        assert!(center(grey(10, &data), 11, 1).is_err());
    }

    #[test]
    fn rectangles_inside_and_outside() {
        let data: Vec<u8> = (0..12).collect();
        let image = grey(4, &data);
        assert_eq!(crop(image, 1, 1, 2, 2).unwrap().data, [5, 6, 9, 10]);
        assert_eq!(crop(image, 0, 0, 4, 3).unwrap(), image.to_image());
        for (x, y, width, height) in [
            (-1, 0, 1, 1),
            (4, 0, 1, 1),
            (3, 0, 2, 1),
            (0, 3, 1, 1),
            (i64::MAX, 0, u32::MAX, 1),
        ] {
            assert!(
                crop(image, x, y, width, height).is_err(),
                "{width} x {height} at ({x}, {y})"
            );
        }
    }

    #[test]
    fn backgrounds() {
        #[rustfmt::skip]
        let data = [
            250, 255, 249, 255,
            255, 255, 10, 255,
            250, 20, 255, 255,
            255, 255, 255, 250,
        ];
        assert_eq!(trim_background(grey(4, &data), 10).data, [255, 10, 20, 255]);
        // The lower median of 250, 255, 255, 250 is 250: with no tolerance, 255 is content.
        assert_eq!(trim_background(grey(4, &data), 0), grey(4, &data).to_image());
        assert_eq!(trim_background(grey(4, &data), 255), grey(4, &data).to_image());
        // Content in one corner is not the background.
        assert_eq!(trim_background(grey(2, &[0, 255, 255, 255]), 10).data, [0]);
        assert_eq!(trim_background(grey(1, &[3]), 0).data, [3]);
    }
}
