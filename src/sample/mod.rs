//! The sample data set: labelled pictures of fruits, 100x100 JPEGs on white in the folders of
//! Fruits-360, so that the first query needs no data, no network and no account.
//!
//! | | |
//! |---|---|
//! | `sample://fruits/Training/<label>/000.jpg` … | 40 of each label |
//! | `sample://fruits/Test/<label>/000.jpg` … | 15 of each label, drawn from other random numbers |
//!
//! The pictures are drawn, not stored, with variety in pose, size, light and colour: the file
//! `fruits.rs` says what grows, `draw.rs` takes the pictures. [`SampleStore`] serves them like any
//! other object store; [`write_sample`] writes as many as are wanted elsewhere.

mod draw;
mod fruits;

use std::fmt::{self, Display};
use std::num::NonZero;
use std::pin::pin;
use std::sync::Arc;
use std::thread::available_parallelism;

use async_trait::async_trait;
use chrono::DateTime;
use datafusion::common::runtime::SpawnedTask;
use datafusion::error::{DataFusionError, Result};
use futures::stream::{self, BoxStream, Stream, StreamExt, TryStreamExt};
use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageResult};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use tokio::sync::OnceCell;

use draw::{Random, SIZE};
use fruits::Fruit;

/// How many pictures `sample://fruits/` holds.
pub const SAMPLE_IMAGES: usize = 440;

/// The seed of the pictures of `sample://fruits/`.
pub const SAMPLE_SEED: u64 = 0;

const SPLITS: [&str; 2] = ["Training", "Test"];

const JPEG_QUALITY: u8 = 90;

/// How many pictures are on their way to a store at the same time.
const WRITES: usize = 32;

/// One picture of a data set, before it is drawn.
#[derive(Debug, Clone, Copy)]
struct Picture {
    fruit: Fruit,
    /// Position in [`SPLITS`].
    split: usize,
    index: usize,
    /// Digits of the file's name.
    digits: usize,
}

impl Picture {
    fn path(&self) -> Path {
        let Self {
            fruit,
            split,
            index,
            digits,
        } = *self;
        Path::from(format!("{}/{}/{index:0digits$}.jpg", SPLITS[split], fruit.label()))
    }

    /// Does not depend on how many pictures the data set has.
    fn jpeg(&self, seed: u64) -> ImageResult<Vec<u8>> {
        let random = Random::new(&[seed, self.fruit as u64, self.split as u64, self.index as u64]);
        let pixels = self.fruit.draw(random);
        let mut jpeg = Vec::new();
        JpegEncoder::new_with_quality(&mut jpeg, JPEG_QUALITY).encode(
            &pixels,
            SIZE as u32,
            SIZE as u32,
            ExtendedColorType::Rgb8,
        )?;
        Ok(jpeg)
    }
}

/// The pictures of a data set of `images`: as many of each label as of the others (or one more), 8
/// for training to 3 for testing.
fn pictures(images: usize) -> impl Iterator<Item = Picture> {
    let labels = Fruit::ALL.len();
    let counts = move |position: usize| {
        let count = images / labels + usize::from(position < images % labels);
        let test = (count * 3 + 5) / 11;
        [count - test, test]
    };
    let last = counts(0)[0].saturating_sub(1);
    let digits = last.to_string().len().max(3);
    (0..SPLITS.len()).flat_map(move |split| {
        (0..labels).flat_map(move |position| {
            let fruit = Fruit::ALL[position];
            (0..counts(position)[split]).map(move |index| Picture {
                fruit,
                split,
                index,
                digits,
            })
        })
    })
}

/// The paths and contents of the pictures of a data set, in order, drawn on all cores; only as far
/// ahead of who reads them as there are cores.
fn drawn(images: usize, seed: u64) -> impl Stream<Item = object_store::Result<(Path, Vec<u8>)>> {
    let cores = available_parallelism().map_or(1, NonZero::get);
    let draw = move |picture: Picture| async move {
        let task = SpawnedTask::spawn_blocking(move || picture.jpeg(seed));
        let jpeg = task.join_unwind().await.map_err(generic)?.map_err(generic)?;
        Ok::<_, Error>((picture.path(), jpeg))
    };
    stream::iter(pictures(images)).map(draw).buffered(cores)
}

fn generic(source: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Generic {
        store: "sample",
        source: Box::new(source),
    }
}

/// What [`write_sample`] wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleSummary {
    /// Pictures below `Training/`.
    pub training: usize,
    /// Pictures below `Test/`.
    pub test: usize,
    /// The size of all of them.
    pub bytes: u64,
}

/// Writes a data set of `images` pictures below `prefix`; with [`SAMPLE_IMAGES`] and [`SAMPLE_SEED`]
/// the one of `sample://fruits/`. Pictures are drawn while others are written, and few are held at a
/// time. A larger data set of the same seed holds the pictures of a smaller one, and more.
///
/// # Errors
/// What the store says about the picture that it did not take.
pub async fn write_sample(
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    images: usize,
    seed: u64,
) -> Result<SampleSummary> {
    let write = move |(path, jpeg): (Path, Vec<u8>)| {
        let store = Arc::clone(&store);
        let location: Path = prefix.parts().chain(path.parts()).collect();
        async move {
            let size = jpeg.len() as u64;
            match store.put(&location, jpeg.into()).await {
                Ok(_) => Ok(size),
                Err(e) => Err(DataFusionError::from(e).context(format!("writing {location}"))),
            }
        }
    };
    let sizes = drawn(images, seed).map_err(DataFusionError::from).map_ok(write);
    let sizes = sizes.try_buffer_unordered(WRITES);
    let bytes = sizes.try_fold(0_u64, |sum, size| async move { Ok(sum + size) }).await?;
    let training = pictures(images).filter(|picture| picture.split == 0).count();
    Ok(SampleSummary {
        training,
        test: images - training,
        bytes,
    })
}

/// The object store behind `sample://fruits/`: in memory, read-only, and drawn when it is first
/// used, once per process.
#[derive(Debug, Default)]
pub struct SampleStore(());

impl SampleStore {
    /// The store; nothing is drawn yet.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Display for SampleStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sample://fruits/")
    }
}

static OBJECTS: OnceCell<InMemory> = OnceCell::const_new();

async fn objects() -> object_store::Result<&'static InMemory> {
    let draw = || async {
        let objects = InMemory::new();
        let mut drawn = pin!(drawn(SAMPLE_IMAGES, SAMPLE_SEED));
        // One after the other: the tag of an object is its position.
        while let Some((path, jpeg)) = drawn.try_next().await? {
            objects.put(&path, jpeg.into()).await?;
        }
        Ok::<_, Error>(objects)
    };
    OBJECTS.get_or_try_init(draw).await
}

/// What is drawn has no date; with the hour of its drawing no two runs would list the same.
fn undated(meta: ObjectMeta) -> ObjectMeta {
    ObjectMeta {
        last_modified: DateTime::UNIX_EPOCH,
        ..meta
    }
}

fn read_only() -> Error {
    Error::NotSupported {
        source: "sample:// is read-only; `pomona sample DIR` writes a copy that is yours to change".into(),
    }
}

#[async_trait]
impl ObjectStore for SampleStore {
    async fn get_opts(&self, location: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        let objects = objects().await?;
        // Conditions hold for the date that is listed, not for the one of the memory below.
        let meta = undated(objects.head(location).await?);
        options.check_preconditions(&meta)?;
        let range = GetOptions {
            range: options.range,
            head: options.head,
            ..GetOptions::default()
        };
        Ok(GetResult {
            meta,
            ..objects.get_opts(location, range).await?
        })
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let prefix = prefix.cloned();
        let listing = async move { Ok::<_, Error>(objects().await?.list(prefix.as_ref())) };
        stream::once(listing).try_flatten().map_ok(undated).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        let listing = objects().await?.list_with_delimiter(prefix).await?;
        let objects = listing.objects.into_iter().map(undated).collect();
        Ok(ListResult { objects, ..listing })
    }

    async fn put_opts(&self, _: &Path, _: PutPayload, _: PutOptions) -> object_store::Result<PutResult> {
        Err(read_only())
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        Err(read_only())
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        locations
            .map(|location| location.and_then(|_| Err(read_only())))
            .boxed()
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> object_store::Result<()> {
        Err(read_only())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    async fn listing(store: &dyn ObjectStore, prefix: &str) -> Vec<ObjectMeta> {
        store.list(Some(&Path::from(prefix))).try_collect().await.unwrap()
    }

    #[test]
    fn pictures_are_the_same_on_every_machine() {
        // FNV-1a of the first picture of every label.
        let pixels = Fruit::ALL
            .iter()
            .flat_map(|fruit| fruit.draw(Random::new(&[0, *fruit as u64, 0, 0])));
        let hash = pixels.fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
        });
        assert_eq!(hash, 0xB18E_1CB4_1D79_E1BF);
    }

    #[test]
    fn labels_are_balanced_and_names_sort() {
        for images in [0, 1, 7, 8, 440, 441, 12_345] {
            let all: Vec<_> = pictures(images).collect();
            assert_eq!(all.len(), images);
            let of = |fruit| all.iter().filter(|picture| picture.fruit == fruit).count();
            let counts = Fruit::ALL.map(of);
            assert!(counts[0] - counts[7] <= 1, "{counts:?}");
            let paths: Vec<_> = all.iter().map(Picture::path).collect();
            let training = all.iter().filter(|picture| picture.split == 0).count();
            assert!(paths[..training].is_sorted() && paths[training..].is_sorted());
        }
        assert_eq!(pictures(440).filter(|picture| picture.split == 1).count(), 8 * 15);
        let first = |images| pictures(images).next().unwrap().path().to_string();
        assert_eq!(first(440), "Training/Apple/000.jpg");
        assert_eq!(first(1_000_000), "Training/Apple/00000.jpg");
    }

    #[tokio::test]
    async fn serves_labelled_jpegs() {
        let store = SampleStore::new();
        assert_eq!(listing(&store, "").await.len(), SAMPLE_IMAGES);
        assert_eq!(listing(&store, "Training/Kiwi").await.len(), 40);
        let labels = store.list_with_delimiter(Some(&Path::from("Test"))).await.unwrap();
        assert_eq!(
            labels.common_prefixes,
            Fruit::ALL.map(|fruit| Path::from(format!("Test/{}", fruit.label())))
        );

        let meta = listing(&store, "Test/Plum").await.remove(14);
        assert_eq!(meta.location.as_ref(), "Test/Plum/014.jpg");
        let options = GetOptions {
            if_match: meta.e_tag.clone(),
            if_unmodified_since: Some(meta.last_modified),
            ..GetOptions::default()
        };
        let got = store.get_opts(&meta.location, options).await.unwrap();
        assert_eq!(got.meta, meta);
        let jpeg = got.bytes().await.unwrap();
        assert_eq!(jpeg.len() as u64, meta.size);
        let image = image::load_from_memory(&jpeg).unwrap().to_rgb8();
        assert_eq!(image.dimensions(), (100, 100));
        assert!(
            image.get_pixel(0, 0).0.iter().all(|level| *level > 250),
            "white around the fruit"
        );

        let missing = store.get(&Path::from("Test/Plum/015.jpg")).await;
        assert!(matches!(missing, Err(Error::NotFound { .. })));
        let written = store.put(&meta.location, jpeg.into()).await;
        assert!(written.unwrap_err().to_string().contains("read-only"));
    }

    #[tokio::test]
    async fn the_default_sample_is_the_built_in_one() {
        let target = Arc::new(InMemory::new());
        let store = Arc::clone(&target) as Arc<dyn ObjectStore>;
        let summary = write_sample(store, Path::from("a/b"), SAMPLE_IMAGES, SAMPLE_SEED)
            .await
            .unwrap();
        let written = listing(target.as_ref(), "a/b").await;
        let built_in = listing(&SampleStore::new(), "").await;
        assert_eq!((summary.training, summary.test), (320, 120));
        assert_eq!(summary.bytes, built_in.iter().map(|meta| meta.size).sum::<u64>());
        for (written, built_in) in written.iter().zip(&built_in) {
            assert_eq!(written.location.as_ref(), format!("a/b/{}", built_in.location));
            assert_eq!(written.size, built_in.size);
        }
    }
}
