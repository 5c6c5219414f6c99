//! From LIST to rows: which objects there are, and which of them a query wants.
//!
//! 1. What the query's filters say of path and pattern columns narrows the prefixes that are listed.
//! 2. Each object that is listed is matched with the glob and the path pattern.
//! 3. The filters are evaluated on the rows, a chunk at a time, and the rows sorted by path.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray, BooleanArray, Int64Builder, RecordBatch, StringBuilder, TimestampMicrosecondBuilder,
};
use arrow::compute::{concat_batches, filter_record_batch, sort_to_indices, take_record_batch};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef, TimeUnit};
use datafusion::common::cast::as_boolean_array;
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

use super::location::{Base, Location, parent_name};
use super::options::ImagesOptions;
use super::pattern::PathPattern;
use crate::stores::{Cause, cause_of, into_datafusion, io};

/// Rows that are filtered together.
const CHUNK: usize = 1024;

/// More prefixes than these do not replace one LIST of the whole.
const MAX_PREFIXES: usize = 64;

const TIME_ZONE: &str = "UTC";

/// The rows of a table, or of what a query wants of it, sorted by path.
#[derive(Debug)]
pub(crate) struct Listing {
    /// With the columns of [`Lister::schema`].
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
    /// no more than `limit` are needed.
    ///
    /// # Errors
    /// What the store answers, explained, and a local folder that does not exist.
    pub(crate) async fn list(
        self: &Arc<Self>,
        store: Arc<dyn ObjectStore>,
        predicate: Option<Arc<dyn PhysicalExpr>>,
        limit: Option<usize>,
    ) -> Result<Listing> {
        let lister = Arc::clone(self);
        io::run(async move { lister.list_here(&store, predicate, limit).await }).await?
    }

    async fn list_here(
        &self,
        store: &Arc<dyn ObjectStore>,
        predicate: Option<Arc<dyn PhysicalExpr>>,
        limit: Option<usize>,
    ) -> Result<Listing> {
        let known = predicate.as_ref().map(Known::of).unwrap_or_default();
        let mut collector = Collector::new(self, predicate);
        let enough = limit.filter(|_| self.lists_in_order()).unwrap_or(usize::MAX);
        'all: for location in &self.locations {
            if let Some(object) = self.named_object(store, location).await? {
                collector.add(location, &object, true)?;
                continue;
            }
            for prefix in self.prefixes(location, &known) {
                let mut objects = self.objects(store, prefix);
                while let Some(object) = objects.next().await {
                    if collector.surely_kept() >= enough {
                        break 'all;
                    }
                    collector.add(location, &object.map_err(|e| into_datafusion(&e))?, false)?;
                }
            }
        }
        collector.finish(limit)
    }

    /// Does LIST return objects in the order of their paths? Then the first rows are enough for a
    /// limit.
    fn lists_in_order(&self) -> bool {
        let ordered = |location: &Location| {
            let store = location.base().store().as_str();
            ["s3:", "s3a:", "gs:", "gcs:", "az:", "abfs:", "abfss:"]
                .iter()
                .any(|scheme| store.starts_with(scheme))
        };
        self.recursive && self.locations.len() == 1 && self.locations.iter().all(ordered)
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

/// Turns objects into rows.
struct Collector<'a> {
    lister: &'a Lister,
    predicate: Option<Arc<dyn PhysicalExpr>>,
    /// Which of the values that the pattern captures is the label, if one is.
    label: Option<usize>,
    chunk: Chunk,
    kept: Vec<RecordBatch>,
    kept_rows: usize,
    listed: usize,
    /// The folders of all objects, as keys.
    folders: HashSet<String>,
    last_folder: String,
    has_empty: bool,
}

/// Rows whose predicate has not been evaluated yet.
struct Chunk {
    rows: usize,
    path: StringBuilder,
    label: StringBuilder,
    columns: Vec<StringBuilder>,
    size: Int64Builder,
    last_modified: TimestampMicrosecondBuilder,
    e_tag: StringBuilder,
}

impl<'a> Collector<'a> {
    fn new(lister: &'a Lister, predicate: Option<Arc<dyn PhysicalExpr>>) -> Self {
        let names = lister.pattern.as_ref().map(PathPattern::columns).unwrap_or_default();
        let label = names.iter().position(|name| name == "label");
        let columns = names.len() - usize::from(label.is_some());
        Self {
            lister,
            predicate,
            label,
            chunk: Chunk {
                rows: 0,
                path: StringBuilder::new(),
                label: StringBuilder::new(),
                columns: (0..columns).map(|_| StringBuilder::new()).collect(),
                size: Int64Builder::new(),
                last_modified: TimestampMicrosecondBuilder::new().with_timezone(TIME_ZONE),
                e_tag: StringBuilder::new(),
            },
            kept: vec![],
            kept_rows: 0,
            listed: 0,
            folders: HashSet::new(),
            last_folder: String::new(),
            has_empty: false,
        }
    }

    /// Adds what LIST returned, or the object that the location names, whatever its name.
    fn add(&mut self, location: &Location, object: &ObjectMeta, named: bool) -> Result<()> {
        let key = &object.location;
        self.listed += 1;
        self.note_folder(key);
        let Some(relative) = location.relative(key) else {
            return Ok(());
        };
        // The marker of the location itself has its name.
        if !named && (key == location.prefix() || !self.lister.glob.matches(relative)) {
            return Ok(());
        }
        let values = match &self.lister.pattern {
            None => vec![],
            Some(pattern) => match pattern.matches(relative) {
                Some(values) => values,
                None => return Ok(()),
            },
        };
        let chunk = &mut self.chunk;
        let label = match self.label {
            Some(column) => values.get(column).copied(),
            None => parent_name(key),
        };
        chunk.path.append_value(location.base().path_of(key));
        chunk.label.append_option(label);
        let others = values.iter().enumerate().filter(|(i, _)| Some(*i) != self.label);
        for (column, (_, value)) in chunk.columns.iter_mut().zip(others) {
            column.append_value(value);
        }
        chunk.size.append_value(i64::try_from(object.size).unwrap_or(i64::MAX));
        if self.lister.metadata {
            chunk
                .last_modified
                .append_value(object.last_modified.timestamp_micros());
            chunk.e_tag.append_option(object.e_tag.as_deref());
        }
        chunk.rows += 1;
        self.has_empty |= object.size == 0;
        if chunk.rows == CHUNK {
            self.filter_chunk()
        } else {
            Ok(())
        }
    }

    fn note_folder(&mut self, key: &Path) {
        let Some((folder, _)) = key.as_ref().rsplit_once('/') else {
            return;
        };
        if folder == self.last_folder {
            return;
        }
        folder.clone_into(&mut self.last_folder);
        let mut folder = folder;
        while self.folders.insert(folder.to_owned()) {
            match folder.rsplit_once('/') {
                Some((parent, _)) => folder = parent,
                None => break,
            }
        }
    }

    /// Rows that nothing can take away any more.
    fn surely_kept(&self) -> usize {
        match (self.has_empty, &self.predicate) {
            // They may turn out to be markers of folders.
            (true, _) => 0,
            (false, Some(_)) => self.kept_rows,
            (false, None) => self.kept_rows + self.chunk.rows,
        }
    }

    fn filter_chunk(&mut self) -> Result<()> {
        let rows = self.chunk.finish(&self.lister.schema, self.lister.metadata)?;
        let rows = match &self.predicate {
            None => rows,
            Some(predicate) => {
                let mask = predicate.evaluate(&rows)?.into_array(rows.num_rows())?;
                filter_record_batch(&rows, as_boolean_array(&mask)?)?
            }
        };
        self.kept_rows += rows.num_rows();
        self.kept.push(rows);
        Ok(())
    }

    fn finish(mut self, limit: Option<usize>) -> Result<Listing> {
        self.filter_chunk()?;
        let rows = concat_batches(&self.lister.schema, &self.kept)?;
        let order = sort_to_indices(rows.column(0), None, None)?;
        let mut rows = take_record_batch(&rows, &order)?;
        if self.has_empty || self.lister.locations.len() > 1 {
            rows = filter_record_batch(&rows, &self.are_objects(&rows))?;
        }
        let pruned = self.listed - rows.num_rows();
        if let Some(limit) = limit {
            rows = rows.slice(0, limit.min(rows.num_rows()));
        }
        Ok(Listing {
            rows,
            listed: self.listed,
            pruned,
        })
    }

    /// Which rows are neither the marker of a folder, which is an empty object with the folder's
    /// name, nor there twice because locations overlap.
    fn are_objects(&self, rows: &RecordBatch) -> BooleanArray {
        let paths = rows.column(0).as_string::<i32>();
        let sizes = rows
            .column_by_name("size")
            .map(|sizes| sizes.as_primitive::<Int64Type>());
        let base = self.lister.locations.first().map(Location::base);
        (0..rows.num_rows())
            .map(|i| {
                let is_empty = sizes.is_some_and(|sizes| sizes.value(i) == 0);
                let is_marker = || {
                    let key = base.and_then(|base| base.key_of(paths.value(i)));
                    key.is_some_and(|key| self.folders.contains(key.as_ref()))
                };
                let is_twice = i > 0 && paths.value(i) == paths.value(i - 1);
                Some(!(is_twice || is_empty && is_marker()))
            })
            .collect()
    }
}

impl Chunk {
    fn finish(&mut self, schema: &SchemaRef, metadata: bool) -> Result<RecordBatch> {
        self.rows = 0;
        let mut columns: Vec<ArrayRef> = vec![Arc::new(self.path.finish()), Arc::new(self.label.finish())];
        columns.extend(
            self.columns
                .iter_mut()
                .map(|column| Arc::new(column.finish()) as ArrayRef),
        );
        columns.push(Arc::new(self.size.finish()));
        if metadata {
            columns.push(Arc::new(self.last_modified.finish()));
            columns.push(Arc::new(self.e_tag.finish()));
        }
        Ok(RecordBatch::try_new(Arc::clone(schema), columns)?)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
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
        let listing = lister("s3://b/t/", &ImagesOptions::default())
            .list(store, None, None)
            .await
            .unwrap();
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
        let listing = lister("s3://b/t/", &all).list(store, None, Some(9)).await.unwrap();
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
            let listing = lister.list(Arc::clone(&store), None, None).await.unwrap();
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
        let listing = lister.list(store, Some(either), None).await.unwrap();
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
        let listing = lister
            .list(Arc::clone(&store), Some(Arc::clone(&is_a)), None)
            .await
            .unwrap();
        assert_eq!(
            paths(&listing),
            ["s3://b/t/X/A/1.jpg", "s3://b/t/X/A/2.jpg", "s3://b/t/Y/A/4.jpg"]
        );
        assert_eq!((listing.listed, listing.pruned), (4, 1));
        let listing = lister.list(store, Some(is_a), Some(2)).await.unwrap();
        assert_eq!(paths(&listing), ["s3://b/t/X/A/1.jpg", "s3://b/t/X/A/2.jpg"]);
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
