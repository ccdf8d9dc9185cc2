//! Pictures and other files that are written whole: an SVG text as it is, or as the pixels of a PNG file.

use std::fs::Permissions;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use bitnetd_proto::exit_code::ExitCode;
use resvg::{tiny_skia, usvg};

use crate::error::CliError;

/// The font of texts in PNG pictures: part of the program, since many servers have none.
const FONT: &[u8] = epaint_default_fonts::UBUNTU_LIGHT;
/// Its name.
const FONT_FAMILY: &str = "Ubuntu";
/// Pixels of a PNG picture for each unit of the SVG one.
const SCALE: f32 = 2.0;

/// Whether a picture can be written under this name.
pub(crate) fn check_name(path: &Path) -> Result<(), CliError> {
    match extension(path).as_deref() {
        Some("svg" | "png") => Ok(()),
        _ => Err(CliError::usage(format!("`{}`: a picture is .svg or .png", path.display()))),
    }
}

/// Writes a picture in the format that the name of the file says.
pub(crate) fn write(path: &Path, svg: &str) -> Result<(), CliError> {
    check_name(path)?;
    match extension(path).as_deref() {
        Some("png") => replace(path, &png(svg)?),
        _ => replace(path, svg.as_bytes()),
    }
}

/// Writes a file whole or not at all: a reader sees the old one or the new one. Its permissions stay.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    let at = |source| CliError::file("write", path, source);
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().permissions(mode(path)).tempfile_in(dir).map_err(at)?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(at)?;
    file.persist(path).map_err(|error| at(error.error))?;
    Ok(())
}

fn mode(path: &Path) -> Permissions {
    std::fs::metadata(path).map_or_else(|_| Permissions::from_mode(0o644), |metadata| metadata.permissions())
}

fn extension(path: &Path) -> Option<String> {
    path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase())
}

/// The picture in pixels.
fn png(svg: &str) -> Result<Vec<u8>, CliError> {
    let failed = |what: &str| CliError::new(ExitCode::Software, format!("cannot draw: {what}"));
    let mut fonts = usvg::fontdb::Database::new();
    fonts.load_font_data(FONT.to_vec());
    fonts.set_sans_serif_family(FONT_FAMILY);
    let options =
        usvg::Options { font_family: FONT_FAMILY.into(), fontdb: Arc::new(fonts), ..Default::default() };
    let tree = usvg::Tree::from_str(svg, &options).map_err(|error| failed(&error.to_string()))?;
    let size = tree.size().to_int_size().scale_by(SCALE).ok_or_else(|| failed("it has no size"))?;
    let mut pixels =
        tiny_skia::Pixmap::new(size.width(), size.height()).ok_or_else(|| failed("it is too large"))?;
    resvg::render(&tree, tiny_skia::Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
    pixels.encode_png().map_err(|error| failed(&error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SVG: &str = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"80\" height=\"20\">\
        <text x=\"2\" y=\"16\" font-family=\"sans-serif\" font-size=\"16\">words</text></svg>";

    #[test]
    fn texts_can_be_seen_on_a_machine_without_fonts() {
        let pixels = tiny_skia::Pixmap::decode_png(&png(SVG).unwrap()).unwrap();
        assert_eq!((pixels.width(), pixels.height()), (160, 40));
        assert!(pixels.pixels().iter().filter(|pixel| pixel.alpha() > 128).count() > 50, "nothing is drawn");
    }

    #[test]
    fn other_names_are_refused_before_anything_is_drawn() {
        assert!(check_name(Path::new("a.PNG")).is_ok());
        assert!(check_name(Path::new("a.jpg")).is_err());
        assert!(check_name(Path::new("a")).is_err());
    }

    #[test]
    fn a_file_is_replaced_and_keeps_its_permissions() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        replace(&path, b"one").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
