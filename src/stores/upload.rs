//! Uploads that are aborted when they are given up, so that Ctrl-C leaves no half-written result.
//!
//! A multipart upload that is merely dropped stays on S3 and GCS for ever, invisible and paid for.

use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;
use object_store::path::Path;
use object_store::{Error, MultipartUpload, PutPayload, PutResult, Result, UploadPart};
use parking_lot::{Condvar, Mutex};

use super::explain::Operation;
use super::io;
use super::lazy::Explainer;

/// Aborts that have begun and not ended.
static ABORTING: Mutex<usize> = Mutex::new(0);
static ABORTED: Condvar = Condvar::new();

/// Waits until uploads that were given up are cleaned away, at most `timeout`; says whether all
/// are. A program calls it before it ends.
pub fn wait_for_aborts(timeout: Duration) -> bool {
    let mut aborting = ABORTING.lock();
    !ABORTED
        .wait_while_for(&mut aborting, |count| *count > 0, timeout)
        .timed_out()
}

/// An upload that is aborted when it is dropped before it is complete.
#[derive(Debug)]
pub(super) struct GuardedUpload {
    /// `None` once it is complete or aborted.
    upload: Option<Box<dyn MultipartUpload>>,
    explainer: Explainer,
    location: Path,
}

impl GuardedUpload {
    pub(super) fn new(upload: Box<dyn MultipartUpload>, explainer: Explainer, location: Path) -> Self {
        Self {
            upload: Some(upload),
            explainer,
            location,
        }
    }

    fn upload(&mut self) -> Result<&mut Box<dyn MultipartUpload>> {
        self.upload.as_mut().ok_or_else(|| Error::Generic {
            store: "upload",
            source: format!("the upload of {} has ended already", self.location).into(),
        })
    }
}

#[async_trait]
impl MultipartUpload for GuardedUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let part = match self.upload() {
            Ok(upload) => upload.put_part(data),
            Err(error) => return futures::future::ready(Err(error)).boxed(),
        };
        let (explainer, location) = (self.explainer.clone(), self.location.clone());
        part.map(move |result| result.map_err(|e| explainer.explain(e, Operation::Write, Some(&location))))
            .boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let result = self.upload()?.complete().await;
        match result {
            Ok(result) => {
                self.upload = None;
                Ok(result)
            }
            Err(error) => Err(self.explainer.explain(error, Operation::Write, Some(&self.location))),
        }
    }

    async fn abort(&mut self) -> Result<()> {
        let result = self.upload()?.abort().await;
        self.upload = None;
        result.map_err(|e| self.explainer.explain(e, Operation::Write, Some(&self.location)))
    }
}

impl Drop for GuardedUpload {
    fn drop(&mut self) {
        let (Some(mut upload), Ok(handle)) = (self.upload.take(), io::handle()) else {
            return;
        };
        let aborting = Aborting::begin();
        let location = self.location.clone();
        // Detached on purpose: it must outlive the query. `wait_for_aborts` waits for it.
        drop(handle.spawn(async move {
            if let Err(error) = upload.abort().await {
                log::debug!("the upload of {location} could not be aborted: {error}");
            }
            drop(aborting);
        }));
    }
}

/// Counts one abort for as long as it lives.
struct Aborting;

impl Aborting {
    fn begin() -> Self {
        *ABORTING.lock() += 1;
        Self
    }
}

impl Drop for Aborting {
    fn drop(&mut self) {
        *ABORTING.lock() -= 1;
        ABORTED.notify_all();
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[derive(Debug, Clone, Default)]
    struct Recorder {
        completed: Arc<AtomicUsize>,
        aborted: Arc<AtomicUsize>,
    }

    #[async_trait]
    impl MultipartUpload for Recorder {
        fn put_part(&mut self, _: PutPayload) -> UploadPart {
            futures::future::ready(Ok(())).boxed()
        }

        async fn complete(&mut self) -> Result<PutResult> {
            self.completed.fetch_add(1, Ordering::SeqCst);
            Ok(PutResult {
                e_tag: None,
                version: None,
            })
        }

        async fn abort(&mut self) -> Result<()> {
            self.aborted.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    fn guarded(recorder: &Recorder) -> GuardedUpload {
        let explainer = Explainer::new("s3://bucket".to_owned(), String::new());
        GuardedUpload::new(Box::new(recorder.clone()), explainer, Path::from("a.parquet"))
    }

    #[test]
    fn an_upload_that_is_given_up_is_aborted_and_a_complete_one_is_not() {
        let recorder = Recorder::default();
        let mut complete = guarded(&recorder);
        futures::executor::block_on(async {
            complete.put_part(PutPayload::from_static(b"part")).await.unwrap();
            complete.complete().await.unwrap();
            complete.complete().await.unwrap_err();
        });
        drop(complete);
        drop(guarded(&recorder));
        assert!(wait_for_aborts(Duration::from_secs(10)));
        assert_eq!(recorder.completed.load(Ordering::SeqCst), 1);
        assert_eq!(recorder.aborted.load(Ordering::SeqCst), 1);
    }
}
