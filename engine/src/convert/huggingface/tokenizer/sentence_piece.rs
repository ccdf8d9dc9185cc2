//! `tokenizer.model`, the protocol buffer of SentencePiece.
//!
//! Field numbers are those of the published `sentencepiece_model.proto`; fields that do not decide about tokens are left
//! out.

use std::collections::BTreeMap;

use prost::Message as _;

use super::{
    CONTROL, Config, NORMAL, Rules, Table, TokenizerConfigRaw, TokenizerFile, TokenizerFileError,
    USER_DEFINED,
};

#[derive(Clone, PartialEq, prost::Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<NormalizerSpec>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Piece {
    #[prost(string, optional, tag = "1")]
    text: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3", default = "1")]
    kind: Option<i32>, // The numbers are those of the GGUF key.
}

#[derive(Clone, PartialEq, prost::Message)]
struct TrainerSpec {
    #[prost(int32, optional, tag = "3", default = "1")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    treat_whitespace_as_suffix: Option<bool>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NormalizerSpec {
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3", default = "true")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4", default = "true")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5", default = "true")]
    escape_whitespaces: Option<bool>,
}

/// `TrainerSpec.model_type`: how text becomes pieces.
const BPE: i32 = 2;

impl TokenizerFile {
    /// Reads the model, and tokens that were added to it beside.
    pub(super) fn from_model(
        bytes: &[u8],
        added: BTreeMap<String, u32>,
        extra: &TokenizerConfigRaw,
        config: &Config,
    ) -> Result<Self, TokenizerFileError> {
        let model = ModelProto::decode(bytes).map_err(TokenizerFileError::ModelFile)?;
        let normalizer = model.normalizer.unwrap_or_default();
        check(&model.trainer.unwrap_or_default(), &normalizer)?;
        let mut table = Table::new(config.shape.n_vocab);
        let mut scores = vec![0.0; config.shape.n_vocab as usize];
        for (id, piece) in (0..).zip(&model.pieces) {
            table.put(piece.text().to_owned(), id, piece.kind())?; // Refuses ids that are too high.
            scores[id as usize] = piece.score();
        }
        let is_special = |id: u32| [config.bos, config.eos, config.pad].contains(&Some(id));
        let listed = added.into_iter().map(|(content, id)| (id, content, false));
        let described = extra.added_tokens_decoder.iter();
        let described = described.map(|(id, token)| (*id, token.content.clone(), token.special));
        for (id, content, special) in listed.chain(described) {
            let kind = if special || is_special(id) { CONTROL } else { USER_DEFINED };
            // What SentencePiece knows as special is described here once more.
            if table.kind(&content).is_none_or(|known| known == NORMAL || known == USER_DEFINED) {
                table.put(content, id, kind)?;
            }
        }
        let (eot, (tokens, types)) = (table.eot(), table.finish());
        let adds_space_prefix = normalizer.add_dummy_prefix() && extra.add_prefix_space != Some(false);
        Self::new(tokens, types, Rules::Scores { scores, adds_space_prefix }, eot, config)
    }
}

fn check(trainer: &TrainerSpec, normalizer: &NormalizerSpec) -> Result<(), TokenizerFileError> {
    let model = match trainer.model_type() {
        BPE => None,
        1 => Some("Unigram of SentencePiece"),
        3 => Some("Word of SentencePiece"),
        4 => Some("Char of SentencePiece"),
        _ => Some("unknown to SentencePiece"),
    };
    if let Some(found) = model {
        return Err(TokenizerFileError::Model { found: found.to_owned() });
    }
    let charsmap_len = normalizer.precompiled_charsmap().len();
    if charsmap_len > 0 {
        let found = format!("{charsmap_len} bytes");
        let key = "normalizer_spec.precompiled_charsmap";
        return Err(TokenizerFileError::Rule { key, found, expected: "none (the rule `identity`)" });
    }
    for (key, found, is_expected) in [
        (
            "normalizer_spec.remove_extra_whitespaces",
            normalizer.remove_extra_whitespaces(),
            !normalizer.remove_extra_whitespaces(),
        ),
        (
            "normalizer_spec.escape_whitespaces",
            normalizer.escape_whitespaces(),
            normalizer.escape_whitespaces(),
        ),
        (
            "trainer_spec.treat_whitespace_as_suffix",
            trainer.treat_whitespace_as_suffix(),
            !trainer.treat_whitespace_as_suffix(),
        ),
    ] {
        if !is_expected {
            let expected = if found { "false" } else { "true" };
            return Err(TokenizerFileError::Rule { key, found: found.to_string(), expected });
        }
    }
    Ok(())
}
