//! From LIST to rows: which objects there are, and which of them a query wants.
//!
//! 1. What the query's filters say of path and pattern columns narrows the prefixes that are listed.
//! 2. `walk` lists them, several folders at the same time.
//! 3. `rows` matches each object with the glob and the path pattern, evaluates the filters a chunk at
//!    a time, and keeps the columns that the query reads. They are sorted by path.

mod rows;
mod walk;

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use datafusion::common::{exec_err, plan_datafusion_err, plan_err};
use datafusion::error::Result;
use datafusion::physical_expr::expressions::{Column, LikeExpr, Literal};
use datafusion::physical_expr::utils::{Guarantee, LiteralGuarantee};
use datafusion::physical_expr::{PhysicalExpr, split_conjunction};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};

use self::rows::{Collector, Scan};
use self::walk::Walker;
use super::location::{Base, Location};
use super::options::ImagesOptions;
use super::pattern::PathPattern;
use crate::stores::{Cause, cause_of, into_datafusion, io};

/// More prefixes than these do not replace one LIST of the whole.
const MAX_PREFIXES: usize = 64;

const TIME_ZONE: &str = "UTC";

/// The position of `path` in [`Lister::schema`].
const PATH: usize = 0;

/// The rows of a table, or of what a query wants of it, sorted by path.
///
/// It is held as a whole, since a leaf of our own would run more than once on a cluster: for the length
/// of its strings and 4 bytes for each, and 8 bytes for each number. Of an object at
/// 's3://bucket/Training/Kiwi/000123.jpg' that is 8 bytes where labels are counted, and 56 with its
/// path and size where content is read; twice that while it is made.
#[derive(Debug)]
pub(crate) struct Listing {
    /// With the columns that were asked for.
    pub(crate) rows: RecordBatch,
    /// Objects that LIST returned.
    pub(crate) listed: usize,
    /// Objects among them that are no rows.
    pub(crate) pruned: usize,
}

/// Lists the objects of a table.
#[derive(Debug)]
pub(crate) struct Lister {
    locations: Vec<Location>,
    glob: ObjectGlob,
    pattern: Option<PathPattern>,
    recursive: bool,
    metadata: bool,
    schema: SchemaRef,
}

impl Lister {
    /// # Errors
    /// A pattern or a glob that cannot be read, and locations of several stores.
    pub(crate) fn try_new(locations: Vec<Location>, options: &ImagesOptions) -> Result<Self> {
        if let [first, rest @ ..] = locations.as_slice()
            && let Some(other) = rest.iter().find(|location| location.base() != first.base())
        {
            return plan_err!(
                "the locations of an image table are in one store, but {first} and {other} are not: make two tables and \
                 put them together with UNION ALL"
            );
        }
        let pattern = options
            .path_pattern
            .as_deref()
            .map(str::parse::<PathPattern>)
            .transpose()?;
        if !options.recursive && pattern.as_ref().is_some_and(PathPattern::needs_folders) {
            return plan_err!("images.recursive = false looks through no folders, but images.path_pattern needs them");
        }
        let schema = listing_schema(pattern.as_ref(), options.metadata);
        let glob = ObjectGlob::try_new(&options.glob)?;
        Ok(Self {
            locations,
            glob,
            pattern,
            recursive: options.recursive,
            metadata: options.metadata,
            schema,
        })
    }

    /// path, label, the pattern's columns, size, and with metadata last_modified and e_tag.
    pub(crate) fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    pub(crate) fn locations(&self) -> &[Location] {
        &self.locations
    }

    pub(crate) fn has_metadata(&self) -> bool {
        self.metadata
    }

    /// Lists on the I/O runtime. `predicate` is over [`Lister::schema`]; of the rows that fulfil it
    /// no more than `limit` are needed, and of their columns these.
    ///
    /// # Errors
    /// What the store answers, explained, and a local folder that does not exist.
    pub(crate) async fn list(
        self: &Arc<Self>,
        store: Arc<dyn ObjectStore>,
        predicate: Option<Arc<dyn PhysicalExpr>>,
        limit: Option<usize>,
        columns: Vec<usize>,
    ) -> Result<Listing> {
        let lister = Arc::clone(self);
        io::run(async move { lister.list_here(&store, predicate, limit, columns).await }).await?
    }

    async fn list_here(
        self: &Arc<Self>,
        store: &Arc<dyn ObjectStore>,
        predicate: Option<Arc<dyn PhysicalExpr>>,
        limit: Option<usize>,
        columns: Vec<usize>,
    ) -> Result<Listing> {
        let known = predicate.as_ref().map(Known::of).unwrap_or_default();
        let asked: Vec<usize> = (0..columns.len()).collect();
        let mut kept = columns;
        // What comes in no order is put in order by its paths.
        if !self.lists_in_order() && !kept.contains(&PATH) {
            kept.push(PATH);
        }
        let scan = Arc::new(Scan {
            lister: Arc::clone(self),
            predicate,
            columns: kept,
        });
        let mut rows = Collector::new(Arc::clone(&scan));
        for location in &self.locations {
            if let Some(object) = self.named_object(store, location).await? {
                rows.add(location, &object, true)?;
                continue;
            }
            let prefixes = self.prefixes(location, &known);
            let Some(enough) = limit.filter(|_| self.lists_in_order()) else {
                let walker = Walker::new(Arc::clone(store), Arc::clone(&scan), location.clone());
                rows = walker.list(prefixes, rows).await?;
                continue;
            };
            for prefix in prefixes {
                let mut objects = self.objects(store, prefix);
                while rows.surely_kept() < enough
                    && let Some(object) = objects.next().await
                {
                    rows.add(location, &object.map_err(|e| into_datafusion(&e))?, false)?;
                }
            }
        }
        let mut listing = rows.finish(limit)?;
        listing.rows = listing.rows.project(&asked)?;
        Ok(listing)
    }

    /// Does LIST return objects in the order of their paths? Then the first rows are enough for a
    /// limit.
    fn lists_in_order(&self) -> bool {
        self.locations.len() == 1 && self.locations.iter().all(|location| self.lists_pages(location))
    }

    /// Does LIST return pages of objects, in the order of their keys?
    fn lists_pages(&self, location: &Location) -> bool {
        let store = location.base().store().as_str();
        let schemes = ["s3:", "s3a:", "gs:", "gcs:", "az:", "abfs:", "abfss:"];
        self.recursive && schemes.iter().any(|scheme| store.starts_with(scheme))
    }

    /// The object that a location names, if it names one.
    async fn named_object(&self, store: &Arc<dyn ObjectStore>, location: &Location) -> Result<Option<ObjectMeta>> {
        let name = location.prefix().filename().unwrap_or_default();
        // A web server answers for a folder too, with a page.
        let asks = location.may_be_object() && (!location.base().is_web() || self.glob.matches(name));
        if asks {
            match store.head(location.prefix()).await {
                // An empty object may stand for a folder.
                Ok(object) if object.size > 0 || self.glob.matches(name) => return Ok(Some(object)),
                Ok(_) => {}
                Err(error) if cause_of(&error).0 == Cause::Unreachable => return Err(into_datafusion(&error)),
                // A folder; or HEAD is refused, which has no text, so that LIST will tell why.
                Err(_) => {}
            }
        }
        if let Some(folder) = location.local()
            && !tokio::fs::try_exists(folder).await.unwrap_or(true)
        {
            return exec_err!(
                "cannot list {location}: there is no file or folder {}",
                folder.display()
            );
        }
        Ok(None)
    }

    fn objects(
        &self,
        store: &Arc<dyn ObjectStore>,
        prefix: Path,
    ) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        if self.recursive {
            return store.list(Some(&prefix));
        }
        let store = Arc::clone(store);
        futures::stream::once(async move { store.list_with_delimiter(Some(&prefix)).await })
            .map_ok(|found| futures::stream::iter(found.objects.into_iter().map(Ok::<_, object_store::Error>)))
            .try_flatten()
            .boxed()
    }

    /// The prefixes that hold every object that can fulfil the predicate, without overlap, in the
    /// order of their paths.
    fn prefixes(&self, location: &Location, known: &Known) -> Vec<Path> {
        let whole = location.prefix();
        if !self.recursive {
            return vec![whole.clone()];
        }
        let mut prefixes: Vec<Path> = match &self.pattern {
            // A value that no key can have has no folder.
            Some(pattern) => pattern
                .prefixes(&known.columns)
                .into_iter()
                .filter_map(|folder| Path::parse(format!("{whole}/{folder}")).ok())
                .collect(),
            None => vec![whole.clone()],
        };
        for folders in known.folders(location.base()) {
            // The deeper of two folders, where one holds the other.
            prefixes = prefixes
                .iter()
                .flat_map(|prefix| {
                    folders.iter().filter_map(move |folder| {
                        if folder.prefix_matches(prefix) {
                            Some(folder.clone())
                        } else {
                            prefix.prefix_matches(folder).then(|| prefix.clone())
                        }
                    })
                })
                .collect();
        }
        // So that a folder stands right before those in it; the root, which has no name, before all.
        prefixes.sort_unstable_by_key(|prefix| match prefix.is_root() {
            true => String::new(),
            false => format!("{prefix}/"),
        });
        prefixes.dedup_by(|deeper, kept| deeper.prefix_matches(kept));
        prefixes
    }
}

fn listing_schema(pattern: Option<&PathPattern>, metadata: bool) -> SchemaRef {
    let mut fields = vec![
        Field::new("path", DataType::Utf8, false),
        Field::new("label", DataType::Utf8, true),
    ];
    let columns = pattern.map(PathPattern::columns).unwrap_or_default();
    fields.extend(
        columns
            .iter()
            .filter(|name| *name != "label")
            .map(|name| Field::new(name, DataType::Utf8, false)),
    );
    fields.push(Field::new("size", DataType::Int64, false));
    if metadata {
        let time = DataType::Timestamp(TimeUnit::Microsecond, Some(TIME_ZONE.into()));
        fields.push(Field::new("last_modified", time, false));
        fields.push(Field::new("e_tag", DataType::Utf8, true));
    }
    Arc::new(Schema::new(fields))
}

/// Which objects are images, by their names.
#[derive(Debug)]
struct ObjectGlob {
    // A set of one: a glob alone would panic where it is too large.
    set: GlobSet,
    /// Is it matched with the whole relative path?
    whole: bool,
}

impl ObjectGlob {
    fn try_new(glob: &str) -> Result<Self> {
        let set = GlobBuilder::new(glob)
            .case_insensitive(true)
            .literal_separator(true)
            .build()
            .and_then(|parsed| GlobSetBuilder::new().add(parsed).build())
            .map_err(|e| plan_datafusion_err!("images.glob '{glob}': {e}"))?;
        Ok(Self {
            set,
            whole: glob.contains('/'),
        })
    }

    fn matches(&self, relative: &str) -> bool {
        let name = relative.rsplit('/').next().unwrap_or_default();
        self.set.is_match(if self.whole { relative } else { name })
    }
}

/// What a predicate says of the values of columns, wherever it is true.
#[derive(Debug, Default)]
struct Known {
    /// Columns that have one of these values.
    columns: BTreeMap<String, Vec<String>>,
    /// What paths start with.
    path_start: Option<String>,
}

impl Known {
    fn of(predicate: &Arc<dyn PhysicalExpr>) -> Self {
        let mut known = Self::default();
        for LiteralGuarantee {
            column,
            guarantee,
            literals,
        } in LiteralGuarantee::analyze(predicate)
        {
            let values = literals
                .iter()
                .map(|value| value.try_as_str().flatten().map(str::to_owned));
            if let (Guarantee::In, Some(mut values)) = (guarantee, values.collect::<Option<Vec<_>>>()) {
                values.sort_unstable();
                known.columns.insert(column.name, values);
            }
        }
        known.path_start = split_conjunction(predicate).into_iter().find_map(like_start);
        known
    }

    /// Sets of folders: what the predicate wants is in one of the folders of each set.
    fn folders(&self, base: &Base) -> Vec<Vec<Path>> {
        let mut sets = vec![];
        if let Some(paths) = self.columns.get("path").filter(|paths| paths.len() <= MAX_PREFIXES) {
            sets.push(paths.iter().filter_map(|path| base.key_of(path)?.parent()).collect());
        }
        if let Some(start) = &self.path_start {
            let root = base.store().as_str();
            sets.push(match start.rsplit_once('/') {
                _ if root.starts_with(start.as_str()) => vec![Path::ROOT],
                Some((folder, _)) if start.starts_with(root) => {
                    // The slash is part of the store's URL where the folder is its root.
                    base.key_of(&format!("{folder}/")).into_iter().collect()
                }
                _ => vec![],
            });
        }
        sets
    }
}

/// What a path starts with, if `conjunct` is path LIKE 'start%'.
fn like_start(conjunct: &Arc<dyn PhysicalExpr>) -> Option<String> {
    let like = conjunct.downcast_ref::<LikeExpr>()?;
    let is_path = like.expr().downcast_ref::<Column>()?.name() == "path";
    if !is_path || like.negated() || like.case_insensitive() {
        return None;
    }
    let pattern = like.pattern().downcast_ref::<Literal>()?.value().try_as_str()??;
    let mut start = String::new();
    let mut characters = pattern.chars();
    while let Some(character) = characters.next() {
        match character {
            '%' | '_' => break,
            '\\' => start.extend(characters.next()),
            character => start.push(character),
        }
    }
    Some(start)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use arrow::array::AsArray;
    use datafusion::logical_expr::Operator;
    use datafusion::physical_expr::expressions::{binary, col, in_list, like, lit};
    use object_store::PutPayload;
    use object_store::memory::InMemory;

    use super::*;

    fn lister(location: &str, options: &ImagesOptions) -> Arc<Lister> {
        Arc::new(Lister::try_new(vec![Location::parse(location).unwrap()], options).unwrap())
    }

    fn by_split() -> ImagesOptions {
        ImagesOptions {
            path_pattern: Some("{split}/{label}/*".into()),
            ..ImagesOptions::default()
        }
    }

    async fn store(keys: &[&str]) -> Arc<dyn ObjectStore> {
        let store = InMemory::new();
        for key in keys {
            let bytes: &'static [u8] = if key.contains("empty") || !key.contains('.') {
                b""
            } else {
                b"image"
            };
            store
                .put(&Path::parse(key).unwrap(), PutPayload::from_static(bytes))
                .await
                .unwrap();
        }
        Arc::new(store)
    }

    /// Lists with all columns.
    async fn list(
        lister: &Arc<Lister>,
        store: Arc<dyn ObjectStore>,
        predicate: Option<Arc<dyn PhysicalExpr>>,
        limit: Option<usize>,
    ) -> Listing {
        let columns = (0..lister.schema().fields().len()).collect();
        lister.list(store, predicate, limit, columns).await.unwrap()
    }

    fn paths(listing: &Listing) -> Vec<&str> {
        listing.rows.column(0).as_string::<i32>().iter().flatten().collect()
    }

    #[tokio::test]
    async fn objects_become_rows() {
        let store = store(&[
            "t/B/2.JPG",
            "t/A/1.png",
            "t/A/empty.jpg",
            "t/A/notes.txt",
            "t/B",
            "u/3.jpg",
            "t/0.gif",
        ])
        .await;
        let listing = list(&lister("s3://b/t/", &ImagesOptions::default()), store, None, None).await;
        assert_eq!(
            paths(&listing),
            [
                "s3://b/t/0.gif",
                "s3://b/t/A/1.png",
                "s3://b/t/A/empty.jpg",
                "s3://b/t/B/2.JPG"
            ]
        );
        let labels = listing.rows.column(1).as_string::<i32>();
        assert_eq!(labels.iter().flatten().collect::<Vec<_>>(), ["t", "A", "A", "B"]);
        assert_eq!((listing.listed, listing.pruned), (6, 2));
    }

    #[tokio::test]
    async fn markers_of_folders_are_no_rows() {
        let store = store(&["t", "t/A", "t/A/1.jpg", "t/file"]).await;
        let all = ImagesOptions {
            glob: "*".into(),
            ..ImagesOptions::default()
        };
        let listing = list(&lister("s3://b/t/", &all), store, None, Some(9)).await;
        assert_eq!(paths(&listing), ["s3://b/t/A/1.jpg", "s3://b/t/file"]);
    }

    #[tokio::test]
    async fn a_location_may_be_one_object_or_nothing() {
        let store = store(&["t/A/photo.raw", "t/A/1.jpg"]).await;
        for (location, rows) in [
            ("s3://b/t/A/photo.raw", 1),
            ("s3://b/t/A", 1),
            ("s3://b/none/", 0),
            ("s3://b/none", 0),
        ] {
            let lister = lister(location, &ImagesOptions::default());
            let listing = list(&lister, Arc::clone(&store), None, None).await;
            assert_eq!(listing.rows.num_rows(), rows, "{location}");
        }
    }

    #[tokio::test]
    async fn objects_of_several_prefixes_are_listed_once() {
        let store = store(&["1.jpg", "(x)/3.jpg", "y/4.jpg"]).await;
        let lister = lister("s3://b/", &ImagesOptions::default());
        let wanted = vec![lit("s3://b/1.jpg"), lit("s3://b/(x)/3.jpg")];
        let schema = lister.schema();
        let either = in_list(col("path", schema).unwrap(), wanted, &false, schema).unwrap();
        let listing = list(&lister, store, Some(either), None).await;
        assert_eq!(paths(&listing), ["s3://b/(x)/3.jpg", "s3://b/1.jpg"]);
    }

    #[tokio::test]
    async fn filters_and_limits_are_exact() {
        let store = store(&["t/X/A/1.jpg", "t/X/A/2.jpg", "t/X/B/3.jpg", "t/Y/A/4.jpg"]).await;
        let lister = lister("s3://b/t/", &by_split());
        let is_a = binary(
            col("label", lister.schema()).unwrap(),
            Operator::Eq,
            lit("A"),
            lister.schema(),
        )
        .unwrap();
        let listing = list(&lister, Arc::clone(&store), Some(Arc::clone(&is_a)), None).await;
        assert_eq!(
            paths(&listing),
            ["s3://b/t/X/A/1.jpg", "s3://b/t/X/A/2.jpg", "s3://b/t/Y/A/4.jpg"]
        );
        assert_eq!((listing.listed, listing.pruned), (4, 1));
        let listing = list(&lister, Arc::clone(&store), Some(Arc::clone(&is_a)), Some(2)).await;
        assert_eq!(paths(&listing), ["s3://b/t/X/A/1.jpg", "s3://b/t/X/A/2.jpg"]);

        // Columns that nobody asked for are not kept, whether paths are filtered and sorted or not.
        for location in ["s3://b/t/", "mem://b/t/"] {
            let lister = self::lister(location, &by_split());
            let label = lister.schema().index_of("label").unwrap();
            let listing = lister.list(Arc::clone(&store), Some(Arc::clone(&is_a)), None, vec![label]);
            let rows = listing.await.unwrap().rows;
            assert_eq!((rows.num_rows(), rows.num_columns()), (3, 1));
        }
    }

    #[test]
    fn predicates_narrow_prefixes() {
        let lister = lister("s3://b/t/", &by_split());
        let schema = lister.schema();
        let column = |name| col(name, schema).unwrap();
        let split = in_list(column("split"), vec![lit("Y"), lit("X")], &false, schema).unwrap();
        let label = binary(column("label"), Operator::Eq, lit("A"), schema).unwrap();
        let both = binary(Arc::clone(&split), Operator::And, Arc::clone(&label), schema).unwrap();
        let path = |text: &str| binary(column("path"), Operator::Eq, lit(text), schema).unwrap();
        let start = |text: &str| like(false, false, column("path"), lit(text), schema).unwrap();
        let x_and_path = binary(Arc::clone(&split), Operator::And, path("s3://b/t/X/A/1.jpg"), schema).unwrap();
        for (predicate, prefixes) in [
            (split, vec!["t/X", "t/Y"]),
            (label, vec!["t"]),
            (both, vec!["t/X/A", "t/Y/A"]),
            (path("s3://b/t/X/A/1.jpg"), vec!["t/X/A"]),
            (path("s3://b/u/1.jpg"), vec![]),
            (path("nothing"), vec![]),
            (x_and_path, vec!["t/X/A"]),
            (start("s3://b/t/X/B%"), vec!["t/X"]),
            (start("s3://b/t/X\\_Y/B%"), vec!["t/X_Y"]),
            (start("s3:%"), vec!["t"]),
            (start("s3://b/%"), vec!["t"]),
            (start("s3://c/%"), vec![]),
            (start("%.jpg"), vec!["t"]),
        ] {
            let found = lister.prefixes(&lister.locations()[0], &Known::of(&predicate));
            assert_eq!(
                found.iter().map(Path::as_ref).collect::<Vec<&str>>(),
                prefixes,
                "{predicate}"
            );
        }
    }

    #[test]
    fn contradictions_are_refused() {
        let parse = |locations: &[&str]| {
            locations
                .iter()
                .map(|l| Location::parse(l).unwrap())
                .collect::<Vec<_>>()
        };
        let flat = ImagesOptions {
            recursive: false,
            ..by_split()
        };
        assert!(Lister::try_new(parse(&["s3://b/"]), &flat).is_err());
        assert!(Lister::try_new(parse(&["s3://b/", "s3://c/"]), &ImagesOptions::default()).is_err());
        assert!(Lister::try_new(parse(&["s3://b/x/", "s3://b/y/"]), &ImagesOptions::default()).is_ok());
        let glob = ImagesOptions {
            glob: "[".into(),
            ..ImagesOptions::default()
        };
        assert!(Lister::try_new(parse(&["s3://b/"]), &glob).is_err());
    }
}
