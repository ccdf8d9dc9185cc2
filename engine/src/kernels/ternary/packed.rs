//! Packed rows as the fast kernels read them: one block of 256 columns is 64 bytes of two-bit codes.
//!
//! That is what `TQ2_0` holds, and what two neighbouring blocks of `I2_S` are together. `TQ1_0` is brought into
//! this form, with the scales behind the codes, a few rows at a time.

#![expect(unsafe_code, reason = "calls the instruction set that `KernelSet` has seen; writes its own rows")]

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::TILE_ROWS;
use super::output::{Output, TokenScale};
use super::quantized_rows::BLOCK_COLS;
use crate::kernels::Isa;
use crate::ternary::{TernaryFormat, TernaryMatrix};

/// Bytes of codes in a block of 256 columns.
pub(super) const BLOCK_BYTES: usize = 64;

/// Bytes of such a block with its scale behind the codes.
const SCALED_BYTES: usize = BLOCK_BYTES + size_of::<u16>();

/// Some rows of two-bit codes.
///
/// Invariant: block `b < n_full` of row `r < n_rows` is the 64 bytes from `r * row_bytes + b * block_bytes` of
/// `bytes`, and if `has_half`, block `n_full` is 32 bytes there. If `block_bytes` is more than 64, its scale follows.
#[derive(Clone, Copy)]
pub(super) struct PackedRows<'a> {
    bytes: &'a [u8],
    n_rows: usize,
    row_bytes: usize,
    block_bytes: usize,
    n_full: usize,
    has_half: bool,
}

impl<'a> PackedRows<'a> {
    /// The rows of a matrix whose format is two-bit codes.
    pub(super) fn of(matrix: &TernaryMatrix<'a>, rows: Range<usize>) -> Self {
        let block_bytes = match matrix.format() {
            TernaryFormat::I2S => BLOCK_BYTES,
            TernaryFormat::Tq2_0 | TernaryFormat::Tq1_0 => matrix.format().block_bytes(),
        };
        assert!(block_bytes == BLOCK_BYTES || block_bytes == SCALED_BYTES, "`TQ1_0` is not in two-bit codes");
        let row_bytes = matrix.row_bytes();
        let bytes = &matrix.blocks()[rows.start * row_bytes..rows.end * row_bytes];
        let (n_full, has_half) = blocks(matrix.n_cols());
        assert!(row_bytes >= n_full * block_bytes + if has_half { BLOCK_BYTES / 2 } else { 0 });
        Self { bytes, n_rows: rows.len(), row_bytes, block_bytes, n_full, has_half }
    }

    /// Rows that were brought into this form one after the other, without gaps.
    pub(super) fn dense(bytes: &'a [u8], n_rows: usize, n_cols: usize) -> Self {
        let (n_full, has_half) = blocks(n_cols);
        assert!(!has_half && bytes.len() >= n_rows * n_full * SCALED_BYTES, "{} bytes", bytes.len());
        let row_bytes = n_full * SCALED_BYTES;
        Self { bytes, n_rows, row_bytes, block_bytes: SCALED_BYTES, n_full, has_half }
    }

    /// Number of rows.
    pub(super) fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Whole blocks of 256 columns.
    pub(super) fn n_full(&self) -> usize {
        self.n_full
    }

    /// Blocks of 256 columns; the last may be a half.
    pub(super) fn n_blocks(&self) -> usize {
        self.n_full + usize::from(self.has_half)
    }

    /// Whether half a block follows the whole ones.
    pub(super) fn has_half(&self) -> bool {
        self.has_half
    }

    /// Bytes from one block to the next.
    pub(super) fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Bytes from one row to the next.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Where a row starts; past the end of the matrix its last row again.
    #[inline(always)]
    pub(super) fn start(&self, row: usize) -> *const u8 {
        self.bytes[row.min(self.n_rows - 1) * self.row_bytes..].as_ptr()
    }

    /// Where `N` rows start.
    pub(super) fn starts<const N: usize>(&self, first: usize) -> [*const u8; N] {
        std::array::from_fn(|i| self.start(first + i))
    }
}

/// Whole blocks of 256 columns, and whether half a block follows.
fn blocks(n_cols: usize) -> (usize, bool) {
    (n_cols / BLOCK_COLS, !n_cols.is_multiple_of(BLOCK_COLS))
}

/// Some rows of a matrix, to be multiplied by one thread.
pub(super) struct RowsJob<'a> {
    pub(super) rows: PackedRows<'a>,
    /// Where in the matrix they start.
    pub(super) first_row: usize,
    pub(super) matrix: &'a TernaryMatrix<'a>,
    pub(super) out: &'a Output<'a>,
}

impl RowsJob<'_> {
    /// Whether each block has its own scale.
    pub(super) fn has_block_scales(&self) -> bool {
        self.matrix.format().has_block_scales()
    }

    /// Scales, as f16 bits, of block `block` of `N` rows that start there.
    ///
    /// # Safety
    /// `starts` is of these rows, which have such a block with a scale.
    #[inline(always)]
    pub(super) unsafe fn block_scales<const N: usize>(
        &self,
        starts: &[*const u8; N],
        block: usize,
    ) -> [u16; N] {
        let mut scales = [0; N];
        for (scale, start) in scales.iter_mut().zip(starts) {
            let place = start.wrapping_add(block * SCALED_BYTES + BLOCK_BYTES).cast::<[u8; 2]>();
            // SAFETY: the caller promises that the scale lies behind the codes of the block (`PackedRows`).
            *scale = u16::from_le_bytes(unsafe { *place });
        }
        scales
    }

    /// Where the outputs of 16 rows from `first` go; fewer where the rows end.
    ///
    /// # Safety
    /// No other thread uses these rows, and no earlier tile of them is still in use.
    #[cfg(target_arch = "x86_64")]
    #[expect(clippy::mut_from_ref, reason = "the threads write disjoint parts; see the contract")]
    #[inline(always)]
    pub(super) unsafe fn tile(&self, first: usize, token: TokenScale) -> &mut [f32] {
        let n = TILE_ROWS.min(self.rows.n_rows - first);
        // SAFETY: the caller's promise.
        unsafe { self.out.tile(token.token, self.first_row + first..self.first_row + first + n) }
    }

    /// Finishes the sums of one token for `N` rows from `first`, of which the first that exist are stored.
    ///
    /// # Safety
    /// No other thread uses these rows.
    #[inline(always)]
    pub(super) unsafe fn finish_dots<const N: usize>(
        &self,
        first: usize,
        dots: &[i32; N],
        token: TokenScale,
    ) {
        let n = N.min(self.rows.n_rows - first);
        let rows = self.first_row + first..self.first_row + first + n;
        // SAFETY: the caller's promise.
        unsafe { self.out.finish_dots(rows, dots, token, self.matrix.scale()) };
    }

    /// The same for sums over scaled blocks.
    ///
    /// # Safety
    /// No other thread uses these rows.
    #[inline(always)]
    pub(super) unsafe fn finish_sums<const N: usize>(
        &self,
        first: usize,
        sums: &[f32; N],
        token: TokenScale,
    ) {
        let n = N.min(self.rows.n_rows - first);
        let rows = self.first_row + first..self.first_row + first + n;
        // SAFETY: the caller's promise.
        unsafe { self.out.finish_sums(rows, sums, token) };
    }
}

/// Brings rows of `TQ1_0` into the form of `TQ2_0`.
pub(super) fn repack<'a>(
    isa: Isa,
    matrix: &TernaryMatrix<'_>,
    rows: Range<usize>,
    packed: &'a mut Vec<u8>,
) -> PackedRows<'a> {
    let n_rows = rows.len();
    let row_bytes = matrix.row_bytes();
    let needed = n_rows * (matrix.n_cols() / BLOCK_COLS) * SCALED_BYTES;
    if packed.len() < needed {
        packed.resize(needed, 0);
    }
    let blocks = &matrix.blocks()[rows.start * row_bytes..rows.end * row_bytes];
    let packed = &mut packed[..needed];
    match isa {
        // SAFETY: `isa` comes from a `KernelSet`, so that `for_isa` saw AVX2 on this CPU.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => unsafe { repack_avx2(blocks, packed) },
        // SAFETY: `isa` comes from a `KernelSet`, so that `for_isa` saw AVX-512 F, BW and VL on this CPU.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => unsafe { repack_avx512(blocks, packed) },
        // SAFETY: `isa` comes from a `KernelSet`, so that `for_isa` saw Advanced SIMD on this CPU.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDotprod => unsafe { repack_neon(blocks, packed) },
        _ => repack_body(blocks, packed),
    }
    PackedRows::dense(packed, n_rows, matrix.n_cols())
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn repack_avx2(blocks: &[u8], packed: &mut [u8]) {
    repack_body(blocks, packed);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn repack_avx512(blocks: &[u8], packed: &mut [u8]) {
    repack_body(blocks, packed);
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
fn repack_neon(blocks: &[u8], packed: &mut [u8]) {
    repack_body(blocks, packed);
}

/// Compiled once for each instruction set, which makes vector loops of it.
#[inline(always)]
fn repack_body(blocks: &[u8], packed: &mut [u8]) {
    let block_bytes = TernaryFormat::Tq1_0.block_bytes();
    for (block, packed) in blocks.chunks_exact(block_bytes).zip(packed.chunks_exact_mut(SCALED_BYTES)) {
        let (packed, scale) = packed.split_at_mut(BLOCK_BYTES);
        scale.copy_from_slice(&block[block_bytes - 2..]);
        let mut codes = [0_u8; BLOCK_COLS];
        let (five, two) = codes.split_at_mut(160);
        let (five_more, four) = two.split_at_mut(80);
        push_out::<32>(&block[..32], five);
        push_out::<16>(&block[32..48], five_more);
        push_out::<4>(&block[48..52], four);
        for (packed, codes) in packed.chunks_exact_mut(32).zip(codes.chunks_exact(128)) {
            for (p, byte) in packed.iter_mut().enumerate() {
                *byte = codes[p] | codes[32 + p] << 2 | codes[64 + p] << 4 | codes[96 + p] << 6;
            }
        }
    }
}

/// Pushes out code after code of `N` bytes: multiplying a fraction by 3 moves the next digit before the point.
#[inline(always)]
fn push_out<const N: usize>(bytes: &[u8], codes: &mut [u8]) {
    let mut fractions = [0_u16; N];
    fractions.iter_mut().zip(bytes).for_each(|(fraction, &byte)| *fraction = u16::from(byte));
    for codes in codes.chunks_exact_mut(N) {
        for (fraction, code) in fractions.iter_mut().zip(codes) {
            let [rest, digit] = fraction.wrapping_mul(3).to_le_bytes();
            *code = digit;
            *fraction = u16::from(rest);
        }
    }
}
