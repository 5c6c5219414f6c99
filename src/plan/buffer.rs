//! [`Buffer`]: one stream for several readers, each of which takes all batches at its own pace.
//!
//! 1. A reader takes what waits in its queue: first what is in memory, then what was spilled.
//! 2. If nothing does, it polls the input itself, and puts what comes into the queues of all other readers
//!    that are still there. Nobody else is needed: a join may read one side wholly before the other.
//! 3. While one polls, the others that need the next batch wait. The input wakes all of them, since the one
//!    that polled may never poll again.
//!
//! A queue holds a bounded number of bytes in memory, from the pool of the query; the rest is on disk.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use datafusion::common::utils::memory::get_record_batch_memory_size;
use datafusion::common::{exec_datafusion_err, internal_datafusion_err};
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryReservation};
use datafusion::execution::{RecordBatchStream, SendableRecordBatchStream, TaskContext};
use datafusion::physical_plan::metrics::{BaselineMetrics, SpillMetrics};
use datafusion::physical_plan::spill::SpillManager;
use datafusion::physical_plan::spill::spill_pool::{SpillPoolSink, spsc_channel};
use futures::{Stream, StreamExt};
use parking_lot::Mutex;

/// What the queues of one reader hold in memory, in all partitions.
const QUEUED_BYTES: usize = 16 << 20;

/// A stream, and what some of its readers have not taken yet.
pub(super) struct Buffer {
    state: Mutex<State>,
    waiting: Arc<Waiting>,
    store: Store,
}

struct State {
    input: Input,
    /// Why nothing more comes, once nothing does.
    failure: Option<Arc<DataFusionError>>,
    queues: Vec<Queue>,
}

enum Input {
    Idle(SendableRecordBatchStream),
    /// A reader polls it.
    Busy,
    Ended,
}

/// What waits for one reader.
#[derive(Default)]
struct Queue {
    reader: Presence,
    batches: VecDeque<(RecordBatch, usize)>,
    bytes: usize,
    /// All that came later than `batches`.
    spilled: Option<Spilled>,
    knows_failure: bool,
}

#[derive(Default, PartialEq, Eq)]
enum Presence {
    /// It may still come: a subquery is read before the query's other parts are executed.
    #[default]
    Expected,
    Here,
    Gone,
}

struct Spilled {
    sink: SpillPoolSink,
    batches: SendableRecordBatchStream,
    unread: usize,
}

impl Buffer {
    /// A buffer of one partition of `partitions`, for `readers`.
    pub(super) fn new(
        input: SendableRecordBatchStream,
        readers: usize,
        (partition, partitions): (usize, usize),
        context: &TaskContext,
        metrics: SpillMetrics,
    ) -> Self {
        let store = Store::new(input.schema(), (partition, partitions), context, metrics);
        Self {
            state: Mutex::new(State {
                input: Input::Idle(input),
                failure: None,
                queues: (0..readers).map(|_| Queue::default()).collect(),
            }),
            waiting: Arc::new(Waiting::default()),
            store,
        }
    }

    /// All batches, for one reader; none if it reads already.
    pub(super) fn read(self: &Arc<Self>, reader: usize, metrics: BaselineMetrics) -> Option<Reader> {
        let mut state = self.state.lock();
        let queue = state.queues.get_mut(reader)?;
        if queue.reader != Presence::Expected {
            return None;
        }
        queue.reader = Presence::Here;
        Some(Reader {
            buffer: Arc::clone(self),
            reader,
            metrics,
        })
    }

    fn poll(&self, reader: usize, cx: &mut Context<'_>) -> Poll<Option<Result<RecordBatch>>> {
        let mut input = {
            let mut state = self.state.lock();
            if let Some(poll) = self.poll_queue(&mut state, reader, cx) {
                return poll;
            }
            self.waiting.register(reader, cx.waker());
            match std::mem::replace(&mut state.input, Input::Busy) {
                Input::Idle(input) => input,
                Input::Busy => return Poll::Pending,
                Input::Ended => {
                    state.input = Input::Ended;
                    return Poll::Ready(None);
                }
            }
        };

        // Without the lock: a network may run in here.
        self.waiting.woken.store(false, Ordering::SeqCst);
        let mut polling = Polling {
            buffer: self,
            has_returned: false,
        };
        let waker = Waker::from(Arc::clone(&self.waiting));
        let polled = input.poll_next_unpin(&mut Context::from_waker(&waker));
        polling.has_returned = true;

        match polled {
            Poll::Pending => {
                self.state.lock().input = Input::Idle(input);
                // Those who were woken while this reader polled found the input busy.
                if self.waiting.woken.load(Ordering::SeqCst) {
                    self.waiting.wake_all();
                }
                Poll::Pending
            }
            Poll::Ready(Some(Ok(batch))) => {
                let handed_out = {
                    let mut state = self.state.lock();
                    state.input = Input::Idle(input);
                    state.hand_out(&batch, reader, &self.store)
                };
                if let Err(error) = handed_out {
                    return Poll::Ready(Some(Err(self.fail(reader, error))));
                }
                self.waiting.wake_all();
                Poll::Ready(Some(Ok(batch)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(self.fail(reader, error)))),
            Poll::Ready(None) => {
                self.state.lock().input = Input::Ended;
                self.waiting.wake_all();
                Poll::Ready(None)
            }
        }
    }

    /// What waits for a reader, or that nothing will; none if it is the next to poll the input.
    fn poll_queue(
        &self,
        state: &mut State,
        reader: usize,
        cx: &mut Context<'_>,
    ) -> Option<Poll<Option<Result<RecordBatch>>>> {
        let Some(queue) = state.queues.get_mut(reader) else {
            let error = internal_datafusion_err!("SharedExec has no reader {reader}");
            return Some(Poll::Ready(Some(Err(error))));
        };
        if let Some((batch, bytes)) = queue.batches.pop_front() {
            queue.bytes -= bytes;
            self.store.reservation.shrink(bytes);
            return Some(Poll::Ready(Some(Ok(batch))));
        }
        if let Some(spilled) = &mut queue.spilled {
            let polled = match spilled.batches.poll_next_unpin(cx) {
                Poll::Ready(None) => Poll::Ready(Some(Err(internal_datafusion_err!(
                    "a spilled file of SharedExec ended {} batches early",
                    spilled.unread
                )))),
                polled => polled,
            };
            if polled.is_ready() {
                spilled.unread = spilled.unread.saturating_sub(1);
            }
            if spilled.unread == 0 {
                queue.spilled = None;
            }
            return Some(polled);
        }
        match &state.failure {
            Some(_) if queue.knows_failure => Some(Poll::Ready(None)),
            Some(failure) => {
                queue.knows_failure = true;
                Some(Poll::Ready(Some(Err(DataFusionError::from(failure)))))
            }
            None => None,
        }
    }

    /// Ends the input: `reader` gets the error at once, the others after what waits for them.
    fn fail(&self, reader: usize, error: DataFusionError) -> DataFusionError {
        let failure = Arc::new(error);
        let ended = {
            let mut state = self.state.lock();
            state.failure = Some(Arc::clone(&failure));
            if let Some(queue) = state.queues.get_mut(reader) {
                queue.knows_failure = true;
            }
            std::mem::replace(&mut state.input, Input::Ended)
        };
        drop(ended);
        self.waiting.wake_all();
        DataFusionError::from(&failure)
    }

    /// Nothing waits for a reader that has gone, and nothing is computed when all have.
    fn leave(&self, reader: usize) {
        let (queue, input) = {
            let mut state = self.state.lock();
            let mut left = Queue {
                reader: Presence::Gone,
                ..Queue::default()
            };
            if let Some(queue) = state.queues.get_mut(reader) {
                std::mem::swap(queue, &mut left);
            }
            let is_read = state.queues.iter().any(|queue| queue.reader != Presence::Gone);
            let input = (!is_read).then(|| std::mem::replace(&mut state.input, Input::Ended));
            (left, input)
        };
        self.store.reservation.shrink(queue.bytes);
        drop((queue, input));
    }
}

impl State {
    fn hand_out(&mut self, batch: &RecordBatch, taken_by: usize, store: &Store) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        for (reader, queue) in self.queues.iter_mut().enumerate() {
            if reader != taken_by && queue.reader != Presence::Gone {
                queue.push(batch, store)?;
            }
        }
        Ok(())
    }
}

impl Queue {
    fn push(&mut self, batch: &RecordBatch, store: &Store) -> Result<()> {
        let bytes = get_record_batch_memory_size(batch);
        let fits = self.spilled.is_none() && (self.bytes + bytes <= store.queued_bytes || !store.has_disk);
        if fits && store.reservation.try_grow(bytes).is_ok() {
            self.bytes += bytes;
            self.batches.push_back((batch.clone(), bytes));
            return Ok(());
        }
        let spilled = self.spilled.get_or_insert_with(|| store.spilled());
        spilled.sink.push_batch(batch)?;
        spilled.unread += 1;
        Ok(())
    }
}

/// Where batches wait.
struct Store {
    reservation: MemoryReservation,
    queued_bytes: usize,
    has_disk: bool,
    file_bytes: usize,
    spill_manager: Arc<SpillManager>,
}

impl Store {
    fn new(
        schema: SchemaRef,
        (partition, partitions): (usize, usize),
        context: &TaskContext,
        metrics: SpillMetrics,
    ) -> Self {
        let config = context.session_config();
        let runtime = context.runtime_env();
        let manager = SpillManager::new(Arc::clone(&runtime), metrics, schema);
        Self {
            reservation: MemoryConsumer::new(format!("SharedExec[{partition}]"))
                .with_can_spill(true)
                .register(context.memory_pool()),
            queued_bytes: QUEUED_BYTES / partitions.max(1),
            has_disk: runtime.disk_manager.tmp_files_enabled(),
            file_bytes: config.options().execution.max_spill_file_size_bytes.get(),
            spill_manager: Arc::new(manager.with_compression_type(config.spill_compression())),
        }
    }

    fn spilled(&self) -> Spilled {
        let (sink, batches) = spsc_channel(self.file_bytes, Arc::clone(&self.spill_manager));
        Spilled {
            sink,
            batches,
            unread: 0,
        }
    }
}

/// The readers that wait for the input.
#[derive(Default)]
struct Waiting {
    wakers: Mutex<Vec<(usize, Waker)>>,
    /// Whether anybody was woken since the input was last polled.
    woken: AtomicBool,
}

impl Waiting {
    fn register(&self, reader: usize, waker: &Waker) {
        let mut wakers = self.wakers.lock();
        match wakers.iter_mut().find(|(known, _)| *known == reader) {
            Some((_, known)) => known.clone_from(waker),
            None => wakers.push((reader, waker.clone())),
        }
    }

    fn wake_all(&self) {
        self.woken.store(true, Ordering::SeqCst);
        let wakers = std::mem::take(&mut *self.wakers.lock());
        for (_, waker) in wakers {
            waker.wake();
        }
    }
}

impl Wake for Waiting {
    fn wake(self: Arc<Self>) {
        self.wake_all();
    }
}

/// Lets nobody wait for a reader that panicked as it polled the input.
struct Polling<'a> {
    buffer: &'a Buffer,
    has_returned: bool,
}

impl Drop for Polling<'_> {
    fn drop(&mut self) {
        if !self.has_returned {
            let error = exec_datafusion_err!("a computation that several parts of the query share has panicked");
            // No reader: all of them shall know.
            self.buffer.fail(usize::MAX, error);
        }
    }
}

/// The batches of a [`Buffer`], for one reader.
pub(super) struct Reader {
    buffer: Arc<Buffer>,
    reader: usize,
    metrics: BaselineMetrics,
}

impl Stream for Reader {
    type Item = Result<RecordBatch>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let poll = self.buffer.poll(self.reader, cx);
        self.metrics.record_poll(poll)
    }
}

impl RecordBatchStream for Reader {
    fn schema(&self) -> SchemaRef {
        Arc::clone(self.buffer.store.spill_manager.schema())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.buffer.leave(self.reader);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use arrow::array::{AsArray, Int64Array};
    use arrow::datatypes::{DataType, Field, Int64Type, Schema};
    use datafusion::execution::memory_pool::GreedyMemoryPool;
    use datafusion::execution::runtime_env::RuntimeEnvBuilder;
    use datafusion::physical_plan::metrics::ExecutionPlanMetricsSet;
    use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
    use futures::channel::mpsc;
    use futures::{FutureExt, SinkExt, TryStreamExt, stream};

    use super::*;

    fn batch(rows: std::ops::Range<i64>) -> RecordBatch {
        let schema = Arc::new(Schema::new(vec![Field::new("v", DataType::Int64, false)]));
        RecordBatch::try_new(schema, vec![Arc::new(Int64Array::from_iter_values(rows))]).unwrap()
    }

    fn values(batches: &[RecordBatch]) -> Vec<i64> {
        let columns = batches.iter().map(|batch| batch.column(0).as_primitive::<Int64Type>());
        columns.flat_map(|column| column.values().to_vec()).collect()
    }

    fn context(memory: usize) -> TaskContext {
        let runtime = RuntimeEnvBuilder::new().with_memory_pool(Arc::new(GreedyMemoryPool::new(memory)));
        TaskContext::default().with_runtime(runtime.build_arc().unwrap())
    }

    fn buffer(
        input: impl Stream<Item = Result<RecordBatch>> + Send + 'static,
        readers: usize,
        context: &TaskContext,
    ) -> (Arc<Buffer>, Vec<Reader>, SpillMetrics) {
        let metrics = ExecutionPlanMetricsSet::new();
        let spills = SpillMetrics::new(&metrics, 0);
        let input = Box::pin(RecordBatchStreamAdapter::new(batch(0..1).schema(), input));
        let buffer = Arc::new(Buffer::new(input, readers, (0, 1), context, spills.clone()));
        let readers = (0..readers)
            .map(|i| buffer.read(i, BaselineMetrics::new(&metrics, 0)).unwrap())
            .collect();
        (buffer, readers, spills)
    }

    #[tokio::test]
    async fn readers_take_all_rows_one_after_the_other() {
        for memory in [usize::MAX, 0] {
            let context = context(memory);
            let input = stream::iter((0..500).map(|i| Ok(batch(i * 100..(i + 1) * 100))));
            let (_, readers, spills) = buffer(input, 3, &context);
            for reader in readers {
                let batches: Vec<RecordBatch> = reader.try_collect().await.unwrap();
                assert_eq!(values(&batches), (0..50_000).collect::<Vec<_>>());
            }
            assert_eq!(spills.spilled_rows.value(), if memory == 0 { 100_000 } else { 0 });
            assert_eq!(context.memory_pool().reserved(), 0);
        }
    }

    #[tokio::test]
    async fn readers_may_take_turns_while_one_spills() {
        let context = context(8 << 10);
        let input = stream::iter((0..100).map(|i| Ok(batch(i * 100..(i + 1) * 100))));
        let (_, mut readers, _) = buffer(input, 2, &context);
        let (mut slow, mut fast) = (readers.pop().unwrap(), readers.pop().unwrap());
        let mut rows = [vec![], vec![]];
        while let Some(next) = fast.try_next().await.unwrap() {
            rows[0].push(next);
            if rows[0].len().is_multiple_of(3) {
                rows[1].extend(slow.try_next().await.unwrap());
                rows[1].extend(slow.try_next().await.unwrap());
            }
        }
        rows[1].extend(slow.try_collect::<Vec<_>>().await.unwrap());
        for rows in rows {
            assert_eq!(values(&rows), (0..10_000).collect::<Vec<_>>());
        }
    }

    #[tokio::test]
    async fn an_error_reaches_every_reader_after_the_rows() {
        let context = context(usize::MAX);
        let input = stream::iter([Ok(batch(0..2)), Err(exec_datafusion_err!("no such image"))]);
        let (_, readers, _) = buffer(input, 2, &context);
        for mut reader in readers {
            assert_eq!(reader.next().await.unwrap().unwrap().num_rows(), 2);
            let error = reader.next().await.unwrap().unwrap_err().to_string();
            assert!(error.contains("no such image"), "{error}");
            assert!(reader.next().await.is_none());
        }
    }

    #[tokio::test]
    async fn a_reader_that_never_polls_again_holds_nobody_up() {
        let context = context(usize::MAX);
        let (mut sender, input) = mpsc::channel(1);
        let (_, mut readers, _) = buffer(input, 2, &context);
        let (mut second, mut first) = (readers.pop().unwrap(), readers.pop().unwrap());
        assert!(first.next().now_or_never().is_none());
        let waits = datafusion::common::runtime::SpawnedTask::spawn(async move { second.next().await });
        tokio::task::yield_now().await;
        sender.send(Ok(batch(0..3))).await.unwrap();
        assert_eq!(waits.await.unwrap().unwrap().unwrap().num_rows(), 3);
        assert_eq!(first.next().await.unwrap().unwrap().num_rows(), 3);
    }

    #[tokio::test]
    async fn nothing_is_computed_or_kept_for_nobody() {
        let context = context(usize::MAX);
        let (sender, input) = mpsc::channel::<Result<RecordBatch>>(1);
        let (buffer, mut readers, _) = buffer(input.chain(stream::pending()), 2, &context);
        drop(readers.pop());
        assert!(!sender.is_closed());
        assert!(
            buffer
                .read(0, BaselineMetrics::new(&ExecutionPlanMetricsSet::new(), 0))
                .is_none()
        );
        drop(readers.pop());
        assert!(sender.is_closed());
        assert_eq!(context.memory_pool().reserved(), 0);
    }
}
