//! A look at a template's text before it is parsed: its parts must be small enough for a recursive parser, and tags that only
//! training code needs are made neutral.
use super::{Error, Result};

/// The longest template. The longest in use have about 60,000 bytes.
pub(super) const MAX_BYTES: usize = 512 << 10;
/// The most words and signs in one `{{ }}` or `{% %}`: each may be one level of recursion.
pub(super) const MAX_TOKENS: usize = 4096;
/// The most `elif` in a template, which nest as well.
pub(super) const MAX_ELIF: usize = 1024;

/// Checks the sizes, and turns `{% generation %}` and `{% endgeneration %}`, which mark the assistant's words for training,
/// into a condition that holds. Lines stay where they are.
pub(super) fn prepare(source: &str) -> Result<String> {
    if source.len() > MAX_BYTES {
        return Err(Error::TooLarge { what: "bytes", found: source.len(), limit: MAX_BYTES });
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut elif = 0;
    while let Some(open) = rest.find('{') {
        let end = match rest.as_bytes().get(open + 1) {
            Some(b'#') => rest[open..].find("#}").map_or(rest.len(), |n| open + n + 2),
            Some(sign @ (b'{' | b'%')) => {
                let (tokens, len) = tag(&rest[open + 2..], *sign == b'{');
                if tokens > MAX_TOKENS {
                    return Err(Error::TooLarge {
                        what: "words in one tag",
                        found: tokens,
                        limit: MAX_TOKENS,
                    });
                }
                open + 2 + len
            }
            _ => open + 1,
        };
        let (text, tag) = (&rest[..open], &rest[open..end]);
        out.push_str(text);
        match statement(tag) {
            Some("elif") => elif += 1,
            Some("generation") if words(tag) == 1 => out.push_str(&tag.replacen("generation", "if true", 1)),
            Some("endgeneration") if words(tag) == 1 => {
                out.push_str(&tag.replacen("endgeneration", "endif", 1))
            }
            _ => {}
        }
        if !matches!(statement(tag), Some("generation" | "endgeneration")) || words(tag) != 1 {
            out.push_str(tag);
        }
        rest = &rest[end..];
    }
    if elif > MAX_ELIF {
        return Err(Error::TooLarge { what: "elif", found: elif, limit: MAX_ELIF });
    }
    out.push_str(rest);
    Ok(out)
}

/// Counts the words and signs of a tag up to its end, and its bytes with the closing sign. Strings count as one word.
fn tag(text: &str, expression: bool) -> (usize, usize) {
    let close = if expression { "}}" } else { "%}" };
    let bytes = text.as_bytes();
    let (mut tokens, mut i) = (0, 0);
    let mut braces = 0usize;
    while i < bytes.len() {
        match bytes[i] {
            quote @ (b'"' | b'\'') => {
                tokens += 1;
                i += 1;
                while i < bytes.len() && bytes[i] != quote {
                    i += if bytes[i] == b'\\' { 2 } else { 1 };
                }
                i += 1;
            }
            _ if braces == 0 && text.get(i..).is_some_and(|t| t.starts_with(close)) => {
                return (tokens, i + 2);
            }
            b if b.is_ascii_whitespace() => i += 1,
            b if is_word(b) => {
                tokens += 1;
                i += bytes[i..].iter().take_while(|b| is_word(**b)).count();
            }
            sign => {
                tokens += 1;
                i += 1;
                match sign {
                    b'{' => braces += 1,
                    b'}' => braces = braces.saturating_sub(1),
                    _ => {}
                }
            }
        }
    }
    (tokens, text.len())
}

fn is_word(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b == b'_' || !b.is_ascii()
}

/// The first word of a `{% %}`.
fn statement(tag: &str) -> Option<&str> {
    let inner = tag.strip_prefix("{%")?.trim_start_matches(['-', '+']).trim_start();
    let len = inner.bytes().take_while(|b| is_word(*b)).count();
    inner.get(..len)
}

fn words(tag: &str) -> usize {
    tag.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_become_conditions_that_hold() {
        let text = "a\n{%- generation -%} x {%+ endgeneration %}{% generation_x %}{# {% generation %} #}{{ '{% generation %}' }}";
        let out = "a\n{%- if true -%} x {%+ endif %}{% generation_x %}{# {% generation %} #}{{ '{% generation %}' }}";
        assert_eq!(prepare(text).unwrap(), out);
    }

    #[test]
    fn everything_else_stays_as_it_is() {
        for text in [
            "",
            "{",
            "{{",
            "{% if",
            "{# open",
            "{{ {'a': {'b': 1}} }}{% set x = '%}' %}",
            "{{ \"it's\" }}{{ 'a\\'}}b' }}",
            "{é{ {%é%}",
            "{{ 'open }}",
            "{{ 'open\\",
        ] {
            assert_eq!(prepare(text).unwrap(), text);
        }
    }

    #[test]
    fn parts_that_are_too_large_are_errors() {
        let limit = |text: &str| prepare(text).unwrap_err().to_string();
        assert!(limit(&" ".repeat(MAX_BYTES + 1)).contains("524289 bytes, at most 524288"));
        assert!(limit(&format!("{{{{ 1{} }}}}", "+1".repeat(MAX_TOKENS))).contains("words in one tag"));
        assert!(limit(&format!("{{% if 1{} %}}", "+1".repeat(MAX_TOKENS))).contains("words in one tag"));
        assert!(
            limit(&format!("{{% if 1 %}}{}{{% endif %}}", "{% elif 1 %}".repeat(MAX_ELIF + 1)))
                .contains("elif")
        );
        // A long text in quotes is one word.
        prepare(&format!("{{{{ '{}' }}}}", "a b ".repeat(9999))).unwrap();
        prepare(&"{{ 1 + 1 }}".repeat(9999)).unwrap();
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_scanned(text in r#"([{}%#'"\\a é-]|\{%|%\}|\{\{|\}\}|generation){0,60}"#) {
            let _ = prepare(&text);
        }
    }
}
