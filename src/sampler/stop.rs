//! Texts at which an answer ends.

/// Looks for stop strings in text that comes in pieces, and holds back only what may still become one.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// The end of the text so far, as long as a stop string may begin in it.
    held: String,
    /// The stop string that was found.
    found: Option<String>,
}

impl StopMatcher {
    /// A matcher for `stops`; empty strings among them are left out.
    #[must_use]
    pub fn new(stops: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let stops = stops.into_iter().map(Into::into).filter(|s| !s.is_empty()).collect();
        Self { stops, held: String::new(), found: None }
    }

    /// Takes more text and returns what is certain to come before any stop string. Nothing comes after a stop string.
    pub fn push(&mut self, text: &str) -> String {
        if self.found.is_some() {
            return String::new();
        }
        self.held.push_str(text);
        // The first one to begin; of those that begin together the longest that is complete.
        let first = self.stops.iter().filter_map(|s| Some((self.held.find(s.as_str())?, s)));
        let first = first.min_by_key(|(at, s)| (*at, std::cmp::Reverse(s.len())));
        let open = self.held.char_indices().map(|(at, _)| at).find(|at| {
            let end = &self.held[*at..];
            self.stops.iter().any(|s| s.len() > end.len() && s.starts_with(end))
        });
        match (first, open) {
            // A longer stop string may still begin before this one.
            (Some((at, _)), Some(open)) if open < at => self.held.drain(..open).collect(),
            (Some((at, stop)), _) => {
                self.found = Some(stop.clone());
                self.held.truncate(at);
                std::mem::take(&mut self.held)
            }
            (None, open) => self.held.drain(..open.unwrap_or(self.held.len())).collect(),
        }
    }

    /// Ends the text and returns what was held back, which became no stop string, or what comes before one that is complete.
    pub fn finish(&mut self) -> String {
        let first = self.stops.iter().filter_map(|s| Some((self.held.find(s.as_str())?, s)));
        if let Some((at, stop)) = first.min_by_key(|(at, s)| (*at, std::cmp::Reverse(s.len()))) {
            self.found = Some(stop.clone());
            self.held.truncate(at);
        }
        std::mem::take(&mut self.held)
    }

    /// The stop string that ended the text.
    #[must_use]
    pub fn found(&self) -> Option<&str> {
        self.found.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn holds_back_no_more_than_it_must() {
        let mut m = StopMatcher::new(["</end>", "\n\n", ""]);
        assert_eq!(m.push("a<"), "a");
        assert_eq!(m.push("b\n"), "<b");
        assert_eq!(m.push("c</en"), "\nc");
        assert_eq!(m.push("x"), "</enx");
        assert_eq!(m.push("y\n\nz"), "y");
        assert_eq!((m.push("more"), m.finish(), m.found()), (String::new(), String::new(), Some("\n\n")));
        let mut m = StopMatcher::new(["abc"]);
        assert_eq!((m.push("xab"), m.finish(), m.found()), ("x".into(), "ab".into(), None));
        let mut m = StopMatcher::new(Vec::<String>::new());
        assert_eq!((m.push("abc"), m.finish()), ("abc".into(), String::new()));
    }

    #[test]
    fn earlier_beginning_wins_even_when_it_ends_later() {
        let mut m = StopMatcher::new(["bc", "abcd"]);
        assert_eq!((m.push("xabc"), m.found()), ("x".into(), None));
        assert_eq!((m.push("d"), m.found()), (String::new(), Some("abcd")));
        let mut m = StopMatcher::new(["bc", "abcd"]);
        assert_eq!((m.push("xabce"), m.found()), ("xa".into(), Some("bc")));
        let mut m = StopMatcher::new(["bc", "abcd"]);
        assert_eq!((m.push("xabc"), m.finish(), m.found()), ("x".into(), "a".into(), Some("bc")));
        // Characters of several bytes are never cut.
        let mut m = StopMatcher::new(["é!"]);
        assert_eq!((m.push("aé"), m.push("è")), ("a".into(), "éè".into()));
    }

    proptest! {
        #[test]
        fn equals_a_search_in_the_whole(
            stops in proptest::collection::vec("[abé]{1,4}", 0..4),
            pieces in proptest::collection::vec("[abcé]{0,5}", 0..12),
        ) {
            let whole = pieces.concat();
            // The stop string that begins first, the longest of those that begin there, ends the text. In a stream a longer one
            // that begins at the same place is not waited for, so the text before it is what counts.
            let at = stops.iter().filter_map(|s| whole.find(s.as_str())).min();
            let mut m = StopMatcher::new(stops);
            let mut text: String = pieces.iter().map(|p| m.push(p)).collect();
            text += &m.finish();
            prop_assert_eq!(&text, &whole[..at.unwrap_or(whole.len())]);
            prop_assert_eq!(m.found().is_some(), at.is_some());
        }
    }
}
