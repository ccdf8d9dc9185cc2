//! `bitnetd bench`: every rate is there beside its bound. How fast it is, no test decides.

use std::fs;

use crate::support::Folder;

#[test]
fn rates_stand_beside_their_bounds_as_json_and_as_a_picture() {
    let folder = Folder::new();
    let report = folder.run("bench --quick -t 1,2 --sequences 1,3 -q --json --plot %/rates.svg").json();
    let rates = |kind: &str| report[kind].as_array().unwrap().clone();
    let keys = |kind: &str| {
        rates(kind)
            .iter()
            .map(|rate| (rate["threads"].as_u64(), rate["sequences"].as_u64()))
            .collect::<Vec<_>>()
    };
    assert_eq!(keys("prefill"), [(Some(1), Some(1)), (Some(2), Some(1))]);
    assert_eq!(keys("decode"), [(1, 1), (1, 3), (2, 1), (2, 3)].map(|(t, n)| (Some(t), Some(n))));
    for rate in rates("prefill").iter().chain(&rates("decode")) {
        let number =
            |key: &str| rate[key].as_f64().filter(|x| *x > 0.0).unwrap_or_else(|| panic!("{key} in {rate}"));
        let share = number("tokens_per_s") / number("bound_tokens_per_s");
        assert!((share - number("share_of_bound")).abs() < 1e-9, "{rate}");
    }
    for bounds in rates("bounds") {
        assert!(bounds["read_bytes_per_s"].as_f64().unwrap() > 1e6, "{bounds}");
        assert!(bounds["macs_per_s"].as_f64().unwrap() > 1e6, "{bounds}");
        assert!(bounds["moved"].as_f64().unwrap() >= 0.0, "{bounds}");
    }
    // The story model: 2-bit weights and an F16 head.
    assert!(
        report["step_bytes"].as_u64().unwrap() > 2_000_000
            && report["token_macs"].as_u64().unwrap() > 1_000_000
    );
    let picture = fs::read_to_string(folder.path("rates.svg")).unwrap();
    assert!(picture.starts_with("<svg") && picture.contains("2 threads, bound"));
}

#[test]
fn the_table_has_a_line_for_each_rate() {
    let folder = Folder::new();
    let table = folder.run("bench --quick -t 1 --sequences 2 -q").ok();
    assert!(
        table.contains("int8 GMAC/s") && table.contains("Reading a prompt of 128 tokens (once)"),
        "{table}"
    );
    assert_eq!(table.lines().filter(|line| line.contains(" %  ")).count(), 2, "{table}");
    let finished = folder.run("bench --quick -t 1 --plot rates.pdf");
    assert_eq!(finished.code, Some(64), "{finished:?}");
    assert!(finished.stderr.contains("a picture is .svg or .png"), "{finished:?}");
}
