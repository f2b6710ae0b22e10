//! Where Jinja2 shows that it is Python: how values print, `tojson`, and tests and methods that MiniJinja lacks.

use std::fmt::Write;

use chrono::NaiveDateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};

/// The Jinja environment of transformers' `apply_chat_template`. `markup`: what `safe` gives escapes what is joined to it.
pub(super) fn environment(markup: bool) -> Environment<'static> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.expect("the default delimiters are valid"));
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_formatter(if markup { print_markup } else { print });
    env.set_unknown_method_callback(method);
    env.add_filter("tojson", tojson);
    env.add_filter("string", |value: &Value| python_str(value));
    env.add_filter("safe", move |value: &Value| match markup {
        true => format!("{MARKUP_START}{}{MARKUP_END}", python_str(value)),
        false => python_str(value),
    });
    env.add_filter("int", int);
    env.add_filter("float", float);
    env.add_test("sequence", |value: &Value| {
        // A Python str and a dict have a length and items, which is all that Jinja2 asks.
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined)
    });
    env.add_test("iterable", |value: &Value| {
        let kind = value.kind();
        matches!(
            kind,
            ValueKind::Seq | ValueKind::Iterable | ValueKind::String | ValueKind::Map | ValueKind::Undefined
        )
    });
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    env
}

/// Makes `strftime_now` answer with `now`.
pub(super) fn set_now(env: &mut Environment<'static>, now: NaiveDateTime) {
    env.add_function("strftime_now", move |format: String| -> Result<String, Error> {
        let mut text = String::new();
        write!(text, "{}", now.format(&format)).map_err(|_| {
            Error::new(ErrorKind::InvalidOperation, format!("strftime_now: unknown format {format:?}"))
        })?;
        Ok(text)
    });
}

/// Brackets around what `safe` marked, until it is printed. Jinja2's `Markup` escapes each string that `+` joins to it,
/// even where templates are not HTML, and published templates show it (`&#34;` in Mistral's tool calls); MiniJinja has
/// no such type without escaping all output. The two are Unicode noncharacters; a message with the first is refused
/// where a template marks anything. `~` would have to take them away, which cannot be told from here: a template that
/// uses `~` has plain strings instead.
pub(super) const MARKUP_START: char = '\u{fdd0}';
const MARKUP_END: char = '\u{fdd1}';

fn print(out: &mut Output, _: &mut State, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.write_str(text)?,
        None => out.write_str(&python_str(value))?,
    }
    Ok(())
}

fn print_markup(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) if text.contains(MARKUP_START) => {
            let mut rest = text;
            while let Some((before, after)) = rest.split_once(MARKUP_START) {
                escape(out, before)?;
                let (inside, after) = after.split_once(MARKUP_END).unwrap_or((after, ""));
                out.write_str(inside)?;
                rest = after;
            }
            escape(out, rest)?;
            Ok(())
        }
        _ => print(out, state, value),
    }
}

fn escape(out: &mut Output, text: &str) -> std::fmt::Result {
    for c in text.chars() {
        match c {
            '&' => out.write_str("&amp;")?,
            '<' => out.write_str("&lt;")?,
            '>' => out.write_str("&gt;")?,
            '\'' => out.write_str("&#39;")?,
            '"' => out.write_str("&#34;")?,
            c => out.write_char(c)?,
        }
    }
    Ok(())
}

/// Jinja2's `int`: what cannot be read is `default`, and "42.23" is 42.
fn int(value: &Value, default: Option<Value>, base: Option<u32>) -> Value {
    let base = base.filter(|base| (2..=36).contains(base)).unwrap_or(10);
    let digits = value.as_str().map(|text| text.trim().replace('_', ""));
    let whole = match &digits {
        Some(digits) => i128::from_str_radix(digits, base).ok(),
        None => i128::try_from(value.clone()).ok(),
    };
    let whole = whole.or_else(|| as_float(value).filter(|x| x.is_finite()).map(|x| x.trunc() as i128));
    whole.map(Value::from).or(default).unwrap_or_else(|| Value::from(0))
}

/// Jinja2's `float`: what cannot be read is `default`.
fn float(value: &Value, default: Option<Value>) -> Value {
    as_float(value).map(Value::from).or(default).unwrap_or_else(|| Value::from(0.0))
}

fn as_float(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some(text) => text.trim().replace('_', "").parse().ok(),
        None if value.kind() == ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        None => f64::try_from(value.clone()).ok(),
    }
}

/// Python's `str` of a JSON value.
pub(super) fn python_text(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Bool(true) => "True".to_owned(),
        serde_json::Value::Bool(false) => "False".to_owned(),
        other => python_str(&Value::from(minijinja::value::Serde(other))),
    }
}

/// Python's `str(value)`.
fn python_str(value: &Value) -> String {
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => python_repr(value),
        _ => value.to_string(),
    }
}

/// Python's `repr(value)`.
fn python_repr(value: &Value) -> String {
    let items = |of: &Value| -> Vec<String> {
        of.try_iter().map(|items| items.map(|item| python_repr(&item)).collect()).unwrap_or_default()
    };
    match value.kind() {
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float_repr)
        }
        ValueKind::Seq if value.downcast_object_ref::<Tuple>().is_some() => {
            let items = items(value);
            if items.len() == 1 { format!("({},)", items[0]) } else { format!("({})", items.join(", ")) }
        }
        ValueKind::Seq => format!("[{}]", items(value).join(", ")),
        ValueKind::Map => {
            let pairs: Vec<String> = pairs(value)
                .map(|(key, item)| format!("{}: {}", python_repr(&key), python_repr(&item)))
                .collect();
            format!("{{{}}}", pairs.join(", "))
        }
        _ => format!("{value:?}"),
    }
}

/// Python's shortest text of a float: an exponent below 1e-4 and from 1e16 on.
fn float_repr(x: f64) -> String {
    if x.is_nan() {
        return "nan".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    if x == 0.0 || (1e-4..1e16).contains(&x.abs()) {
        return format!("{x:?}");
    }
    let text = format!("{x:e}");
    let (mantissa, exponent) = text.split_once('e').expect("{:e} writes an exponent");
    let exponent: i32 = exponent.parse().expect("{:e} writes a number after the e");
    format!("{mantissa}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

fn pairs(map: &Value) -> impl Iterator<Item = (Value, Value)> {
    map.as_object().and_then(|object| object.try_iter_pairs()).into_iter().flatten()
}

/// `json.dumps(value, ensure_ascii, indent, separators, sort_keys)`: transformers' filter, which escapes no HTML.
fn tojson(
    value: &Value,
    ensure_ascii: Option<bool>,
    indent: Option<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let ensure_ascii = ensure_ascii.or(kwargs.get("ensure_ascii")?).unwrap_or(false);
    let indent = indent.or(kwargs.get("indent")?).filter(|indent| !indent.is_none());
    let separators: Option<(String, String)> = match kwargs.get::<Option<Vec<String>>>("separators")? {
        Some(pair) => Some(<[String; 2]>::try_from(pair).map(|[item, key]| (item, key)).map_err(|_| {
            Error::new(ErrorKind::InvalidOperation, "tojson: separators must be a pair of strings")
        })?),
        None => None,
    };
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let indent = match indent {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(indent)?),
        }),
    };
    let (item, key) =
        separators.unwrap_or_else(|| (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()));
    let mut json = Json { out: String::new(), ensure_ascii, indent, item, key, sort_keys };
    json.write(value, 0)?;
    Ok(Value::from(json.out))
}

struct Json {
    out: String,
    ensure_ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
}

impl Json {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.out.push_str(&value.to_string()),
            ValueKind::Number => {
                let text = float_repr(f64::try_from(value.clone())?);
                self.out.push_str(match text.as_str() {
                    "nan" => "NaN",
                    "inf" => "Infinity",
                    "-inf" => "-Infinity",
                    text => text,
                });
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.container('[', ']', depth, &items, |json, item| json.write(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut items: Vec<(String, Value)> = pairs(value)
                    .map(|(key, item)| Ok((json_key(&key)?, item)))
                    .collect::<Result<_, Error>>()?;
                if self.sort_keys {
                    items.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.container('{', '}', depth, &items, |json, (key, item)| {
                    json.string(key);
                    let separator = json.key.clone();
                    json.out.push_str(&separator);
                    json.write(item, depth + 1)
                })?;
            }
            kind => {
                let reason = format!("Object of type {kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::BadSerialization, reason));
            }
        }
        Ok(())
    }

    fn container<T>(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        items: &[T],
        write: impl Fn(&mut Json, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.out.push_str(&self.item);
            }
            self.new_line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.new_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, text: &str) {
        // serde_json escapes exactly what json.dumps(ensure_ascii=False) does.
        let quoted = serde_json::Value::from(text).to_string();
        if !self.ensure_ascii {
            return self.out.push_str(&quoted);
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                self.out.push(c);
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(self.out, "\\u{unit:04x}");
                }
            }
        }
    }
}

fn json_key(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.to_string()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => Ok(python_repr(key)),
        kind => Err(Error::new(ErrorKind::BadSerialization, format!("keys must be str, not {kind}"))),
    }
}

/// Python's methods: those of minijinja-contrib, and a few of `str` that it does not have.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        match name {
            "removeprefix" => {
                let (prefix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)));
            }
            "removesuffix" => {
                let (suffix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)));
            }
            "rsplit" => {
                let (separator, limit): (&str, Option<usize>) = from_args(args)?;
                let mut parts: Vec<Value> = match limit {
                    Some(limit) => text.rsplitn(limit + 1, separator).map(Value::from).collect(),
                    None => text.rsplit(separator).map(Value::from).collect(),
                };
                parts.reverse();
                return Ok(Value::from(parts));
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}
