//! What `deploy/` and `docs/cluster.md` tell the program to do, it knows: every option that stands there is one
//! of the command that it stands with.

#![cfg(feature = "cluster")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "every test binary takes the helpers that it needs")]
mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use common::{pomona, success};

/// The commands that have options of their own.
const COMMANDS: [&str; 4] = ["scheduler", "executor", "sample", "model"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The options that a command's help names, with the single letters.
fn options(command: Option<&str>) -> BTreeSet<String> {
    let help = match command {
        // `pomona model add`, the one that is used.
        Some("model") => success(pomona().args(["model", "add", "--help"])),
        Some(command) => success(pomona().args([command, "--help"])),
        None => success(pomona().arg("--help")),
    };
    let words = help.split(|c: char| c.is_whitespace() || "[],=<>".contains(c));
    words.filter(|word| word.starts_with('-')).map(str::to_owned).collect()
}

/// Checks one command line, without the program's name.
fn check(place: &Path, arguments: &[String]) {
    let command = COMMANDS
        .iter()
        .find(|command| arguments.iter().any(|argument| argument == *command));
    let known = options(command.copied());
    for argument in arguments
        .iter()
        .filter(|argument| argument.len() > 1 && argument.starts_with('-'))
    {
        let name = argument.split('=').next().unwrap();
        assert!(
            known.contains(name),
            "{}: `pomona {}` has no {name}",
            place.display(),
            command.unwrap_or(&"")
        );
    }
}

/// The files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] })
        .collect()
}

/// The lists of arguments in a YAML file: what stands below `args:` or `command:`, one item a line, or beside it
/// in brackets; and the items that a patch adds to one.
fn arguments(yaml: &str) -> Vec<Vec<String>> {
    let mut lists = vec![];
    let mut current: Option<(usize, Vec<String>)> = None;
    for line in yaml.lines().filter(|line| !line.trim_start().starts_with('#')) {
        let text = line.trim_start();
        let indent = line.len() - text.len();
        if let Some((start, items)) = &mut current {
            match text.strip_prefix("- ") {
                Some(item) if indent >= *start => {
                    items.push(item.split(" #").next().unwrap().trim().to_owned());
                    continue;
                }
                _ => lists.extend(current.take().map(|(_, items)| items)),
            }
        }
        let list = ["args:", "command:", "entrypoint:"]
            .into_iter()
            .find_map(|key| text.strip_prefix(key));
        match list.map(str::trim) {
            Some("") => current = Some((indent, vec![])),
            Some(inline) => {
                let items = inline.trim_matches(['[', ']']).split(',');
                lists.push(items.map(|item| item.trim().trim_matches('"').to_owned()).collect());
            }
            None => {}
        }
    }
    lists.extend(current.map(|(_, items)| items));
    lists
}

#[test]
fn the_manifests_use_options_that_there_are() {
    let mut checked = BTreeSet::new();
    for file in files(&root().join("deploy")) {
        let text = fs::read_to_string(&file).unwrap();
        for list in arguments(&text) {
            // Of other programs: the store, and what asks a container for its health.
            if !list.iter().any(|item| item.starts_with("--")) || list.first().is_some_and(|first| first == "mc") {
                continue;
            }
            checked.extend(list.first().cloned());
            check(&file, &list);
        }
    }
    for command in ["scheduler", "executor"] {
        assert!(
            checked.contains(command),
            "no arguments of {command} were found: {checked:?}"
        );
    }
}

#[test]
fn patches_add_options_that_there_are() {
    let known = [Some("scheduler"), Some("executor")].map(options);
    let mut found = 0;
    for file in files(&root().join("deploy/kubernetes")) {
        let text = fs::read_to_string(&file).unwrap();
        let values = text.split("value: --").skip(1);
        for name in values.map(|rest| rest.split(['=', ' ']).next().unwrap()) {
            found += 1;
            let option = format!("--{name}");
            assert!(
                known.iter().any(|known| known.contains(&option)),
                "{}: no role has {option}",
                file.display()
            );
        }
    }
    assert!(found >= 6, "{found}");
}

#[test]
fn the_guide_uses_options_that_there_are() {
    let place = PathBuf::from("docs/cluster.md");
    let text = fs::read_to_string(root().join(&place)).unwrap();
    // Code blocks of the shell; a line that ends in \ goes on.
    let blocks = text
        .split("```sh\n")
        .skip(1)
        .map(|block| block.split("```").next().unwrap());
    let mut checked = 0;
    for block in blocks {
        for line in block.replace("\\\n", " ").lines() {
            // Quoted SQL is no option; what follows a `#` is for people.
            let unquoted: String = line.split(['"', '\'']).step_by(2).collect();
            let words = unquoted.split('#').next().unwrap().split_whitespace();
            let Some(program) = words.clone().position(|word| word == "pomona") else {
                continue;
            };
            let line: Vec<_> = words
                .skip(program + 1)
                .take_while(|word| !["&", "|", ">"].contains(word))
                .map(str::to_owned)
                .collect();
            // `kubectl -n pomona …`, `docker build -t pomona .` and the like.
            if unquoted.trim_start().starts_with("kubectl") || unquoted.trim_start().starts_with("docker") {
                continue;
            }
            checked += 1;
            check(&place, &line);
        }
    }
    assert!(checked >= 8, "{checked}");
}
