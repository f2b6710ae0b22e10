//! Numbers in texts, as people and models write them.

use std::sync::LazyLock;

use fancy_regex::Regex;

/// A number as it is written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Number {
    pub value: f64,
    /// A percent sign stands behind it; `value` is what stands before the sign.
    pub percent: bool,
}

impl Number {
    /// Whether both mean the same, to 12 digits. Where only one has a percent sign, it may be meant or left out: 50 % equals
    /// 50 and 0.5.
    pub fn equals(self, other: Number) -> bool {
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-12 * a.abs().max(b.abs());
        match (self.percent, other.percent) {
            (true, false) => close(self.value, other.value) || close(self.value / 100.0, other.value),
            (false, true) => other.equals(self),
            _ => close(self.value, other.value),
        }
    }
}

/// The number that a reply states: the last one inside the last `<answer>..</answer>`; without that, inside the last
/// `\boxed{..}`; without that, behind the last `####` in its line; without that, of the whole text.
///
/// A number may have a sign, thousands separators (`1,234`), decimals (`.5`), an exponent, a denominator (`3/4`,
/// `\frac{3}{4}`) and a percent sign. A comma that is no thousands separator ends it; mixed numbers are two.
pub fn stated_number(reply: &str) -> Option<Number> {
    let tagged = reply.rsplit_once("<answer>").and_then(|(_, rest)| rest.split_once("</answer>"));
    let stated = tagged
        .map(|(answer, _)| answer)
        .or_else(|| boxed(reply))
        .or_else(|| reply.rsplit_once("####").map(|(_, rest)| rest.lines().next().unwrap_or("")));
    last_number(stated.unwrap_or(reply))
}

/// The inside of the last `\boxed{..}`, whose braces may hold others.
fn boxed(reply: &str) -> Option<&str> {
    let (_, inside) = reply.rsplit_once("\\boxed{")?;
    let mut depth = 1;
    for (at, letter) in inside.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(&inside[..at]);
        }
    }
    None
}

fn last_number(text: &str) -> Option<Number> {
    static FRACTION: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}").expect("a valid pattern"));
    // A minus behind a digit, a letter or a bracket is a subtraction or a hyphen.
    static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(
            r"(?x) (?<sign>(?<![\w)\]}])[-\u{2212}])?
              (?<![\d.]) (?<number>(?:\d{1,3}(?:,\d{3})+(?!\d) | \d+)(?:\.\d+)? | \.\d+)
              (?<exponent>[eE][-+]?\d+(?!\w))?
              (?:/(?<denominator>\d+(?:\.\d+)?))?
              (?<percent>\s?\\?%)?",
        )
        .expect("a valid pattern")
    });
    let plain = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "");
    let plain = FRACTION.replace_all(&plain, "$1/$2");
    let found = NUMBER.captures_iter(&plain).filter_map(Result::ok).last()?;
    let part = |name: &str| found.name(name).map_or("", |part| part.as_str());
    let mut value: f64 = format!("{}{}", part("number").replace(',', ""), part("exponent")).parse().ok()?;
    if let Some(denominator) = found.name("denominator") {
        value /= denominator.as_str().parse::<f64>().ok().filter(|denominator| *denominator != 0.0)?;
    }
    if !part("sign").is_empty() {
        value = -value;
    }
    Some(Number { value, percent: !part("percent").is_empty() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_they_are_written() {
        for (text, value) in [
            ("It is 12.", 12.0),
            ("7+5=12", 12.0),
            ("12 - 15 = -3", -3.0),
            ("12-3", 3.0),
            ("a \u{2212}4 b", -4.0),
            ("1,234,567.5 litres", 1_234_567.5),
            ("1{,}234", 1234.0),
            ("3,5", 5.0),
            ("12,3456", 3456.0),
            (".25", 0.25),
            ("x = 3/4", 0.75),
            (r"\frac{3}{4}", 0.75),
            (r"-\dfrac{1}{8}", -0.125),
            ("6.02e23", 6.02e23),
            ("<answer>5</answer> of 7", 5.0),
            ("<think>9</think><answer>x is 1</answer><answer>2</answer>", 2.0),
            (r"so \boxed{\frac{1}{2}} or 9", 0.5),
            ("4+4=<<4+4=8>>8\n#### 72\n1", 72.0),
            ("$1,000", 1000.0),
        ] {
            assert_eq!(stated_number(text), Some(Number { value, percent: false }), "{text:?}");
        }
        for text in ["no number", "<answer>none</answer> 5", "1/0", "", "####"] {
            assert_eq!(stated_number(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_percent_sign_may_be_left_out() {
        let equal = |a, b| stated_number(a).unwrap().equals(stated_number(b).unwrap());
        assert!(equal("50%", "50") && equal("0.5", "50 %") && equal(r"50\%", "50%") && equal("1/2", "0.5"));
        assert!(!equal("0.5%", "50%") && !equal("1000000001", "1000000000") && !equal("0", "1e-30"));
    }
}
