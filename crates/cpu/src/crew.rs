//! A crew of threads that stay: each call of [`Crew::join`] has them all run one closure beside the caller.
//!
//! A kernel takes microseconds to milliseconds and the next one follows at once, so a thread that has run out of work
//! looks for more a while before it sleeps, and handing it work allocates nothing. Who comes after the caller has
//! finished is not waited for: it finds the work closed and takes none.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::{self, JoinHandle};

/// Looks for work before a thread sleeps: some tens of microseconds.
const LOOKS: usize = 4000;

/// Set in `State::entered` while the work is open to the crew.
const OPEN: usize = 1 << (usize::BITS - 1);

type Work<'a> = &'a (dyn Fn() + Sync);

/// What the crew shares.
struct State {
    /// Grows with every work handed out, and at the end.
    round: AtomicUsize,
    /// OPEN, and how many of the crew are at work.
    entered: AtomicUsize,
    /// The work of the round, while it is open or anybody is at it.
    work: Mutex<Option<Work<'static>>>,
    /// What a thread of the crew panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// The threads; they end when it is dropped.
pub(crate) struct Crew {
    state: Arc<State>,
    threads: Vec<JoinHandle<()>>,
    /// Held by the caller whom the crew works for.
    caller: Mutex<()>,
}

impl std::fmt::Debug for Crew {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Crew of {}", self.count())
    }
}

/// The contents, whatever a holder panicked of: each is replaced as a whole.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Crew {
    /// Up to `count` threads: as many as the system grants.
    pub(crate) fn new(count: usize) -> Self {
        let state = Arc::new(State {
            round: AtomicUsize::new(0),
            entered: AtomicUsize::new(0),
            work: Mutex::new(None),
            panic: Mutex::new(None),
        });
        let hire = |i: usize| {
            let state = state.clone();
            thread::Builder::new().name(format!("rankfold-cpu-{}", i + 1)).spawn(move || state.work()).ok()
        };
        let threads = (0..count).map_while(hire).collect();
        Self { state, threads, caller: Mutex::new(()) }
    }

    /// How many threads it has.
    pub(crate) fn count(&self) -> usize {
        self.threads.len()
    }

    /// Run `work` on the caller's thread and on as many of the crew's as come in time, of whom `wanted` are woken if they
    /// sleep; returns when all of them are done. Who comes may come twice. On the caller's alone while the crew works for
    /// somebody else, the caller itself among them.
    ///
    /// # Panics
    /// Where `work` does, on any thread.
    pub(crate) fn join(&self, wanted: usize, work: Work) {
        let _caller = match self.caller.try_lock() {
            Ok(caller) => caller,
            Err(TryLockError::Poisoned(of_a_work_that_panicked)) => of_a_work_that_panicked.into_inner(),
            Err(TryLockError::WouldBlock) => return work(),
        };
        let state = &*self.state;
        // SAFETY: nobody is at the work, nor comes to it, once `Closing` is dropped, and that is before `work` ends.
        let work_for_all = unsafe { std::mem::transmute::<Work<'_>, Work<'static>>(work) };
        *lock(&state.work) = Some(work_for_all);
        *lock(&state.panic) = None;
        state.entered.store(OPEN, Ordering::Release);
        state.round.fetch_add(1, Ordering::Release);
        let closing = Closing(state);
        self.threads.iter().take(wanted).for_each(|thread| thread.thread().unpark());
        work();
        drop(closing);
        if let Some(panic) = lock(&state.panic).take() {
            resume_unwind(panic);
        }
    }
}

/// Closes the work when it is dropped, and waits for those who are at it.
struct Closing<'a>(&'a State);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.entered.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0;
        while self.0.entered.load(Ordering::Acquire) != 0 {
            looks += 1;
            if looks < LOOKS { std::hint::spin_loop() } else { thread::yield_now() }
        }
        *lock(&self.0.work) = None;
    }
}

impl State {
    /// A thread's life.
    fn work(&self) {
        let mut seen = 0;
        loop {
            let mut looks = 0;
            while self.round.load(Ordering::Acquire) == seen {
                looks += 1;
                if looks < LOOKS { std::hint::spin_loop() } else { thread::park() }
            }
            seen = self.round.load(Ordering::Acquire);
            if seen == usize::MAX {
                return;
            }
            if self.enter() {
                let work = *lock(&self.work);
                if let Some(Err(panic)) = work.map(|work| catch_unwind(AssertUnwindSafe(work))) {
                    lock(&self.panic).get_or_insert(panic);
                }
                self.entered.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// One more at the work, if it is open.
    fn enter(&self) -> bool {
        let one_more = |entered: usize| (entered & OPEN != 0).then_some(entered + 1);
        self.entered.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_ok()
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.state.round.store(usize::MAX, Ordering::Release);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A thread of the crew catches every panic.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    #[test]
    fn all_come_and_all_have_left_when_join_returns() {
        let crew = Crew::new(3);
        for round in 0..500 {
            let (here, left, all) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(round % 50 > 0));
            crew.join(3, &|| {
                // Some rounds wait until everybody has come, the others are over at once.
                if here.fetch_add(1, Ordering::SeqCst) == 3 {
                    all.store(true, Ordering::SeqCst);
                }
                while !all.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
                left.fetch_add(1, Ordering::SeqCst);
            });
            assert_eq!(here.into_inner(), left.into_inner());
        }
    }

    #[test]
    fn threads_that_sleep_are_woken() {
        let crew = Crew::new(1);
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(20));
            let here = AtomicUsize::new(0);
            crew.join(3, &|| {
                here.fetch_add(1, Ordering::SeqCst);
                while here.load(Ordering::SeqCst) < 2 {
                    thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_crew_works_on() {
        let crew = Crew::new(2);
        for panics_at in 0..3 {
            let here = AtomicUsize::new(0);
            let found = catch_unwind(AssertUnwindSafe(|| {
                crew.join(3, &|| {
                    let i = here.fetch_add(1, Ordering::SeqCst);
                    while here.load(Ordering::SeqCst) < 3 {
                        thread::yield_now();
                    }
                    assert_ne!(i, panics_at);
                });
            }));
            assert!(found.is_err());
        }
        let ran = AtomicBool::new(false);
        crew.join(3, &|| ran.store(true, Ordering::SeqCst));
        assert!(ran.into_inner());
    }

    #[test]
    fn a_caller_whom_the_crew_works_for_does_other_work_alone() {
        let crew = Crew::new(2);
        crew.join(2, &|| {
            let runs = AtomicUsize::new(0);
            crew.join(2, &|| _ = runs.fetch_add(1, Ordering::SeqCst));
            assert_eq!(runs.into_inner(), 1);
        });
    }

    #[test]
    fn callers_beside_each_other_each_find_everybody_gone() {
        let crew = Crew::new(2);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let (here, left) = (AtomicUsize::new(0), AtomicUsize::new(0));
                        crew.join(2, &|| {
                            here.fetch_add(1, Ordering::SeqCst);
                            thread::yield_now();
                            left.fetch_add(1, Ordering::SeqCst);
                        });
                        assert_eq!(here.into_inner(), left.into_inner());
                    }
                });
            }
        });
    }
}
