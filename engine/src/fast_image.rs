//! What decoding reads instead of the file: fewer bytes for the same tokens, made once and shared by all workers.
//!
//! Two parts, each optional: every `I2_S` matrix as indices of tables ([`LookupMatrix`]), those with many zeros among their
//! inputs by columns as well ([`ColumnMatrix`]); and the screen of the output head ([`FastHead`]). Products with them are those of
//! the file to the bit, and so are chosen tokens; an image can be taken up at any moment, also in the middle of an answer. Prompts
//! read two thirds of their rows from the file.
//!
//! Layout: a 64-byte header (magic, parts, fingerprint of the model, length, zeros), then the matrices layer by layer,
//! then the screen; each part starts at a multiple of 64 bytes. Where they lie follows from the model alone. The
//! header is written last.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::head::{FastHead, FastHeadError, HeadLayout};
use crate::kernels::KernelSet;
use crate::kernels::float::Activation;
use crate::kernels::ternary::{ColumnMatrix, LookupMatrix, STRIP_BYTES, UNIT_COLS};
use crate::mapping::{HUGE_PAGE_BYTES, Mapping, MappingMut};
use crate::model::{Model, TernaryWeight};
use crate::pool::ThreadPool;
use crate::ternary::TernaryFormat;

const MAGIC: [u8; 8] = *b"bndfast3";
const HEADER_BYTES: usize = 64;

/// Memory that is asked for as huge pages at once: the system takes its time for every request, and others wait.
const COLLAPSE_BYTES: usize = 32 * HUGE_PAGE_BYTES;

/// Rows of the screen made between two looks at the clock.
const STEP_ROWS: usize = 256;

/// Strips of a matrix made between two looks at the clock.
const STEP_STRIPS: usize = 512;

/// Models whose weights fit a large cache gain nothing.
const MODEL_BYTES_MIN: usize = 64 << 20;

/// Which parts an image has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FastParts {
    /// Ternary matrices.
    pub ternary: bool,
    /// The screen of the output head.
    pub head: bool,
}

impl FastParts {
    /// The parts that pay for a model on a machine.
    #[must_use]
    pub fn that_pay(model: &Model, kernels: KernelSet) -> Self {
        let is_large = model.gguf().mapping().len() >= MODEL_BYTES_MIN;
        Self { ternary: is_large && kernels.reads_image(), head: is_large }
    }

    fn is_any(self) -> bool {
        self.ternary || self.head
    }
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum FastImageError {
    /// A weight is none of -1, 0, 1.
    #[error("a ternary matrix of layer {layer} has a code 3")]
    Code {
        /// Its layer.
        layer: usize,
    },
    /// The head cannot be screened.
    #[error("the output head has no screen")]
    Head(#[from] FastHeadError),
    /// Nothing can be made of this model.
    #[error("the model has no part that could be smaller")]
    Nothing,
    /// Memory of another size than asked for.
    #[error("the memory has {found} bytes, the image takes {expected}")]
    Length {
        /// Bytes it takes.
        expected: usize,
        /// Bytes found.
        found: usize,
    },
    /// Somebody else's memory.
    #[error("the memory holds no image of this model and version")]
    Foreign,
}

/// Where everything lies.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    parts: FastParts,
    fingerprint: u64,
    layers: Vec<LayerRanges>, // Empty without the matrices.
    head: Option<(usize, HeadLayout)>,
    n_bytes: usize,
}

/// In the order of [`weights_of`].
type LayerRanges = [Range<usize>; N_WEIGHTS];

const N_WEIGHTS: usize = 8;

/// The places of `ffn_down` in [`weights_of`]: for a few tokens, and for one.
const DOWN: [usize; 2] = [6, 7];

/// How a matrix is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    /// As indices of tables.
    Lookup,
    /// By columns.
    Columns,
}

impl Packing {
    /// What suits the use of a weight in [`weights_of`], if there is any.
    fn of(model: &Model, place: usize) -> Option<Self> {
        let has_zeros = model.hparams().architecture.activation() == Activation::ReluSquared;
        match place {
            0..=6 => Some(Self::Lookup),
            _ => has_zeros.then_some(Self::Columns),
        }
    }

    /// Bytes of a matrix.
    fn n_bytes(self, n_rows: usize, n_cols: usize) -> usize {
        match self {
            Self::Lookup => LookupMatrix::bytes_of(n_rows, n_cols),
            Self::Columns => n_cols * ColumnMatrix::column_bytes_of(n_rows),
        }
    }

    /// Bytes of what is packed at once, by one thread: a strip, or as many columns as share bytes of the file.
    fn item_bytes(self, n_rows: usize) -> usize {
        match self {
            Self::Lookup => STRIP_BYTES,
            Self::Columns => UNIT_COLS * ColumnMatrix::column_bytes_of(n_rows),
        }
    }

    /// Items that are packed between two looks at the clock, and by a thread at a time.
    fn step_items(self) -> (usize, usize) {
        match self {
            Self::Lookup => (STEP_STRIPS, 16),
            Self::Columns => (8, 1),
        }
    }
}

/// The ternary matrices of a layer, that twice which is read in two ways.
fn weights_of(model: &Model, layer: usize) -> [&TernaryWeight; N_WEIGHTS] {
    let layer = &model.layers()[layer];
    [
        &layer.attn_q,
        &layer.attn_k,
        &layer.attn_v,
        &layer.attn_output,
        &layer.ffn_gate,
        &layer.ffn_up,
        &layer.ffn_down,
        &layer.ffn_down,
    ]
}

impl Layout {
    fn new(model: &Model, parts: FastParts) -> Result<Self, FastImageError> {
        let mut end = HEADER_BYTES;
        let mut take = |n_bytes: usize| {
            let start = end;
            end = (end + n_bytes).next_multiple_of(64);
            start..start + n_bytes
        };
        let n_layers = if parts.ternary && is_all_i2_s(model) { model.layers().len() } else { 0 };
        let layers: Vec<LayerRanges> = (0..n_layers)
            .map(|layer| {
                let weights = weights_of(model, layer);
                std::array::from_fn(|place| {
                    let matrix = model.ternary(weights[place]);
                    let packing = Packing::of(model, place);
                    take(packing.map_or(0, |packing| packing.n_bytes(matrix.n_rows(), matrix.n_cols())))
                })
            })
            .collect();
        let head = parts
            .head
            .then(|| HeadLayout::new(model.output().n_rows(), model.output().n_cols()))
            .transpose()?;
        let head = head.map(|head| (take(head.n_bytes).start, head));
        let parts = FastParts { ternary: !layers.is_empty(), head: head.is_some() };
        if !parts.is_any() {
            return Err(FastImageError::Nothing);
        }
        Ok(Self { parts, fingerprint: fingerprint(model), layers, head, n_bytes: end })
    }

    fn header(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(&MAGIC);
        header[8] = u8::from(self.parts.ternary) | u8::from(self.parts.head) << 1;
        header[16..24].copy_from_slice(&self.fingerprint.to_le_bytes());
        header[24..32].copy_from_slice(&(self.n_bytes as u64).to_le_bytes());
        header
    }
}

fn is_all_i2_s(model: &Model) -> bool {
    (0..model.layers().len())
        .flat_map(|layer| weights_of(model, layer))
        .all(|weight| model.ternary(weight).format() == TernaryFormat::I2S)
}

/// Of the length and of bytes all over the file (FNV-1a): tells models apart, not forgers off.
fn fingerprint(model: &Model) -> u64 {
    let bytes: &[u8] = model.gguf().mapping();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    };
    add(&(bytes.len() as u64).to_le_bytes());
    add(&bytes[..bytes.len().min(4096)]);
    for piece in bytes.chunks((bytes.len() / 256).max(64)) {
        add(&piece[..piece.len().min(64)]);
    }
    hash
}

/// An image in the making, a few rows at a time: whoever makes it has other things to do meanwhile.
#[derive(Debug)]
pub struct FastImageBuilder {
    model: Arc<Model>,
    layout: Layout,
    memory: MappingMut,
    wants_huge_pages: bool,
    n_collapsed: usize,
    n_refused: usize, // Of the bytes collapsed, those that stayed as they were.
    piece: usize,     // Matrices in order, then the head.
    row: usize,       // The next one of the piece, or of its units of columns.
}

impl FastImageBuilder {
    /// How many bytes the image takes.
    ///
    /// # Errors
    /// If there is nothing to make, or the head has a shape that cannot be screened.
    pub fn n_bytes(model: &Model, parts: FastParts) -> Result<usize, FastImageError> {
        Ok(Layout::new(model, parts)?.n_bytes)
    }

    /// Starts an image in `memory`, which has [`Self::n_bytes`].
    ///
    /// # Errors
    /// As [`Self::n_bytes`], or the memory has another length.
    pub fn new(model: Arc<Model>, parts: FastParts, memory: MappingMut) -> Result<Self, FastImageError> {
        let layout = Layout::new(&model, parts)?;
        if memory.len() != layout.n_bytes {
            return Err(FastImageError::Length { expected: layout.n_bytes, found: memory.len() });
        }
        Ok(Self {
            model,
            layout,
            memory,
            wants_huge_pages: true,
            n_collapsed: 0,
            n_refused: 0,
            piece: 0,
            row: 0,
        })
    }

    /// Leaves the memory in pages of the usual size.
    pub fn without_huge_pages(&mut self) {
        self.wants_huge_pages = false;
    }

    /// Works for about `time`. True if the image is whole.
    ///
    /// # Errors
    /// If the model is none that an image can be made of.
    pub fn advance(
        &mut self,
        kernels: KernelSet,
        pool: &ThreadPool,
        time: Duration,
    ) -> Result<bool, FastImageError> {
        let until = Instant::now() + time;
        let n_matrices = self.layout.layers.len() * N_WEIGHTS;
        loop {
            if self.piece < n_matrices {
                self.pack(pool)?;
            } else if self.piece == n_matrices && self.layout.head.is_some() {
                self.screen_rows(kernels, pool)?;
            } else {
                self.memory[..HEADER_BYTES].copy_from_slice(&self.layout.header());
                return Ok(true);
            }
            if Instant::now() >= until {
                return Ok(false);
            }
        }
    }

    /// Bytes of the image, and how many of them the system would not put into huge pages.
    #[must_use]
    pub fn huge_page_bytes(&self) -> (usize, usize) {
        (self.layout.n_bytes, self.n_refused)
    }

    /// Asks for huge pages up to byte `end`, before anything is written there.
    fn collapse_to(&mut self, pool: &ThreadPool, end: usize) {
        while self.n_collapsed < end {
            let range = self.n_collapsed..self.layout.n_bytes.min(self.n_collapsed + COLLAPSE_BYTES);
            self.n_collapsed = range.end;
            let n_bytes = range.len();
            self.n_refused += if self.wants_huge_pages { self.memory.collapse(pool, range) } else { n_bytes };
        }
    }

    fn pack(&mut self, pool: &ThreadPool) -> Result<(), FastImageError> {
        let (layer, place) = (self.piece / N_WEIGHTS, self.piece % N_WEIGHTS);
        let model = Arc::clone(&self.model);
        let matrix = model.ternary(weights_of(&model, layer)[place]);
        let Some(packing) = Packing::of(&model, place) else {
            self.end_step(0, 0);
            return Ok(());
        };
        let item_bytes = packing.item_bytes(matrix.n_rows());
        let n_items = packing.n_bytes(matrix.n_rows(), matrix.n_cols()) / item_bytes;
        let (step_items, chunk) = packing.step_items();
        let items = self.row..n_items.min(self.row + step_items);
        let start = self.layout.layers[layer][place].start;
        let bytes = start + items.start * item_bytes..start + items.end * item_bytes;
        self.collapse_to(pool, bytes.end);
        let is_valid = std::sync::atomic::AtomicBool::new(true);
        pool.for_each_row_mut(&mut self.memory[bytes], item_bytes, chunk, &|_, item, packed| {
            let item = items.start + item;
            let is_packed = match packing {
                Packing::Lookup => LookupMatrix::pack_strip(&matrix, item, packed),
                Packing::Columns => ColumnMatrix::pack_unit(&matrix, item, packed),
            };
            if !is_packed {
                is_valid.store(false, std::sync::atomic::Ordering::Relaxed);
            }
        });
        if !is_valid.into_inner() {
            return Err(FastImageError::Code { layer });
        }
        self.end_step(items.end, n_items);
        Ok(())
    }

    fn screen_rows(&mut self, kernels: KernelSet, pool: &ThreadPool) -> Result<(), FastImageError> {
        let model = Arc::clone(&self.model);
        let matrix = model.output();
        let Some((start, layout)) = &self.layout.head else { return Ok(()) };
        let (start, n_bytes) = (*start, layout.n_bytes);
        let rows = self.row..matrix.n_rows().min(self.row + STEP_ROWS);
        self.collapse_to(pool, start + n_bytes);
        let image = &mut self.memory[start..start + n_bytes];
        kernels.build_head_rows(pool, &matrix, rows.clone(), image)?;
        self.end_step(rows.end, matrix.n_rows());
        Ok(())
    }

    fn end_step(&mut self, row: usize, n_rows: usize) {
        self.row = row;
        if row == n_rows {
            (self.piece, self.row) = (self.piece + 1, 0);
        }
    }
}

/// A whole image.
#[derive(Debug)]
pub struct FastImage {
    memory: Mapping,
    layout: Layout,
}

fn checked_layout(beginning: &[u8], n_bytes: usize, model: &Model) -> Result<Layout, FastImageError> {
    let parts = beginning.get(8).map_or(0, |parts| *parts);
    let layout = Layout::new(model, FastParts { ternary: parts & 1 != 0, head: parts & 2 != 0 })?;
    if n_bytes != layout.n_bytes {
        return Err(FastImageError::Length { expected: layout.n_bytes, found: n_bytes });
    }
    if !beginning.starts_with(&layout.header()) {
        return Err(FastImageError::Foreign);
    }
    Ok(layout)
}

/// The matrices of a layer.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names are those of `LayerWeights`")]
pub struct ImageLayer<'a> {
    pub attn_q: LookupMatrix<'a>,
    pub attn_k: LookupMatrix<'a>,
    pub attn_v: LookupMatrix<'a>,
    pub attn_output: LookupMatrix<'a>,
    pub ffn_gate: LookupMatrix<'a>,
    pub ffn_up: LookupMatrix<'a>,
    pub ffn_down: LookupMatrix<'a>,
    /// For one token, most of whose inputs are zero.
    pub down_columns: Option<ColumnMatrix<'a>>,
}

impl FastImage {
    /// The image in `memory`, if it is one of this model, with whatever parts it has.
    ///
    /// # Errors
    /// If it is another one, or none.
    pub fn new(memory: Mapping, model: &Model) -> Result<Self, FastImageError> {
        let layout = checked_layout(&memory, memory.len(), model)?;
        let image = Self { memory, layout };
        if let Some(head) = image.head() {
            head.check()?;
        }
        Ok(image)
    }

    /// Looks whether `beginning` is that of an image of `model` which has `n_bytes` in all.
    ///
    /// # Errors
    /// If it is another one, or none.
    pub fn check(beginning: &[u8], n_bytes: usize, model: &Model) -> Result<(), FastImageError> {
        checked_layout(beginning, n_bytes, model).map(drop)
    }

    /// Its parts.
    #[must_use]
    pub fn parts(&self) -> FastParts {
        self.layout.parts
    }

    /// Its size.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        self.layout.n_bytes
    }

    /// Bytes of the ternary matrices that a pass of one row, or of a few, reads of it; nothing if it has none.
    #[must_use]
    pub fn ternary_bytes(&self, n_rows: usize) -> Option<usize> {
        let bytes = |ranges: &LayerRanges| {
            let columns = ranges[DOWN[1]].len();
            let unread = if n_rows == 1 && columns > 0 { ranges[DOWN[0]].len() } else { columns };
            ranges.iter().map(|range| range.len()).sum::<usize>() - unread
        };
        self.layout.parts.ternary.then(|| self.layout.layers.iter().map(bytes).sum())
    }

    /// The screen of the head.
    #[must_use]
    pub fn head(&self) -> Option<FastHead<'_>> {
        let (start, layout) = self.layout.head.as_ref()?;
        FastHead::new(&self.memory[*start..start + layout.n_bytes], layout.n_rows, layout.n_cols).ok()
    }

    /// The matrices of a layer of `model`.
    #[must_use]
    pub fn layer(&self, model: &Model, layer: usize) -> Option<ImageLayer<'_>> {
        let ranges = self.layout.layers.get(layer)?;
        let weights = weights_of(model, layer);
        let lookup = |i: usize| {
            let file = model.ternary(weights[i]);
            LookupMatrix::new(&self.memory[ranges[i].clone()], file.n_rows(), file.n_cols())
        };
        let columns = DOWN[1];
        let file = model.ternary(weights[columns]);
        Some(ImageLayer {
            attn_q: lookup(0)?,
            attn_k: lookup(1)?,
            attn_v: lookup(2)?,
            attn_output: lookup(3)?,
            ffn_gate: lookup(4)?,
            ffn_up: lookup(5)?,
            ffn_down: lookup(DOWN[0])?,
            down_columns: ColumnMatrix::new(
                &self.memory[ranges[columns].clone()],
                file.n_rows(),
                file.n_cols(),
            ),
        })
    }
}
