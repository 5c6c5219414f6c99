//! The store that the registry gives out.

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
};
use tokio::sync::OnceCell;
use url::Url;

use super::explain::{self, Operation};
use super::upload::GuardedUpload;
use super::{StoreOptions, cloud};

/// A store that is opened when it is first used, because only then are credentials needed; whose
/// errors explain themselves; and whose uploads are aborted when they are dropped.
#[derive(Clone)]
pub(super) struct LazyStore(Arc<Inner>);

struct Inner {
    /// 's3://bucket'
    root: String,
    /// How to open it; `None` where it is open from the start.
    source: Option<(Url, StoreOptions)>,
    opened: OnceCell<Opened>,
}

struct Opened {
    store: Arc<dyn ObjectStore>,
    explainer: Explainer,
}

/// What it takes to explain an error of a store.
#[derive(Debug, Clone)]
pub(super) struct Explainer {
    root: Arc<str>,
    /// Where the credentials came from; empty where there is nothing to say.
    credentials: Arc<str>,
}

impl Explainer {
    pub(super) fn new(root: String, credentials: String) -> Self {
        Self {
            root: root.into(),
            credentials: credentials.into(),
        }
    }

    pub(super) fn explain(&self, error: Error, operation: Operation, path: Option<&Path>) -> Error {
        explain::explain(error, operation, &self.root, path, &self.credentials)
    }
}

impl Opened {
    fn new(root: &str, store: Arc<dyn ObjectStore>, credentials: String) -> Self {
        Self {
            store,
            explainer: Explainer::new(root.to_owned(), credentials),
        }
    }

    /// Awaits an operation of the store and explains its error.
    async fn explained<T>(
        &self,
        operation: Operation,
        path: Option<&Path>,
        result: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        result
            .await
            .map_err(|error| self.explainer.explain(error, operation, path))
    }
}

impl LazyStore {
    /// The store at `url`, which is opened with `options` when it is first used.
    pub(super) fn new(root: String, url: Url, options: StoreOptions) -> Self {
        Self(Arc::new(Inner {
            root,
            source: Some((url, options)),
            opened: OnceCell::new(),
        }))
    }

    /// A store that is open.
    pub(super) fn opened(root: String, store: Arc<dyn ObjectStore>) -> Self {
        let opened = Opened::new(&root, store, String::new());
        Self(Arc::new(Inner {
            root,
            source: None,
            opened: OnceCell::new_with(Some(opened)),
        }))
    }

    /// The stream that `start` makes of the opened store, its errors explained.
    fn stream<T: Send + 'static>(
        &self,
        operation: Operation,
        path: Option<Path>,
        start: impl FnOnce(&dyn ObjectStore, Option<&Path>) -> BoxStream<'static, Result<T>> + Send + 'static,
    ) -> BoxStream<'static, Result<T>> {
        let inner = Arc::clone(&self.0);
        futures::stream::once(async move {
            let opened = inner.open().await?;
            let explainer = opened.explainer.clone();
            let stream = start(opened.store.as_ref(), path.as_ref());
            Ok::<_, Error>(stream.map_err(move |error| explainer.explain(error, operation, path.as_ref())))
        })
        .try_flatten()
        .boxed()
    }
}

impl Inner {
    async fn open(&self) -> Result<&Opened> {
        self.opened
            .get_or_try_init(|| async {
                let Some((url, options)) = &self.source else {
                    return Err(Error::Generic {
                        store: "store",
                        source: "it is not open and cannot be opened".into(),
                    });
                };
                match cloud::open(url, options).await {
                    Ok((store, credentials)) => Ok(Opened::new(&self.root, store, credentials)),
                    Err(error) => Err(explain::explain(error, Operation::Open, &self.root, None, "")),
                }
            })
            .await
    }
}

impl fmt::Debug for LazyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LazyStore").field(&self.0.root).finish()
    }
}

impl fmt::Display for LazyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.root)
    }
}

#[async_trait]
impl ObjectStore for LazyStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let opened = self.0.open().await?;
        opened
            .explained(
                Operation::Write,
                Some(location),
                opened.store.put_opts(location, payload, options),
            )
            .await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let opened = self.0.open().await?;
        let upload = opened.store.put_multipart_opts(location, options);
        let upload = opened.explained(Operation::Write, Some(location), upload).await?;
        Ok(Box::new(GuardedUpload::new(
            upload,
            opened.explainer.clone(),
            location.clone(),
        )))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let opened = self.0.open().await?;
        let get = opened.store.get_opts(location, options);
        let GetResult {
            payload,
            meta,
            range,
            attributes,
        } = opened.explained(Operation::Read, Some(location), get).await?;
        let payload = match payload {
            GetResultPayload::Stream(body) => {
                let (explainer, location) = (opened.explainer.clone(), location.clone());
                let body = body.map_err(move |error| explainer.explain(error, Operation::Read, Some(&location)));
                GetResultPayload::Stream(body.boxed())
            }
            file => file,
        };
        Ok(GetResult {
            payload,
            meta,
            range,
            attributes,
        })
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let opened = self.0.open().await?;
        opened
            .explained(
                Operation::Read,
                Some(location),
                opened.store.get_ranges(location, ranges),
            )
            .await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.stream(Operation::Delete, None, move |store, _| store.delete_stream(locations))
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.stream(Operation::List, prefix.cloned(), |store, prefix| store.list(prefix))
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        let offset = offset.clone();
        self.stream(Operation::List, prefix.cloned(), move |store, prefix| {
            store.list_with_offset(prefix, &offset)
        })
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let opened = self.0.open().await?;
        opened
            .explained(Operation::List, prefix, opened.store.list_with_delimiter(prefix))
            .await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let opened = self.0.open().await?;
        opened
            .explained(Operation::Write, Some(to), opened.store.copy_opts(from, to, options))
            .await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        let opened = self.0.open().await?;
        opened
            .explained(Operation::Write, Some(to), opened.store.rename_opts(from, to, options))
            .await
    }
}
