//! Files that are there whole or not at all.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::thread;

use isobath::durable::replace;
use tempfile::tempdir;

use crate::data::files;

#[test]
fn a_file_is_written_and_replaced_and_nothing_else_stays() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("file");
    fs::write(folder.path().join("plain"), "").unwrap(); // 0644 under the usual umask
    let mode = |name: &str| fs::metadata(folder.path().join(name)).unwrap().permissions().mode();
    for contents in ["first", "second, longer", ""] {
        replace(&path, contents.as_bytes()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), contents);
        assert_eq!(mode("file"), mode("plain"));
        assert_eq!(files(folder.path()), ["file", "plain"]);
    }
    let error = replace(&folder.path().join("missing/file"), b"contents").unwrap_err();
    let message = error.to_string();
    assert!(message.contains("missing") && message.contains("remedy: check the path"), "{message}");
    assert_eq!(error.exit_code(), 2);
}

/// As two processes that prepare shards into one folder write its tokenizer.
#[test]
fn several_writers_of_one_file_do_not_mix() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("file");
    let contents = ["a", "b", "c", "d"].map(|letter| letter.repeat(1 << 16));
    replace(&path, contents[0].as_bytes()).unwrap();
    thread::scope(|scope| {
        for mine in &contents {
            scope.spawn(|| {
                for _ in 0..50 {
                    replace(&path, mine.as_bytes()).unwrap();
                    let found = fs::read_to_string(&path).unwrap();
                    assert!(contents.contains(&found), "{} bytes of {}", found.len(), mine.len());
                }
            });
        }
    });
    assert_eq!(files(folder.path()), ["file"]);
}
