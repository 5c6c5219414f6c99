//! Decoding: from encoded bytes to RGB pixels.
//!
//! The reference is Pillow's `ImageOps.exif_transpose(image).convert("RGB")`: the EXIF orientation
//! is applied, alpha is dropped (a transparent pixel keeps its colour), of 16 bits the high byte is
//! taken, grey is replicated. Of an animation there is the first frame.
//!
//! The bytes are hostile: what they say of sizes is checked before memory is taken, and an image of
//! which a part is missing is an error.

use std::any::Any;
use std::error::Error;
use std::fmt::Display;
use std::io::{self, Cursor, ErrorKind};
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow::datatypes::DataType;
use datafusion::error::Result as DataFusionResult;
use datafusion::logical_expr::{
    ColumnarValue, Documentation, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use datafusion_macros::user_doc;
use image::metadata::Orientation;
use image::{
    ColorType, DynamicImage, ExtendedColorType, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage,
};
use mozjpeg::{ColorSpace, Decompress, Marker};
use tiff::decoder::{Decoder as TiffDecoder, DecodingResult, Limits as TiffLimits};

use super::rows::{Kind, coerce, evaluate, for_each_row};
use super::{ContentColumn, Image, ImageBuilder, ImageView, image_type};
use crate::policy::{RowError, Stage};

pub(super) fn functions() -> Vec<Arc<ScalarUDF>> {
    vec![Arc::new(ScalarUDF::from(DecodeImage::new()))]
}

/// The most scans of a JPEG; progressive files have about ten.
const MAX_SCANS: usize = 500;

/// The formats that can be decoded.
const FORMATS: [(ImageFormat, &str); 6] = [
    (ImageFormat::Jpeg, "JPEG"),
    (ImageFormat::Png, "PNG"),
    (ImageFormat::WebP, "WebP"),
    (ImageFormat::Gif, "GIF"),
    (ImageFormat::Bmp, "BMP"),
    (ImageFormat::Tiff, "TIFF"),
];

/// What is found in the wild beside them, so that an error can name it.
const OTHER_FORMATS: [(&[u8], &str); 14] = [
    (b"II+\0", "BigTIFF"),
    (b"MM\0+", "BigTIFF"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"8BPS", "Photoshop (PSD)"),
    (b"%PDF", "PDF"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML, perhaps SVG"),
    (b"<!DOCTYPE", "HTML"),
    (b"<!doctype", "HTML"),
    (b"<html", "HTML"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x1f\x8b", "gzip"),
];

/// Decodes an image of any supported format to RGB.
///
/// At most `max_pixels` are decoded; with what decoders need beside the pixels, memory stays below
/// some 30 bytes for each of them.
///
/// # Errors
/// Where the bytes are no image, are damaged or end early, or hold more than `max_pixels`.
pub fn decode(content: &[u8], max_pixels: u64) -> Result<Image, RowError> {
    let mut data = Vec::new();
    let ImageView {
        width,
        height,
        channels,
        ..
    } = decode_into(content, max_pixels, |_, _| None, &mut data)?;
    Ok(Image {
        width,
        height,
        channels,
        data,
    })
}

/// Decodes into `pixels`, whatever they held.
///
/// `target` gives the size to which an upright image of a width and a height will be shrunk, for an
/// image that need not be decoded in full: a JPEG has, where it is more than twice as large, as many
/// eighths of its size as leave at least twice the target. None: it is decoded in full.
///
/// # Errors
/// As [`decode`]. The header's size counts, whatever is made of it.
pub(crate) fn decode_into<'a>(
    content: &[u8],
    max_pixels: u64,
    target: impl Fn(u32, u32) -> Option<(u64, u64)>,
    pixels: &'a mut Vec<u8>,
) -> Result<ImageView<'a>, RowError> {
    let (width, height) = guard(|| {
        if is_jpeg(content) {
            check_jpeg_end(content)?;
        }
        let (header, source) = open(content, max_pixels)?;
        check_size(header.width, header.height, max_pixels)?;
        let mut size = (header.width, header.height);
        match source {
            Source::Jpeg(decoder) => size = decode_jpeg(*decoder, &header, eighths(&header, target), pixels)?,
            Source::CmykTiff(content) => *pixels = decode_cmyk_tiff(content, max_pixels)?,
            Source::Other(decoder) => decode_other(decoder, &header, pixels)?,
        }
        turn_upright(&header, size, pixels)
    })?;
    Ok(ImageView {
        width,
        height,
        channels: 3,
        data: pixels,
    })
}

/// What an image's header says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    /// The name of the format.
    pub(super) format: &'static str,
    /// Columns of pixels, before the orientation is applied.
    pub(super) width: u32,
    /// Rows of pixels, before the orientation is applied.
    pub(super) height: u32,
    /// Values per pixel; those of the palette for images that have one.
    pub(super) channels: u8,
    /// How the pixels are to be turned.
    pub(super) orientation: Orientation,
}

/// The bytes that decoding takes: the pixels, and those of the image turned upright or, of a progressive
/// JPEG, its coefficients. None where the header
/// cannot be read or has more than `max_pixels`, which the decoder itself tells.
pub(crate) fn decoding_bytes(content: &[u8], max_pixels: u64) -> Option<usize> {
    let header = read_header(content, max_pixels).ok()?;
    let pixels = u64::from(header.width) * u64::from(header.height);
    usize::try_from(pixels)
        .ok()
        .filter(|_| pixels <= max_pixels)?
        .checked_mul(9)
}

/// Reads the header alone; sizes are not checked, and no memory is taken for pixels.
///
/// # Errors
/// Where the bytes are no image, or the header is damaged.
pub(super) fn read_header(content: &[u8], max_pixels: u64) -> Result<Header, RowError> {
    guard(|| open(content, max_pixels).map(|(header, _)| header)).map_err(|error| {
        // libjpeg makes up what is missing, and stumbles over that.
        let end = if is_jpeg(content) {
            check_jpeg_end(content)
        } else {
            Ok(())
        };
        end.err().unwrap_or(error)
    })
}

fn is_jpeg(content: &[u8]) -> bool {
    content.starts_with(b"\xff\xd8\xff")
}

/// An image of which the header has been read.
enum Source<'a> {
    Jpeg(Box<Decompress<&'a [u8]>>),
    CmykTiff(&'a [u8]),
    Other(Box<dyn ImageDecoder + 'a>),
}

/// Runs decoders, which are not proof against every sequence of bytes: one that panics has failed on
/// one object, which is no reason to stop a query over a million of them. libjpeg's way to fail is one.
fn guard<T>(decode: impl FnOnce() -> Result<T, RowError>) -> Result<T, RowError> {
    // Nobody reads a buffer that was left half filled.
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|panic| Err(gave_up(&*panic)))
}

fn gave_up(panic: &(dyn Any + Send)) -> RowError {
    let text = panic.downcast_ref::<&str>().copied();
    let message = text
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no reason given");
    match message.strip_prefix("libjpeg fatal error: ") {
        Some("Empty JPEG image (DNL not supported)") => {
            failed("the JPEG header says that the image is 0 pixels wide or high")
        }
        Some(cause) => failed(format!("the JPEG data cannot be decoded: {cause}")),
        None => failed(format!("the decoder gave up: {message}")),
    }
}

fn open(content: &[u8], max_pixels: u64) -> Result<(Header, Source<'_>), RowError> {
    let (format, name) = format_of(content)?;
    let content = match format {
        ImageFormat::Jpeg => return open_jpeg(content),
        ImageFormat::WebP => check_webp(content, max_pixels)?,
        _ => content,
    };
    // What else there is in a PNG, such as a compressed colour profile, is in proportion to its picture.
    let pixels = match (format, content.get(16..24)) {
        (ImageFormat::Png, Some([a, b, c, d, e, f, g, h])) => {
            u64::from(u32::from_be_bytes([*a, *b, *c, *d])) * u64::from(u32::from_be_bytes([*e, *f, *g, *h]))
        }
        _ => max_pixels,
    };
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(max_alloc(pixels.min(max_pixels)));
    let mut reader = ImageReader::with_format(Cursor::new(content), format);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(|e| image_error(name, &e))?;
    let (width, height) = decoder.dimensions();
    let color = decoder.original_color_type();
    let header = Header {
        format: name,
        width,
        height,
        channels: color.channel_count(),
        // Damaged metadata are no reason to lose the picture.
        orientation: decoder.orientation().unwrap_or(Orientation::NoTransforms),
    };
    let source = match color {
        ExtendedColorType::Cmyk8 => Source::CmykTiff(content),
        _ => Source::Other(Box::new(decoder)),
    };
    Ok((header, source))
}

fn open_jpeg(content: &[u8]) -> Result<(Header, Source<'_>), RowError> {
    let decoder = Decompress::builder()
        .with_markers(&[Marker::APP(1)])
        .from_mem(content)
        .map_err(jpeg_error)?;
    let exif = decoder
        .markers()
        .find_map(|marker| marker.data.strip_prefix(b"Exif\0\0"));
    let (width, height) = decoder.size();
    let header = Header {
        format: "JPEG",
        // A JPEG file's header has 16 bits for each, and 8 for the number of components.
        width: width as u32,
        height: height as u32,
        channels: decoder.components().len() as u8,
        orientation: exif
            .and_then(Orientation::from_exif_chunk)
            .unwrap_or(Orientation::NoTransforms),
    };
    Ok((header, Source::Jpeg(Box::new(decoder))))
}

/// Bytes that a decoder may take beside the pixels.
fn max_alloc(max_pixels: u64) -> u64 {
    max_pixels.saturating_mul(8).saturating_add(16 << 20)
}

fn check_size(width: u32, height: u32, max_pixels: u64) -> Result<(), RowError> {
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 {
        return Err(failed(format!(
            "the header says that the image is {width} x {height} pixels"
        )));
    }
    if pixels > max_pixels {
        return Err(failed(format!(
            "the header says that the image is {width} x {height} pixels, more than pomona.max_image_pixels = \
             {max_pixels}"
        )));
    }
    Ok(())
}

fn format_of(content: &[u8]) -> Result<(ImageFormat, &'static str), RowError> {
    if content.is_empty() {
        return Err(failed("the object is empty (0 bytes)"));
    }
    let guess = image::guess_format(content).ok();
    if let Some(found) = FORMATS.into_iter().find(|(format, _)| guess == Some(*format)) {
        return Ok(found);
    }
    let formats = FORMATS.map(|(_, name)| name).join(", ");
    let other = other_format(content).map(str::to_owned);
    Err(failed(
        match other.or_else(|| guess.map(|format| format!("{format:?}").to_uppercase())) {
            Some(name) => format!("the object is {name}, which cannot be decoded (formats: {formats})"),
            None => {
                let head = &content[..content.len().min(16)];
                format!(
                    "not an image: its first bytes are \"{}\" (formats: {formats})",
                    head.escape_ascii()
                )
            }
        },
    ))
}

fn other_format(content: &[u8]) -> Option<&'static str> {
    if let [_, _, _, _, b'f', b't', b'y', b'p', brand @ ..] = content {
        return Some(match brand.get(..4) {
            Some(b"avif" | b"avis") => "AVIF",
            Some(b"heic" | b"heix" | b"heim" | b"heis" | b"hevc" | b"hevx" | b"mif1" | b"msf1") => "HEIC",
            _ => "MP4 or QuickTime",
        });
    }
    let text = content.trim_ascii_start();
    let known = OTHER_FORMATS
        .into_iter()
        .find(|(head, _)| text.starts_with(head) || content.starts_with(head));
    known.map(|(_, name)| name)
}

/// Walks over the markers of a JPEG file to the one that ends the image (EOI), as decoders do that
/// refuse truncated files. Bytes behind it are none of the image's.
fn check_jpeg_end(content: &[u8]) -> Result<(), RowError> {
    let mut rest = content;
    let mut scans = 0;
    // Between segments there are entropy-coded data, in which 0xFF is written as 0xFF 0x00.
    while let Some(at) = rest.iter().position(|byte| *byte == 0xFF) {
        rest = &rest[at + 1..];
        match rest {
            // A fill byte: the marker is still to come.
            [0xFF, ..] => {}
            // Stuffing, and markers without a segment.
            [0x00 | 0x01 | 0xD0..=0xD8, next @ ..] => rest = next,
            [0xD9, ..] if scans == 0 => {
                return Err(failed("the JPEG data hold no picture: they end before a scan (SOS)"));
            }
            [0xD9, ..] => return Ok(()),
            [marker, high, low, ..] => {
                scans += usize::from(*marker == 0xDA);
                // Every scan costs a pass over all blocks, even an empty one: few bytes, many minutes.
                if scans > MAX_SCANS {
                    return Err(failed(format!("the JPEG data have more than {MAX_SCANS} scans")));
                }
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                rest = rest.get(1 + length..).unwrap_or_default();
            }
            _ => break,
        }
    }
    Err(early_end("JPEG"))
}

/// Walks over the chunks of a WebP file, and returns it without what may follow it.
///
/// The decoder takes memory for what chunks and frames say of themselves before it looks whether
/// they can be so large, and makes pictures of frames that are cut off.
fn check_webp(content: &[u8], max_pixels: u64) -> Result<&[u8], RowError> {
    let number = |bytes: [u8; 4]| u32::from_le_bytes(bytes) as usize;
    let file = match *content {
        [_, _, _, _, a, b, c, d, ..] => content.get(..number([a, b, c, d]).saturating_add(8)),
        _ => None,
    };
    let file = file.ok_or_else(|| early_end("WebP"))?;
    let mut chunks = file.get(12..).unwrap_or_default();
    while let Some((head, rest)) = chunks.split_first_chunk::<8>() {
        let [n0, n1, n2, n3, a, b, c, d] = *head;
        let size = number([a, b, c, d]);
        let payload = rest.get(..size).ok_or_else(|| early_end("WebP"))?;
        let mut skipped = size + size % 2;
        match (&[n0, n1, n2, n3], payload) {
            // The chunks of an animation's frame follow the 16 bytes of its header.
            (b"ANMF", _) => skipped = 16,
            (b"VP8 ", [_, _, _, _, _, _, w0, w1, h0, h1, ..]) => {
                let sides = [[*w0, *w1], [*h0, *h1]];
                let [width, height] = sides.map(|side| u32::from(u16::from_le_bytes(side) & 0x3FFF));
                check_size(width, height, max_pixels)?;
            }
            _ => {}
        }
        chunks = rest.get(skipped..).unwrap_or_default();
    }
    Ok(file)
}

/// The eighths of its size, 1 to 8, in which a JPEG is decoded that will be shrunk to `target`.
///
/// Twice the target is left to the filter of the resize, as Pillow does with `reducing_gap = 2.0`,
/// the value of its `Image.thumbnail`: what the cheap reduction did wrong is then hardly seen.
fn eighths(header: &Header, target: impl Fn(u32, u32) -> Option<(u64, u64)>) -> u8 {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    let (mut width, mut height) = (header.width, header.height);
    if let Rotate90 | Rotate90FlipH | Rotate270 | Rotate270FlipH = header.orientation {
        mem::swap(&mut width, &mut height);
    }
    let Some(target) = target(width, height) else {
        return 8;
    };
    let enough =
        |eighths: u8, side: u32, target: u64| u64::from(side) * u64::from(eighths) / 8 >= target.saturating_mul(2);
    // With nasm there is fast code for all of the size, half and quarters of it: five eighths and more take
    // longer than the whole.
    let most = if cfg!(feature = "nasm") { 4 } else { 7 };
    (1..=most)
        .find(|n| enough(*n, width, target.0) && enough(*n, height, target.1))
        .unwrap_or(8)
}

/// Decodes a JPEG file by libjpeg-turbo, in the form that MozJPEG has it, to `eighths` of its size;
/// returns the width and the height.
///
/// It is the decoder of Pillow, OpenCV and TensorFlow: networks were trained on what it makes of
/// files. zune-jpeg rounds twice where it upsamples colours; with it the cosine of an embedding with
/// the reference fell to 0.9993 on 100 x 100 pixels, and with this one the pixels are the same. Nor
/// is it faster where an image shrinks: of 12 megapixels it takes 1.4 times as long as this one for
/// two eighths.
fn decode_jpeg(
    mut decoder: Decompress<&[u8]>,
    header: &Header,
    eighths: u8,
    pixels: &mut Vec<u8>,
) -> Result<(u32, u32), RowError> {
    decoder.scale(eighths);
    let (space, channels) = match header.channels {
        4 => (ColorSpace::JCS_CMYK, 4),
        _ => (ColorSpace::JCS_RGB, 3),
    };
    let mut decoder = decoder.to_colorspace(space).map_err(jpeg_error)?;
    let (width, height) = (decoder.width(), decoder.height());
    pixels.resize(width * height * channels, 0);
    decoder.read_scanlines_into(pixels).map_err(jpeg_error)?;
    if channels == 4 {
        // As everybody does since Photoshop did: 255 is no ink.
        pixels.iter_mut().for_each(|ink| *ink = 255 - *ink);
        *pixels = cmyk_to_rgb(pixels);
    }
    Ok((width as u32, height as u32))
}

/// Pillow's formula, which rounds the product.
fn cmyk_to_rgb(pixels: &[u8]) -> Vec<u8> {
    let ink = |color: u8, rest: u8| {
        let product = u32::from(color) * u32::from(rest) + 128;
        rest.saturating_sub(((product + (product >> 8)) >> 8) as u8)
    };
    let (pixels, _) = pixels.as_chunks::<4>();
    let rgb = pixels
        .iter()
        .map(|[c, m, y, k]| [c, m, y].map(|color| ink(*color, 255 - *k)));
    rgb.collect::<Vec<_>>().into_flattened()
}

/// Decodes a TIFF file of 8-bit CMYK, of which `image` makes pictures that are up to a level darker
/// than other decoders': it cuts where they round.
fn decode_cmyk_tiff(content: &[u8], max_pixels: u64) -> Result<Vec<u8>, RowError> {
    let error = |e: tiff::TiffError| failed(format!("the TIFF data cannot be decoded: {e}"));
    let alloc = usize::try_from(max_alloc(max_pixels)).unwrap_or(usize::MAX);
    let mut limits = TiffLimits::unlimited();
    limits.decoding_buffer_size = alloc;
    limits.intermediate_buffer_size = alloc;
    limits.ifd_value_size = alloc;
    let mut decoder = TiffDecoder::new(Cursor::new(content))
        .map_err(error)?
        .with_limits(limits);
    let mut samples = DecodingResult::U8(Vec::new());
    let layout = decoder.read_image_to_buffer(&mut samples).map_err(error)?;
    match samples {
        DecodingResult::U8(samples) if layout.planes == 1 => Ok(cmyk_to_rgb(&samples)),
        _ => Err(failed("CMYK TIFF in separate planes cannot be decoded")),
    }
}

/// Decodes what `image` decodes.
fn decode_other(decoder: Box<dyn ImageDecoder + '_>, header: &Header, pixels: &mut Vec<u8>) -> Result<(), RowError> {
    let error = |e: ImageError| image_error(header.format, &e);
    if decoder.color_type() == ColorType::Rgb8 {
        // Cleared: decoders leave out pixels that a file leaves out.
        pixels.clear();
        pixels.resize(header.width as usize * header.height as usize * 3, 0);
        return decoder.read_image(pixels).map_err(error);
    }
    *pixels = to_rgb(DynamicImage::from_decoder(decoder).map_err(error)?);
    Ok(())
}

fn to_rgb(image: DynamicImage) -> Vec<u8> {
    let high = |value: u16| (value >> 8) as u8;
    match image {
        DynamicImage::ImageRgb8(image) => image.into_raw(),
        DynamicImage::ImageLuma8(image) => pick_rgb(image.as_raw(), 1, |value| value),
        DynamicImage::ImageLumaA8(image) => pick_rgb(image.as_raw(), 2, |value| value),
        DynamicImage::ImageRgba8(image) => pick_rgb(image.as_raw(), 4, |value| value),
        DynamicImage::ImageLuma16(image) => pick_rgb(image.as_raw(), 1, high),
        DynamicImage::ImageLumaA16(image) => pick_rgb(image.as_raw(), 2, high),
        DynamicImage::ImageRgb16(image) => pick_rgb(image.as_raw(), 3, high),
        DynamicImage::ImageRgba16(image) => pick_rgb(image.as_raw(), 4, high),
        // TIFF's floats, from 0 to 1.
        image => image.into_rgb8().into_raw(),
    }
}

/// The colours of pixels of `channels` values; grey, with or without alpha, is replicated.
fn pick_rgb<T: Copy>(values: &[T], channels: usize, to_u8: impl Fn(T) -> u8) -> Vec<u8> {
    let source = if channels < 3 { [0; 3] } else { [0, 1, 2] };
    let mut rgb = vec![0; values.len() / channels * 3];
    for (rgb, pixel) in rgb.chunks_exact_mut(3).zip(values.chunks_exact(channels)) {
        for (color, source) in rgb.iter_mut().zip(source) {
            *color = to_u8(pixel[source]);
        }
    }
    rgb
}

/// Applies the orientation to an image that has the `size` of its file; returns the new one.
fn turn_upright(header: &Header, size: (u32, u32), pixels: &mut Vec<u8>) -> Result<(u32, u32), RowError> {
    let Some(image) = RgbImage::from_raw(size.0, size.1, mem::take(pixels)) else {
        return Err(failed(format!(
            "the {} decoder returned another size than the header's",
            header.format
        )));
    };
    let mut image = DynamicImage::ImageRgb8(image);
    image.apply_orientation(header.orientation);
    let image = image.into_rgb8();
    let size = image.dimensions();
    *pixels = image.into_raw();
    Ok(size)
}

fn failed(cause: impl Display) -> RowError {
    RowError::new(Stage::Decode, cause)
}

fn early_end(format: &str) -> RowError {
    failed(format!("the {format} data end early: the object is truncated"))
}

#[expect(clippy::needless_pass_by_value, reason = "map_err hands over values")]
fn jpeg_error(error: io::Error) -> RowError {
    failed(format!("the JPEG data cannot be decoded: {error}"))
}

fn image_error(format: &str, error: &ImageError) -> RowError {
    match error {
        ImageError::IoError(e) if e.kind() == ErrorKind::UnexpectedEof => early_end(format),
        ImageError::Limits(_) => failed(format!(
            "the {format} data take more memory than pomona.max_image_pixels allows"
        )),
        other => {
            // The source says the same without repeating the format.
            let cause = other
                .source()
                .map_or_else(|| other.to_string(), |source| source.to_string());
            failed(format!("the {format} data cannot be decoded: {cause}"))
        }
    }
}

/// `decode_image(content)`
#[user_doc(
    doc_section(label = "Images"),
    description = "Decodes an image: JPEG, PNG, WebP, GIF (the first frame), BMP or TIFF, to 8-bit RGB. The EXIF \
                   orientation is applied, alpha is dropped, of 16 bits the high byte is taken. An image is a struct \
                   {height, width, channels, data}, its data row by row with the channels interleaved.",
    syntax_example = "decode_image(content)",
    sql_example = r#"```sql
SELECT image['height'] AS height, image['width'] AS width, image['channels'] AS channels
FROM (SELECT decode_image(content) AS image FROM images('sample://fruits/Training/') ORDER BY path LIMIT 1);
```"#,
    argument(name = "content", description = "The encoded bytes of an image.")
)]
#[derive(Debug, PartialEq, Eq, Hash)]
struct DecodeImage {
    signature: Signature,
}

impl DecodeImage {
    fn new() -> Self {
        Self {
            signature: Signature::user_defined(Volatility::Immutable),
        }
    }
}

impl ScalarUDFImpl for DecodeImage {
    fn name(&self) -> &str {
        "decode_image"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, types: &[DataType]) -> DataFusionResult<Vec<DataType>> {
        coerce(self.name(), &[("content", Kind::Content)], 0, types)
    }

    fn return_type(&self, _types: &[DataType]) -> DataFusionResult<DataType> {
        Ok(image_type())
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> DataFusionResult<ColumnarValue> {
        evaluate(&args, |columns, options| {
            let contents = ContentColumn::try_new(columns[0].as_ref())?;
            let rows = columns[0].len();
            let mut builder = ImageBuilder::with_capacity(rows);
            let outcome = |row| {
                Ok(contents
                    .get(row)
                    .map(|content| decode(content, options.max_image_pixels)))
            };
            for_each_row(rows, options, outcome, |image| {
                builder.append(image.as_ref().map(Image::view))
            })?;
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
    use image::{ImageBuffer, Rgba};

    use super::*;

    const MAX: u64 = 1 << 20;

    fn picture() -> RgbImage {
        RgbImage::from_fn(40, 30, |x, y| image::Rgb([(x * 6) as u8, (y * 8) as u8, (x * y) as u8]))
    }

    fn encode(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.into().write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn lossless_formats_keep_the_pixels() {
        for (format, name) in FORMATS.into_iter().filter(|(format, _)| *format != ImageFormat::Jpeg) {
            // 256 colours at most, for GIF.
            let picture = RgbImage::from_fn(16, 9, |x, y| image::Rgb([(x * 17) as u8, (y * 31) as u8, 0]));
            let decoded = decode(&encode(picture.clone(), format), MAX).unwrap();
            let expected = Image {
                width: 16,
                height: 9,
                channels: 3,
                data: picture.into_raw(),
            };
            assert_eq!(decoded, expected, "{name}");
        }
    }

    #[test]
    fn many_scans_are_refused_before_they_are_decoded() {
        let mut bomb = b"\xff\xd8".to_vec();
        bomb.extend_from_slice(&b"\xff\xda\x00\x02".repeat(MAX_SCANS + 1));
        bomb.extend_from_slice(b"\xff\xd9");
        let error = check_jpeg_end(&bomb).unwrap_err().to_string();
        assert!(error.contains("500 scans"), "{error}");
    }

    #[test]
    fn a_truncated_object_is_an_error() {
        for format in [ImageFormat::Jpeg, ImageFormat::WebP] {
            let whole = encode(picture(), format);
            for cut in 0..whole.len() {
                assert!(
                    decode(&whole[..cut], MAX).is_err(),
                    "{format:?} cut to {cut} of {} bytes",
                    whole.len()
                );
            }
            let longer = [whole.as_slice(), b"not the image's"].concat();
            assert_eq!(decode(&longer, MAX).unwrap(), decode(&whole, MAX).unwrap());
        }
        for (format, name) in FORMATS {
            let whole = encode(picture(), format);
            let half = decode(&whole[..whole.len() / 2], MAX);
            assert!(half.is_err(), "{name}");
        }
    }

    #[test]
    fn damage_is_an_error_or_a_picture() {
        for (format, _) in FORMATS {
            let whole = encode(picture(), format);
            for i in 0..whole.len() {
                let mut damaged = whole.clone();
                damaged[i] ^= 0x55;
                if let Ok(image) = decode(&damaged, MAX) {
                    let pixels = image.width as usize * image.height as usize;
                    assert_eq!(image.data.len(), pixels * 3, "{format:?}, byte {i}");
                    assert!(pixels as u64 <= MAX);
                }
            }
        }
    }

    #[test]
    fn a_jpeg_is_decoded_no_larger_than_needed() {
        let eighths = |width, height, orientation, target: (u64, u64)| {
            let header = Header {
                format: "JPEG",
                width,
                height,
                channels: 3,
                orientation,
            };
            eighths(&header, |_, _| Some(target))
        };
        let upright = Orientation::NoTransforms;
        assert_eq!(eighths(4000, 3000, upright, (224, 224)), 2);
        assert_eq!(eighths(4000, 3000, upright, (341, 256)), 2);
        assert_eq!(eighths(800, 800, upright, (100, 100)), 2);
        assert_eq!(eighths(800, 800, upright, (101, 100)), 3);
        assert_eq!(eighths(8000, 8000, upright, (1, 1)), 1);
        // By 2 or less, on one axis alone, and larger.
        assert_eq!(eighths(800, 800, upright, (400, 400)), 8);
        assert_eq!(eighths(800, 800, upright, (10, 800)), 8);
        assert_eq!(eighths(800, 800, upright, (u64::MAX, 900)), 8);
        // Lying on its side.
        assert_eq!(eighths(4000, 1000, upright, (250, 1000)), 8);
        assert_eq!(eighths(4000, 1000, Orientation::Rotate90, (250, 1000)), 4);

        let jpeg = encode(picture(), ImageFormat::Jpeg);
        let mut pixels = Vec::new();
        let small = decode_into(&jpeg, MAX, |_, _| Some((10, 7)), &mut pixels).unwrap();
        assert_eq!((small.width, small.height), (20, 15));
        assert_eq!(small.data.len(), 20 * 15 * 3);
    }

    #[test]
    fn a_buffer_may_hold_anything() {
        let mut pixels = vec![77; 100_000];
        for (format, name) in FORMATS {
            let file = encode(picture(), format);
            let image = decode_into(&file, MAX, |_, _| None, &mut pixels).unwrap().to_image();
            assert_eq!(image, decode(&file, MAX).unwrap(), "{name}");
        }
    }

    #[test]
    fn sixteen_bits_and_alpha() {
        let picture: ImageBuffer<Rgba<u16>, _> = ImageBuffer::from_pixel(2, 1, Rgba([0x12FF, 0x34FF, 0x56FF, 0]));
        let decoded = decode(&encode(picture, ImageFormat::Png), MAX).unwrap();
        assert_eq!(decoded.data, [0x12, 0x34, 0x56, 0x12, 0x34, 0x56]);
    }

    #[test]
    fn the_size_is_checked_first() {
        for (format, name) in FORMATS {
            let error = decode(&encode(picture(), format), 1199).unwrap_err().to_string();
            assert!(
                error.contains("40 x 30 pixels, more than pomona.max_image_pixels = 1199"),
                "{name}: {error}"
            );
            assert!(decode(&encode(picture(), format), 1200).is_ok(), "{name}");
        }
    }
}
