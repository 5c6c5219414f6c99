//! Queries at random, of joins, groups, windows, orders, limits and sets, nested in each other: the same ones for the
//! same seed. They find what nobody thinks of.

/// Tables and queries with the columns `i`, `label` and `x`. Limits are behind whole orders: so are the rows.
const TABLES: [&str; 14] = [
    "nums",
    "bigs",
    "tinies",
    "smalls",
    "nothing",
    "singles",
    "pics",
    "(SELECT i, label, x FROM nums ORDER BY i, label, x LIMIT 17)",
    "(SELECT label, count(*) AS i, sum(x) AS x FROM nums GROUP BY label)",
    "(SELECT DISTINCT label, i % 5 AS i, x % 3 AS x FROM bigs)",
    "(SELECT i, label, row_number() OVER (PARTITION BY label ORDER BY i, x) AS x FROM bigs)",
    "(SELECT i, label, x FROM smalls UNION ALL SELECT i, label, x FROM tinies)",
    "(SELECT i, label, x FROM nums LIMIT 0)",
    "(SELECT i, label, x FROM pics ORDER BY i, label, x LIMIT 9)",
];

/// A sequence of queries.
pub(crate) struct Queries(u64);

impl Queries {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `bound`. (Steele, Lea, Flood 2014: SplitMix.)
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }

    fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len())]
    }

    fn table(&mut self) -> &'static str {
        self.one(&TABLES)
    }

    /// The columns in another order.
    fn shuffled(&mut self, columns: &[&'static str]) -> Vec<&'static str> {
        let mut columns = columns.to_vec();
        for last in (1..columns.len()).rev() {
            columns.swap(last, self.below(last + 1));
        }
        columns
    }

    fn condition(&mut self) -> String {
        let (number, table) = (self.below(30), self.table());
        match self.below(9) {
            0 => format!("a.i > {number}"),
            1 => format!("a.x % 3 = {}", number % 3),
            2 => format!("a.label = '{}'", self.one(&["Apple", "Kiwi", "Pear"])),
            3 => format!("a.i IN (SELECT i FROM {table} q WHERE q.x < {number})"),
            4 => format!("a.label NOT IN (SELECT label FROM {table} q WHERE q.label IS NOT NULL)"),
            5 => format!("EXISTS (SELECT 1 FROM {table} q WHERE q.label = a.label AND q.x > {number})"),
            6 => format!("NOT EXISTS (SELECT 1 FROM {table} q WHERE q.i = a.i)"),
            7 => format!("a.x > (SELECT avg(x) FROM {table} q)"),
            _ => format!("a.x NOT IN (SELECT x FROM {table} q)"),
        }
    }

    /// What is read, and its columns.
    fn source(&mut self) -> (String, Vec<&'static str>) {
        let (left, right) = (self.table(), self.table());
        let (mine, both) = (
            vec!["a.i", "a.label", "a.x"],
            vec!["a.i", "a.label", "a.x", "b.i", "b.label", "b.x"],
        );
        if self.once_in(3) {
            return (format!("{left} a"), mine);
        }
        if self.once_in(8) {
            let right = self.one(&["smalls", "tinies", "nothing"]);
            return (format!("{left} a CROSS JOIN {right} b"), both);
        }
        let kind = self.one(&[
            "JOIN",
            "LEFT JOIN",
            "RIGHT JOIN",
            "FULL JOIN",
            "LEFT SEMI JOIN",
            "LEFT ANTI JOIN",
        ]);
        let equal = [
            "a.i = b.i",
            "a.label = b.label",
            "a.label = b.label AND a.x < b.x",
            "a.i = b.i AND a.x > 3",
        ];
        let on = match kind != "FULL JOIN" && self.once_in(4) {
            true => self.one(&["a.i > b.i + 15", "a.x < b.x - 30"]),
            false => self.one(&equal),
        };
        let columns = if kind.starts_with("LEFT SEMI") || kind.starts_with("LEFT ANTI") {
            mine
        } else {
            both
        };
        (format!("{left} a {kind} {right} b ON {on}"), columns)
    }

    fn limit(&mut self) -> String {
        match self.below(3) {
            0 => String::new(),
            1 => format!(" LIMIT {}", 1 + self.below(20)),
            _ => format!(" LIMIT {} OFFSET {}", 1 + self.below(20), self.below(5)),
        }
    }

    /// A query whose rows are the same wherever it runs, and in the same order if it ends with one.
    pub(crate) fn next(&mut self) -> String {
        if self.once_in(8) {
            let (left, right) = (self.table(), self.table());
            let set = self.one(&["UNION", "UNION ALL", "INTERSECT", "EXCEPT"]);
            let limit = self.limit();
            return format!(
                "SELECT i, label, x FROM {left} u {set} SELECT i, label, x FROM {right} v ORDER BY i, label, x{limit}"
            );
        }
        let (source, columns) = self.source();
        let filter = match self.once_in(2) {
            true => format!(" WHERE {}", self.condition()),
            false => String::new(),
        };
        let names: Vec<_> = columns
            .iter()
            .map(|column| format!("{column} AS {}", column.replace('.', "")))
            .collect();
        let (names, order) = (names.join(", "), self.shuffled(&columns).join(", "));
        let (first, last) = (self.one(&columns), columns[columns.len() - 1]);
        match self.below(3) {
            0 => {
                let direction = self.one(&["", " DESC", " NULLS FIRST"]);
                let limit = self.limit();
                format!("SELECT {names} FROM {source}{filter} ORDER BY {order}{direction}{limit}")
            }
            1 => {
                let computed = self.one(&[
                    "count(*) AS n",
                    "count(DISTINCT a.label) AS n, max(a.i) AS m",
                    "sum(a.x) AS s, min(a.label) AS m",
                    "array_agg(a.x ORDER BY a.x, a.i) AS l",
                    "count(*) FILTER (WHERE a.x > 5) AS n, count(DISTINCT a.i) AS d",
                    "last_value(a.x ORDER BY a.i, a.label, a.x) AS z",
                ]);
                match self.below(4) {
                    0 => format!("SELECT {computed} FROM {source}{filter}"),
                    1 if first != last => format!(
                        "SELECT {first} AS g, {last} AS h, {computed} FROM {source}{filter} GROUP BY ROLLUP ({first}, {last})"
                    ),
                    _ => {
                        let limit = self.limit();
                        format!(
                            "SELECT {first} AS g, {computed} FROM {source}{filter} GROUP BY {first} ORDER BY g{limit}"
                        )
                    }
                }
            }
            _ => {
                let parts = match self.once_in(2) {
                    true => format!("PARTITION BY {first} "),
                    false => String::new(),
                };
                let window = match self.below(5) {
                    0 => format!("row_number() OVER ({parts}ORDER BY {order})"),
                    1 => format!("sum({last}) OVER ({parts}ORDER BY {order} ROWS BETWEEN 2 PRECEDING AND CURRENT ROW)"),
                    2 => format!("rank() OVER ({parts}ORDER BY {last})"),
                    3 => format!("lag({last}) OVER ({parts}ORDER BY {order})"),
                    _ => format!("max({last}) OVER ({parts}ORDER BY {last} DESC)"),
                };
                match self.once_in(2) {
                    true => format!("SELECT {names}, {window} AS w FROM {source}{filter}"),
                    false => {
                        let limit = self.limit();
                        format!("SELECT {names}, {window} AS w FROM {source}{filter} ORDER BY {order}, w{limit}")
                    }
                }
            }
        }
    }
}
