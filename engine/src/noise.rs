//! Random numbers that are a function of a seed, a position and a token, and of nothing before them.
//!
//! A token is drawn by adding to each logit (divided by the temperature) its own Gumbel noise and taking the largest
//! sum: exactly a draw from the softmax (Gumbel 1954; Maddison, Tarlow and Minka, "A* Sampling", 2014). A job resumed
//! at a position draws what it would have drawn, and who knows bounds of the logits knows which tokens cannot win.
//!
//! Bits: Philox 4x32 with ten rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
//! SC11). The key is the seed, the counter is the position and a quarter of the token. Everything after them is a
//! few operations in f32 that round alike everywhere (promise P4).

/// The noise of all tokens at one position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noise {
    key: [u32; 2],
    position: [u32; 2],
}

/// No noise is larger.
pub(crate) const NOISE_MAX: f32 = 23.0;

/// Tokens that get their noise together.
pub(crate) const NOISE_LANES: usize = 64;

impl Noise {
    /// For a seed and a position.
    #[must_use]
    pub fn new(seed: u64, position: u64) -> Self {
        Self { key: halves(seed), position: halves(position) }
    }

    /// Of one token.
    #[must_use]
    pub fn of(&self, token: u32) -> f32 {
        let [position_low, position_high] = self.position;
        let block = philox([position_low, position_high, token / 4, 0], self.key);
        gumbel(block[token as usize % 4])
    }

    /// Of the tokens from `first`, a multiple of four.
    #[expect(
        clippy::inline_always,
        reason = "compiled into the function of an instruction set, which makes vectors of it"
    )]
    #[inline(always)]
    pub(crate) fn of_many(&self, first: u32) -> [f32; NOISE_LANES] {
        let [position_low, position_high] = self.position;
        let mut counter = [[position_low; 16], [position_high; 16], [0; 16], [0; 16]];
        for (lane, quarter) in counter[2].iter_mut().zip(first / 4..) {
            *lane = quarter;
        }
        let mut key = self.key;
        for round in 0..10 {
            if round > 0 {
                key = next_key(key);
            }
            let [a, b, c, d] = &mut counter;
            for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
                [*a, *b, *c, *d] = philox_round([*a, *b, *c, *d], key);
            }
        }
        let mut noise = [0.0; NOISE_LANES];
        for lane in 0..16 {
            for word in 0..4 {
                noise[lane * 4 + word] = gumbel(counter[word][lane]);
            }
        }
        noise
    }
}

/// `-ln(-ln(1 - v))` with v the fraction that `bits` are of 2^32: the noise of Gumbel's distribution.
#[expect(clippy::inline_always, reason = "as `of_many`")]
#[expect(clippy::cast_precision_loss, reason = "24 bits are enough, and small fractions keep theirs")]
#[inline(always)]
fn gumbel(bits: u32) -> f32 {
    let v = (bits as f32 + 0.5) * (1.0 / 4_294_967_296.0);
    let rest = 1.0 - v;
    let rest = if rest < 3e-8 { 3e-8 } else { rest };
    // ln(1 - v) with the digits that the subtraction lost (Kahan): exact where v is small, which is where it matters.
    let lost = rest - 1.0;
    let ratio = if lost == 0.0 { 1.0 } else { ln(rest) / lost };
    let exponential = v * ratio;
    -ln(exponential)
}

/// The natural logarithm of a positive normal number, within 2 units in the last place. The polynomial is that of
/// Cephes (Moshier, 1989).
#[expect(clippy::inline_always, reason = "as `of_many`")]
#[expect(clippy::cast_precision_loss, reason = "an exponent is small")]
#[inline(always)]
fn ln(x: f32) -> f32 {
    // x = m * 2^e with m from sqrt(1/2) to sqrt(2).
    let bits = x.to_bits().wrapping_sub(0x3f35_04f3);
    let e = (bits.cast_signed() >> 23) as f32;
    let m = f32::from_bits((bits & 0x007f_ffff).wrapping_add(0x3f35_04f3)) - 1.0;
    let z = m * m;
    let mut p = 7.037_683_6e-2;
    for coefficient in [
        -0.115_146_1,
        1.167_699_9e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_8e-1,
        2.000_071_5e-1,
        -2.499_999_4e-1,
        0.333_333_3,
    ] {
        p = p * m + coefficient;
    }
    let y = m * z * p - 2.121_944_4e-4 * e - 0.5 * z;
    m + y + 0.693_359_4 * e
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = next_key(key);
        }
        counter = philox_round(counter, key);
    }
    counter
}

#[expect(clippy::inline_always, reason = "as `of_many`")]
#[inline(always)]
fn next_key(key: [u32; 2]) -> [u32; 2] {
    [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)]
}

#[expect(clippy::inline_always, reason = "as `of_many`")]
#[inline(always)]
fn philox_round(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let first = u64::from(counter[0]) * 0xD251_1F53;
    let second = u64::from(counter[2]) * 0xCD9E_8D57;
    [high(second) ^ counter[1] ^ key[0], low(second), high(first) ^ counter[3] ^ key[1], low(first)]
}

fn halves(x: u64) -> [u32; 2] {
    [low(x), high(x)]
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
#[expect(clippy::inline_always, reason = "as `of_many`")]
#[inline(always)]
fn low(x: u64) -> u32 {
    x as u32
}

#[expect(clippy::inline_always, reason = "as `of_many`")]
#[inline(always)]
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
    fn noise_follows_the_distribution() {
        // P(noise < x) = exp(-exp(-x)); mean 0.5772, variance pi^2 / 6.
        for seed in [0, 1, u64::MAX] {
            let noise = Noise::new(seed, 7);
            let n = 1_u32 << 16;
            let values: Vec<f64> = (0..n).map(|token| f64::from(noise.of(token))).collect();
            let mean = values.iter().sum::<f64>() / f64::from(n);
            let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / f64::from(n);
            assert!((mean - 0.5772).abs() < 0.02, "{mean}");
            assert!((variance - 1.6449).abs() < 0.04, "{variance}");
            for x in [-1.0_f64, 0.0, 1.0, 3.0] {
                let share = values.iter().filter(|v| **v < x).count() as f64 / f64::from(n);
                let expected = libm::exp(-libm::exp(-x));
                assert!((share - expected).abs() < 0.01, "{share} below {x}, expected {expected}");
            }
            assert!(values.iter().all(|v| (-3.0..f64::from(NOISE_MAX)).contains(v)));
        }
    }

    #[test]
    fn many_are_the_same_as_one_by_one() {
        let noise = Noise::new(0x1234_5678_9abc_def0, 1 << 40);
        for first in [0, 64, 128_192] {
            let many = noise.of_many(first).map(f32::to_bits);
            let each: Vec<u32> = (first..first + 64).map(|token| noise.of(token).to_bits()).collect();
            assert_eq!(many[..], each[..]);
        }
    }

    #[test]
    fn logarithms_and_extremes_are_right() {
        for i in 1..100_000_u32 {
            let x = (i as f32) * 1.7e-4;
            let exact = libm::log(f64::from(x));
            assert!((f64::from(ln(x)) - exact).abs() <= 1.5e-7 * exact.abs().max(1.0), "ln {x}");
        }
        let exact = |bits: u32| -libm::log(-libm::log1p(-(f64::from(bits) + 0.5) / 4_294_967_296.0));
        for bits in [0, 1, 5, 1000, 1 << 20, 1 << 31, 3 << 30] {
            assert!((f64::from(gumbel(bits)) - exact(bits)).abs() < 2e-6, "{bits}");
        }
        assert!(gumbel(u32::MAX).is_finite());
    }
}
