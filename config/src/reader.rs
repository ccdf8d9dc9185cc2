//! A TOML table that knows its path, hands out typed values and collects every problem on the way.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::problem::Problem;
use crate::schema;

/// Where problems go: all of them, with the line they belong to.
#[derive(Debug)]
pub(crate) struct Problems<'a> {
    text: &'a str,
    list: Vec<Problem>,
}

impl<'a> Problems<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        Self { text, list: Vec::new() }
    }

    pub(crate) fn add(&mut self, span: Range<usize>, key: String, refusal: Refusal) {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
        let Refusal { message, hint } = refusal;
        self.list.push(Problem { line, column, key, message, hint });
    }

    /// Text that is no TOML. What was read from there on is a guess of the parser, so that problems with it would
    /// mislead: those are dropped.
    pub(crate) fn add_syntax_error(&mut self, span: Range<usize>, message: &str) {
        self.add(span, String::new(), Refusal::new(message));
        let Some(added) = self.list.last().map(|added| (added.line, added.column)) else { return };
        self.list.retain(|problem| problem.key.is_empty() || (problem.line, problem.column) < added);
    }

    pub(crate) fn into_sorted(mut self) -> Vec<Problem> {
        self.list.sort_by_key(|problem| (problem.line, problem.column));
        self.list
    }
}

/// Why a value is refused.
#[derive(Debug)]
pub(crate) struct Refusal {
    message: String,
    hint: Option<String>,
}

impl Refusal {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None }
    }

    /// "expected …, found …"
    pub(crate) fn expected(expected: impl std::fmt::Display, found: &DeValue<'_>) -> Self {
        Self::new(format!("expected {expected}, found {}", describe(found)))
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// A value in words, cut to what fits a message.
fn describe(value: &DeValue<'_>) -> String {
    let shown = match value {
        DeValue::String(text) => text.to_string(),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(value) => value.to_string(),
        DeValue::Datetime(_) => return "a date".into(),
        DeValue::Array(_) => return "an array".into(),
        DeValue::Table(_) => return "a table".into(),
    };
    let mut cut: String = shown.chars().take(60).flat_map(char::escape_debug).collect();
    if shown.chars().nth(60).is_some() {
        cut.push('…');
    }
    let kind = value.type_str();
    let article = if matches!(value, DeValue::Integer(_)) { "an" } else { "a" };
    if matches!(value, DeValue::String(_)) {
        format!("the string \"{cut}\"")
    } else {
        format!("{article} {kind}, `{cut}`")
    }
}

/// One table of the file.
#[derive(Debug)]
pub(crate) struct Table<'t, 'p, 'x> {
    path: String,
    table: Option<&'t DeTable<'t>>,
    span: Range<usize>,
    asked: Vec<&'static str>,
    problems: &'p mut Problems<'x>,
}

impl<'t, 'p, 'x> Table<'t, 'p, 'x> {
    pub(crate) fn root(table: &'t DeTable<'t>, problems: &'p mut Problems<'x>) -> Self {
        Self { path: String::new(), table: Some(table), span: 0..0, asked: Vec::new(), problems }
    }

    /// The path of `key` in this table.
    fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn find(&mut self, key: &'static str) -> Option<&'t Spanned<DeValue<'t>>> {
        self.asked.push(key);
        self.table?.get(key)
    }

    /// Whether the file has `key` here.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.table.is_some_and(|table| table.contains_key(key))
    }

    /// The value of `key` as `read` understands it; `None` if it is absent or was refused.
    pub(crate) fn get<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&DeValue<'_>) -> Result<T, Refusal>,
    ) -> Option<T> {
        let value = self.find(key)?;
        match read(value.get_ref()) {
            Ok(read) => Some(read),
            Err(refusal) => {
                self.problems.add(value.span(), self.path_of(key), refusal);
                None
            }
        }
    }

    /// Reports a problem that becomes visible only with other values known, at `key` if the file has it.
    pub(crate) fn refuse(&mut self, key: &str, refusal: Refusal) {
        let span = self.table.and_then(|table| table.get(key)).map_or(self.span.clone(), Spanned::span);
        let path = if key.is_empty() { self.path.clone() } else { self.path_of(key) };
        self.problems.add(span, path, refusal);
    }

    /// Reads the table `key` with `read` and then refuses what `read` did not ask for.
    pub(crate) fn section<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Table<'_, '_, '_>) -> T,
    ) -> T {
        let value = self.find(key);
        let path = self.path_of(key);
        let table = value.and_then(|value| value.get_ref().as_table());
        if let (Some(value), None) = (value, table) {
            let refusal = Refusal::expected(format!("a table, `[{path}]`"), value.get_ref());
            self.problems.add(value.span(), path.clone(), refusal);
        }
        let span = value.map_or(0..0, Spanned::span);
        let mut section = Table { path, table, span, asked: Vec::new(), problems: self.problems };
        let read = read(&mut section);
        section.finish();
        read
    }

    /// Reads each table of the array of tables `key`; `None` if the file has none.
    pub(crate) fn sections<T>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(&mut Table<'_, '_, '_>) -> T,
    ) -> Option<Vec<T>> {
        let value = self.find(key)?;
        let path = self.path_of(key);
        let Some(array) = value.get_ref().as_array() else {
            let refusal =
                Refusal::expected(format!("one table or more, each headed `[[{path}]]`"), value.get_ref());
            self.problems.add(value.span(), path, refusal);
            return None;
        };
        let mut all = Vec::with_capacity(array.len());
        for (idx, value) in array.iter().enumerate() {
            let path = format!("{path}[{idx}]");
            let Some(table) = value.get_ref().as_table() else {
                self.problems.add(value.span(), path, Refusal::expected("a table", value.get_ref()));
                continue;
            };
            let mut section = Table {
                path,
                table: Some(table),
                span: value.span(),
                asked: Vec::new(),
                problems: self.problems,
            };
            all.push(read(&mut section));
            section.finish();
        }
        Some(all)
    }

    /// Refuses every key that was not asked for.
    pub(crate) fn finish(self) {
        let Some(table) = self.table else { return };
        for (key, value) in table {
            if self.asked.iter().any(|asked| asked == key.get_ref()) {
                continue;
            }
            let path = self.path_of(key.get_ref());
            let is_table = matches!(value.get_ref(), DeValue::Table(_));
            let refusal = unknown(&self.path, key.get_ref(), &path, is_table, &self.asked);
            self.problems.add(key.span(), path, refusal);
        }
    }
}

/// The problem for a key that does not exist, with the best hint there is.
fn unknown(section: &str, key: &str, path: &str, is_table: bool, known: &[&'static str]) -> Refusal {
    if let Some((_, plan)) = schema::NOT_YET.iter().find(|(later, _)| *later == path) {
        return Refusal::new("this version does not have it yet").hint(*plan);
    }
    let what = if is_table { "unknown section" } else { "unknown key" };
    let refusal = Refusal::new(what);
    let near = known
        .iter()
        .map(|name| (strsim::damerau_levenshtein(&key.to_lowercase(), name), *name))
        .filter(|(distance, name)| *distance <= 1 + name.len() / 4)
        .min();
    if let Some((_, near)) = near {
        return refusal.hint(format!("did you mean `{near}`?"));
    }
    let elsewhere = schema::KEYS.iter().find(|other| other.name == key && other.section != section);
    if let Some(other) = elsewhere {
        return refusal.hint(format!("`{key}` belongs into `[{}]`", other.section));
    }
    let mut list = String::new();
    for name in known {
        let separator = if list.is_empty() { "" } else { ", " };
        list.push_str(&format!("{separator}`{name}`"));
    }
    let place =
        if section.is_empty() { "the file has the sections".into() } else { format!("`[{section}]` has") };
    refusal.hint(format!("{place} {list}"))
}
