//! Images as SQL values, and the functions over them.
//!
//! An image is a struct `{height: Int32, width: Int32, channels: Int8, data: Binary}`: 8 bits per
//! channel, row-major, channels interleaved, as Spark and Daft have it. Every row says its own
//! shape. Decoding always gives 3 channels (RGB); images made elsewhere may have 1 (grey) or 4
//! (RGBA) and are accepted everywhere.

pub(crate) mod crop;
pub mod decode;
mod encode;
mod info;
pub mod resize;
mod rows;

use std::sync::{Arc, LazyLock};

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, BinaryBuilder, BinaryViewArray, FixedSizeBinaryArray, Int8Array,
    Int8Builder, Int32Array, Int32Builder, LargeBinaryArray, NullBufferBuilder, StructArray,
};
use arrow::datatypes::{DataType, Field, Fields, Int8Type, Int32Type};
use datafusion::common::{exec_err, internal_err, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::ScalarUDF;

use crate::policy::{RowError, Stage};

/// The functions of this module.
pub fn functions() -> Vec<Arc<ScalarUDF>> {
    [
        decode::functions(),
        resize::functions(),
        crop::functions(),
        info::functions(),
        encode::functions(),
    ]
    .concat()
}

static IMAGE_FIELDS: LazyLock<Fields> = LazyLock::new(|| {
    Fields::from(vec![
        Field::new("height", DataType::Int32, true),
        Field::new("width", DataType::Int32, true),
        Field::new("channels", DataType::Int8, true),
        Field::new("data", DataType::Binary, true),
    ])
});

/// The SQL type of an image.
pub fn image_type() -> DataType {
    DataType::Struct(IMAGE_FIELDS.clone())
}

/// Is this the SQL type of an image? Names and meaning count; the data may be any binary type.
pub fn is_image_type(data_type: &DataType) -> bool {
    let DataType::Struct(fields) = data_type else {
        return false;
    };
    ["height", "width", "channels", "data"]
        .iter()
        .all(|name| fields.find(name).is_some())
}

/// Is this a SQL type that holds encoded bytes?
pub fn is_content_type(data_type: &DataType) -> bool {
    matches!(
        data_type,
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_)
    )
}

/// The type to which an argument that is encoded bytes or an image is coerced.
///
/// # Errors
/// A plan error for any other type.
pub fn coerce_content_or_image(function: &str, data_type: &DataType) -> Result<DataType> {
    match data_type {
        DataType::Null => Ok(DataType::Binary),
        t if is_content_type(t) => Ok(t.clone()),
        t if is_image_type(t) => Ok(image_type()),
        t => plan_err!("{function} takes the encoded bytes of an image (Binary) or a decoded image, not {t}"),
    }
}

/// The type to which an argument that must be a decoded image is coerced.
///
/// # Errors
/// A plan error for any other type; for encoded bytes it tells how to decode them.
pub fn coerce_image(function: &str, data_type: &DataType) -> Result<DataType> {
    match data_type {
        DataType::Null => Ok(image_type()),
        t if is_image_type(t) => Ok(image_type()),
        t if is_content_type(t) => {
            plan_err!("{function} takes a decoded image, not {t}: use decode_image(…) on it first")
        }
        t => plan_err!("{function} takes a decoded image, not {t}"),
    }
}

/// The type to which an argument that must be encoded bytes is coerced.
///
/// # Errors
/// A plan error for any other type.
pub fn coerce_content(function: &str, data_type: &DataType) -> Result<DataType> {
    match data_type {
        DataType::Null => Ok(DataType::Binary),
        t if is_content_type(t) => Ok(t.clone()),
        t => plan_err!("{function} takes the encoded bytes of an image (Binary), not {t}"),
    }
}

/// A decoded image that owns its pixels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Columns of pixels.
    pub width: u32,
    /// Rows of pixels.
    pub height: u32,
    /// Values per pixel: 1 (grey), 3 (RGB) or 4 (RGBA).
    pub channels: u8,
    /// `height * width * channels` values, row-major, interleaved.
    pub data: Vec<u8>,
}

impl Image {
    /// Borrows the pixels.
    pub fn view(&self) -> ImageView<'_> {
        ImageView {
            width: self.width,
            height: self.height,
            channels: self.channels,
            data: &self.data,
        }
    }
}

/// A decoded image that borrows its pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageView<'a> {
    /// Columns of pixels.
    pub width: u32,
    /// Rows of pixels.
    pub height: u32,
    /// Values per pixel: 1 (grey), 3 (RGB) or 4 (RGBA).
    pub channels: u8,
    /// `height * width * channels` values, row-major, interleaved.
    pub data: &'a [u8],
}

impl ImageView<'_> {
    /// Copies the pixels.
    pub fn to_image(self) -> Image {
        Image {
            width: self.width,
            height: self.height,
            channels: self.channels,
            data: self.data.to_vec(),
        }
    }
}

/// Memory that one worker uses again for image after image, on the way from encoded bytes to a
/// network's input.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The pixels of the decoded image.
    pub(crate) decoded: Vec<u8>,
    /// What the first pass of a resize leaves to the second.
    pub(crate) between: Vec<u8>,
    /// The pixels of the resized image.
    pub(crate) resized: Vec<u8>,
}

impl Scratch {
    /// The most bytes of a buffer that is kept: 16 megapixels, which hardly a photo exceeds.
    const KEPT: usize = 48 << 20;

    /// Gives back what a huge image has needed, so that it is not held while small ones follow.
    pub(crate) fn trim(&mut self) {
        for buffer in [&mut self.decoded, &mut self.between, &mut self.resized] {
            if buffer.capacity() > Self::KEPT {
                *buffer = Vec::new();
            }
        }
    }
}

/// A column of encoded bytes, whichever binary type it has.
#[derive(Debug)]
pub enum ContentColumn<'a> {
    /// `Binary`
    Binary(&'a BinaryArray),
    /// `LargeBinary`
    LargeBinary(&'a LargeBinaryArray),
    /// `BinaryView`
    BinaryView(&'a BinaryViewArray),
    /// `FixedSizeBinary`
    FixedSizeBinary(&'a FixedSizeBinaryArray),
}

impl<'a> ContentColumn<'a> {
    /// Reads `array` as encoded bytes.
    ///
    /// # Errors
    /// An internal error where the planner let another type through.
    pub fn try_new(array: &'a dyn Array) -> Result<Self> {
        match array.data_type() {
            DataType::Binary => Ok(Self::Binary(array.as_binary())),
            DataType::LargeBinary => Ok(Self::LargeBinary(array.as_binary())),
            DataType::BinaryView => Ok(Self::BinaryView(array.as_binary_view())),
            DataType::FixedSizeBinary(_) => Ok(Self::FixedSizeBinary(array.as_fixed_size_binary())),
            other => internal_err!("expected encoded bytes, found {other}"),
        }
    }

    /// The bytes of row `i`; `None` for NULL.
    pub fn get(&self, i: usize) -> Option<&'a [u8]> {
        match self {
            Self::Binary(a) => a.is_valid(i).then(|| a.value(i)),
            Self::LargeBinary(a) => a.is_valid(i).then(|| a.value(i)),
            Self::BinaryView(a) => a.is_valid(i).then(|| a.value(i)),
            Self::FixedSizeBinary(a) => a.is_valid(i).then(|| a.value(i)),
        }
    }
}

/// A column of decoded images.
#[derive(Debug)]
pub struct ImageColumn<'a> {
    rows: &'a StructArray,
    height: &'a Int32Array,
    width: &'a Int32Array,
    channels: &'a Int8Array,
    data: &'a BinaryArray,
}

impl<'a> ImageColumn<'a> {
    /// Reads `array` as decoded images.
    ///
    /// # Errors
    /// An internal error where the planner let another type through.
    pub fn try_new(array: &'a dyn Array) -> Result<Self> {
        if array.data_type() != &image_type() {
            return internal_err!("expected an image, found {}", array.data_type());
        }
        let rows = array.as_struct();
        Ok(Self {
            rows,
            height: rows.column(0).as_primitive::<Int32Type>(),
            width: rows.column(1).as_primitive::<Int32Type>(),
            channels: rows.column(2).as_primitive::<Int8Type>(),
            data: rows.column(3).as_binary::<i32>(),
        })
    }

    /// The image of row `i`; `None` for NULL.
    ///
    /// # Errors
    /// A struct can be made by hand in SQL: a shape that its data does not have is an error of
    /// `stage`, the stage of the function that reads it.
    pub fn get(&self, i: usize, stage: Stage) -> Option<Result<ImageView<'a>, RowError>> {
        if self.rows.is_null(i) {
            return None;
        }
        let parts = [
            self.height.is_valid(i),
            self.width.is_valid(i),
            self.channels.is_valid(i),
            self.data.is_valid(i),
        ];
        if parts.contains(&false) {
            return Some(Err(RowError::new(
                stage,
                "an image has a NULL height, width, channels or data",
            )));
        }
        let (height, width, channels) = (self.height.value(i), self.width.value(i), self.channels.value(i));
        let data = self.data.value(i);
        let shape = (u32::try_from(height), u32::try_from(width), u8::try_from(channels));
        let view = match shape {
            (Ok(height @ 1..), Ok(width @ 1..), Ok(channels @ (1 | 3 | 4)))
                if u64::from(height) * u64::from(width) * u64::from(channels) == data.len() as u64 =>
            {
                Ok(ImageView {
                    width,
                    height,
                    channels,
                    data,
                })
            }
            _ => Err(RowError::new(
                stage,
                format!(
                    "an image says height {height}, width {width}, channels {channels}, but has {} bytes of data \
                     (height, width ≥ 1, channels 1, 3 or 4, and their product is the number of bytes)",
                    data.len()
                ),
            )),
        };
        Some(view)
    }
}

/// A column that holds either encoded bytes or decoded images.
#[derive(Debug)]
pub enum SourceColumn<'a> {
    /// Encoded bytes.
    Content(ContentColumn<'a>),
    /// Decoded images.
    Image(ImageColumn<'a>),
}

impl<'a> SourceColumn<'a> {
    /// Reads `array` as encoded bytes or decoded images.
    ///
    /// # Errors
    /// An internal error where the planner let another type through.
    pub fn try_new(array: &'a dyn Array) -> Result<Self> {
        if is_content_type(array.data_type()) {
            ContentColumn::try_new(array).map(Self::Content)
        } else {
            ImageColumn::try_new(array).map(Self::Image)
        }
    }
}

/// Builds a column of images.
#[derive(Debug)]
pub struct ImageBuilder {
    height: Int32Builder,
    width: Int32Builder,
    channels: Int8Builder,
    data: BinaryBuilder,
    nulls: NullBufferBuilder,
}

impl ImageBuilder {
    /// A builder for `rows` rows.
    pub fn with_capacity(rows: usize) -> Self {
        Self {
            height: Int32Builder::with_capacity(rows),
            width: Int32Builder::with_capacity(rows),
            channels: Int8Builder::with_capacity(rows),
            data: BinaryBuilder::with_capacity(rows, 0),
            nulls: NullBufferBuilder::new(rows),
        }
    }

    /// Appends an image, or NULL.
    ///
    /// # Errors
    /// Where the column would hold more than the 2 GiB that its type can address.
    pub fn append(&mut self, image: Option<ImageView<'_>>) -> Result<()> {
        let Some(image) = image else {
            self.height.append_null();
            self.width.append_null();
            self.channels.append_null();
            self.data.append_null();
            self.nulls.append_null();
            return Ok(());
        };
        let held = self.data.values_slice().len();
        match (
            i32::try_from(image.height),
            i32::try_from(image.width),
            i8::try_from(image.channels),
        ) {
            (Ok(height), Ok(width), Ok(channels)) if held + image.data.len() <= i32::MAX as usize => {
                self.height.append_value(height);
                self.width.append_value(width);
                self.channels.append_value(channels);
                self.data.append_value(image.data);
                self.nulls.append_non_null();
                Ok(())
            }
            _ => exec_err!(
                "a batch of images is larger than 2 GiB (here {held} bytes and one of {} x {}): use a smaller \
                 datafusion.execution.batch_size, or resize the images where they are decoded, \
                 resize(content, width, height)",
                image.width,
                image.height
            ),
        }
    }

    /// The column.
    pub fn finish(mut self) -> ArrayRef {
        Arc::new(StructArray::new(
            IMAGE_FIELDS.clone(),
            vec![
                Arc::new(self.height.finish()),
                Arc::new(self.width.finish()),
                Arc::new(self.channels.finish()),
                Arc::new(self.data.finish()),
            ],
            self.nulls.finish(),
        ))
    }
}
