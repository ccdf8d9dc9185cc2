//! An output that several threads fill, each its own parts.
#![expect(unsafe_code, reason = "threads write disjoint parts of one slice that are not contiguous rows")]

use std::marker::PhantomData;

/// A mutable slice cut up by its users.
#[derive(Debug)]
pub(crate) struct SharedOut<'a, T> {
    data: *mut T,
    len: usize,
    // Borrows the slice for as long as parts may be taken.
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it gives out `&mut T` on several threads, as a `&mut [T]` cut up beforehand would.
unsafe impl<T: Send> Sync for SharedOut<'_, T> {}

impl<'a, T> SharedOut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { data: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The part `start..start + len`.
    ///
    /// # Panics
    /// If it does not lie in the slice.
    ///
    /// # Safety
    /// No other part that overlaps it is in use while this one is.
    #[expect(clippy::mut_from_ref, reason = "the caller keeps parts disjoint")]
    #[inline(always)]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part {start} + {len} of {}", self.len);
        // SAFETY: `start` is inside the slice (above).
        let data = unsafe { self.data.add(start) };
        // SAFETY: inside the slice (above), which stays borrowed; the caller keeps parts disjoint.
        unsafe { std::slice::from_raw_parts_mut(data, len) }
    }
    /// Writes element `i`.
    ///
    /// # Panics
    /// If there is none.
    ///
    /// # Safety
    /// No part with it is in use, and no other thread writes it now.
    #[inline(always)]
    pub(crate) unsafe fn set(&self, i: usize, value: T) {
        // SAFETY: the caller's promise.
        let element = unsafe { self.part(i, 1) };
        element[0] = value;
    }
}
