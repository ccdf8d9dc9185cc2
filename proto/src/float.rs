//! Floats in JSON: exact both ways, and never infinite or not a number.
//!
//! The shortest decimal of an `f32` is usually exact again when it is read as an `f64` and rounded, but not
//! always (`7.038531e-26` is not). Such a value is written with the digits of its `f64`, which always is.
//! Reading exactly needs `serde_json`'s `float_roundtrip`.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};

/// An `f32` that goes through JSON unchanged.
struct ExactF32(f32);

impl Serialize for ExactF32 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if !self.0.is_finite() {
            return Err(ser::Error::custom(format_args!("`{}` is not a finite number", self.0)));
        }
        if is_exact_when_short(self.0) {
            serializer.serialize_f32(self.0)
        } else {
            serializer.serialize_f64(f64::from(self.0))
        }
    }
}

/// True if the shortest decimal, read as an `f64`, rounds to the same `f32`.
fn is_exact_when_short(value: f32) -> bool {
    serde_json::to_string(&value)
        .ok()
        .and_then(|text| text.parse::<f64>().ok())
        .is_some_and(|read| round_to_f32(read).to_bits() == value.to_bits())
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to the nearest f32 is what is asked for")]
fn round_to_f32(value: f64) -> f32 {
    value as f32
}

impl<'de> Deserialize<'de> for ExactF32 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = round_to_f32(f64::deserialize(deserializer)?);
        if value.is_finite() {
            Ok(Self(value))
        } else {
            Err(de::Error::custom("number is too large for a 32-bit float"))
        }
    }
}

/// `#[serde(with = "exact_f32")]` on an `f32`.
pub(crate) mod exact_f32 {
    use super::{Deserialize, Deserializer, ExactF32, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &f32, serializer: S) -> Result<S::Ok, S::Error> {
        ExactF32(*value).serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f32, D::Error> {
        Ok(ExactF32::deserialize(deserializer)?.0)
    }
}

/// `#[serde(with = "finite_f64")]` on an `f64`.
pub(crate) mod finite_f64 {
    use super::{Deserialize, Deserializer, Serializer, ser};

    pub(crate) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() {
            serializer.serialize_f64(*value)
        } else {
            Err(ser::Error::custom(format_args!("`{value}` is not a finite number")))
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        f64::deserialize(deserializer)
    }
}

/// `#[serde(with = "logit_bias")]` on (token id, bias) pairs.
pub(crate) mod logit_bias {
    use super::{Deserialize, Deserializer, ExactF32, Serializer};

    pub(crate) fn serialize<S: Serializer>(pairs: &[(u32, f32)], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(pairs.iter().map(|&(id, bias)| (id, ExactF32(bias))))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<(u32, f32)>, D::Error> {
        let pairs = Vec::<(u32, ExactF32)>::deserialize(deserializer)?;
        Ok(pairs.into_iter().map(|(id, bias)| (id, bias.0)).collect())
    }
}

/// `#[serde(with = "top_logprobs")]` on (token id, log-probability, text) triples.
pub(crate) mod top_logprobs {
    use super::{Deserialize, Deserializer, ExactF32, Serializer};

    pub(crate) fn serialize<S: Serializer>(
        triples: &[(u32, f32, String)],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(triples.iter().map(|(id, logprob, text)| (id, ExactF32(*logprob), text)))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<(u32, f32, String)>, D::Error> {
        let triples = Vec::<(u32, ExactF32, String)>::deserialize(deserializer)?;
        Ok(triples.into_iter().map(|(id, logprob, text)| (id, logprob.0, text)).collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn round_trip(value: f32) -> f32 {
        let text = serde_json::to_string(&ExactF32(value)).unwrap();
        serde_json::from_str::<ExactF32>(&text).unwrap().0
    }

    #[test]
    fn the_float_that_rounds_twice_survives() {
        let value = f32::from_bits(0x15ae_43fd); // 7.038531e-26
        assert!(!is_exact_when_short(value), "this is the case that needs more digits");
        assert_eq!(round_trip(value).to_bits(), value.to_bits());
    }

    #[test]
    fn what_is_not_finite_is_refused_both_ways() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(serde_json::to_string(&ExactF32(value)).is_err());
        }
        for text in ["1e39", "-1e300", "1e999", "null", "\"NaN\""] {
            assert!(serde_json::from_str::<ExactF32>(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_finite_f32_survives(bits in any::<u32>()) {
            let value = f32::from_bits(bits);
            prop_assume!(value.is_finite());
            prop_assert_eq!(round_trip(value).to_bits(), bits);
        }
    }
}
