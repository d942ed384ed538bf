//! Lists and ranges of numbers, as llama-bench reads them: `512`, `8,16`, `1-4`, `0-1024+256`, `512-4096*2`.

/// The numbers that `text` stands for.
///
/// # Errors
/// What was found and what was expected.
pub fn numbers(text: &str) -> Result<Vec<usize>, String> {
    let mut out = vec![];
    for part in text.split(',') {
        let (range, step) = match part.find(['+', '*']) {
            Some(at) => (&part[..at], Some((&part[at..=at], number(&part[at + 1..])?))),
            None => (part, None),
        };
        let (first, last) = match range.split_once('-') {
            Some((a, b)) => (number(a)?, number(b)?),
            None => (number(range)?, number(range)?),
        };
        let next = |n: usize| match step {
            None => n.checked_add(1),
            Some(("+", by)) if by > 0 => n.checked_add(by),
            Some(("*", by)) if by > 1 && n > 0 => n.checked_mul(by),
            _ => None,
        };
        if first > last {
            return Err(format!("'{part}' counts down: write the smaller number first"));
        }
        let mut n = first;
        loop {
            out.push(n);
            if out.len() > 1000 {
                return Err(format!("'{text}' stands for more than 1000 numbers"));
            }
            match next(n) {
                Some(following) if following <= last => n = following,
                None if n < last => return Err(format!("'{part}' never reaches {last}")),
                _ => break,
            }
        }
    }
    Ok(out)
}

fn number(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.trim().strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1024),
        None => (text.trim(), 1),
    };
    let value = digits.parse::<usize>().ok().and_then(|n| n.checked_mul(unit));
    value.ok_or_else(|| {
        format!("found '{text}', expected a number, a list like 512,2048 or a range like 512-4096*2")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_ranges() {
        assert_eq!(numbers("512").unwrap(), [512]);
        assert_eq!(numbers("8,16").unwrap(), [8, 16]);
        assert_eq!(numbers("1-4").unwrap(), [1, 2, 3, 4]);
        assert_eq!(numbers("0-1024+512,8K").unwrap(), [0, 512, 1024, 8192]);
        assert_eq!(numbers("512-4096*2").unwrap(), [512, 1024, 2048, 4096]);
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in ["", "x", "4-1", "1-9+0", "0-8*2", "1-9*1", "1-9999999", "99999999999999999999", "-1"] {
            assert!(numbers(bad).is_err(), "{bad}");
        }
    }
}
