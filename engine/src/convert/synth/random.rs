//! Random numbers for synthetic models: fast, and the same on every machine.

use half::f16;

/// A `SplitMix64` generator.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    state: u64,
}

impl Stream {
    /// The numbers of one tensor: they depend on the seed and its name, not on what was made before.
    pub(super) fn new(seed: u64, name: &str) -> Self {
        let mut stream = Self { state: seed };
        for &byte in name.as_bytes() {
            stream.state = stream.next() ^ u64::from(byte);
        }
        stream
    }

    pub(super) fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// Samples of a distribution close to the normal one, to draw from.
#[derive(Debug)]
pub(super) struct GaussTable {
    samples: Vec<f32>, // (65536)
}

/// The samples times a factor, as stored.
pub(super) type Halves = Vec<[u8; 2]>;

impl GaussTable {
    pub(super) fn new() -> Self {
        let mut stream = Stream::new(0, "gauss");
        // Twelve uniform numbers have variance 1. Their parts are whole, so that the sum is exact everywhere.
        let mut sample = || {
            let sum: u32 = (0..12).map(|_| u32::from(stream.next().to_le_bytes()[7])).sum();
            (f32::from(u16::try_from(sum).unwrap_or(0)) - 12.0 * 127.5) / 256.0
        };
        Self { samples: (0..65_536).map(|_| sample()).collect() }
    }

    pub(super) fn next(&self, stream: &mut Stream) -> f32 {
        let [low, high, ..] = stream.next().to_le_bytes();
        self.samples[usize::from(u16::from_le_bytes([low, high]))]
    }

    pub(super) fn times(&self, factor: f32) -> Halves {
        self.samples.iter().map(|sample| f16::from_f32(sample * factor).to_le_bytes()).collect()
    }

    /// Draws four samples.
    pub(super) fn fill(halves: &Halves, four: &mut [u8; 8], stream: &mut Stream) {
        let drawn = stream.next().to_le_bytes();
        for (element, idx) in four.as_chunks_mut::<2>().0.iter_mut().zip(drawn.as_chunks::<2>().0) {
            *element = halves[usize::from(u16::from_le_bytes(*idx))];
        }
    }
}

/// Bytes of four ternary codes, to draw from: every code about as often.
#[derive(Debug)]
pub(super) struct TernaryTable {
    bytes: [u8; 256],
}

impl TernaryTable {
    /// Each of the 81 valid bytes three times; the 13 places left get those nearest to zero, so that -1 and +1
    /// stay equally frequent.
    pub(super) fn new() -> Self {
        let mut valid: Vec<u8> =
            (0..=255).filter(|byte| (0..4).all(|at| byte >> (2 * at) & 3 != 3)).collect();
        let n_nonzero = |byte: u8| (0..4).filter(|at| byte >> (2 * at) & 3 != 1).count();
        valid.sort_by_key(|&byte| n_nonzero(byte));
        let zeros = [valid[0]; 5];
        let one_nonzero = valid[1..9].to_vec();
        let all = valid.iter().cycle().take(243).copied().chain(zeros).chain(one_nonzero);
        let mut bytes = [0; 256];
        for (place, byte) in bytes.iter_mut().zip(all) {
            *place = byte;
        }
        Self { bytes }
    }

    pub(super) fn fill(&self, chunk: &mut [u8], stream: &mut Stream) {
        for eight in chunk.chunks_mut(8) {
            for (byte, idx) in eight.iter_mut().zip(stream.next().to_le_bytes()) {
                *byte = self.bytes[usize::from(idx)];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_are_balanced_and_codes_valid() {
        let mut counts = [0; 4];
        for byte in TernaryTable::new().bytes {
            for at in 0..4 {
                counts[usize::from(byte >> (2 * at) & 3)] += 1;
            }
        }
        assert_eq!(counts, [328, 368, 328, 0]);
    }

    #[test]
    fn samples_have_the_moments_of_a_normal_distribution() {
        let samples = GaussTable::new().samples;
        let mean = samples.iter().sum::<f32>() / 65_536.0;
        let variance = samples.iter().map(|sample| sample * sample).sum::<f32>() / 65_536.0;
        assert!(mean.abs() < 0.02, "{mean}");
        assert!((variance - 1.0).abs() < 0.02, "{variance}");
    }
}
