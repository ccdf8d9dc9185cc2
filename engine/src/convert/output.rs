//! A file that appears under its name only when it is complete.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::ConvertError;

/// Writes beside the wanted file. Invariant: dropped without [`Self::commit`], it leaves nothing.
#[derive(Debug)]
pub(super) struct Output {
    wanted: PathBuf,
    partial: PathBuf,
    file: Option<BufWriter<File>>, // Taken by `commit`.
}

impl Output {
    pub(super) fn create(wanted: &Path) -> Result<Self, ConvertError> {
        let error = |source| ConvertError::Output { path: wanted.to_owned(), source };
        let Some(name) = wanted.file_name().and_then(|name| name.to_str()) else {
            return Err(error(io::Error::from(io::ErrorKind::InvalidFilename)));
        };
        if wanted.is_dir() {
            return Err(error(io::Error::from(io::ErrorKind::IsADirectory)));
        }
        let partial = wanted.with_file_name(format!(".{name}.{}.partial", std::process::id()));
        let file = File::create(&partial).map_err(error)?;
        let file = Some(BufWriter::with_capacity(1 << 20, file));
        Ok(Self { wanted: wanted.to_owned(), partial, file })
    }

    pub(super) fn commit(mut self) -> Result<(), ConvertError> {
        let result = self.file.take().map_or(Ok(()), |file| {
            let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
            file.sync_all()?;
            fs::rename(&self.partial, &self.wanted)
        });
        result.map_err(|source| {
            self.remove();
            ConvertError::Output { path: self.wanted.clone(), source }
        })
    }

    fn remove(&self) {
        // Nothing can be done about a file that cannot be removed, and the reason for removing it is told.
        drop(fs::remove_file(&self.partial));
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.as_mut().map_or(Ok(0), |file| file.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.as_mut().map_or(Ok(()), Write::flush)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            self.remove();
        }
    }
}
