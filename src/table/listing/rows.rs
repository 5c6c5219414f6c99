//! From objects to rows: names are matched, filters evaluated, and only the columns kept that the
//! query reads. A million objects whose labels are counted are a million labels, without their paths.

use std::collections::HashSet;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Int64Builder, RecordBatch, StringBuilder, TimestampMicrosecondBuilder,
};
use arrow::compute::{concat_batches, filter_record_batch, sort_to_indices, take_record_batch};
use arrow::datatypes::{Int64Type, SchemaRef};
use datafusion::common::cast::as_boolean_array;
use datafusion::error::Result;
use datafusion::physical_expr::PhysicalExpr;
use object_store::ObjectMeta;
use object_store::path::Path;

use super::{Lister, Listing, TIME_ZONE};
use crate::table::location::{Location, parent_name};
use crate::table::pattern::PathPattern;

/// Rows that are filtered together.
const CHUNK: usize = 1024;

/// What is made of objects.
#[derive(Debug)]
pub(super) struct Scan {
    pub(super) lister: Arc<Lister>,
    /// What rows fulfil, over the lister's columns.
    pub(super) predicate: Option<Arc<dyn PhysicalExpr>>,
    /// The lister's columns that are kept.
    pub(super) columns: Vec<usize>,
}

/// Turns objects into rows.
pub(super) struct Collector {
    scan: Arc<Scan>,
    /// Which of the values that the pattern captures is the label, if one is.
    label: Option<usize>,
    chunk: Chunk,
    kept: Vec<Kept>,
    kept_rows: usize,
    listed: usize,
    /// The folders of all objects, as keys.
    folders: HashSet<String>,
    last_folder: String,
    has_empty: bool,
}

/// Rows that fulfil the predicate.
struct Kept {
    rows: RecordBatch,
    /// Those of empty objects, with their keys: they may be markers of folders.
    empty: Vec<(usize, Path)>,
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

impl Collector {
    pub(super) fn new(scan: Arc<Scan>) -> Self {
        // They take room when they are written to: there may be a collector for every folder.
        let strings = || StringBuilder::with_capacity(0, 0);
        let names = scan
            .lister
            .pattern
            .as_ref()
            .map(PathPattern::columns)
            .unwrap_or_default();
        let label = names.iter().position(|name| name == "label");
        let columns = names.len() - usize::from(label.is_some());
        Self {
            label,
            chunk: Chunk {
                rows: 0,
                path: strings(),
                label: strings(),
                columns: (0..columns).map(|_| strings()).collect(),
                size: Int64Builder::with_capacity(0),
                last_modified: TimestampMicrosecondBuilder::with_capacity(0).with_timezone(TIME_ZONE),
                e_tag: strings(),
            },
            scan,
            kept: vec![],
            kept_rows: 0,
            listed: 0,
            folders: HashSet::new(),
            last_folder: String::new(),
            has_empty: false,
        }
    }

    /// Adds what LIST returned, or the object that the location names, whatever its name.
    pub(super) fn add(&mut self, location: &Location, object: &ObjectMeta, named: bool) -> Result<()> {
        let key = &object.location;
        self.listed += 1;
        self.note_folder(key);
        let lister = &self.scan.lister;
        let Some(relative) = location.relative(key) else {
            return Ok(());
        };
        // The marker of the location itself has its name.
        if !named && (key == location.prefix() || !lister.glob.matches(relative)) {
            return Ok(());
        }
        let values = match &lister.pattern {
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
        if lister.metadata {
            chunk
                .last_modified
                .append_value(object.last_modified.timestamp_micros());
            chunk.e_tag.append_option(object.e_tag.as_deref());
        }
        chunk.rows += 1;
        self.has_empty |= object.size == 0;
        if chunk.rows == CHUNK { self.flush() } else { Ok(()) }
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
    pub(super) fn surely_kept(&self) -> usize {
        match (self.has_empty, &self.scan.predicate) {
            // They may turn out to be markers of folders.
            (true, _) => 0,
            (false, Some(_)) => self.kept_rows,
            (false, None) => self.kept_rows + self.chunk.rows,
        }
    }

    /// Filters the rows that were not yet.
    pub(super) fn flush(&mut self) -> Result<()> {
        if self.chunk.rows == 0 {
            return Ok(());
        }
        let Scan {
            lister,
            predicate,
            columns,
        } = self.scan.as_ref();
        let rows = self.chunk.finish(&lister.schema, lister.metadata)?;
        let rows = match predicate {
            None => rows,
            Some(predicate) => {
                let mask = predicate.evaluate(&rows)?.into_array(rows.num_rows())?;
                filter_record_batch(&rows, as_boolean_array(&mask)?)?
            }
        };
        self.kept_rows += rows.num_rows();
        self.kept.push(Kept {
            empty: lister.empty_objects(&rows),
            rows: rows.project(columns)?,
        });
        Ok(())
    }

    /// Adds what another collected, after the rows that are here.
    ///
    /// # Errors
    /// Those of the predicate.
    pub(super) fn append(&mut self, mut other: Self) -> Result<()> {
        self.flush()?;
        other.flush()?;
        self.kept.append(&mut other.kept);
        self.kept_rows += other.kept_rows;
        self.listed += other.listed;
        self.folders.extend(other.folders);
        self.has_empty |= other.has_empty;
        Ok(())
    }

    /// The listing, sorted by path where the path is kept, and with no object twice.
    pub(super) fn finish(mut self, limit: Option<usize>) -> Result<Listing> {
        self.flush()?;
        let lister = &self.scan.lister;
        let schema = Arc::new(lister.schema.project(&self.scan.columns)?);
        let kept = self
            .kept
            .into_iter()
            .map(|kept| kept.objects(&self.folders))
            .collect::<Result<Vec<_>>>()?;
        let mut rows = concat_batches(&schema, &kept)?;
        drop(kept);
        if let Some(paths) = rows.column_by_name("path")
            && !paths.as_string::<i32>().iter().is_sorted()
        {
            rows = take_record_batch(&rows, &sort_to_indices(paths, None, None)?)?;
        }
        // Locations may overlap.
        if lister.locations.len() > 1
            && let Some(paths) = rows.column_by_name("path")
        {
            let paths = paths.as_string::<i32>();
            let is_first = |i: usize| i == 0 || paths.value(i) != paths.value(i - 1);
            let mask: BooleanArray = (0..paths.len()).map(|i| Some(is_first(i))).collect();
            rows = filter_record_batch(&rows, &mask)?;
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
}

impl Lister {
    /// The rows of empty objects, with their keys.
    fn empty_objects(&self, rows: &RecordBatch) -> Vec<(usize, Path)> {
        let sizes = rows
            .column_by_name("size")
            .and_then(|sizes| sizes.as_primitive_opt::<Int64Type>());
        let paths = rows
            .column_by_name("path")
            .and_then(|paths| paths.as_string_opt::<i32>());
        let (Some(sizes), Some(paths), Some(location)) = (sizes, paths, self.locations.first()) else {
            return vec![];
        };
        let empty = (0..rows.num_rows()).filter(|row| sizes.value(*row) == 0);
        empty
            .filter_map(|row| Some((row, location.base().key_of(paths.value(row))?)))
            .collect()
    }
}

impl Kept {
    /// The rows without markers of folders: empty objects that have a folder's name.
    fn objects(self, folders: &HashSet<String>) -> Result<RecordBatch> {
        let markers: Vec<usize> = self
            .empty
            .iter()
            .filter(|(_, key)| folders.contains(key.as_ref()))
            .map(|(row, _)| *row)
            .collect();
        if markers.is_empty() {
            return Ok(self.rows);
        }
        let rows = 0..self.rows.num_rows();
        let mask: BooleanArray = rows.map(|row| Some(markers.binary_search(&row).is_err())).collect();
        Ok(filter_record_batch(&self.rows, &mask)?)
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
