//! From a decoded image to a network's input, as `preprocessor_config.json` says.
//!
//! The keys are those of Hugging Face image processors; a key that is absent or `null` has the
//! value that `ViTImageProcessor` gives it, and a size that is absent is the network's own. Mean
//! and standard deviation are in the order that the network sees, after the flip of the channels.

use std::fmt::{self, Display};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::graph::{ImageInput, Layout, MAX_SIDE};
use crate::image::crop::center;
use crate::image::decode::decode_into;
use crate::image::resize::{Filter, resize_into};
use crate::image::{Image, ImageView, Scratch};
use crate::policy::{RowError, Stage};
use crate::settings::DecodeMode;

/// Pillow's filters, in the order of their numbers.
const FILTERS: [&str; 6] = ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"];

/// What is wrong with a `preprocessor_config.json`, for a person; the caller names the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// It is no JSON object.
    #[error("it is no JSON object: {0}")]
    Json(String),
    /// A key has a value that cannot be.
    #[error("{key}: {cause}")]
    Key {
        /// The key.
        key: &'static str,
        /// What is wrong with its value.
        cause: String,
    },
}

fn wrong<T>(key: &'static str, cause: impl Display) -> Result<T, ConfigError> {
    Err(ConfigError::Key {
        key,
        cause: cause.to_string(),
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(
    untagged,
    expecting = "expected {\"height\": H, \"width\": W} or {\"shortest_edge\": S}"
)]
enum Size {
    Exact { height: u32, width: u32 },
    ShortestEdge { shortest_edge: u32 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "expected a side or {\"height\": H, \"width\": W}")]
enum CropSize {
    Square(u32),
    Exact { height: u32, width: u32 },
}

/// The value of a key; `None` where it is absent or `null`.
fn key<T: DeserializeOwned>(keys: &Map<String, Value>, key: &'static str) -> Result<Option<T>, ConfigError> {
    match keys.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => T::deserialize(value).map(Some).or_else(|e| wrong(key, e)),
    }
}

fn side(key: &'static str, side: u32) -> Result<u32, ConfigError> {
    match side {
        1..=MAX_SIDE => Ok(side),
        _ => wrong(key, format!("a side of {side} pixels is not between 1 and {MAX_SIDE}")),
    }
}

/// How an image gets its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resize {
    /// To this height and width.
    Exact(u32, u32),
    /// The shorter side to this, the other in proportion.
    ShortestEdge(u32),
}

/// Makes a network's input from an image.
#[derive(Debug, Clone)]
pub struct Preprocess {
    resize: Option<Resize>,
    filter: Filter,
    filter_name: &'static str,
    /// Height and width.
    crop: Option<(u32, u32)>,
    flip: bool,
    rescale: f64,
    mean: [f64; 3],
    std: [f64; 3],
    /// What the network sees for each value of a pixel, by its channels.
    table: Box<[[f32; 256]; 3]>,
    layout: Layout,
    height: u32,
    width: u32,
}

impl Preprocess {
    /// Reads a `preprocessor_config.json` for a network that takes `input`.
    ///
    /// # Errors
    /// Names the key whose value cannot be, or does not fit the network.
    pub fn new(json: &str, input: &ImageInput) -> Result<Self, ConfigError> {
        let keys: Map<String, Value> = serde_json::from_str(json).map_err(|e| ConfigError::Json(e.to_string()))?;
        // Left out, these would change pixels without a word.
        if key::<f64>(&keys, "crop_pct")?.is_some() {
            return wrong(
                "crop_pct",
                "write what it means: size.shortest_edge, do_center_crop and crop_size",
            );
        }
        if key(&keys, "do_pad")?.unwrap_or(false) {
            return wrong("do_pad", "padding is not supported: resize to an exact size instead");
        }

        let do_resize = key(&keys, "do_resize")?.unwrap_or(true);
        let do_center_crop = key(&keys, "do_center_crop")?.unwrap_or(false);
        let network = input.height.zip(input.width);
        let size = match key(&keys, "size")? {
            Some(Size::Exact { height, width }) => Some(Resize::Exact(side("size", height)?, side("size", width)?)),
            Some(Size::ShortestEdge { shortest_edge }) => Some(Resize::ShortestEdge(side("size", shortest_edge)?)),
            None => network.map(|(height, width)| Resize::Exact(height, width)),
        };
        let crop_size = match key(&keys, "crop_size")? {
            Some(CropSize::Square(square)) => Some((side("crop_size", square)?, side("crop_size", square)?)),
            Some(CropSize::Exact { height, width }) => Some((side("crop_size", height)?, side("crop_size", width)?)),
            None => network,
        };
        let (resize, crop) = match (do_resize, size, do_center_crop, crop_size) {
            (true, None, ..) => return wrong("size", "it is needed, for the network takes images of any size"),
            (_, _, true, None) => return wrong("crop_size", "it is needed, for the network takes images of any size"),
            (_, _, true, crop) => (size.filter(|_| do_resize), crop),
            (true, size, false, _) => (size, None),
            (false, ..) => (None, None),
        };
        let (size_key, made) = match (crop, resize) {
            (Some(crop), _) => ("crop_size", Some(crop)),
            (None, Some(Resize::Exact(height, width))) => ("size", Some((height, width))),
            (None, Some(Resize::ShortestEdge(_))) => {
                return wrong(
                    "size",
                    "shortest_edge alone leaves images of different shapes: add do_center_crop and crop_size",
                );
            }
            (None, None) => ("do_resize", network),
        };
        let Some((height, width)) = made else {
            return wrong(
                size_key,
                "without resizing and cropping a network must take one size, this one takes any",
            );
        };
        if input.height.is_some_and(|takes| takes != height) || input.width.is_some_and(|takes| takes != width) {
            let takes =
                [input.height, input.width].map(|side| side.map_or_else(|| "any".to_owned(), |side| side.to_string()));
            return wrong(
                size_key,
                format!(
                    "it makes {height}x{width}, the network takes {} (height x width)",
                    takes.join("x")
                ),
            );
        }

        let resample: u8 = key(&keys, "resample")?.unwrap_or(2);
        let (Some(filter), Some(filter_name)) = (
            Filter::from_pillow(resample),
            FILTERS.get(usize::from(resample)).copied(),
        ) else {
            return wrong(
                "resample",
                format!(
                    "{resample} is none of Pillow's filters: 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic, 4 box, 5 hamming"
                ),
            );
        };
        let rescale: f64 = if key(&keys, "do_rescale")?.unwrap_or(true) {
            key(&keys, "rescale_factor")?.unwrap_or(1.0 / 255.0)
        } else {
            1.0
        };
        let (mean, std): ([f64; 3], [f64; 3]) = if key(&keys, "do_normalize")?.unwrap_or(true) {
            (
                key(&keys, "image_mean")?.unwrap_or([0.5; 3]),
                key(&keys, "image_std")?.unwrap_or([0.5; 3]),
            )
        } else {
            ([0.0; 3], [1.0; 3])
        };
        if std.contains(&0.0) {
            return wrong("image_std", "a standard deviation of 0 cannot be divided by");
        }
        let mut table = Box::new([[0.0f32; 256]; 3]);
        for ((values, mean), std) in table.iter_mut().zip(mean).zip(std) {
            for (pixel, value) in (0u8..=255).zip(values.iter_mut()) {
                *value = ((f64::from(pixel) * rescale - mean) / std) as f32;
            }
        }
        if !table.as_flattened().iter().all(|value| value.is_finite()) {
            return wrong(
                "image_std",
                "with rescale_factor and image_mean, pixels become infinite",
            );
        }

        Ok(Self {
            resize,
            filter,
            filter_name,
            crop,
            flip: key(&keys, "do_flip_channel_order")?.unwrap_or(false),
            rescale,
            mean,
            std,
            table,
            layout: input.layout,
            height,
            width,
        })
    }

    /// Rows of pixels that the network gets.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Columns of pixels that the network gets.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Values that the network gets for one image.
    pub fn values(&self) -> usize {
        self.height as usize * self.width as usize * 3
    }

    /// Has the image the network's size?
    pub fn fits(&self, image: ImageView<'_>) -> bool {
        (image.height, image.width) == (self.height, self.width)
    }

    /// The whole preprocessing of encoded bytes, into [`Self::values`] values. At no time are there
    /// images of more than `max_pixels`.
    ///
    /// # Errors
    /// Where the image cannot be decoded or resized, or is of another size and nothing resizes it.
    pub fn run_encoded(
        &self,
        content: &[u8],
        mode: DecodeMode,
        max_pixels: u64,
        scratch: &mut Scratch,
        values: &mut [f32],
    ) -> Result<(), RowError> {
        let target = |width, height| match mode {
            DecodeMode::Exact => None,
            DecodeMode::Fast => self.resize.map(|resize| resize.target(width, height)),
        };
        let Scratch {
            decoded,
            between,
            resized,
        } = scratch;
        let outcome = decode_into(content, max_pixels, target, decoded)
            .and_then(|image| self.run_with(image, max_pixels, between, resized, values));
        scratch.trim();
        outcome
    }

    /// The whole preprocessing of a decoded image, into [`Self::values`] values. At no time are there
    /// images of more than `max_pixels`.
    ///
    /// # Errors
    /// Where the image cannot be resized, or is of another size and nothing resizes it.
    pub fn run(
        &self,
        image: ImageView<'_>,
        max_pixels: u64,
        scratch: &mut Scratch,
        values: &mut [f32],
    ) -> Result<(), RowError> {
        let outcome = self.run_with(image, max_pixels, &mut scratch.between, &mut scratch.resized, values);
        scratch.trim();
        outcome
    }

    fn run_with(
        &self,
        image: ImageView<'_>,
        max_pixels: u64,
        between: &mut Vec<u8>,
        resized: &mut Vec<u8>,
        values: &mut [f32],
    ) -> Result<(), RowError> {
        let rgb;
        let mut image = image;
        if image.channels == 4 {
            // Before resizing, as Pillow's convert("RGB") does: transparent pixels do not weigh less.
            rgb = without_alpha(image);
            image = rgb.view();
        }
        if let Some((width, height)) = self.resize.map(|resize| resize.target(image.width, image.height)) {
            let allowed = width * height <= max_pixels;
            let (Ok(width), Ok(height), true) = (u32::try_from(width), u32::try_from(height), allowed) else {
                return Err(RowError::new(
                    Stage::Resize,
                    format!(
                        "an image of {} x {} would become one of {width} x {height}, pomona.max_image_pixels allows \
                         {max_pixels}: crop it first",
                        image.width, image.height
                    ),
                ));
            };
            image = resize_into(image, (width, height), self.filter, between, resized)?;
        }
        if let Some((height, width)) = self.crop
            && (height, width) != (image.height, image.width)
        {
            let middle = center(image, width, height)?;
            self.normalize_rows(middle.rows(image), image.channels, values);
            return Ok(());
        }
        if !self.fits(image) {
            return Err(RowError::new(
                Stage::Resize,
                format!(
                    "the image is {} x {}, the network takes {w} x {h}, and its preprocessing does not resize: \
                     use resize(image, {w}, {h})",
                    image.width,
                    image.height,
                    w = self.width,
                    h = self.height
                ),
            ));
        }
        self.normalize(image, values);
        Ok(())
    }

    /// Only the pixels' values, for an image that [fits](Self::fits).
    pub fn normalize(&self, image: ImageView<'_>, values: &mut [f32]) {
        let stride = image.width as usize * usize::from(image.channels);
        self.normalize_rows(image.data.chunks_exact(stride.max(1)), image.channels, values);
    }

    fn normalize_rows<'a>(&self, rows: impl Iterator<Item = &'a [u8]>, channels: u8, values: &mut [f32]) {
        let source = match (channels, self.flip) {
            (1, _) => [0, 0, 0],
            (_, false) => [0, 1, 2],
            (_, true) => [2, 1, 0],
        };
        let channels = usize::from(channels).max(1);
        let width = self.width as usize;
        match self.layout {
            Layout::Nhwc => {
                for (row, values) in rows.zip(values.chunks_exact_mut(width * 3)) {
                    for (pixel, values) in row.chunks_exact(channels).zip(values.chunks_exact_mut(3)) {
                        for ((value, table), source) in values.iter_mut().zip(self.table.iter()).zip(source) {
                            *value = table[usize::from(pixel[source])];
                        }
                    }
                }
            }
            Layout::Nchw => {
                let (first, rest) = values.split_at_mut(self.values() / 3);
                let (second, third) = rest.split_at_mut(self.values() / 3);
                let planes = first
                    .chunks_exact_mut(width)
                    .zip(second.chunks_exact_mut(width))
                    .zip(third.chunks_exact_mut(width));
                for (row, ((first, second), third)) in rows.zip(planes) {
                    for ((plane, table), source) in
                        [first, second, third].into_iter().zip(self.table.iter()).zip(source)
                    {
                        for (pixel, value) in row.chunks_exact(channels).zip(plane) {
                            *value = table[usize::from(pixel[source])];
                        }
                    }
                }
            }
        }
    }
}

impl Resize {
    /// Width and height that an image of this width and height gets; the longer side is cut to whole pixels as torchvision
    /// does it, `int(size * long / short)`. Their product is below 2^56.
    fn target(self, width: u32, height: u32) -> (u64, u64) {
        let (width, height) = (u64::from(width).max(1), u64::from(height).max(1));
        match self {
            Self::Exact(height, width) => (u64::from(width), u64::from(height)),
            Self::ShortestEdge(edge) if width <= height => (u64::from(edge), u64::from(edge) * height / width),
            Self::ShortestEdge(edge) => (u64::from(edge) * width / height, u64::from(edge)),
        }
    }
}

fn without_alpha(image: ImageView<'_>) -> Image {
    let data = image
        .data
        .chunks_exact(4)
        .flat_map(|pixel| [pixel[0], pixel[1], pixel[2]])
        .collect();
    Image {
        width: image.width,
        height: image.height,
        channels: 3,
        data,
    }
}

impl Display for Preprocess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.resize {
            Some(Resize::Exact(height, width)) => write!(f, "resize {width}x{height} {}, ", self.filter_name)?,
            Some(Resize::ShortestEdge(edge)) => write!(f, "resize shortest edge {edge} {}, ", self.filter_name)?,
            None => {}
        }
        if let Some((height, width)) = self.crop {
            write!(f, "crop {width}x{height}, ")?;
        }
        f.write_str(if self.flip { "BGR" } else { "RGB" })?;
        let divisor = 1.0 / self.rescale;
        if self.rescale != 1.0 && (divisor - divisor.round()).abs() < 1e-6 {
            write!(f, ", /{}", divisor.round())?;
        } else if self.rescale != 1.0 {
            write!(f, ", *{}", self.rescale)?;
        }
        if self.mean != [0.0; 3] {
            write!(f, ", mean {}", self.mean.map(|mean| mean.to_string()).join("/"))?;
        }
        if self.std != [1.0; 3] {
            write!(f, ", std {}", self.std.map(|std| std.to_string()).join("/"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn input(layout: Layout, height: u32, width: u32) -> ImageInput {
        ImageInput {
            name: "image".to_owned(),
            layout,
            height: Some(height),
            width: Some(width),
        }
    }

    const CAFFE: &str = r#"{
        "do_rescale": false, "image_mean": [103.939, 116.779, 123.68], "image_std": [1, 1, 1],
        "do_flip_channel_order": true, "resample": 3, "size": null, "image_processor_type": "ViTImageProcessor"
    }"#;

    #[test]
    fn channels_are_flipped_then_normalized_into_the_layout() {
        let image = ImageView {
            width: 2,
            height: 1,
            channels: 3,
            data: &[10, 20, 30, 40, 50, 60],
        };
        let [b, g, r] = [103.939f64, 116.779, 123.68];
        let expected = [30. - b, 20. - g, 10. - r, 60. - b, 50. - g, 40. - r].map(|value| value as f32);
        let mut values = [0.0; 6];
        Preprocess::new(CAFFE, &input(Layout::Nhwc, 1, 2))
            .unwrap()
            .run(image, 100, &mut Scratch::default(), &mut values)
            .unwrap();
        assert_eq!(values, expected);
        Preprocess::new(CAFFE, &input(Layout::Nchw, 1, 2))
            .unwrap()
            .run(image, 100, &mut Scratch::default(), &mut values)
            .unwrap();
        let [a, b, c, d, e, f] = expected;
        assert_eq!(values, [a, d, b, e, c, f]);
    }

    #[test]
    fn grey_is_repeated_and_alpha_dropped() {
        let preprocess = Preprocess::new(
            r#"{"do_rescale": false, "do_normalize": false}"#,
            &input(Layout::Nhwc, 1, 1),
        )
        .unwrap();
        let mut values = [0.0; 3];
        preprocess.normalize(
            ImageView {
                width: 1,
                height: 1,
                channels: 1,
                data: &[7],
            },
            &mut values,
        );
        assert_eq!(values, [7.0; 3]);
        preprocess
            .run(
                ImageView {
                    width: 1,
                    height: 1,
                    channels: 4,
                    data: &[1, 2, 3, 4],
                },
                1,
                &mut Scratch::default(),
                &mut values,
            )
            .unwrap();
        assert_eq!(values, [1., 2., 3.]);
    }

    #[test]
    fn the_longer_side_is_cut_to_whole_pixels() {
        assert_eq!(Resize::ShortestEdge(256).target(100, 37), (691, 256));
        assert_eq!(Resize::ShortestEdge(256).target(37, 100), (256, 691));
        assert_eq!(Resize::Exact(2, 3).target(37, 100), (3, 2));
    }

    #[test]
    fn what_cannot_be_names_the_key() {
        for (json, expected) in [
            ("[]", "no JSON object"),
            (r#"{"image_std": [1, 0, 1]}"#, "image_std: a standard deviation of 0"),
            (r#"{"image_mean": [1, 2]}"#, "image_mean: invalid length 2"),
            (r#"{"resample": 9}"#, "resample: 9 is none"),
            (r#"{"size": {"height": 0, "width": 8}}"#, "size: a side of 0 pixels"),
            (r#"{"size": 224}"#, "size: expected"),
            (
                r#"{"size": {"height": 8, "width": 9}}"#,
                "size: it makes 8x9, the network takes 8x8",
            ),
            (r#"{"size": {"shortest_edge": 8}}"#, "size: shortest_edge alone"),
            (r#"{"crop_pct": 0.875}"#, "crop_pct: write what it means"),
            (r#"{"rescale_factor": 1e300}"#, "image_std: with rescale_factor"),
        ] {
            let error = Preprocess::new(json, &input(Layout::Nhwc, 8, 8))
                .unwrap_err()
                .to_string();
            assert!(error.contains(expected), "{json}: {error}");
        }
        let any = ImageInput {
            height: None,
            width: None,
            ..input(Layout::Nchw, 1, 1)
        };
        let error = Preprocess::new("{}", &any).unwrap_err().to_string();
        assert!(error.contains("size: it is needed"), "{error}");
    }

    #[test]
    fn it_describes_itself() {
        let caffe = Preprocess::new(CAFFE, &input(Layout::Nhwc, 224, 224)).unwrap();
        assert_eq!(
            caffe.to_string(),
            "resize 224x224 bicubic, BGR, mean 103.939/116.779/123.68"
        );
        let torchvision = r#"{
            "size": {"shortest_edge": 256}, "do_center_crop": true, "crop_size": 224,
            "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]
        }"#;
        assert_eq!(
            Preprocess::new(torchvision, &input(Layout::Nchw, 224, 224))
                .unwrap()
                .to_string(),
            "resize shortest edge 256 bilinear, crop 224x224, RGB, /255, mean 0.485/0.456/0.406, std 0.229/0.224/0.225"
        );
    }
}
