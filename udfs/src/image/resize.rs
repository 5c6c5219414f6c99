//! Resizing, bit for bit as Pillow's `Image.resize`.
//!
//! A filter is a weight over the distance from the new pixel's centre; where the image shrinks it is
//! stretched, so that every old pixel counts (antialiasing). Rows and columns are filtered one after
//! the other, with 8 bits between: the order matters, since values are cut to 0..=255 both times.
//! Pillow 13 filters rows first, unless the height shrinks by more than twice as much as the width;
//! until Pillow 12 it did always.
//!
//! Source: `src/libImaging/Resample.c` and `Geometry.c` of Pillow. Libraries with the same filters do
//! not give the same pixels: with another order of the passes they are up to 9 levels off where the
//! photos of Fruits-360 are enlarged to 224 x 224. fast_image_resize 6.1, called once for each pass,
//! still has 16 instead of 22 bits for weights (2 levels off) and other borders of boxes (over 100).
//!
//! The loops are written so that the compiler makes vector instructions of them, and pulp has them
//! compiled for those that the machine has: 2.5 (100 x 100 to 224 x 224) to 4 times (12 megapixels) as fast
//! as Pillow.

use std::f64::consts::PI;
use std::str::FromStr;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, FieldRef};
use datafusion::common::{exec_err, plan_err};
use datafusion::error::Result as DataFusionResult;
use datafusion::logical_expr::{
    ColumnarValue, Documentation, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use datafusion_macros::user_doc;
use pulp::{Arch, NullaryFnOnce};

use super::decode::decode_into;
use super::rows::{Kind, coerce, constant_integer, constant_text, evaluate, integers, text};
use super::{Image, ImageBuilder, ImageView, Scratch, SourceColumn, image_type};
use crate::policy::{RowError, RowPolicy, Stage};
use crate::settings::{DecodeMode, PomonaOptions};

pub(super) fn functions() -> Vec<Arc<ScalarUDF>> {
    vec![Arc::new(ScalarUDF::from(Resize::new()))]
}

/// How the pixels of a resized image are made from the old ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Filter {
    /// The nearest pixel.
    Nearest,
    /// The mean of the pixels that the new one covers.
    Box,
    /// Linear interpolation.
    Bilinear,
    /// As fast as bilinear and sharper.
    Hamming,
    /// Cubic interpolation with a = -0.5 (Catmull-Rom).
    Bicubic,
    /// A windowed sinc over 3 pixels to each side.
    Lanczos,
}

impl Filter {
    const ALL: [(Self, &str); 6] = [
        (Self::Nearest, "nearest"),
        (Self::Box, "box"),
        (Self::Bilinear, "bilinear"),
        (Self::Hamming, "hamming"),
        (Self::Bicubic, "bicubic"),
        (Self::Lanczos, "lanczos"),
    ];

    /// The filter with this number in Pillow, as `preprocessor_config.json` has it in `resample`.
    pub fn from_pillow(number: u8) -> Option<Self> {
        [
            Self::Nearest,
            Self::Lanczos,
            Self::Bilinear,
            Self::Bicubic,
            Self::Box,
            Self::Hamming,
        ]
        .get(usize::from(number))
        .copied()
    }

    /// The distance from the centre beyond which there is no weight.
    fn support(self) -> f64 {
        match self {
            Self::Nearest | Self::Box => 0.5,
            Self::Bilinear | Self::Hamming => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    /// The weight at `x` pixels from the centre.
    fn weight(self, x: f64) -> f64 {
        let distance = x.abs();
        match self {
            Self::Nearest | Self::Box => f64::from(x > -0.5 && x <= 0.5),
            Self::Bilinear => (1.0 - distance).max(0.0),
            // The window, whose constants have 32 bits, is not quite 1 there.
            Self::Hamming if distance == 0.0 => 1.0,
            Self::Hamming if distance < 1.0 => {
                sinc(distance) * (f64::from(0.54_f32) + f64::from(0.46_f32) * (distance * PI).cos())
            }
            Self::Bicubic if distance < 1.0 => (1.5 * distance - 2.5) * distance * distance + 1.0,
            Self::Bicubic if distance < 2.0 => (((distance - 5.0) * distance + 8.0) * distance - 4.0) * -0.5,
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            _ => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) }
}

impl FromStr for Filter {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let named = Self::ALL
            .into_iter()
            .find(|(_, known)| known.eq_ignore_ascii_case(name));
        named.map(|(filter, _)| filter).ok_or_else(|| {
            let known = Self::ALL.map(|(_, known)| known).join(", ");
            format!("there is no filter '{name}'; there are: {known}")
        })
    }
}

/// The longest side: weights are kept for what each column and row of the result sees of the image.
const MAX_SIDE: u32 = 1 << 20;

/// Resizes an image; one of the same size is returned as it is. Of four channels the last is alpha:
/// transparent pixels weigh less, as in Pillow.
///
/// Beside the image and the result, memory is taken for an image between the two passes, which is not
/// larger than the larger of the two.
///
/// # Errors
/// Where the image's shape and its data do not fit, or the new size is 0 or cannot be addressed.
pub fn resize(image: ImageView<'_>, width: u32, height: u32, filter: Filter) -> Result<Image, RowError> {
    let (mut between, mut resized) = (Vec::new(), Vec::new());
    Ok(resize_into(image, (width, height), filter, &mut between, &mut resized)?.to_image())
}

/// [`resize`] with the memory of the image between the passes and of the result, whatever they held;
/// an image that has the size is not copied.
///
/// # Errors
/// As [`resize`].
pub(crate) fn resize_into<'a>(
    image: ImageView<'a>,
    to: Size,
    filter: Filter,
    between: &mut Vec<u8>,
    resized: &'a mut Vec<u8>,
) -> Result<ImageView<'a>, RowError> {
    let (from, (width, height)) = ((image.width, image.height), to);
    let bytes = |(width, height): Size| {
        let pixels = u64::from(width) * u64::from(height);
        let bytes = pixels.checked_mul(u64::from(image.channels))?;
        usize::try_from(bytes).ok().filter(|bytes| *bytes > 0)
    };
    if width.max(height) > MAX_SIDE {
        return Err(RowError::new(Stage::Resize, too_long(width, height)));
    }
    if image.width.max(image.height) > MAX_SIDE {
        return Err(RowError::new(
            Stage::Resize,
            format!(
                "an image of {} x {} cannot be resized: a side has at most {MAX_SIDE} pixels",
                image.width, image.height
            ),
        ));
    }
    if bytes(from) != Some(image.data.len()) || bytes(to).is_none() {
        return Err(RowError::new(
            Stage::Resize,
            format!(
                "an image of {} x {} with {} channels and {} bytes cannot be resized to {width} x {height}",
                image.width,
                image.height,
                image.channels,
                image.data.len()
            ),
        ));
    }
    if from == to {
        return Ok(image);
    }
    match (filter, image.channels) {
        (Filter::Nearest, _) => nearest(image, to, resized),
        (_, 1) => convolve::<1, 8>(image.data, from, to, filter, between, resized),
        // Four pixels are enough for what two filters see of an image that they enlarge.
        (Filter::Bilinear | Filter::Bicubic, 3) if from.0 <= to.0 => {
            convolve::<3, 12>(image.data, from, to, filter, between, resized);
        }
        (_, 3) => convolve::<3, 24>(image.data, from, to, filter, between, resized),
        (_, 4) => {
            convolve::<4, 32>(&premultiply(image.data), from, to, filter, between, resized);
            unpremultiply(resized);
        }
        (_, channels) => {
            return Err(RowError::new(
                Stage::Resize,
                format!("an image has 1, 3 or 4 channels, not {channels}"),
            ));
        }
    }
    Ok(ImageView {
        width,
        height,
        channels: image.channels,
        data: resized,
    })
}

/// A width and a height.
type Size = (u32, u32);

fn nearest(image: ImageView<'_>, to: Size, resized: &mut Vec<u8>) {
    let pixel = usize::from(image.channels);
    let columns = nearest_positions(image.width, to.0);
    resized.clear();
    for y in nearest_positions(image.height, to.1) {
        let stride = image.width as usize * pixel;
        let row = &image.data[y * stride..][..stride];
        for x in &columns {
            resized.extend_from_slice(&row[x * pixel..][..pixel]);
        }
    }
}

fn nearest_positions(from: u32, to: u32) -> Vec<usize> {
    let step = f64::from(from) / f64::from(to);
    let mut position = step * 0.5;
    let positions = (0..to).map(|_| {
        let nearest = (position as u32).min(from - 1);
        // Adding up errors, as Pillow does: a product is sometimes on the other side of a border.
        position += step;
        nearest as usize
    });
    positions.collect()
}

/// `LANES` values, of whole pixels, are filtered at once along rows.
fn convolve<const CHANNELS: usize, const LANES: usize>(
    data: &[u8],
    from: Size,
    to: Size,
    filter: Filter,
    between: &mut Vec<u8>,
    resized: &mut Vec<u8>,
) {
    let (narrower, lower) = (i64::from(from.0) - i64::from(to.0), i64::from(from.1) - i64::from(to.1));
    if narrower == 0 {
        filter_columns(data, from.0 as usize * CHANNELS, from.1, to.1, filter, resized);
    } else if lower == 0 {
        filter_rows::<CHANNELS, LANES>(data, from.0, to.0, filter, resized);
    } else if lower > 0 && lower > 2 * narrower {
        filter_columns(data, from.0 as usize * CHANNELS, from.1, to.1, filter, between);
        filter_rows::<CHANNELS, LANES>(between, from.0, to.0, filter, resized);
    } else {
        filter_rows::<CHANNELS, LANES>(data, from.0, to.0, filter, between);
        filter_columns(between, to.0 as usize * CHANNELS, from.1, to.1, filter, resized);
    }
}

/// From rows of `from` pixels to rows of `to` pixels.
fn filter_rows<const CHANNELS: usize, const LANES: usize>(
    data: &[u8],
    from: u32,
    to: u32,
    filter: Filter,
    filtered: &mut Vec<u8>,
) {
    let stride = from as usize * CHANNELS;
    filtered.resize(data.len() / stride * to as usize * CHANNELS, 0);
    Arch::new().dispatch(FilterRows::<CHANNELS, LANES> {
        data,
        stride,
        windows: &Windows::new::<CHANNELS, LANES>(from, to, filter),
        filtered,
    });
}

/// Pixels of a row that are made together.
const CHUNK: usize = 32;

struct FilterRows<'a, const CHANNELS: usize, const LANES: usize> {
    data: &'a [u8],
    stride: usize,
    windows: &'a Windows,
    filtered: &'a mut [u8],
}

impl<const CHANNELS: usize, const LANES: usize> NullaryFnOnce for FilterRows<'_, CHANNELS, LANES> {
    type Output = ();

    // Inlined, the loops are compiled for the instructions that were found.
    #[inline(always)]
    fn call(self) {
        let windows = self.windows;
        let mut sums = [[0; LANES]; CHUNK];
        // The last window may end behind the row, with weights of 0 there: so may not the last row.
        let mut last = vec![0; self.stride + windows.stride];
        let rows = self.filtered.chunks_exact_mut(windows.spans.len() * CHANNELS);
        for (start, filtered) in (0..).step_by(self.stride).zip(rows) {
            let row = match self.data.get(start..start + last.len()) {
                Some(row) => row,
                None => {
                    last[..self.stride].copy_from_slice(&self.data[start..][..self.stride]);
                    &last
                }
            };
            let mut windows = windows.spans.iter().zip(windows.weights());
            for filtered in filtered.chunks_mut(CHUNK * CHANNELS) {
                let (pixels, _) = filtered.as_chunks_mut::<CHANNELS>();
                for (sums, (span, weights)) in sums[..pixels.len()].iter_mut().zip(&mut windows) {
                    let mut lanes = [0; LANES];
                    let (values, _) = row[span.start * CHANNELS..].as_chunks::<LANES>();
                    for (weights, values) in weights.as_chunks::<LANES>().0.iter().zip(values) {
                        for ((lane, weight), value) in lanes.iter_mut().zip(weights).zip(values) {
                            *lane += weight * i32::from(*value);
                        }
                    }
                    *sums = lanes;
                }
                // In a loop of its own: together with the one above, the compiler gives up on both.
                for (pixel, sums) in pixels.iter_mut().zip(&sums) {
                    let mut total = [HALF; CHANNELS];
                    for sums in sums.as_chunks::<CHANNELS>().0 {
                        for (total, sum) in total.iter_mut().zip(sums) {
                            *total += sum;
                        }
                    }
                    *pixel = total.map(to_level);
                }
            }
        }
    }
}

/// From columns of `from` pixels to columns of `to` pixels, in rows of `stride` bytes.
fn filter_columns(data: &[u8], stride: usize, from: u32, to: u32, filter: Filter, filtered: &mut Vec<u8>) {
    filtered.resize(to as usize * stride, 0);
    Arch::new().dispatch(FilterColumns {
        data,
        stride,
        windows: &Windows::new::<1, 1>(from, to, filter),
        filtered,
    });
}

struct FilterColumns<'a> {
    data: &'a [u8],
    stride: usize,
    windows: &'a Windows,
    filtered: &'a mut [u8],
}

impl NullaryFnOnce for FilterColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let mut sums = vec![HALF; self.stride];
        let rows = self.filtered.chunks_exact_mut(self.stride);
        for ((filtered, span), weights) in rows.zip(&self.windows.spans).zip(self.windows.weights()) {
            sums.fill(HALF);
            let rows = self.data[span.start * self.stride..].chunks_exact(self.stride);
            for (weight, row) in weights.iter().zip(rows).take(span.length) {
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum += weight * i32::from(*value);
                }
            }
            for (value, sum) in filtered.iter_mut().zip(&sums) {
                *value = to_level(*sum);
            }
        }
    }
}

/// Bits of a weight's fraction: 8 of 32 hold the value, 2 the sign and sums above 1 that negative
/// weights bring.
const PRECISION: u32 = 32 - 8 - 2;

const ONE: f64 = (1_u32 << PRECISION) as f64;

/// Half a level, so that sums are rounded.
const HALF: i32 = 1 << (PRECISION - 1);

#[inline(always)]
fn to_level(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// The old pixels that make a new one.
struct Span {
    start: usize,
    length: usize,
}

/// What makes the new pixels of a row or a column.
struct Windows {
    spans: Vec<Span>,
    /// `stride` for each new pixel, in units of 1 / [`ONE`]; their sum is about 1, behind the span
    /// they are 0.
    weights: Vec<i32>,
    stride: usize,
}

impl Windows {
    /// With each weight `CHANNELS` times in a row, and a multiple of `LANES` for each new pixel.
    fn new<const CHANNELS: usize, const LANES: usize>(from: u32, to: u32, filter: Filter) -> Self {
        let scale = f64::from(from) / f64::from(to);
        let stretch = scale.max(1.0);
        let support = filter.support() * stretch;
        // Where a border falls on a pixel's centre, rounding decides: the operations are Pillow's, one
        // by one.
        let shrink = 1.0 / stretch;
        let span = |i: u32| {
            let center = (f64::from(i) + 0.5) * scale;
            // Conversions cut towards 0 and stop at it.
            let start = (center - support + 0.5) as u32;
            let end = ((center + support + 0.5) as u32).min(from);
            (center, start, end)
        };
        let spans: Vec<Span> = (0..to)
            .map(span)
            .map(|(_, start, end)| Span {
                start: start as usize,
                length: (end - start) as usize,
            })
            .collect();
        let longest = spans.iter().map(|span| span.length).max().unwrap_or(0);
        let stride = (longest * CHANNELS).next_multiple_of(LANES).max(1);
        let mut fixed = vec![0; stride * spans.len()];
        let mut weights = Vec::with_capacity(longest);
        for ((center, start, end), fixed) in (0..to).map(span).zip(fixed.chunks_exact_mut(stride)) {
            weights.clear();
            weights.extend((start..end).map(|x| filter.weight((f64::from(x) - center + 0.5) * shrink)));
            let sum: f64 = weights.iter().sum();
            for (weight, fixed) in weights.iter().zip(fixed.chunks_exact_mut(CHANNELS)) {
                let weight = if sum == 0.0 { 0.0 } else { weight / sum };
                fixed.fill((weight * ONE + 0.5_f64.copysign(weight)) as i32);
            }
        }
        Self {
            spans,
            weights: fixed,
            stride,
        }
    }

    fn weights(&self) -> impl Iterator<Item = &[i32]> {
        self.weights.chunks_exact(self.stride)
    }
}

fn premultiply(data: &[u8]) -> Vec<u8> {
    let mut data = data.to_vec();
    for [r, g, b, alpha] in data.as_chunks_mut::<4>().0 {
        for color in [r, g, b] {
            let product = u32::from(*color) * u32::from(*alpha) + 128;
            *color = ((product + (product >> 8)) >> 8) as u8;
        }
    }
    data
}

fn unpremultiply(data: &mut [u8]) {
    for [r, g, b, alpha] in data.as_chunks_mut::<4>().0 {
        if *alpha > 0 {
            for color in [r, g, b] {
                *color = (255 * u32::from(*color) / u32::from(*alpha)).min(255) as u8;
            }
        }
    }
}

fn too_long(width: u32, height: u32) -> String {
    format!("resize to {width} x {height}: a side has at most {MAX_SIDE} pixels")
}

/// The size that a call asks for.
fn target(width: i64, height: i64, max_pixels: u64) -> Result<Size, String> {
    match (u32::try_from(width), u32::try_from(height)) {
        (Ok(w @ 1..), Ok(h @ 1..)) if u64::from(w) * u64::from(h) <= max_pixels && w.max(h) > MAX_SIDE => {
            Err(too_long(w, h))
        }
        (Ok(w @ 1..), Ok(h @ 1..)) if u64::from(w) * u64::from(h) <= max_pixels => Ok((w, h)),
        _ if width < 1 || height < 1 => Err(format!("resize to {width} x {height}: a side has at least 1 pixel")),
        _ => Err(format!(
            "resize to {width} x {height} makes more pixels than pomona.max_image_pixels = {max_pixels}"
        )),
    }
}

/// The image of a row, resized; `None` for NULL.
fn resize_row<'a>(
    source: &'a SourceColumn<'_>,
    row: usize,
    size: Size,
    filter: Filter,
    options: &PomonaOptions,
    scratch: &'a mut Scratch,
) -> Option<Result<ImageView<'a>, RowError>> {
    let Scratch {
        decoded,
        between,
        resized,
    } = scratch;
    let image = match source {
        SourceColumn::Content(column) => {
            let shrunk = (u64::from(size.0), u64::from(size.1));
            let target = |_, _| (options.decode == DecodeMode::Fast).then_some(shrunk);
            let content = column.get(row)?;
            decode_into(content, options.max_image_pixels, target, decoded)
        }
        SourceColumn::Image(column) => column.get(row, Stage::Resize)?,
    };
    Some(image.and_then(|image| resize_into(image, size, filter, between, resized)))
}

/// `resize(content_or_image, width, height [, filter])`
#[user_doc(
    doc_section(label = "Images"),
    description = "Resizes an image to a width and a height, with the same pixels as Pillow's `Image.resize`. Encoded \
                   bytes are decoded first.",
    syntax_example = "resize(content_or_image, width, height [, filter])",
    sql_example = r#"```sql
SELECT image['height'] AS height, image['width'] AS width
FROM (
    SELECT resize(content, 224, 224, 'lanczos') AS image
    FROM images('sample://fruits/Training/')
    ORDER BY path
    LIMIT 1
);
```"#,
    argument(
        name = "content_or_image",
        description = "The encoded bytes of an image, or a decoded image."
    ),
    argument(
        name = "width",
        description = "Columns of pixels; a column may give each row its own."
    ),
    argument(name = "height", description = "Rows of pixels."),
    argument(
        name = "filter",
        description = "`nearest`, `box`, `bilinear`, `hamming`, `bicubic` (the default) or `lanczos`."
    )
)]
#[derive(Debug, PartialEq, Eq, Hash)]
struct Resize {
    signature: Signature,
}

impl Resize {
    fn new() -> Self {
        Self {
            signature: Signature::user_defined(Volatility::Immutable),
        }
    }
}

impl ScalarUDFImpl for Resize {
    fn name(&self) -> &str {
        "resize"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, types: &[DataType]) -> DataFusionResult<Vec<DataType>> {
        let parameters = [
            ("content_or_image", Kind::ContentOrImage),
            ("width", Kind::Integer),
            ("height", Kind::Integer),
            ("filter", Kind::Text),
        ];
        coerce(self.name(), &parameters, 1, types)
    }

    fn return_type(&self, _types: &[DataType]) -> DataFusionResult<DataType> {
        Ok(image_type())
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> DataFusionResult<FieldRef> {
        if let (Some(width), Some(height)) = (constant_integer(&args, 1), constant_integer(&args, 2))
            // Sizes that are too large are found when the setting is known.
            && width.min(height) < 1
            && let Err(cause) = target(width, height, u64::MAX)
        {
            return plan_err!("{cause}");
        }
        if let Some(Err(cause)) = constant_text(&args, 3).map(str::parse::<Filter>) {
            return plan_err!("{cause}");
        }
        Ok(Arc::new(Field::new(self.name(), image_type(), true)))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> DataFusionResult<ColumnarValue> {
        evaluate(&args, |columns, options| {
            let sizes = integers([&columns[1], &columns[2]]);
            let filters = columns.get(3).map(text);
            let parameters = |row: usize| -> Result<_, String> {
                let filter = match &filters {
                    None => Some(Filter::Bicubic),
                    Some(filters) => filters(row).map(str::parse::<Filter>).transpose()?,
                };
                let Some(([width, height], filter)) = sizes(row).zip(filter) else {
                    return Ok(None);
                };
                Ok(Some((target(width, height, options.max_image_pixels)?, filter)))
            };
            let source = SourceColumn::try_new(columns[0].as_ref())?;
            let policy = RowPolicy::new(options);
            let mut builder = ImageBuilder::with_capacity(columns[0].len());
            let mut scratch = Scratch::default();
            for row in 0..columns[0].len() {
                // Read before the image: a wrong call fails before a pixel is touched.
                let resized = match parameters(row) {
                    _ if columns[0].is_null(row) => None,
                    Ok(None) => None,
                    Ok(Some((size, filter))) => resize_row(&source, row, size, filter, options, &mut scratch),
                    Err(cause) => return exec_err!("{cause}"),
                };
                let image = match resized {
                    Some(resized) => policy.apply(resized)?,
                    None => None,
                };
                builder.append(image)?;
                scratch.trim();
            }
            Ok(builder.finish())
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

    /// 7 x 5, grey.
    const PICTURE: [u8; 35] = [
        0, 37, 74, 111, 148, 185, 222, 91, 157, 223, 33, 99, 165, 231, 182, 21, 116, 211, 103, 198, 37, 17, 141, 9,
        186, 54, 231, 99, 108, 5, 211, 108, 58, 211, 161,
    ];

    fn resized(width: u32, height: u32, filter: Filter) -> Vec<u8> {
        let image = ImageView {
            width: 7,
            height: 5,
            channels: 1,
            data: &PICTURE,
        };
        resize(image, width, height, filter).unwrap().data
    }

    #[test]
    fn pixels_are_those_of_pillow() {
        // Pillow 13.0: Image.fromarray(picture).resize(size, filter).
        let smaller: [(Filter, [u8; 6]); 6] = [
            (Filter::Nearest, [157, 33, 165, 141, 186, 231]),
            (Filter::Box, [82, 124, 173, 68, 105, 176]),
            (Filter::Bilinear, [96, 119, 166, 84, 124, 146]),
            (Filter::Hamming, [93, 112, 176, 78, 124, 158]),
            (Filter::Bicubic, [94, 119, 168, 86, 123, 145]),
            (Filter::Lanczos, [93, 120, 168, 88, 125, 143]),
        ];
        for (filter, expected) in smaller {
            assert_eq!(resized(3, 2, filter), expected, "{filter:?}");
        }
        // Columns first.
        let wider: [(Filter, [u8; 9]); 6] = [
            (Filter::Nearest, [182, 21, 21, 116, 211, 103, 198, 198, 37]),
            (Filter::Box, [80, 72, 72, 127, 130, 92, 198, 198, 150]),
            (Filter::Bilinear, [88, 79, 97, 127, 136, 102, 151, 179, 140]),
            (Filter::Hamming, [88, 81, 95, 124, 137, 94, 158, 188, 138]),
            (Filter::Bicubic, [84, 75, 96, 131, 134, 92, 154, 188, 140]),
            (Filter::Lanczos, [86, 74, 95, 134, 133, 88, 154, 191, 138]),
        ];
        for (filter, expected) in wider {
            assert_eq!(resized(9, 1, filter), expected, "{filter:?}");
        }
    }

    #[test]
    fn transparent_pixels_weigh_less() {
        let data = [255, 0, 0, 255, 0, 255, 0, 0, 0, 0, 255, 128, 10, 20, 30, 200];
        let image = ImageView {
            width: 2,
            height: 2,
            channels: 4,
            data: &data,
        };
        let pillow: [u8; 12] = [175, 0, 86, 198, 115, 6, 66, 146, 0, 24, 24, 94];
        assert_eq!(resize(image, 3, 1, Filter::Bicubic).unwrap().data, pillow);
    }

    #[test]
    fn buffers_may_hold_anything() {
        let image = ImageView {
            width: 7,
            height: 5,
            channels: 1,
            data: &PICTURE,
        };
        let (mut between, mut into) = (vec![77; 1000], vec![78; 3]);
        for (filter, name) in Filter::ALL {
            for (width, height) in [(3, 2), (40, 1), (7, 9), (2, 5), (70, 50)] {
                let reused = resize_into(image, (width, height), filter, &mut between, &mut into).unwrap();
                assert_eq!(
                    reused.data,
                    resized(width, height, filter),
                    "{name} to {width} x {height}"
                );
            }
        }
    }

    #[test]
    fn channels_do_not_mix() {
        let data: Vec<u8> = PICTURE.iter().flat_map(|value| [*value, 255 - value, 7]).collect();
        let image = ImageView {
            width: 7,
            height: 5,
            channels: 3,
            data: &data,
        };
        let rgb = resize(image, 4, 9, Filter::Lanczos).unwrap();
        let red: Vec<u8> = rgb.data.iter().step_by(3).copied().collect();
        assert_eq!(red, resized(4, 9, Filter::Lanczos));
        assert!(rgb.data.iter().skip(2).step_by(3).all(|blue| *blue == 7));
    }

    #[test]
    fn what_cannot_be_resized() {
        let image = ImageView {
            width: 7,
            height: 5,
            channels: 1,
            data: &PICTURE,
        };
        assert!(resize(image, 0, 5, Filter::Box).is_err());
        assert!(resize(ImageView { width: 8, ..image }, 3, 2, Filter::Box).is_err());
        assert!(
            resize(
                ImageView {
                    width: 0,
                    data: &[],
                    ..image
                },
                3,
                2,
                Filter::Box
            )
            .is_err()
        );
        assert_eq!(resize(image, 7, 5, Filter::Lanczos).unwrap().data, PICTURE);
    }

    #[test]
    fn names_and_numbers() {
        for (filter, name) in Filter::ALL {
            assert_eq!(name.parse::<Filter>(), Ok(filter));
        }
        let error = "cubic".parse::<Filter>().unwrap_err();
        assert_eq!(
            error,
            "there is no filter 'cubic'; there are: nearest, box, bilinear, hamming, bicubic, lanczos"
        );
        assert_eq!(Filter::from_pillow(3), Some(Filter::Bicubic));
        assert_eq!(Filter::from_pillow(6), None);
    }
}
