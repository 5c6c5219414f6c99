//! LIST, of several folders at the same time.
//!
//! A store answers LIST with a page of 1,000 objects, and only then can the next page be asked for: a
//! million objects are a thousand round trips in a row. Here they are listed from both ends:
//!
//! 1. One LIST of the whole begins at the front. A small table ends with its first page, and has
//!    cost one request.
//! 2. When a page has ended inside a folder, a LIST with a delimiter, which goes on beside it, tells
//!    what folders there are.
//! 3. The last of them are listed each on its own, as many as there are permits, in the same manner;
//!    meanwhile the front goes on through the first. It ends where it meets a folder that was taken.
//!
//! Nothing is guessed of how objects are spread over folders. Where folders hold one object each, or
//! all objects are in one folder, the front comes to the end about as soon as it would have alone.

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;

use datafusion::common::internal_datafusion_err;
use datafusion::common::runtime::JoinSet;
use datafusion::error::{DataFusionError, Result};
use futures::future::{BoxFuture, OptionFuture};
use futures::{FutureExt, StreamExt};
use object_store::path::Path;
use object_store::{ListResult, ObjectMeta, ObjectStore};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinError;

use super::rows::{Collector, Scan};
use crate::stores::into_datafusion;
use crate::table::location::Location;

/// Folders that are listed at the same time.
const CONCURRENCY: usize = 16;

/// Objects that S3 returns at once.
const PAGE: usize = 1000;

/// So many pages of objects later, an answer that has not come is too long to help.
const PATIENCE: usize = 32;

/// What all walks through one location share.
pub(super) struct Walker {
    store: Arc<dyn ObjectStore>,
    scan: Arc<Scan>,
    location: Location,
    /// Does LIST return pages, in the order of keys?
    pages: bool,
    permits: Arc<Semaphore>,
}

impl Walker {
    pub(super) fn new(store: Arc<dyn ObjectStore>, scan: Arc<Scan>, location: Location) -> Arc<Self> {
        Arc::new(Self {
            store,
            pages: scan.lister.lists_pages(&location),
            scan,
            location,
            permits: Arc::new(Semaphore::new(CONCURRENCY)),
        })
    }

    /// Adds what is below `prefixes`, which do not overlap, to `rows`: in the order of paths, or nearly.
    ///
    /// # Errors
    /// What the store answers, explained.
    pub(super) async fn list(self: &Arc<Self>, prefixes: Vec<Path>, rows: Collector) -> Result<Collector> {
        let mut walk = Walk::new(Arc::clone(self), rows);
        walk.folders = prefixes.into_iter().map(Folder::new).collect();
        walk.finish().await
    }

    /// Lists a folder. Boxed, since folders of the folder are listed in the same way.
    fn list_folder(
        self: Arc<Self>,
        folder: Folder,
        permit: OwnedSemaphorePermit,
    ) -> BoxFuture<'static, Result<(Folder, Collector)>> {
        async move {
            let rows = Collector::new(Arc::clone(&self.scan));
            let mut walk = Walk::new(self, rows);
            walk.read_front(&folder.prefix).await?;
            // Who waits for others holds no permit, so that there always is one for them.
            drop(permit);
            Ok((folder, walk.finish().await?))
        }
        .boxed()
    }
}

/// A folder whose objects are to be listed.
#[derive(Debug)]
struct Folder {
    prefix: Path,
    /// What its keys start with, and begin after in the order of keys.
    start: String,
}

impl Folder {
    fn new(prefix: Path) -> Self {
        let start = if prefix.is_root() {
            String::new()
        } else {
            format!("{prefix}/")
        };
        Self { prefix, start }
    }
}

/// The folder in `level` that holds `key`; `None` where it is not in a folder of it.
fn folder_in(level: &Path, key: &Path) -> Option<Path> {
    let mut parts = key.prefix_match(level)?;
    let folder = parts.next()?;
    parts.next().map(|_| level.clone().join(folder))
}

/// One LIST from the front of a folder, and the walks that come to meet it.
struct Walk {
    walker: Arc<Walker>,
    rows: Collector,
    /// Objects that the front has read.
    read: usize,
    /// Its last key.
    last: Path,
    /// The greatest of its keys. The last may be less: the marker of a folder is listed as its name
    /// and a slash, but known without.
    position: Path,
    /// Folders whose folders are known, the deepest last.
    levels: Vec<Path>,
    /// The deepest folder that the front was in when that was last looked at, and not known yet.
    level: Option<Path>,
    /// How many objects will have been read when that is looked at again.
    next_look: usize,
    /// Folders that no LIST has come to, in order. The front goes on into the first.
    folders: VecDeque<Folder>,
    /// Objects beside those folders.
    beside: Vec<ObjectMeta>,
    /// The start of the first folder that has been taken: there the front ends.
    taken: Option<String>,
    walks: JoinSet<Result<(Folder, Collector)>>,
    found: Vec<(Folder, Collector)>,
    /// Does the front go on alone?
    alone: bool,
}

impl Walk {
    fn new(walker: Arc<Walker>, rows: Collector) -> Self {
        Self {
            alone: !walker.pages,
            walker,
            rows,
            read: 0,
            last: Path::ROOT,
            position: Path::ROOT,
            levels: vec![],
            level: None,
            next_look: PAGE,
            folders: VecDeque::new(),
            beside: vec![],
            taken: None,
            walks: JoinSet::new(),
            found: vec![],
        }
    }

    /// Lists `prefix` from the front, until everything is read or has been taken.
    async fn read_front(&mut self, prefix: &Path) -> Result<()> {
        let walker = Arc::clone(&self.walker);
        let mut pages = walker
            .scan
            .lister
            .objects(&walker.store, prefix.clone())
            .ready_chunks(PAGE);
        let mut answer: Option<BoxFuture<'static, object_store::Result<ListResult>>> = None;
        let mut asked = 0;
        loop {
            self.take_folders();
            tokio::select! {
                biased;
                page = pages.next() => {
                    let Some(page) = page else {
                        // What nobody has taken has been read.
                        self.folders.clear();
                        self.beside.clear();
                        return Ok(());
                    };
                    if !self.read_page(page)? {
                        return Ok(());
                    }
                    if answer.is_none() && self.looks_for_folders(prefix) {
                        let (walker, level) = (Arc::clone(&walker), self.level.clone());
                        let ask = async move { walker.store.list_with_delimiter(level.as_ref()).await };
                        answer = Some(ask.boxed());
                        asked = self.read;
                    } else if self.read - asked > PATIENCE * PAGE {
                        self.alone |= answer.take().is_some();
                    }
                }
                Some(told) = OptionFuture::from(answer.as_mut()), if answer.is_some() => {
                    answer = None;
                    match told {
                        Ok(told) if !self.alone => self.split(told),
                        // The front does without; it will say what is wrong if it comes to it.
                        _ => self.alone = true,
                    }
                }
                Some(done) = self.walks.join_next(), if !self.walks.is_empty() => self.keep(done)?,
            }
        }
    }

    /// Adds what the front has read; false where it has come to a folder that was taken.
    fn read_page(&mut self, page: Vec<object_store::Result<ObjectMeta>>) -> Result<bool> {
        for object in page {
            let object = object.map_err(|e| into_datafusion(&e))?;
            let key = object.location.as_ref();
            if object.location < self.position && object.size > 0 && !self.alone {
                self.go_alone();
            }
            // An empty object may be the marker of the folder, which is listed with it.
            let is_taken = |start: &str| key >= start || (object.size == 0 && start.strip_suffix('/') == Some(key));
            if self.taken.as_deref().is_some_and(is_taken) {
                return Ok(false);
            }
            while self.folders.front().is_some_and(|folder| folder.start.as_str() <= key) {
                self.folders.pop_front();
            }
            self.rows.add(&self.walker.location, &object, false)?;
            self.read += 1;
            self.last = object.location;
            if self.last > self.position {
                self.position.clone_from(&self.last);
            }
        }
        Ok(true)
    }

    /// Has the front been in one folder, [`Walk::level`], for a page, and is it in a folder of that?
    fn looks_for_folders(&mut self, prefix: &Path) -> bool {
        if self.alone || self.read < self.next_look {
            return false;
        }
        self.next_look = self.read + PAGE;
        let known = self.levels.iter().rev().find(|level| self.last.prefix_matches(level));
        let level = match known {
            Some(level) => folder_in(level, &self.last),
            None => Some(prefix.clone()),
        };
        let before = mem::replace(&mut self.level, level);
        let stays = self.levels.is_empty() || before == self.level;
        let folder = self.level.as_ref().and_then(|level| folder_in(level, &self.last));
        stays && folder.is_some()
    }

    /// Learns what is in [`Walk::level`], after what has been read of it.
    fn split(&mut self, told: ListResult) {
        let (position, last) = (self.position.as_ref(), &self.last);
        let folders = told.common_prefixes.into_iter().map(Folder::new);
        let mut folders: Vec<_> = folders
            .filter(|folder| folder.start.as_str() > position && folder.prefix != *last)
            .collect();
        folders.sort_unstable_by(|a, b| a.start.cmp(&b.start));
        let objects = told.objects.into_iter();
        self.beside
            .extend(objects.filter(|object| object.location.as_ref() > position));
        // The front is in this level, so that folders of others come after it.
        for folder in folders.into_iter().rev() {
            self.folders.push_front(folder);
        }
        self.levels.extend(self.level.take());
    }

    /// Forgets what others have found: this store lists in no order that tells where they meet.
    fn go_alone(&mut self) {
        self.alone = true;
        self.walks = JoinSet::new();
        self.found.clear();
        self.folders.clear();
        self.beside.clear();
        self.taken = None;
    }

    /// Takes folders from the back, as long as there are permits.
    fn take_folders(&mut self) {
        while !self.folders.is_empty()
            && let Ok(permit) = Arc::clone(&self.walker.permits).try_acquire_owned()
        {
            self.take_last(permit);
        }
    }

    fn take_last(&mut self, permit: OwnedSemaphorePermit) {
        if let Some(folder) = self.folders.pop_back() {
            self.taken = Some(folder.start.clone());
            self.walks.spawn(Arc::clone(&self.walker).list_folder(folder, permit));
        }
    }

    fn keep(&mut self, done: Result<Result<(Folder, Collector)>, JoinError>) -> Result<()> {
        self.found
            .push(done.map_err(|e| DataFusionError::ExecutionJoin(Box::new(e)))??);
        Ok(())
    }

    /// Lists the folders that are left, and puts all rows together.
    async fn finish(mut self) -> Result<Collector> {
        while !self.folders.is_empty() {
            let permit = Arc::clone(&self.walker.permits).acquire_owned().await;
            self.take_last(permit.map_err(|e| internal_datafusion_err!("nobody may list any more: {e}"))?);
        }
        while let Some(done) = self.walks.join_next().await {
            self.keep(done)?;
        }
        self.found.sort_unstable_by(|(a, _), (b, _)| a.start.cmp(&b.start));
        for (_, rows) in self.found {
            self.rows.append(rows)?;
        }
        for object in self.beside {
            if object.location > self.position {
                self.rows.add(&self.walker.location, &object, false)?;
            }
        }
        Ok(self.rows)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::fmt;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use arrow::array::RecordBatch;
    use async_trait::async_trait;
    use chrono::DateTime;
    use datafusion::execution::object_store::ObjectStoreRegistry;
    use futures::stream::{self, BoxStream};
    use object_store::{
        CopyOptions, Error, GetOptions, GetResult, MultipartUpload, PutMultipartOptions, PutOptions, PutPayload,
        PutResult,
    };
    use url::Url;

    use super::super::{Lister, Listing};
    use super::*;
    use crate::stores::PomonaStores;
    use crate::table::options::ImagesOptions;

    /// A bucket that lists as S3 does, markers of folders included, and counts what it is asked.
    #[derive(Debug, Clone)]
    struct Bucket(Arc<Inner>);

    #[derive(Debug)]
    struct Inner {
        /// Keys and sizes.
        objects: BTreeMap<String, u64>,
        page: usize,
        /// The start of keys that it refuses to list.
        refused: String,
        pages: AtomicUsize,
        busy: AtomicUsize,
        most_busy: AtomicUsize,
    }

    impl Bucket {
        fn new(keys: impl IntoIterator<Item = String>, page: usize) -> Self {
            Self::refusing(keys, page, "-")
        }

        fn refusing(keys: impl IntoIterator<Item = String>, page: usize, refused: &str) -> Self {
            let is_empty = |key: &String| key.ends_with('/') || key.contains("empty");
            let size = |key: &String| u64::from(!is_empty(key));
            Self(Arc::new(Inner {
                objects: keys.into_iter().map(|key| (key.clone(), size(&key))).collect(),
                page,
                refused: refused.to_owned(),
                pages: AtomicUsize::new(0),
                busy: AtomicUsize::new(0),
                most_busy: AtomicUsize::new(0),
            }))
        }

        fn pages(&self) -> usize {
            self.0.pages.load(Ordering::Relaxed)
        }

        /// The objects below a prefix, and its keys' start.
        fn below(&self, prefix: Option<&Path>) -> (String, Vec<(String, u64)>) {
            let start = Folder::new(prefix.cloned().unwrap_or_default()).start;
            let objects = self.0.objects.iter().filter(|(key, _)| key.starts_with(&start));
            let objects = objects.map(|(key, size)| (key.clone(), *size)).collect();
            (start, objects)
        }

        /// Waits as long as the answer to one request takes.
        async fn answer(&self, start: &str) -> object_store::Result<()> {
            self.0.pages.fetch_add(1, Ordering::Relaxed);
            let busy = self.0.busy.fetch_add(1, Ordering::Relaxed) + 1;
            self.0.most_busy.fetch_max(busy, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(1 + start.len() as u64 % 2)).await;
            self.0.busy.fetch_sub(1, Ordering::Relaxed);
            if start.starts_with(&self.0.refused) {
                return Err(Error::Generic {
                    store: "bucket",
                    source: "it is tired".into(),
                });
            }
            Ok(())
        }
    }

    fn meta((key, size): (String, u64)) -> ObjectMeta {
        ObjectMeta {
            location: Path::parse(key).unwrap(),
            last_modified: DateTime::UNIX_EPOCH,
            size,
            e_tag: None,
            version: None,
        }
    }

    impl fmt::Display for Bucket {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("bucket")
        }
    }

    fn only_lists() -> Error {
        Error::NotSupported {
            source: "it only lists".into(),
        }
    }

    #[async_trait]
    impl ObjectStore for Bucket {
        fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
            let (start, objects) = self.below(prefix);
            let mut pages: Vec<_> = objects.chunks(self.0.page).map(<[_]>::to_vec).collect();
            if pages.is_empty() {
                pages.push(vec![]);
            }
            let bucket = self.clone();
            stream::iter(pages)
                .then(move |page| {
                    let (bucket, start) = (bucket.clone(), start.clone());
                    async move {
                        match bucket.answer(&start).await {
                            Ok(()) => page.into_iter().map(|object| Ok(meta(object))).collect::<Vec<_>>(),
                            Err(error) => vec![Err(error)],
                        }
                    }
                })
                .flat_map(stream::iter)
                .boxed()
        }

        async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
            let (start, all) = self.below(prefix);
            let mut folders = BTreeSet::new();
            let mut objects = vec![];
            for (key, size) in all {
                match key[start.len()..].split_once('/') {
                    Some((folder, _)) => _ = folders.insert(Path::parse(format!("{start}{folder}")).unwrap()),
                    None => objects.push(meta((key, size))),
                }
            }
            for _ in 0..(folders.len() + objects.len()).div_ceil(self.0.page).max(1) {
                self.answer(&start).await?;
            }
            Ok(ListResult {
                common_prefixes: folders.into_iter().collect(),
                objects,
            })
        }

        async fn get_opts(&self, _: &Path, _: GetOptions) -> object_store::Result<GetResult> {
            Err(only_lists())
        }

        async fn put_opts(&self, _: &Path, _: PutPayload, _: PutOptions) -> object_store::Result<PutResult> {
            Err(only_lists())
        }

        async fn put_multipart_opts(
            &self,
            _: &Path,
            _: PutMultipartOptions,
        ) -> object_store::Result<Box<dyn MultipartUpload>> {
            Err(only_lists())
        }

        fn delete_stream(
            &self,
            locations: BoxStream<'static, object_store::Result<Path>>,
        ) -> BoxStream<'static, object_store::Result<Path>> {
            locations
                .map(|location| location.and_then(|_| Err(only_lists())))
                .boxed()
        }

        async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> object_store::Result<()> {
            Err(only_lists())
        }
    }

    /// What of 's3://b/t/' is listed.
    async fn list(bucket: &Bucket, glob: &str, limit: Option<usize>) -> Result<Listing> {
        let options = ImagesOptions {
            glob: glob.to_owned(),
            ..ImagesOptions::default()
        };
        let lister = Arc::new(Lister::try_new(vec![Location::parse("s3://b/t/")?], &options)?);
        lister.list(Arc::new(bucket.clone()), None, limit, vec![0, 1, 2]).await
    }

    fn keys(folders: usize, files: usize) -> impl Iterator<Item = String> {
        (0..folders).flat_map(move |folder| (0..files).map(move |file| format!("t/{folder:03}/{file:04}.jpg")))
    }

    #[tokio::test]
    async fn rows_are_those_of_one_list_in_its_order() {
        let strings = |keys: &[&str]| -> Vec<String> { keys.iter().map(|key| (*key).to_owned()).collect() };
        let in_all = |folders: &[&str], files: usize| -> Vec<String> {
            let files_of = |folder: &&str| (0..files).map(|i| format!("t/{folder}{i:04}.jpg")).collect::<Vec<_>>();
            folders.iter().flat_map(files_of).collect()
        };
        let mut one_is_large: Vec<_> = keys(300, 1).collect();
        one_is_large.extend(in_all(&["150/", "150/x/"], 2500));
        let mut files_beside = in_all(&["A/", "A!/", "B/x/", "B/y/", "C/"], 900);
        files_beside.extend(strings(&[
            "t/A.jpg",
            "t/A",
            "t/B/0.jpg",
            "t/B/x.jpg",
            "t/B/z.jpg",
            "t/C0.jpg",
            "t/Z.jpg",
        ]));
        let mut marked: Vec<_> = keys(12, 400).collect();
        marked.extend((0..14).map(|folder| format!("t/{folder:03}/")));
        marked.extend(strings(&["t/", "t/004!empty.jpg", "t/005/empty.jpg", "t/011/nothing/"]));
        for (shape, keys) in [
            ("nothing", vec![]),
            ("flat", in_all(&[""], 5000)),
            ("one folder", in_all(&["A/"], 3000)),
            ("labels", keys(20, 300).collect()),
            (
                "nested",
                in_all(&["x/A/", "x/B/c/", "x/B/d/", "y/A/", "y/z/A/", "y/z/B/"], 1100),
            ),
            ("tiny folders", keys(4000, 1).collect()),
            ("one is large", one_is_large),
            ("files beside folders", files_beside),
            ("files before folders", in_all(&["0", "A/", "B/"], 1500)),
            ("markers", marked),
            (
                "characters",
                in_all(&["Granny Smith/", "50%/", "é/", "果/", "a+b&c/", "~/"], 700),
            ),
        ] {
            for page in [150, 1000] {
                for glob in ["*", "*.jpg"] {
                    let bucket = Bucket::new(keys.clone(), page);
                    // With a limit it is one LIST after the other.
                    let one = list(&bucket, glob, Some(usize::MAX)).await.unwrap();
                    let found = list(&bucket, glob, None).await.unwrap();
                    assert!(found.rows == one.rows, "{shape}, pages of {page}, {glob}");
                    assert_eq!(found.listed, one.listed, "{shape}, pages of {page}, {glob}");
                }
            }
        }
    }

    #[tokio::test]
    async fn folders_are_listed_at_the_same_time() {
        // 100 labels of 25 pages.
        let bucket = Bucket::new(keys(100, 250), 10);
        let listing = list(&bucket, "*.jpg", None).await.unwrap();
        assert_eq!(listing.rows.num_rows(), 25_000);
        let most = bucket.0.most_busy.load(Ordering::Relaxed);
        assert!((CONCURRENCY - 4..=CONCURRENCY + 1).contains(&most), "{most}");
        // The labels beside, and what the front reads in vain where it meets the others.
        assert!((2500..2520).contains(&bucket.pages()), "{}", bucket.pages());

        // As many in two folders, whose own folders are listed at the same time too.
        let nested = keys(100, 250).map(|key| key.replacen("t/0", "t/x/0", 1));
        let bucket = Bucket::new(nested.map(|key| key.replacen("t/x/00", "t/a/", 1)), 10);
        let listing = list(&bucket, "*.jpg", None).await.unwrap();
        assert_eq!(listing.rows.num_rows(), 25_000);
        let most = bucket.0.most_busy.load(Ordering::Relaxed);
        assert!(most >= CONCURRENCY / 2, "{most}");
    }

    #[tokio::test]
    async fn small_tables_and_limits_cost_no_more_requests() {
        let bucket = Bucket::new(keys(9, 111), 1000);
        assert_eq!(list(&bucket, "*.jpg", None).await.unwrap().rows.num_rows(), 999);
        assert_eq!(bucket.pages(), 1);

        let bucket = Bucket::new(keys(100, 250), 1000);
        let rows: RecordBatch = list(&bucket, "*.jpg", Some(5)).await.unwrap().rows;
        assert_eq!((rows.num_rows(), bucket.pages()), (5, 1));
    }

    #[tokio::test]
    async fn a_folder_that_cannot_be_listed_is_named() {
        let bucket = Bucket::refusing(keys(100, 250), 100, "t/042/");
        let (stores, url) = (PomonaStores::new(), Url::parse("s3://b").unwrap());
        stores.register_store(&url, Arc::new(bucket));
        let location = Location::parse("s3://b/t/").unwrap();
        let lister = Arc::new(Lister::try_new(vec![location], &ImagesOptions::default()).unwrap());
        let listing = lister.list(stores.get_store(&url).unwrap(), None, None, vec![0]);
        let error = listing.await.unwrap_err().to_string();
        assert!(error.contains("cannot list s3://b/t/042: it is tired"), "{error}");
    }
}
