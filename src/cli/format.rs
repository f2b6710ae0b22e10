//! Numbers for people.

/// `1.25 GiB`, `12.0 MiB`.
pub fn bytes(bytes: u64) -> String {
    match bytes as f64 {
        large if large >= 1e9 => format!("{:.2} GiB", large / (1u64 << 30) as f64),
        small => format!("{:.1} MiB", small / (1u64 << 20) as f64),
    }
}

/// `1,234,567`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Three digits are enough of a rate: `12,345`, `123`, `1.23`.
pub fn rate(rate: f64) -> String {
    match rate {
        large if large >= 100.0 => count(large.round() as u64),
        middle if middle >= 10.0 => format!("{middle:.1}"),
        small => format!("{small:.2}"),
    }
}

/// `3h05m`, `2m10s`, `12.3s`.
pub fn seconds(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        3600.. => format!("{}h{:02}m", whole / 3600, whole % 3600 / 60),
        60.. => format!("{}m{:02}s", whole / 60, whole % 60),
        _ => format!("{seconds:.1}s"),
    }
}

/// `4.75 %`; small shares keep two digits: `0.031 %`.
pub fn percent(share: f64) -> String {
    let percent = share * 100.0;
    let digits = if percent > 0.0 && percent < 1.0 { 1 - percent.log10().floor() as i32 } else { 2 };
    format!("{percent:.*} %", digits.max(2) as usize)
}
