//! What is printed: tables that a person can read; csv, tsv and json that hold every value.

use std::cell::Cell;
use std::fmt::Display;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::rc::Rc;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, OffsetSizeTrait, RecordBatch, RecordBatchOptions, StringArray, StructArray,
};
use arrow::datatypes::{DataType, Field, Float32Type, Float64Type, Schema, SchemaRef};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use datafusion::arrow::{csv, json};
use datafusion::config::FormatOptions as TableFormat;
use datafusion::error::Result;
use datafusion_cli::print_format::PrintFormat;
use datafusion_cli::print_options::MaxRows;
use pomona_udfs::image::{ContentColumn, is_content_type, is_image_type};

/// How results are printed.
#[derive(Debug, Clone)]
pub(crate) struct PrintOptions {
    /// The format; `Automatic` is a table.
    pub(crate) format: PrintFormat,
    /// Results only: no headings, no counts, no times.
    pub(crate) quiet: bool,
    /// Values as they are, not abridged.
    pub(crate) full: bool,
    /// The most rows that a table shows.
    pub(crate) maxrows: MaxRows,
    /// The time that a statement took is printed.
    pub(crate) timing: bool,
}

/// Where results go. A reader that goes away (`pomona … | head`) is no error: what follows is dropped.
pub(crate) struct Out {
    inner: Box<dyn Write>,
    closed: Rc<Cell<bool>>,
}

impl Out {
    /// Standard output.
    pub(crate) fn stdout() -> Self {
        Self::new(BufWriter::new(io::stdout()))
    }

    fn new(inner: impl Write + 'static) -> Self {
        Self {
            inner: Box::new(inner),
            closed: Rc::default(),
        }
    }

    /// Has the reader gone away?
    pub(crate) fn closed(&self) -> bool {
        self.closed.get()
    }

    /// The same, to be asked while a printer holds this.
    pub(crate) fn closed_flag(&self) -> Rc<Cell<bool>> {
        Rc::clone(&self.closed)
    }

    fn unless_closed<T>(&mut self, result: io::Result<T>, dropped: T) -> io::Result<T> {
        match result {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.closed.set(true);
                Ok(dropped)
            }
            result => result,
        }
    }
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.closed() {
            return Ok(bytes.len());
        }
        let written = self.inner.write(bytes);
        self.unless_closed(written, bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.closed() {
            return Ok(());
        }
        let flushed = self.inner.flush();
        self.unless_closed(flushed, ())
    }
}

/// Prints what is not a result: on standard error, so that a result can be piped.
pub(crate) fn note(message: impl Display) {
    // Where standard error is closed there is nobody to tell.
    writeln!(io::stderr().lock(), "{message}").ok();
}

/// Prints the result of one statement, batch by batch.
pub(crate) struct ResultPrinter<'a> {
    schema: SchemaRef,
    table: TableFormat,
    sink: Sink<'a>,
    rows: usize,
}

enum Sink<'a> {
    /// Column widths are known at the end: at most one row more than are shown is kept, and those abridged.
    Table {
        out: &'a mut Out,
        kept: Vec<RecordBatch>,
        kept_rows: usize,
        maxrows: MaxRows,
        abridge: bool,
    },
    /// The largest by far.
    Separated(Box<csv::Writer<&'a mut Out>>),
    Json(json::ArrayWriter<&'a mut Out>),
    NdJson(json::LineDelimitedWriter<&'a mut Out>),
}

impl<'a> Sink<'a> {
    fn separated(out: &'a mut Out, delimiter: u8) -> Self {
        Self::Separated(Box::new(csv::WriterBuilder::new().with_delimiter(delimiter).build(out)))
    }
}

/// How many rows there were, and how many of them were printed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Printed {
    pub(crate) rows: usize,
    pub(crate) shown: usize,
}

impl<'a> ResultPrinter<'a> {
    /// A printer for one result. `whole` prints every row and every value of a table: plans, settings.
    pub(crate) fn new(
        out: &'a mut Out,
        options: &PrintOptions,
        table: TableFormat,
        schema: SchemaRef,
        whole: bool,
    ) -> Self {
        let json = json::WriterBuilder::new().with_explicit_nulls(true);
        let sink = match options.format {
            PrintFormat::Csv => Sink::separated(out, b','),
            PrintFormat::Tsv => Sink::separated(out, b'\t'),
            PrintFormat::Json => Sink::Json(json.build(out)),
            PrintFormat::NdJson => Sink::NdJson(json.build(out)),
            PrintFormat::Table | PrintFormat::Automatic => Sink::Table {
                out,
                kept: Vec::new(),
                kept_rows: 0,
                maxrows: if whole { MaxRows::Unlimited } else { options.maxrows },
                abridge: !(whole || options.full),
            },
        };
        Self {
            schema,
            table,
            sink,
            rows: 0,
        }
    }

    /// Prints rows, or keeps them for the table.
    pub(crate) fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        self.rows += batch.num_rows();
        match &mut self.sink {
            Sink::Table {
                kept,
                kept_rows,
                maxrows,
                abridge,
                ..
            } => {
                let most = match maxrows {
                    MaxRows::Unlimited => usize::MAX,
                    MaxRows::Limited(rows) => rows.saturating_add(1),
                };
                let rows = batch.num_rows().min(most - *kept_rows);
                if rows > 0 {
                    let batch = batch.slice(0, rows);
                    kept.push(if *abridge { abridged(&batch)? } else { batch });
                    *kept_rows += rows;
                }
            }
            Sink::Separated(writer) => writer.write(&without_nested(batch)?)?,
            Sink::Json(writer) => writer.write(batch)?,
            Sink::NdJson(writer) => writer.write(batch)?,
        }
        Ok(())
    }

    /// Prints what is left.
    pub(crate) fn finish(self) -> Result<Printed> {
        let Self {
            schema,
            table,
            sink,
            rows,
        } = self;
        let mut shown = rows;
        match sink {
            Sink::Table { out, kept, maxrows, .. } => {
                if let MaxRows::Limited(most) = maxrows {
                    shown = rows.min(most);
                }
                PrintFormat::Table.print_batches(out, schema, &kept, maxrows, true, &table)?;
                out.flush()?;
            }
            Sink::Separated(mut writer) if rows == 0 => {
                writer.write(&without_nested(&RecordBatch::new_empty(schema))?)?;
            }
            Sink::Separated(_) => {}
            Sink::Json(mut writer) => {
                writer.finish()?;
                let out = writer.into_inner();
                writeln!(out)?;
                out.flush()?;
            }
            Sink::NdJson(mut writer) => {
                writer.finish()?;
                writer.into_inner().flush()?;
            }
        }
        Ok(Printed { rows, shown })
    }
}

/// A result as a table, abridged.
pub(crate) fn table(schema: SchemaRef, batches: &[RecordBatch]) -> Result<String> {
    let batches = batches.iter().map(abridged).collect::<Result<Vec<_>>>()?;
    let format = TableFormat {
        null: "NULL".to_owned(),
        ..TableFormat::default()
    };
    let mut text = Vec::new();
    PrintFormat::Table.print_batches(&mut text, schema, &batches, MaxRows::Unlimited, true, &format)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Rebuilds a batch with some of its columns as text.
fn with_text(
    batch: &RecordBatch,
    becomes_text: impl Fn(&DataType) -> bool,
    text: impl Fn(&dyn Array, usize) -> Result<String>,
) -> Result<RecordBatch> {
    let schema = batch.schema();
    let mut fields = Vec::with_capacity(batch.num_columns());
    let mut columns = Vec::with_capacity(batch.num_columns());
    for (field, column) in schema.fields().iter().zip(batch.columns()) {
        if becomes_text(column.data_type()) {
            let values = (0..column.len()).map(|row| match column.is_valid(row) {
                true => text(column, row).map(Some),
                false => Ok(None),
            });
            let values = values.collect::<Result<StringArray>>()?;
            fields.push(Arc::new(Field::new(field.name(), DataType::Utf8, true)));
            columns.push(Arc::new(values) as ArrayRef);
        } else {
            fields.push(Arc::clone(field));
            columns.push(Arc::clone(column));
        }
    }
    let rows = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    Ok(RecordBatch::try_new_with_options(
        Arc::new(Schema::new(fields)),
        columns,
        &rows,
    )?)
}

/// Lists and structs as text: csv knows none.
fn without_nested(batch: &RecordBatch) -> Result<RecordBatch> {
    with_text(batch, DataType::is_nested, whole)
}

/// Encoded bytes, images, vectors, structs and long strings as a person reads them.
fn abridged(batch: &RecordBatch) -> Result<RecordBatch> {
    let long = |t: &DataType| t.is_nested() || t.is_string() || is_content_type(t);
    with_text(batch, long, abridged_value)
}

/// A value as arrow displays it.
fn whole(array: &dyn Array, row: usize) -> Result<String> {
    let formatter = ArrayFormatter::try_new(array, &FormatOptions::new().with_null("NULL"))?;
    Ok(formatter.value(row).try_to_string()?)
}

fn abridged_value(array: &dyn Array, row: usize) -> Result<String> {
    if array.is_null(row) {
        return Ok("NULL".to_owned());
    }
    match array.data_type() {
        t if is_content_type(t) => Ok(ContentColumn::try_new(array)?
            .get(row)
            .map(abridged_bytes)
            .unwrap_or_default()),
        DataType::List(_) => abridged_list(&array.as_list::<i32>().value(row)),
        DataType::LargeList(_) => abridged_list(&array.as_list::<i64>().value(row)),
        DataType::FixedSizeList(..) => abridged_list(&array.as_fixed_size_list().value(row)),
        t @ DataType::Struct(_) if is_image_type(t) => image_shape(array.as_struct(), row),
        DataType::Struct(_) => abridged_struct(array.as_struct(), row),
        _ => whole(array, row).map(|text| clipped(&text)),
    }
}

/// The beginning of a text that is longer than a screen is wide.
fn clipped(text: &str) -> String {
    const CHARS: usize = 200;
    match text.char_indices().nth(CHARS) {
        Some((end, _)) => format!("{}… ({} characters)", &text[..end], text.chars().count()),
        None => text.to_owned(),
    }
}

/// `ff d8 ff e0 … jpeg, 4.2 kB`
fn abridged_bytes(bytes: &[u8]) -> String {
    const WHOLE: usize = 8;
    const FIRST: usize = 4;
    let hex = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<Vec<_>>()
            .join(" ")
    };
    if bytes.len() <= WHOLE {
        return format!("{} ({})", hex(bytes), size(bytes.len() as u64))
            .trim_start()
            .to_owned();
    }
    let first = hex(bytes.get(..FIRST).unwrap_or(bytes));
    match image::guess_format(bytes) {
        Ok(format) => format!(
            "{first} … {}, {}",
            format.to_mime_type().trim_start_matches("image/"),
            size(bytes.len() as u64)
        ),
        Err(_) => format!("{first} … {}", size(bytes.len() as u64)),
    }
}

/// `4.2 kB`
pub(crate) fn size(bytes: u64) -> String {
    let (unit, name) = match bytes {
        0..1_000 => return format!("{bytes} B"),
        1_000..1_000_000 => (1e3, "kB"),
        1_000_000..1_000_000_000 => (1e6, "MB"),
        _ => (1e9, "GB"),
    };
    format!("{:.1} {name}", bytes as f64 / unit)
}

/// `image 100x80x3`: width, height, channels.
fn image_shape(images: &StructArray, row: usize) -> Result<String> {
    let part = |name| {
        images
            .column_by_name(name)
            .map_or_else(|| Ok("?".to_owned()), |part| whole(part, row))
    };
    Ok(format!(
        "image {}x{}x{}",
        part("width")?,
        part("height")?,
        part("channels")?
    ))
}

/// `{count: 480, mean: [0.12, 0.5, 0.031, … 128 values]}`
fn abridged_struct(structs: &StructArray, row: usize) -> Result<String> {
    let fields = structs.fields().iter().zip(structs.columns());
    let fields = fields.map(|(field, column)| Ok(format!("{}: {}", field.name(), abridged_value(column, row)?)));
    Ok(format!("{{{}}}", fields.collect::<Result<Vec<_>>>()?.join(", ")))
}

/// `[0.12, 0.5, 0.031, … 128 values]`; `25 x 128 values` for vectors of one length. A short list is whole.
fn abridged_list(values: &ArrayRef) -> Result<String> {
    const WHOLE: usize = 8;
    const FIRST: usize = 3;
    if let Some(width) = matrix_width(values)
        && values.len() * width > WHOLE
    {
        return Ok(format!("{} x {width} values", values.len()));
    }
    let shown = if values.len() <= WHOLE { values.len() } else { FIRST };
    let shown = (0..shown)
        .map(|i| element(values, i))
        .collect::<Result<Vec<_>>>()?
        .join(", ");
    Ok(match values.len() {
        0..=WHOLE => format!("[{shown}]"),
        len => format!("[{shown}, … {len} values]"),
    })
}

fn element(values: &ArrayRef, i: usize) -> Result<String> {
    match values.data_type() {
        DataType::Float32 if values.is_valid(i) => {
            Ok(significant(values.as_primitive::<Float32Type>().value(i).into()))
        }
        DataType::Float64 if values.is_valid(i) => Ok(significant(values.as_primitive::<Float64Type>().value(i))),
        _ => abridged_value(values, i),
    }
}

/// The length of the number lists in `rows`, where there are such, all of one length.
fn matrix_width(rows: &ArrayRef) -> Option<usize> {
    fn common<O: OffsetSizeTrait>(rows: &ArrayRef) -> Option<usize> {
        let mut lengths = rows.as_list::<O>().offsets().lengths();
        let first = lengths.next()?;
        lengths.all(|length| length == first).then_some(first)
    }
    match rows.data_type() {
        DataType::List(item) if item.data_type().is_numeric() => common::<i32>(rows),
        DataType::LargeList(item) if item.data_type().is_numeric() => common::<i64>(rows),
        DataType::FixedSizeList(item, width) if item.data_type().is_numeric() => usize::try_from(*width).ok(),
        _ => None,
    }
}

/// A number with four significant digits.
fn significant(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let exponent = value.abs().log10().floor() as i32;
    if !(-4..6).contains(&exponent) {
        return format!("{value:.3e}");
    }
    let decimals = usize::try_from(3 - exponent).unwrap_or(0);
    let text = format!("{value:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use arrow::array::{BinaryArray, FixedSizeListArray, Float32Array, Int32Array, ListArray};
    use arrow::datatypes::Int64Type;
    use pomona_udfs::image::{Image, ImageBuilder};

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Rc<RefCell<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.borrow_mut().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn print_all(format: PrintFormat, maxrows: MaxRows, batches: &[RecordBatch]) -> (String, Printed) {
        let shared = Shared::default();
        let mut out = Out::new(shared.clone());
        let options = PrintOptions {
            format,
            quiet: true,
            full: false,
            maxrows,
            timing: false,
        };
        let schema = batches.first().unwrap().schema();
        let mut printer = ResultPrinter::new(&mut out, &options, TableFormat::default(), schema, false);
        for batch in batches {
            printer.write(batch).unwrap();
        }
        let printed = printer.finish().unwrap();
        let text = String::from_utf8(shared.0.borrow().clone()).unwrap();
        (text, printed)
    }

    fn vectors(rows: usize, width: i32) -> ArrayRef {
        let len = rows * usize::try_from(width).unwrap();
        let values = Float32Array::from_iter_values((0..len).map(|i| i as f32 / 7.0));
        let item = Arc::new(Field::new_list_field(DataType::Float32, true));
        Arc::new(FixedSizeListArray::new(item, width, Arc::new(values), None))
    }

    fn abridged_first(array: &dyn Array) -> String {
        abridged_value(array, 0).unwrap()
    }

    #[test]
    fn bytes_are_their_first_ones_format_and_size() {
        let mut jpeg = vec![0xff, 0xd8, 0xff, 0xe0];
        jpeg.resize(4_210, 0);
        let column = BinaryArray::from_iter_values([jpeg.as_slice(), b"plain text", b"abc", b""]);
        let texts: Vec<_> = (0..4).map(|row| abridged_value(&column, row).unwrap()).collect();
        assert_eq!(
            texts,
            [
                "ff d8 ff e0 … jpeg, 4.2 kB",
                "70 6c 61 69 … 10 B",
                "61 62 63 (3 B)",
                "(0 B)"
            ]
        );
    }

    #[test]
    fn an_image_is_its_shape() {
        let image = Image {
            width: 3,
            height: 2,
            channels: 1,
            data: vec![0; 6],
        };
        let mut builder = ImageBuilder::with_capacity(1);
        builder.append(Some(image.view())).unwrap();
        assert_eq!(abridged_first(&builder.finish()), "image 3x2x1");
    }

    #[test]
    fn a_vector_is_its_first_values_and_length() {
        assert_eq!(abridged_first(&vectors(1, 128)), "[0, 0.1429, 0.2857, … 128 values]");
        assert_eq!(abridged_first(&vectors(1, 3)), "[0, 0.1429, 0.2857]");
        let integers = ListArray::from_iter_primitive::<Int64Type, _, _>([Some([Some(12_345), None])]);
        assert_eq!(abridged_first(&integers), "[12345, NULL]");
    }

    #[test]
    fn a_list_of_vectors_is_its_shape_and_a_struct_is_abridged_within() {
        let components = vectors(25, 128);
        let item = Arc::new(Field::new_list_field(components.data_type().clone(), true));
        let matrix: ArrayRef = Arc::new(FixedSizeListArray::new(item, 25, components, None));
        let model = StructArray::from(vec![
            (
                Arc::new(Field::new("count", DataType::Int32, true)),
                Arc::new(Int32Array::from(vec![480])) as ArrayRef,
            ),
            (
                Arc::new(Field::new("components", matrix.data_type().clone(), true)),
                matrix,
            ),
        ]);
        assert_eq!(abridged_first(&model), "{count: 480, components: 25 x 128 values}");
    }

    #[test]
    fn a_long_string_is_clipped() {
        let text = abridged_first(&StringArray::from(vec!["é".repeat(201)]));
        assert!(text.ends_with("é… (201 characters)"), "{text}");
        assert_eq!(
            abridged_first(&StringArray::from(vec!["é".repeat(200)])),
            "é".repeat(200)
        );
    }

    #[test]
    fn numbers_have_four_significant_digits() {
        let texts = [
            0.0,
            0.5,
            -1.0 / 3.0,
            123_456.7,
            1e7,
            0.000_123_456,
            1e-9,
            f64::NAN,
            0.999_99,
        ]
        .map(significant);
        assert_eq!(
            texts,
            [
                "0",
                "0.5",
                "-0.3333",
                "123457",
                "1.000e7",
                "0.0001235",
                "1.000e-9",
                "NaN",
                "1"
            ]
        );
    }

    #[test]
    fn a_table_counts_all_rows_and_shows_some() {
        let batch = RecordBatch::try_from_iter([("v", vectors(30, 9))]).unwrap();
        let (text, printed) = print_all(PrintFormat::Table, MaxRows::Limited(2), &[batch.clone(), batch]);
        assert_eq!(printed, Printed { rows: 60, shown: 2 });
        assert_eq!(text.matches("… 9 values").count(), 2);
        assert_eq!(text.matches("| .").count(), 3);
    }

    #[test]
    fn csv_and_json_hold_every_value() {
        let batch = RecordBatch::try_from_iter([("v", vectors(1, 9))]).unwrap();
        let (text, printed) = print_all(PrintFormat::Csv, MaxRows::Limited(0), &[batch.clone(), batch.clone()]);
        assert_eq!(printed, Printed { rows: 2, shown: 2 });
        assert_eq!(text.lines().count(), 3, "one header, two rows:\n{text}");
        assert!(text.contains("1.1428572]\""), "{text}");

        let (text, _) = print_all(PrintFormat::Json, MaxRows::Limited(0), &[batch.clone(), batch.clone()]);
        assert!(text.starts_with("[{\"v\":[0.0,") && text.ends_with("}]\n"), "{text}");
        let (text, _) = print_all(PrintFormat::Json, MaxRows::Limited(0), &[batch.slice(0, 0)]);
        assert_eq!(text, "[]\n");
        let (text, _) = print_all(PrintFormat::Tsv, MaxRows::Limited(0), &[batch.slice(0, 0)]);
        assert_eq!(text, "v\n");
    }

    #[test]
    fn a_reader_that_went_away_is_no_error() {
        struct Gone;
        impl Write for Gone {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Err(ErrorKind::BrokenPipe.into())
            }
        }
        let mut out = Out::new(Gone);
        assert!(!out.closed());
        writeln!(out, "text").unwrap();
        assert!(out.closed());
        out.flush().unwrap();
    }
}
