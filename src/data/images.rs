//! Pictures in conversations: where they come from, and whether they are there.
//!
//! A part `{"type": "image", "image": ..}` or `{"type": "image_url", "image_url": {"url": ..}}` names its picture; a part
//! `{"type": "image"}` and the text `<image>` stand for the next one of the row's `image` or `images` column. A picture
//! is a path (from the data file's folder on), an `http` URL, a data URL, base64, or Parquet's `{bytes, path}`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;

use super::lint::texts;
use super::{Example, Row};

/// Where a picture's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSource {
    /// A file.
    Path(PathBuf),
    /// Something to download, which nothing here does.
    Url(String),
    /// The file's bytes.
    Bytes(Vec<u8>),
}

/// What a picture's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// The file format, such as `png`.
    pub format: &'static str,
    /// Pixels across.
    pub width: usize,
    /// Pixels down.
    pub height: usize,
}

/// Stands for a picture in LLaVA's texts.
const PLACEHOLDER: &str = "<image>";
/// Shorter strings are names: no picture has so few bytes.
const SHORTEST_BASE64: usize = 64;

impl ImageSource {
    /// Understands `value`; paths start from `folder`.
    ///
    /// # Errors
    /// Neither a string nor `{bytes, path}`, or base64 that is broken.
    pub fn new(value: &Value, folder: Option<&Path>) -> Result<ImageSource> {
        let text = match value {
            Value::String(text) => text.as_str(),
            Value::Object(fields) => {
                let text =
                    |name: &str| fields.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
                if let Some(bytes) = text("bytes").or_else(|| text("base64")) {
                    return decode(bytes).map(ImageSource::Bytes);
                }
                text("path")
                    .or_else(|| text("url"))
                    .context("the picture has neither bytes nor path nor url")?
            }
            _ => bail!("expected a path, a URL, base64 or {{bytes, path}} as the picture"),
        };
        if let Some(data) = text.strip_prefix("data:") {
            let (head, data) = data.split_once(',').context("a data URL without a comma")?;
            if !head.ends_with(";base64") {
                bail!("a data URL that is not base64");
            }
            return decode(data).map(ImageSource::Bytes);
        }
        if text.starts_with("http://") || text.starts_with("https://") {
            return Ok(ImageSource::Url(text.to_owned()));
        }
        // A path has an ending or a short name; base64 of a picture has neither.
        if text.len() >= SHORTEST_BASE64 && !text.contains('.') {
            return decode(text).map(ImageSource::Bytes);
        }
        let path = Path::new(text.strip_prefix("file://").unwrap_or(text));
        Ok(ImageSource::Path(folder.map_or_else(|| path.to_owned(), |folder| folder.join(path))))
    }

    /// Reads the picture's header; `None` of a URL, which is not downloaded.
    ///
    /// # Errors
    /// No such file, or no picture of a known format.
    pub fn info(&self) -> Result<Option<ImageInfo>> {
        let (kind, size) = match self {
            ImageSource::Url(_) => return Ok(None),
            ImageSource::Bytes(bytes) => (imagesize::image_type(bytes), imagesize::blob_size(bytes)),
            ImageSource::Path(path) => {
                let header = read_header(path).with_context(|| format!("picture {}", path.display()))?;
                (imagesize::image_type(&header), imagesize::size(path))
            }
        };
        let shown = || match self {
            ImageSource::Path(path) => format!("picture {}", path.display()),
            _ => "the picture's bytes".to_owned(),
        };
        let kind = kind.with_context(|| format!("{}: of no known picture format", shown()))?;
        let size = size.with_context(|| format!("{}: a broken header", shown()))?;
        Ok(Some(ImageInfo { format: format_name(kind), width: size.width, height: size.height }))
    }
}

fn read_header(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read;
    let mut header = Vec::new();
    std::fs::File::open(path)?.take(64).read_to_end(&mut header)?;
    Ok(header)
}

fn format_name(kind: imagesize::ImageType) -> &'static str {
    match kind {
        imagesize::ImageType::Bmp => "bmp",
        imagesize::ImageType::Gif => "gif",
        imagesize::ImageType::Heif(_) => "heif",
        imagesize::ImageType::Jpeg => "jpeg",
        imagesize::ImageType::Jxl => "jxl",
        imagesize::ImageType::Png => "png",
        imagesize::ImageType::Tiff => "tiff",
        imagesize::ImageType::Webp => "webp",
        _ => "other",
    }
}

fn decode(text: &str) -> Result<Vec<u8>> {
    BASE64_STANDARD.decode(text.trim()).context("the picture's base64 is broken")
}

/// The pictures of a row in the order in which its text shows them.
///
/// # Errors
/// A picture that cannot be understood, or as many places as pictures do not match.
pub fn images(row: &Row, example: &Example, folder: Option<&Path>) -> Result<Vec<ImageSource>> {
    let column = ["images", "image"].iter().find_map(|name| row.get(*name)).filter(|value| !value.is_null());
    let Example::Conversation(conversation) = example else {
        return column.into_iter().flat_map(each).map(|value| ImageSource::new(value, folder)).collect();
    };
    let mut rest = column.into_iter().flat_map(each);
    let mut found = Vec::new();
    for (message, number) in conversation.messages.iter().zip(1..) {
        let place = || format!("message {number}");
        for part in message["content"].as_array().into_iter().flatten() {
            let named = match part["type"].as_str() {
                Some("image_url") => match &part["image_url"] {
                    Value::Object(object) => object.get("url"),
                    value => Some(value),
                },
                Some("image") => ["image", "url", "path", "base64"]
                    .iter()
                    .find_map(|name| part.get(*name))
                    .or_else(|| rest.next()),
                _ => continue,
            };
            let value = named.with_context(|| format!("{}: a picture is missing from the row", place()))?;
            found.push(ImageSource::new(value, folder).with_context(place)?);
        }
        let places = texts(message).map(|text| text.matches(PLACEHOLDER).count()).sum::<usize>();
        // Without the column it is a text like any other.
        for _ in 0..if column.is_some() { places } else { 0 } {
            let value =
                rest.next().with_context(|| format!("{}: more {PLACEHOLDER} than pictures", place()))?;
            found.push(ImageSource::new(value, folder).with_context(place)?);
        }
    }
    if found.is_empty() {
        // Rows of pictures and plain texts: the pictures come first, as processors put them.
        return rest.map(|value| ImageSource::new(value, folder)).collect();
    }
    match rest.count() {
        0 => Ok(found),
        unused => bail!("{unused} of the row's pictures are shown by no message"),
    }
}

/// The items of a list, or the one value.
fn each(value: &Value) -> std::slice::Iter<'_, Value> {
    match value {
        Value::Array(items) => items.iter(),
        one => std::slice::from_ref(one).iter(),
    }
}

/// What is wrong with the pictures of a row.
pub(super) fn check_images(row: &Row, example: &Example, folder: Option<&Path>) -> Vec<String> {
    match images(row, example, folder) {
        Ok(found) => {
            found.iter().filter_map(|image| image.info().err()).map(|error| format!("{error:#}")).collect()
        }
        Err(error) => vec![format!("{error:#}")],
    }
}
