//! The ceiling of a session's memory, `pomona.memory_limit`: one budget for the operators of its
//! queries, encoded objects, decoded images, tensors, models and fits.
//!
//! It counts what is reserved. What nobody reserves comes on top: the program itself with its libraries
//! (about 100 MB), images as values, and small buffers.

use std::collections::HashMap;
use std::fmt::{self, Display};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use datafusion::common::resources_datafusion_err;
use datafusion::error::Result;
use datafusion::execution::memory_pool::{
    MemoryConsumer, MemoryLimit, MemoryPool, MemoryReservation, human_readable_size,
};
use parking_lot::{Condvar, Mutex};

/// The budget of a session. As DataFusion's pool it divides what others leave fairly among the
/// operators that can spill, as its `FairSpillPool` does; unlike that one its limit can be changed
/// (`SET pomona.memory_limit`), and functions can wait for a share.
#[derive(Debug)]
pub struct MemoryBudget {
    /// `usize::MAX` without a limit.
    limit: AtomicUsize,
    /// The limit cannot be changed.
    is_fixed: bool,
    used: Mutex<Used>,
    /// A share was given back.
    returned: Condvar,
}

#[derive(Debug, Default)]
struct Used {
    /// By operators that cannot spill, and by shares.
    fixed: usize,
    spillable: usize,
    spilling_operators: usize,
    /// The part of `fixed` that is soon given back.
    shares: usize,
    /// The part of `fixed` that models hold.
    models: HashMap<u64, Model>,
}

/// What is reserved for a model.
#[derive(Debug, Clone, Copy)]
struct Model {
    /// The threads that may run it.
    threads: usize,
    bytes: usize,
    /// The limit under which that was found.
    limit: usize,
}

impl Default for MemoryBudget {
    fn default() -> Self {
        Self {
            limit: AtomicUsize::new(usize::MAX),
            is_fixed: false,
            used: Mutex::default(),
            returned: Condvar::new(),
        }
    }
}

impl MemoryBudget {
    /// A budget whose limit, in bytes, stays: an executor's, whatever the sessions say whose queries it runs.
    pub fn fixed(limit: Option<usize>) -> Self {
        Self {
            limit: AtomicUsize::new(limit.unwrap_or(usize::MAX)),
            is_fixed: true,
            ..Self::default()
        }
    }

    /// The limit in bytes, if there is one.
    pub fn limit(&self) -> Option<usize> {
        Some(self.limit.load(Ordering::Relaxed)).filter(|limit| *limit != usize::MAX)
    }

    /// Sets the limit in bytes; what is held beyond a lower one stays until it is given back. A
    /// [fixed](Self::fixed) limit stays as it is.
    pub fn set_limit(&self, limit: Option<usize>) {
        if self.is_fixed {
            return;
        }
        self.limit.store(limit.unwrap_or(usize::MAX), Ordering::Relaxed);
        self.returned.notify_all();
    }

    /// Reserves what a model takes, from its first use in the session on, and gives the number of threads
    /// that it may run on: at most `threads`, fewer where the memory is short. `bytes` says what so many
    /// take.
    ///
    /// # Errors
    /// Where the memory is too small for one thread.
    pub fn keep_model(&self, model: u64, threads: usize, bytes: impl Fn(usize) -> usize) -> Result<usize> {
        let mut used = self.used.lock();
        let limit = self.limit.load(Ordering::Relaxed);
        if let Some(held) = used.models.get(&model) {
            if held.limit == limit {
                return Ok(held.threads);
            }
            used.fixed -= held.bytes;
            used.models.remove(&model);
        }
        // A quarter of what is left stays for images, operators and results, where it can.
        let available = limit.saturating_sub(used.fixed + used.spillable);
        let fits = |threads: &usize| bytes(*threads) <= available - available / 4;
        let threads = (2..=threads).rev().find(fits).unwrap_or(1);
        let bytes = bytes(threads);
        if bytes > available {
            return Err(resources_datafusion_err!(
                "it takes about {}, and of the session's {} there are {} left: raise the limit (SET \
                 pomona.memory_limit = '…', or --memory), or take a smaller model",
                human_readable_size(bytes),
                human_readable_size(limit),
                human_readable_size(available)
            ));
        }
        used.fixed += bytes;
        used.models.insert(model, Model { threads, bytes, limit });
        Ok(threads)
    }

    /// Takes `bytes` for as long as the share lives, and waits while other shares hold what is needed:
    /// they are given back by threads that wait for nothing.
    ///
    /// # Errors
    /// Where the bytes are not there even without the other shares: how many are missing, for what, and
    /// what to do.
    pub fn share(self: &Arc<Self>, bytes: usize, purpose: impl Display) -> Result<Share> {
        let mut used = self.used.lock();
        loop {
            let limit = self.limit.load(Ordering::Relaxed);
            let available = limit.saturating_sub(used.fixed + used.spillable);
            // Where others hold shares there is something to wait for; who cannot wait finds an eighth free.
            let spare = if used.shares == 0 { 0 } else { limit / 8 };
            if bytes.saturating_add(spare) <= available {
                used.fixed += bytes;
                used.shares += bytes;
                return Ok(Share {
                    budget: Arc::clone(self),
                    bytes,
                });
            }
            if used.shares == 0 || bytes > available + used.shares {
                return Err(resources_datafusion_err!(
                    "{purpose} takes {}, and of the session's {} there are {} left: raise the limit (SET \
                     pomona.memory_limit = '…', or --memory)",
                    human_readable_size(bytes),
                    human_readable_size(limit),
                    human_readable_size(available + used.shares)
                ));
            }
            self.returned.wait(&mut used);
        }
    }
}

/// A part of the budget that one step of the work holds; it is given back when it is dropped.
#[derive(Debug)]
pub struct Share {
    budget: Arc<MemoryBudget>,
    bytes: usize,
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut used = self.budget.used.lock();
        used.fixed -= self.bytes;
        used.shares -= self.bytes;
        drop(used);
        self.budget.returned.notify_all();
    }
}

impl Display for MemoryBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.limit() {
            Some(limit) => write!(f, "pomona.memory_limit({})", human_readable_size(limit)),
            None => f.write_str("pomona.memory_limit(none)"),
        }
    }
}

/// [`MemoryBudget`] as the pool of a runtime.
#[derive(Debug)]
pub struct BudgetPool(pub Arc<MemoryBudget>);

impl Display for BudgetPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl MemoryPool for BudgetPool {
    fn name(&self) -> &'static str {
        "pomona"
    }

    fn register(&self, consumer: &MemoryConsumer) {
        if consumer.can_spill() {
            self.0.used.lock().spilling_operators += 1;
        }
    }

    fn unregister(&self, consumer: &MemoryConsumer) {
        if consumer.can_spill() {
            let mut used = self.0.used.lock();
            used.spilling_operators = used.spilling_operators.saturating_sub(1);
        }
    }

    fn grow(&self, reservation: &MemoryReservation, additional: usize) {
        let mut used = self.0.used.lock();
        match reservation.consumer().can_spill() {
            true => used.spillable += additional,
            false => used.fixed += additional,
        }
    }

    fn shrink(&self, reservation: &MemoryReservation, shrink: usize) {
        let mut used = self.0.used.lock();
        match reservation.consumer().can_spill() {
            true => used.spillable = used.spillable.saturating_sub(shrink),
            false => used.fixed = used.fixed.saturating_sub(shrink),
        }
        drop(used);
        self.0.returned.notify_all();
    }

    fn try_grow(&self, reservation: &MemoryReservation, additional: usize) -> Result<()> {
        let limit = self.0.limit.load(Ordering::Relaxed);
        let mut used = self.0.used.lock();
        let can_spill = reservation.consumer().can_spill();
        let (taken, available) = if can_spill {
            // They spill only when they ask for more themselves: a quarter stays for those that cannot.
            let left = limit.saturating_sub(used.fixed - used.shares) / 4 * 3;
            let free = limit.saturating_sub(used.fixed + used.spillable);
            let fair = left / used.spilling_operators.max(1);
            (reservation.size(), fair.min(reservation.size().saturating_add(free)))
        } else {
            (used.fixed + used.spillable, limit)
        };
        if taken.saturating_add(additional) > available {
            return Err(resources_datafusion_err!(
                "{} needs {} more than the {} that it has, and of the session's {} there are {} left: raise the limit (SET \
                 pomona.memory_limit = '…', or --memory), or use fewer threads (SET \
                 datafusion.execution.target_partitions = 1)",
                reservation.consumer().name(),
                human_readable_size(additional),
                human_readable_size(reservation.size()),
                human_readable_size(limit),
                human_readable_size(available.saturating_sub(taken))
            ));
        }
        match can_spill {
            true => used.spillable += additional,
            false => used.fixed += additional,
        }
        Ok(())
    }

    fn reserved(&self) -> usize {
        let used = self.0.used.lock();
        used.fixed + used.spillable
    }

    fn memory_limit(&self) -> MemoryLimit {
        self.0.limit().map_or(MemoryLimit::Infinite, MemoryLimit::Finite)
    }
}

/// Reads `4GB`, `512MB`, `1.5g`, `1048576`. Units are powers of 1024, as memory is sold.
///
/// # Errors
/// Says what a size looks like.
pub fn parse_size(text: &str) -> Result<usize, String> {
    let text = text.trim();
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text[number.len()..].to_ascii_lowercase();
    let shift = match unit.trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(format!("'{unit}' is no unit: use KB, MB, GB or TB")),
    };
    match number.trim().parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok((number * f64::from(2_u32).powi(shift)) as usize),
        _ => Err(format!("'{text}' is no size: a size is a number and a unit, as 4GB")),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("4GB").unwrap(), 4 << 30);
        assert_eq!(parse_size("512m").unwrap(), 512 << 20);
        assert_eq!(parse_size("1.5 KiB").unwrap(), 1536);
        assert_eq!(parse_size("1048576").unwrap(), 1 << 20);
        for wrong in ["", "GB", "-1GB", "0", "4XB", "nan", "inf"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_share_waits_for_others_and_fails_where_waiting_is_in_vain() {
        let budget = Arc::new(MemoryBudget::default());
        budget.set_limit(Some(100));
        let pool: Arc<dyn MemoryPool> = Arc::new(BudgetPool(Arc::clone(&budget)));
        let fixed = MemoryConsumer::new("operator").register(&pool);
        fixed.try_grow(30).unwrap();

        let first = budget.share(60, "decode").unwrap();
        let error = budget.share(71, "decode: this image").unwrap_err().to_string();
        assert!(
            error.contains("decode: this image takes 71") && error.contains("pomona.memory_limit"),
            "{error}"
        );
        let waiting = std::thread::spawn({
            let budget = Arc::clone(&budget);
            move || budget.share(50, "decode").map(|share| share.bytes)
        });
        drop(first);
        assert_eq!(waiting.join().unwrap().unwrap(), 50);
        assert_eq!(pool.reserved(), 30);
        assert!(fixed.try_grow(71).is_err());
        budget.set_limit(None);
        fixed.try_grow(71).unwrap();
    }

    #[test]
    fn a_fixed_limit_stays() {
        let budget = MemoryBudget::fixed(Some(100));
        budget.set_limit(None);
        assert_eq!(budget.limit(), Some(100));
        let unlimited = MemoryBudget::fixed(None);
        unlimited.set_limit(Some(1));
        assert_eq!(unlimited.limit(), None);
    }

    #[test]
    fn operators_that_spill_share_fairly() {
        let budget = Arc::new(MemoryBudget::default());
        budget.set_limit(Some(100));
        let pool: Arc<dyn MemoryPool> = Arc::new(BudgetPool(Arc::clone(&budget)));
        let [one, two] = ["one", "two"].map(|name| MemoryConsumer::new(name).with_can_spill(true).register(&pool));
        let share = budget.share(20, "decode").unwrap();
        one.try_grow(37).unwrap();
        assert!(one.try_grow(1).is_err());
        two.try_grow(37).unwrap();
        drop((one, share));
        two.try_grow(38).unwrap();
        assert!(two.try_grow(1).is_err());
        budget.share(25, "decode").unwrap();
    }
}
