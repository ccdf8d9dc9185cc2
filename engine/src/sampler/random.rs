//! Random numbers that are a function of a seed and a position, and of nothing before them.
//!
//! Philox 4x32 with ten rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
//! SC11): the key is the seed, the counter the position. A job resumed at a position draws what it would have drawn.

/// A number in [0, 1) with 53 random bits.
pub(super) fn uniform(seed: u64, position: u64) -> f64 {
    let block = philox([low(position), high(position), 0, 0], [low(seed), high(seed)]);
    let bits = u64::from(block[1]) << 32 | u64::from(block[0]);
    #[expect(clippy::cast_precision_loss, reason = "53 bits are exact")]
    let numerator = (bits >> 11) as f64;
    numerator / (1_u64 << 53) as f64
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        let first = u64::from(counter[0]) * 0xD251_1F53;
        let second = u64::from(counter[2]) * 0xCD9E_8D57;
        counter =
            [high(second) ^ counter[1] ^ key[0], low(second), high(first) ^ counter[3] ^ key[1], low(first)];
    }
    counter
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
fn low(x: u64) -> u32 {
    x as u32
}

fn high(x: u64) -> u32 {
    low(x >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the authors' Random123 library.
    #[test]
    fn philox_gives_the_published_numbers() {
        let all = u32::MAX;
        let pi = ([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([all; 4], [all; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(philox(pi.0, pi.1), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn numbers_are_spread_evenly() {
        let n = 20_000_u64;
        for seed in [0, 1, u64::MAX] {
            let mean = (0..n).map(|position| uniform(seed, position)).sum::<f64>() / n as f64;
            assert!((mean - 0.5).abs() < 0.01, "{mean}");
        }
        assert!((0..n).all(|position| (0.0..1.0).contains(&uniform(7, position))));
    }
}
