//! A store of as many objects as one likes, on no disk and in no memory: the sample's images, again
//! and again under other names.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::AsArray;
use async_trait::async_trait;
use bytes::Bytes;
use chrono::DateTime;
use futures::stream::{self, BoxStream, StreamExt};
use object_store::path::Path;
use object_store::{
    Attributes, CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use url::Url;

use crate::common::Engine;

/// Objects that S3 lists at once.
const PAGE: usize = 1000;

/// 'Training/label-042/0001234.jpg': as many objects of each label.
#[derive(Debug, Clone)]
pub(crate) struct RepeatedStore {
    images: Arc<[Bytes]>,
    objects: usize,
    labels: usize,
    /// How long each answer takes.
    latency: Duration,
}

/// The sample's images.
pub(crate) fn sample_images(engine: &Engine) -> Arc<[Bytes]> {
    let sql = "SELECT arrow_cast(content, 'Binary') AS content FROM images('sample://fruits/Training/')";
    let batches = engine.wait(async { engine.session.sql(sql).await.unwrap().collect().await.unwrap() });
    let contents = batches
        .iter()
        .flat_map(|batch| batch.column(0).as_binary::<i32>().iter().flatten());
    contents.map(Bytes::copy_from_slice).collect()
}

impl RepeatedStore {
    pub(crate) fn new(images: Arc<[Bytes]>, objects: usize, labels: usize, latency: Duration) -> Self {
        Self {
            images,
            objects,
            labels,
            latency,
        }
    }

    /// Has a session find it; the location of its images.
    pub(crate) fn register(self, engine: &Engine) -> &'static str {
        let url = Url::parse("s3://bench").unwrap();
        engine.session.register_object_store(&url, Arc::new(self));
        "s3://bench/Training/"
    }

    fn objects_of_a_label(&self) -> usize {
        self.objects.div_ceil(self.labels)
    }

    fn label(label: usize) -> Path {
        Path::from(format!("Training/label-{label:03}"))
    }

    fn meta(&self, object: usize) -> ObjectMeta {
        let (label, number) = (object / self.objects_of_a_label(), object % self.objects_of_a_label());
        ObjectMeta {
            location: Self::label(label).join(format!("{number:07}.jpg")),
            last_modified: DateTime::UNIX_EPOCH,
            size: self.images[object % self.images.len()].len() as u64,
            e_tag: Some(format!("\"{object:032x}\"")),
            version: None,
        }
    }

    /// The label that a key, or a prefix, names.
    fn label_of(key: &Path) -> Option<usize> {
        let label = key.parts().nth(1)?;
        label.as_ref().strip_prefix("label-")?.parse().ok()
    }

    fn below(&self, prefix: Option<&Path>) -> Range<usize> {
        match prefix.and_then(Self::label_of) {
            None => 0..self.objects,
            Some(label) => {
                let at = |label| self.objects.min(label * self.objects_of_a_label());
                at(label)..at(label + 1)
            }
        }
    }

    async fn answer(&self) {
        if self.latency.is_zero() {
            // Not even the nearest server answers at once.
            tokio::task::yield_now().await;
        } else {
            tokio::time::sleep(self.latency).await;
        }
    }
}

impl fmt::Display for RepeatedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} objects", self.objects)
    }
}

fn only_reads() -> Error {
    Error::NotSupported {
        source: "it is only read".into(),
    }
}

#[async_trait]
impl ObjectStore for RepeatedStore {
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let objects = self.below(prefix);
        stream::unfold((self.clone(), objects), |(store, objects)| async move {
            if objects.is_empty() {
                return None;
            }
            store.answer().await;
            let end = objects.end.min(objects.start + PAGE);
            let page: Vec<_> = (objects.start..end).map(|object| Ok(store.meta(object))).collect();
            Some((stream::iter(page), (store, end..objects.end)))
        })
        .flatten()
        .boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.answer().await;
        let labels = self.objects.div_ceil(self.objects_of_a_label().max(1));
        let (common_prefixes, objects) = match prefix {
            Some(prefix) if Self::label_of(prefix).is_some() => (vec![], self.below(Some(prefix))),
            Some(_) => ((0..labels).map(Self::label).collect(), 0..0),
            None => (vec![Path::from("Training")], 0..0),
        };
        Ok(ListResult {
            common_prefixes,
            objects: objects.map(|object| self.meta(object)).collect(),
        })
    }

    async fn get_opts(&self, location: &Path, _: GetOptions) -> Result<GetResult> {
        self.answer().await;
        let number = location
            .filename()
            .and_then(|name| name.strip_suffix(".jpg")?.parse::<usize>().ok());
        let object = Self::label_of(location).zip(number);
        let object = object.map(|(label, number)| label * self.objects_of_a_label() + number);
        let Some(object) = object.filter(|object| *object < self.objects) else {
            return Err(Error::NotFound {
                path: location.to_string(),
                source: "there is no such object".into(),
            });
        };
        let image = self.images[object % self.images.len()].clone();
        let meta = self.meta(object);
        Ok(GetResult {
            range: 0..meta.size,
            meta,
            payload: GetResultPayload::Stream(stream::once(async move { Ok(image) }).boxed()),
            attributes: Attributes::default(),
        })
    }

    async fn put_opts(&self, _: &Path, _: PutPayload, _: PutOptions) -> Result<PutResult> {
        Err(only_reads())
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Err(only_reads())
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        locations
            .map(|location| location.and_then(|_| Err(only_reads())))
            .boxed()
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(only_reads())
    }
}
