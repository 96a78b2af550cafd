//! What is left of a machine for the work while its disk moves a step's bytes: the same step without a pager, and
//! beside it plain reads and writes of as many bytes, which nobody waits for before they are done. Whatever moves them
//! takes processor time, the system's copies, or a virtual machine's whose disk another program plays; so this, and not
//! the greater of the two alone, is what to compare a pager that moves as much with. (One that brings in the next
//! step's bytes during the last may come out a little better.)

use crate::disk::Probe;
use crate::meter::Phase;
use crate::work::{Failure, Step};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

/// A run to write from memory, or to read into it: which, and how many bytes of it.
struct Move {
    write: bool,
    run: usize,
    bytes: usize,
}

/// What is to be moved, as the threads that move are given it, and their answers.
struct Moves {
    todo: Sender<Move>,
    done: Receiver<io::Result<()>>,
    /// Runs that memory has; the next of them, and those under way.
    runs: usize,
    next: usize,
    under_way: usize,
}

impl Moves {
    /// Have a phase's bytes moved, those to the file and those from it by turns, in runs of `run`.
    fn start(&mut self, phase: &Phase, run: usize) {
        let mut left = [phase.stored as usize, phase.loaded as usize];
        while left != [0, 0] {
            for (write, left) in [true, false].into_iter().zip(&mut left).filter(|(_, left)| **left > 0) {
                let bytes = run.min(*left);
                // The receiver outlives all of this.
                let _ = self.todo.send(Move { write, run: self.next, bytes });
                (self.next, *left) = ((self.next + 1) % self.runs, *left - bytes);
                self.under_way += 1;
            }
        }
    }

    /// Until all is moved.
    fn finish(&mut self) -> io::Result<()> {
        while self.under_way > 0 {
            self.under_way -= 1;
            self.done.recv().map_err(|_| io::Error::other("the movers are gone"))??;
        }
        Ok(())
    }
}

impl Probe {
    /// Seconds of a step, if in each of its phases as many bytes move as there moved in those; the phase ends when both
    /// are done.
    pub fn beside(&mut self, step: &mut Step, phases: &[Phase]) -> Result<f64, Failure> {
        let (bytes, run, threads) = (self.memory.bytes(), self.run, 2 * self.threads[2]);
        let (file, page) = (&self.file, self.page);
        let mut memory = self.memory.pin_mut(0..bytes)?;
        let runs: Vec<_> = memory.chunks_exact_mut(run).map(Mutex::new).collect();
        let (todo, given) = mpsc::channel::<Move>();
        let (moved, done) = mpsc::channel();
        let given = Mutex::new(given);
        let mover = |moved: Sender<io::Result<()>>| {
            loop {
                let next = given.lock().unwrap_or_else(PoisonError::into_inner).recv();
                let Ok(Move { write, run: at, bytes }) = next else { return };
                let mut memory = runs[at].lock().unwrap_or_else(PoisonError::into_inner);
                // Direct I/O moves whole pages.
                let memory = &mut memory[..bytes.next_multiple_of(page)];
                let at = (at * run) as u64;
                let result = if write { file.write_all_at(memory, at) } else { file.read_exact_at(memory, at) };
                if moved.send(result).is_err() {
                    return;
                }
            }
        };
        thread::scope(|scope| {
            for _ in 0..threads {
                let moved = moved.clone();
                scope.spawn(|| mover(moved));
            }
            drop(moved);
            let mut moves = Moves { todo, done, runs: runs.len(), next: 0, under_way: 0 };
            let mut phases = phases.iter();
            let mut failed = None;
            let begun = Instant::now();
            let mut next = |moves: &mut Moves| phases.next().into_iter().for_each(|phase| moves.start(phase, run));
            next(&mut moves);
            step(&mut || {
                failed = failed.take().or(moves.finish().err());
                next(&mut moves);
            })?;
            failed = failed.or(moves.finish().err());
            let seconds = begun.elapsed().as_secs_f64();
            failed.map_or(Ok(seconds), |why| Err(why.into()))
        })
    }
}
