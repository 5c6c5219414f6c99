//! Object stores that stop to take objects when the query that writes them has failed.
//!
//! Dropping a sink is not enough. It aborts tasks, and one of them that is at work goes on until it
//! waits again: if meanwhile the task that feeds it is gone, its input has ended as any other, and it
//! ends its file in good faith.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use datafusion::execution::TaskContext;
use datafusion::execution::object_store::ObjectStoreRegistry;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};
use url::Url;

/// Open until what [`Self::closing`] gives is dropped.
#[derive(Debug, Clone, Default)]
pub(super) struct Gate(Arc<AtomicBool>);

impl Gate {
    /// When this is dropped, whatever the reason, the gate closes: no object is finished any more.
    pub(super) fn closing(&self) -> Closing {
        Closing(self.clone())
    }

    /// `context`, with stores that are behind this gate.
    pub(super) fn context(&self, context: &TaskContext) -> datafusion::error::Result<Arc<TaskContext>> {
        let runtime = context.runtime_env();
        let stores = Arc::new(GatedStores {
            stores: Arc::clone(&runtime.object_store_registry),
            gate: self.clone(),
        });
        let runtime = RuntimeEnvBuilder::from_runtime_env(&runtime).with_object_store_registry(stores);
        Ok(Arc::new(TaskContext::new(
            context.task_id(),
            context.session_id(),
            context.session_config().clone(),
            context.scalar_functions().clone(),
            context.higher_order_functions().clone(),
            context.aggregate_functions().clone(),
            context.window_functions().clone(),
            runtime.build_arc()?,
        )))
    }

    fn check(&self, location: &Path) -> Result<()> {
        if self.0.load(Ordering::SeqCst) {
            return Err(Error::Generic {
                store: "COPY",
                source: format!("the query ended before {location} was whole").into(),
            });
        }
        Ok(())
    }
}

/// See [`Gate::closing`].
#[derive(Debug)]
pub(super) struct Closing(Gate);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::SeqCst);
    }
}

#[derive(Debug)]
struct GatedStores {
    stores: Arc<dyn ObjectStoreRegistry>,
    gate: Gate,
}

impl ObjectStoreRegistry for GatedStores {
    fn register_store(&self, url: &Url, store: Arc<dyn ObjectStore>) -> Option<Arc<dyn ObjectStore>> {
        self.stores.register_store(url, store)
    }

    fn deregister_store(&self, url: &Url) -> datafusion::error::Result<Arc<dyn ObjectStore>> {
        self.stores.deregister_store(url)
    }

    fn get_store(&self, url: &Url) -> datafusion::error::Result<Arc<dyn ObjectStore>> {
        Ok(Arc::new(GatedStore {
            store: self.stores.get_store(url)?,
            gate: self.gate.clone(),
        }))
    }
}

#[derive(Debug)]
struct GatedStore {
    store: Arc<dyn ObjectStore>,
    gate: Gate,
}

impl fmt::Display for GatedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.store.fmt(f)
    }
}

#[async_trait]
impl ObjectStore for GatedStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.gate.check(location)?;
        self.store.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        Ok(Box::new(GatedUpload {
            upload: self.store.put_multipart_opts(location, options).await?,
            gate: self.gate.clone(),
            location: location.clone(),
        }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.store.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.store.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.store.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.gate.check(to)?;
        self.store.copy_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct GatedUpload {
    upload: Box<dyn MultipartUpload>,
    gate: Gate,
    location: Path,
}

#[async_trait]
impl MultipartUpload for GatedUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.upload.put_part(data)
    }

    async fn complete(&mut self) -> Result<PutResult> {
        self.gate.check(&self.location)?;
        self.upload.complete().await
    }

    async fn abort(&mut self) -> Result<()> {
        self.upload.abort().await
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;

    use super::*;

    #[tokio::test]
    async fn a_closed_gate_lets_no_object_be_finished() {
        let gate = Gate::default();
        let store = GatedStore {
            store: Arc::new(InMemory::new()),
            gate: gate.clone(),
        };
        let (small, large, late) = (Path::from("small"), Path::from("large"), Path::from("late"));
        store.put(&small, "before".into()).await.unwrap();
        let mut upload = store.put_multipart(&large).await.unwrap();
        upload.put_part("part".into()).await.unwrap();

        drop(gate.closing());
        let error = upload.complete().await.unwrap_err().to_string();
        assert!(error.contains("the query ended before large was whole"), "{error}");
        store.put(&small, "after".into()).await.unwrap_err();
        store.copy(&small, &late).await.unwrap_err();
        assert_eq!(store.get(&small).await.unwrap().bytes().await.unwrap(), "before");
        store.head(&large).await.unwrap_err();
        store.head(&late).await.unwrap_err();
    }
}
