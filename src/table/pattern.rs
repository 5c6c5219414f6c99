//! Path patterns: '{split}/{label}/*', 'split={split}/**/*.jpg'.
//!
//! A pattern is matched against an object's path relative to the table's location, segment by
//! segment. `{name}` stands for one or more characters of a segment and is a column, `*` for any
//! number of them, and `**` alone for any number of segments.

use std::collections::BTreeMap;
use std::str::FromStr;

use datafusion::common::plan_err;
use datafusion::error::{DataFusionError, Result};

/// More sub-prefixes than these are not listed one by one.
const MAX_PREFIXES: usize = 64;

/// A path pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PathPattern {
    segments: Vec<Segment>,
    columns: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    /// `**`
    Folders,
    /// Anything else: literals, and between each two of them a wildcard.
    Name(Vec<Piece>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Literal(String),
    /// `*`
    Any,
    /// `{name}`: the number of its column.
    Column(usize),
}

impl FromStr for PathPattern {
    type Err = DataFusionError;

    fn from_str(text: &str) -> Result<Self> {
        let mut columns = vec![];
        let segments = text
            .split('/')
            .map(|segment| match segment {
                "" => plan_err!("images.path_pattern '{text}' has an empty segment"),
                "**" => Ok(Segment::Folders),
                _ => parse_segment(text, segment, &mut columns).map(Segment::Name),
            })
            .collect::<Result<_>>()?;
        Ok(Self { segments, columns })
    }
}

fn parse_segment(text: &str, segment: &str, columns: &mut Vec<String>) -> Result<Vec<Piece>> {
    let mut pieces: Vec<Piece> = vec![];
    let mut rest = segment;
    while !rest.is_empty() {
        let piece;
        if let Some(after) = rest.strip_prefix('*') {
            (piece, rest) = (Piece::Any, after);
        } else if let Some(after) = rest.strip_prefix('{') {
            let Some((name, after)) = after.split_once('}') else {
                return plan_err!("images.path_pattern '{text}' has a {{ without }}");
            };
            let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
                && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
            if !is_name {
                return plan_err!(
                    "images.path_pattern '{text}': '{name}' is no column name (letters, digits and _, no digit first)"
                );
            }
            if ["path", "content", "size", "last_modified", "e_tag"].contains(&name) {
                return plan_err!(
                    "images.path_pattern '{text}': {name} is a column of every image table; use another name"
                );
            }
            if columns.iter().any(|column| column == name) {
                return plan_err!("images.path_pattern '{text}' has {{{name}}} twice");
            }
            columns.push(name.to_owned());
            (piece, rest) = (Piece::Column(columns.len() - 1), after);
        } else {
            let (literal, after) = rest.split_at(rest.find(['*', '{']).unwrap_or(rest.len()));
            if literal.contains('}') {
                return plan_err!("images.path_pattern '{text}' has a }} without {{");
            }
            (piece, rest) = (Piece::Literal(literal.to_owned()), after);
        }
        let wild = |piece: &Piece| !matches!(piece, Piece::Literal(_));
        if wild(&piece) && pieces.last().is_some_and(wild) {
            return plan_err!("images.path_pattern '{text}': put something between two wildcards of '{segment}'");
        }
        pieces.push(piece);
    }
    Ok(pieces)
}

impl PathPattern {
    /// The columns, in the order in which they appear.
    pub(crate) fn columns(&self) -> &[String] {
        &self.columns
    }

    /// Can only an object that lies in a folder of the location match?
    pub(crate) fn needs_folders(&self) -> bool {
        self.segments
            .iter()
            .filter(|segment| matches!(segment, Segment::Name(_)))
            .count()
            > 1
    }

    /// The values of the columns, if `relative` matches. A wildcard stands for as little as it can.
    pub(crate) fn matches<'a>(&self, relative: &'a str) -> Option<Vec<&'a str>> {
        let names: Vec<&str> = relative.split('/').collect();
        let mut values = vec![""; self.columns.len()];
        let (mut segment, mut name) = (0, 0);
        // Where to go on if what follows the last `**` does not match: it swallows one more name.
        // Earlier ones need no second try, as with `*` in a name.
        let mut retry: Option<(usize, usize)> = None;
        while let Some(&text) = names.get(name) {
            match self.segments.get(segment) {
                Some(Segment::Folders) => {
                    segment += 1;
                    retry = Some((segment, name));
                }
                Some(Segment::Name(pieces)) if match_name(pieces, text, &mut values) => {
                    segment += 1;
                    name += 1;
                }
                _ => {
                    let (after, swallowed) = retry?;
                    retry = Some((after, swallowed + 1));
                    (segment, name) = (after, swallowed + 1);
                }
            }
        }
        let rest = self.segments.get(segment..).unwrap_or_default();
        rest.iter()
            .all(|segment| *segment == Segment::Folders)
            .then_some(values)
    }

    /// The folders, relative to the location, that hold every object that matches when the columns
    /// have one of these values. One empty path is the location itself; no path at all says that
    /// nothing can match.
    pub(crate) fn prefixes(&self, known: &BTreeMap<String, Vec<String>>) -> Vec<String> {
        let mut prefixes = vec![String::new()];
        // The last segment is the object's name.
        let folders = self.segments.split_last().map_or(&[][..], |(_, folders)| folders);
        for segment in folders {
            let Segment::Name(pieces) = segment else { break };
            let Some(names) = self.names(pieces, known) else { break };
            if prefixes.len().saturating_mul(names.len()) > MAX_PREFIXES {
                break;
            }
            prefixes = prefixes
                .iter()
                .flat_map(|prefix| names.iter().map(move |name| format!("{prefix}{name}/")))
                .collect();
        }
        prefixes
    }

    /// Every name that a segment can match; `None` where that is not known.
    fn names(&self, pieces: &[Piece], known: &BTreeMap<String, Vec<String>>) -> Option<Vec<String>> {
        let mut names = vec![String::new()];
        for piece in pieces {
            let values: Vec<&str> = match piece {
                Piece::Any => return None,
                Piece::Literal(literal) => vec![literal.as_str()],
                Piece::Column(column) => known
                    .get(self.columns.get(*column)?)?
                    .iter()
                    .map(String::as_str)
                    .filter(|value| !value.is_empty() && !value.contains('/'))
                    .collect(),
            };
            if names.len().saturating_mul(values.len()) > MAX_PREFIXES {
                return None;
            }
            names = names
                .iter()
                .flat_map(|name| values.iter().map(move |value| format!("{name}{value}")))
                .collect();
        }
        Some(names)
    }
}

/// Matches one name in linear time, as a glob: the first occurrence of each literal is the right
/// one, but for the last, which must end the name.
fn match_name<'a>(pieces: &[Piece], name: &'a str, values: &mut [&'a str]) -> bool {
    let mut rest = name;
    let mut pieces = pieces.iter().peekable();
    while let Some(piece) = pieces.next() {
        let column = match piece {
            Piece::Literal(literal) => match rest.strip_prefix(literal.as_str()) {
                Some(after) => {
                    rest = after;
                    continue;
                }
                None => return false,
            },
            Piece::Any => None,
            Piece::Column(column) => Some(*column),
        };
        // A column has at least one character.
        let least = column.and(rest.chars().next()).map_or(0, char::len_utf8);
        let end = match pieces.next() {
            Some(Piece::Literal(literal)) if pieces.peek().is_none() => rest
                .strip_suffix(literal.as_str())
                .map(|value| (value.len(), rest.len())),
            Some(Piece::Literal(literal)) => rest
                .get(least..)
                .and_then(|searched| searched.find(literal.as_str()))
                .map(|at| (least + at, least + at + literal.len())),
            _ => Some((rest.len(), rest.len())),
        };
        let Some((value, after)) = end.and_then(|(end, after)| rest.get(..end).zip(rest.get(after..))) else {
            return false;
        };
        if let Some(column) = column {
            match values.get_mut(column) {
                Some(slot) if !value.is_empty() => *slot = value,
                _ => return false,
            }
        }
        rest = after;
    }
    rest.is_empty()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn pattern(text: &str) -> PathPattern {
        text.parse().unwrap()
    }

    #[test]
    fn patterns_capture() {
        for (text, path, values) in [
            (
                "{split}/{label}/*",
                "Training/Kiwi/1.jpg",
                Some(vec!["Training", "Kiwi"]),
            ),
            ("{split}/{label}/*", "Training/Kiwi/a/1.jpg", None),
            ("{split}/{label}/*", "Kiwi/1.jpg", None),
            (
                "split={split}/label={label}/*",
                "split=Test/label=Granny Smith/1.jpg",
                Some(vec!["Test", "Granny Smith"]),
            ),
            ("split={split}/*", "split=/1.jpg", None),
            ("*.jpg", "1.jpg", Some(vec![])),
            ("*.jpg", "1.jpg.png", None),
            ("{fruit}_{n}.jpg", "a_b_7.jpg", Some(vec!["a", "b_7"])),
            ("{fruit}_{n}.jpg", "_7.jpg", None),
            ("é{x}é", "éééé", Some(vec!["éé"])),
            ("a*a", "a", None),
            ("**", "a/b/c.jpg", Some(vec![])),
            ("**/{label}/*", "a/b/Kiwi/1.jpg", Some(vec!["Kiwi"])),
            ("**/{label}/*", "Kiwi/1.jpg", Some(vec!["Kiwi"])),
            ("**/x/{y}/**/*.jpg", "x/q/x/r/s/1.jpg", Some(vec!["q"])),
            ("**/x/**/z.jpg", "x/a/b/y.jpg", None),
            ("{x}/**", "a/b", Some(vec!["a"])),
        ] {
            assert_eq!(pattern(text).matches(path), values, "{text} on {path}");
        }
    }

    #[test]
    fn matching_takes_no_exponential_time() {
        let stars = "*a".repeat(500) + "b";
        assert_eq!(pattern(&stars).matches(&"a".repeat(10_000)), None);
        let folders = "**/a/".repeat(50) + "b";
        assert_eq!(pattern(&folders).matches(&"a/".repeat(2_000)), None);
    }

    #[test]
    fn known_values_narrow_leading_segments() {
        let known = |pairs: &[(&str, &[&str])]| -> BTreeMap<String, Vec<String>> {
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), v.iter().map(|v| (*v).to_owned()).collect()))
                .collect()
        };
        let both = pattern("{split}/label={label}/*");
        assert_eq!(both.prefixes(&known(&[])), [""]);
        assert_eq!(both.prefixes(&known(&[("label", &["a"])])), [""]);
        assert_eq!(both.prefixes(&known(&[("split", &["A", "B"])])), ["A/", "B/"]);
        let two = known(&[("split", &["A", "B"]), ("label", &["x", "y"])]);
        assert_eq!(
            both.prefixes(&two),
            ["A/label=x/", "A/label=y/", "B/label=x/", "B/label=y/"]
        );
        assert!(both.prefixes(&known(&[("split", &["a/b"])])).is_empty());
        assert_eq!(
            pattern("images/**/{label}/*").prefixes(&known(&[("label", &["a"])])),
            ["images/"]
        );
        assert_eq!(pattern("{name}.jpg").prefixes(&known(&[("name", &["a"])])), [""]);
    }

    #[test]
    fn wrong_patterns_are_refused() {
        for text in [
            "",
            "/a",
            "a//b",
            "{a",
            "a}",
            "{}",
            "{1a}",
            "{a}{b}",
            "{a}*",
            "{a}/{a}/*",
            "{path}/*",
            "***",
        ] {
            assert!(text.parse::<PathPattern>().is_err(), "{text}");
        }
    }
}
