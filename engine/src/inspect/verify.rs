//! Reads every byte of a model that matters and says what is wrong with it.

use std::sync::Arc;

use crate::convert::{dense_format, ternary_format};
use crate::dense::DenseMatrix;
use crate::gguf::{Gguf, TensorView};
use crate::ternary::TernaryMatrix;
use crate::tokenizer::Tokenizer;

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The tensor it is in; `None` if it is in the metadata or concerns the whole file.
    pub tensor: Option<String>,
    /// What it is.
    pub text: String,
}

/// What was checked, and what was found.
#[derive(Clone, Debug)]
pub struct Verification {
    /// Tensors whose every element was looked at.
    pub n_tensors: usize,
    /// Bytes of these.
    pub n_bytes: u64,
    /// At most one for each tensor, one for the graph and one for the vocabulary.
    pub problems: Vec<Problem>,
}

/// Checks that the architecture's tensors are all there in the right type and shape, that every ternary weight is
/// -1, 0 or 1, that every scale, norm and dense weight is finite, and that the vocabulary can be used. Tells after each
/// tensor.
///
/// That tensors lie within the file and not over each other was checked when it was parsed.
pub fn verify(gguf: &Arc<Gguf>, on_progress: &mut dyn FnMut(&str)) -> Verification {
    let of_file = super::problems(gguf, &Tokenizer::from_gguf(gguf)).into_iter();
    let mut problems: Vec<Problem> = of_file.map(|text| Problem { tensor: None, text }).collect();
    let mut n_bytes = 0;
    for tensor in gguf.tensors() {
        if let Err(text) = check_elements(&tensor) {
            problems.push(Problem { tensor: Some(tensor.name.to_owned()), text });
        }
        n_bytes += tensor.data.len() as u64;
        on_progress(tensor.name);
    }
    Verification { n_tensors: gguf.n_tensors(), n_bytes, problems }
}

fn check_elements(tensor: &TensorView<'_>) -> Result<(), String> {
    let [n_rows, n_cols] =
        [tensor.n_rows(), tensor.n_cols()].map(|n| usize::try_from(n).unwrap_or(usize::MAX));
    if let Some(format) = ternary_format(tensor.kind) {
        let matrix =
            TernaryMatrix::new(format, tensor.data, n_rows, n_cols).map_err(|error| super::chain(&error))?;
        return matrix.first_invalid_weight().map_or(Ok(()), |invalid| Err(invalid.to_string()));
    }
    let Some(format) = dense_format(tensor.kind) else {
        return Err(format!("type {} is not supported", tensor.kind));
    };
    let matrix =
        DenseMatrix::new(format, tensor.data, n_rows, n_cols).map_err(|error| super::chain(&error))?;
    let mut row = vec![0.0_f32; n_cols];
    for idx in 0..n_rows {
        matrix.dequantize_row(idx, &mut row);
        if let Some(col) = row.iter().position(|value| !value.is_finite()) {
            return Err(format!("row {idx}, column {col} is `{}`: expected a finite number", row[col]));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::synth::{SynthOptions, synth};
    use crate::inspect::{ModelInfo, ModelShape};
    use crate::mapping::Mapping;

    fn tiny() -> Vec<u8> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tiny.gguf");
        let options = SynthOptions { shape: ModelShape::tiny(), name: "t".to_owned(), seed: 5 };
        synth(&path, &options, &mut |_| ()).unwrap();
        std::fs::read(path).unwrap()
    }

    fn parse(bytes: &[u8]) -> Arc<Gguf> {
        Arc::new(Gguf::parse(Arc::new(Mapping::from_bytes(bytes).unwrap())).unwrap())
    }

    /// Where a tensor's data is in the file.
    fn place(gguf: &Gguf, name: &str) -> (usize, usize) {
        let data = gguf.tensor(name).unwrap().data;
        (data.as_ptr() as usize - gguf.mapping().as_ptr() as usize, data.len())
    }

    #[test]
    fn a_sound_file_has_no_problems() {
        let bytes = tiny();
        let found = verify(&parse(&bytes), &mut |_| ());
        assert_eq!(found.problems, []);
        assert_eq!(found.n_tensors, 24);
        let info = ModelInfo::new(&parse(&bytes));
        assert_eq!(info.problem, None);
        assert_eq!(info.n_ternary_weights, 2 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512));
    }

    #[test]
    fn faults_in_the_data_name_the_tensor_and_the_place() {
        /// The tensor, the change, what is said of it.
        type Case = (&'static str, fn(&mut [u8]), &'static str);
        let bytes = tiny();
        let gguf = parse(&bytes);
        let cases: [Case; 4] = [
            ("blk.1.ffn_up.weight", |data| data[64 * 3 + 1] = 0b1100_0000, "row 3, column 1 has code 3"),
            (
                "blk.0.attn_q.weight",
                |data| {
                    let at = data.len() - 32;
                    data[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
                },
                "not finite",
            ),
            (
                "output_norm.weight",
                |data| data[..4].copy_from_slice(&f32::INFINITY.to_le_bytes()),
                "column 0 is `inf`",
            ),
            (
                "token_embd.weight",
                |data| data[512..514].copy_from_slice(&[0, 0x7e]),
                "row 1, column 0 is `NaN`",
            ),
        ];
        for (name, spoil, text) in cases {
            let (start, len) = place(&gguf, name);
            let mut bad = bytes.clone();
            spoil(&mut bad[start..start + len]);
            let problems = verify(&parse(&bad), &mut |_| ()).problems;
            let found = problems.iter().find(|problem| problem.tensor.as_deref() == Some(name));
            assert!(found.is_some_and(|problem| problem.text.contains(text)), "{name}: {problems:?}");
        }
    }

    #[test]
    fn a_missing_tensor_is_a_problem_of_the_file() {
        let bytes = tiny();
        let mut bad = bytes.clone();
        let name = b"blk.1.ffn_up.weight";
        let at = bytes.windows(name.len()).position(|window| window == name).unwrap();
        bad[at] = b'x';
        let problems = verify(&parse(&bad), &mut |_| ()).problems;
        assert!(
            problems[0].tensor.is_none() && problems[0].text.contains("blk.1.ffn_up.weight"),
            "{problems:?}"
        );
        let info = ModelInfo::new(&parse(&bad));
        assert_eq!(info.problem.as_ref(), Some(&problems[0].text));
    }
}
