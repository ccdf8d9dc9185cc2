//! What the package installs is complete and sound, as far as that can be said without installing it: `tests/guest/systemd.sh`
//! does that in a guest with a real systemd.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use bitnetd_proto::exit_code::ExitCode;

const UNITS: [&str; 4] = ["bitnetd.service", "bitnetd.socket", "bitnetd@.service", "bitnetd@.socket"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn unit(name: &str) -> String {
    fs::read_to_string(root().join("systemd").join(name)).unwrap()
}

fn settings(text: &str) -> Vec<&str> {
    text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

#[test]
fn each_kind_of_unit_differs_from_its_template_in_the_name_only() {
    let cases = [("bitnetd.service", "bitnetd@.service"), ("bitnetd.socket", "bitnetd@.socket")];
    for (one, template) in cases {
        let expected: Vec<String> = settings(&unit(one))
            .into_iter()
            .map(|line| match line.split_once('=') {
                Some(("Description", what)) => format!("Description={what} (%i)"),
                Some((key @ ("StateDirectory" | "CacheDirectory"), name)) => format!("{key}={name}/%i"),
                _ => line
                    .replace("=bitnetd.socket", "=bitnetd@%i.socket")
                    .replace("bitnetd/bitnetd.toml", "bitnetd/%i.toml")
                    .replace("bitnetd/bitnetd.sock", "bitnetd/%i.sock"),
            })
            .collect();
        assert_eq!(settings(&unit(template)), expected, "{template}");
    }
}

#[test]
fn every_restriction_is_explained() {
    let page = fs::read_to_string(root().join("docs/systemd.md")).unwrap();
    for name in ["bitnetd.service", "bitnetd@.service"] {
        let text = unit(name);
        // One figure, and each point that is left has its line: `tests/guest/systemd.sh` asks the real one.
        let exposure = text.split_once("`systemd-analyze security bitnetd` says ").unwrap().1;
        let exposure = exposure.split_once(". ---").unwrap().0;
        assert!(page.contains(&format!("`systemd-analyze security bitnetd` says {exposure} ")), "{exposure}");
        let (_, confinement) = text.split_once("# --- What it may do").unwrap();
        // Runs of settings, each right after a comment that is about all of them.
        let mut n_in_run = None;
        for line in confinement.lines().skip(1).take_while(|line| !line.starts_with("[Install]")) {
            n_in_run = match (line, n_in_run) {
                (line, _) if line.starts_with('#') => Some(0),
                ("", _) => None,
                (_, Some(n)) if n < 7 => Some(n + 1),
                _ => panic!("{name}: `{line}` has no comment of its own"),
            };
        }
        assert!(settings(confinement).len() > 30, "{name}");
    }
}

#[test]
fn exit_codes_that_another_try_cannot_mend_are_those_of_the_program() {
    let unit = unit("bitnetd.service");
    let codes = unit.lines().find_map(|line| line.strip_prefix("RestartPreventExitStatus=")).unwrap();
    let permanent: Vec<String> = ExitCode::ALL
        .into_iter()
        .filter(|code| code.is_permanent())
        .map(|code| (code as u8).to_string())
        .collect();
    assert_eq!(codes.split_whitespace().collect::<Vec<_>>(), permanent);
}

/// A root file system with the units and what they start.
fn with_units() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let units = folder.path().join("etc/systemd/system");
    fs::create_dir_all(&units).unwrap();
    for name in UNITS {
        fs::write(units.join(name), unit(name)).unwrap();
    }
    // The template with the drop-in for TCP, the other without.
    fs::create_dir(units.join("bitnetd@.service.d")).unwrap();
    fs::write(units.join("bitnetd@.service.d/tcp.conf"), unit("tcp.conf")).unwrap();
    let system = Path::new("/usr/lib/systemd/system");
    let ours = folder.path().join("usr/lib/systemd/system");
    fs::create_dir_all(&ours).unwrap();
    for entry in fs::read_dir(system).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|kind| kind == "target") {
            fs::copy(entry.path(), ours.join(entry.file_name())).unwrap();
        }
    }
    let program = folder.path().join("usr/bin/bitnetd");
    fs::create_dir_all(program.parent().unwrap()).unwrap();
    fs::write(&program, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

/// What `systemd-analyze` says, if it is installed.
fn analyze(args: &[&str]) -> Option<(bool, String)> {
    let program = Path::new("/usr/bin/systemd-analyze");
    if !program.exists() {
        return None; // Not everybody has it; the guest does.
    }
    let output = Command::new(program).args(args).output().unwrap();
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    Some((output.status.success(), text))
}

#[test]
fn systemd_finds_no_fault_with_the_units() {
    let folder = with_units();
    let at = format!("--root={}", folder.path().display());
    let names = ["bitnetd.service", "bitnetd@x.service", "bitnetd.socket", "bitnetd@x.socket"];
    let args = [&[at.as_str(), "--man=no", "verify"], names.as_slice()].concat();
    if let Some((is_ok, text)) = analyze(&args) {
        let ours: Vec<&str> = text.lines().filter(|line| line.contains("bitnetd")).collect();
        assert!(is_ok && ours.is_empty(), "{text}");
    }
}

#[test]
fn exposure_is_two_at_most() {
    let folder = with_units();
    let at = format!("--root={}", folder.path().display());
    for name in ["bitnetd.service", "bitnetd@x.service"] {
        // The threshold is in tenths.
        let args = [at.as_str(), "security", "--offline=true", "--threshold=20", "--no-pager", name];
        if let Some((is_ok, text)) = analyze(&args) {
            assert!(is_ok && text.contains("Overall exposure level"), "{name}: {text}");
        }
    }
}

#[test]
fn every_file_of_the_package_exists_or_is_made_by_its_script() {
    let manifest: toml::Table = fs::read_to_string(root().join("cli/Cargo.toml")).unwrap().parse().unwrap();
    let deb = &manifest["package"]["metadata"]["deb"];
    let script = fs::read_to_string(root().join("packaging/deb.sh")).unwrap();
    let mut targets = Vec::new();
    for asset in deb["assets"].as_array().unwrap() {
        let source = asset[0].as_str().unwrap();
        targets.push(asset[1].as_str().unwrap().to_owned());
        if let Some(made) = source.strip_prefix("../target/").or(source.strip_prefix("target/")) {
            let made = made.trim_end_matches("/*.1");
            assert!(script.contains(&format!("target/{made}")), "{source} is not made by packaging/deb.sh");
        } else {
            let path = root().join("cli").join(source.trim_end_matches("*.md"));
            assert!(path.exists(), "{source}");
        }
    }
    for name in UNITS {
        let is_installed =
            deb["assets"].as_array().unwrap().iter().any(|asset| asset[0].as_str().unwrap().ends_with(name));
        assert!(is_installed, "{name} is not installed");
    }
    for file in deb["conf-files"].as_array().unwrap() {
        let file = file.as_str().unwrap().trim_start_matches('/');
        assert!(targets.iter().any(|target| target == file), "{file}");
    }
}

#[test]
fn the_scripts_are_shell() {
    let mut scripts: Vec<PathBuf> =
        ["postinst", "prerm", "postrm"].map(|name| root().join("packaging/debian").join(name)).into();
    scripts.extend(["deb.sh", "reproduce.sh"].map(|name| root().join("packaging").join(name)));
    for script in scripts {
        let text = fs::read_to_string(&script).unwrap();
        let shell = if text.starts_with("#!/bin/sh\n") { "sh" } else { "bash" };
        let status = Command::new(shell).arg("-n").arg(&script).status().unwrap();
        assert!(status.success(), "{}", script.display());
        assert!(text.contains("\nset -e"), "{}: a failed step would go unseen", script.display());
        let mode = fs::metadata(&script).unwrap().permissions().mode();
        assert_eq!(mode & 0o111, 0o111, "{} is not executable", script.display());
    }
}

#[test]
fn each_command_has_its_page() {
    let folder = tempfile::tempdir().unwrap();
    let bitnetd = env!("CARGO_BIN_EXE_bitnetd");
    assert!(Command::new(bitnetd).arg("man").arg(folder.path()).status().unwrap().success());
    let help = Command::new(bitnetd).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let commands =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // A line with more blanks goes on with the one before.
    let names = commands.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    let names: Vec<&str> = names.filter(|name| !name.is_empty()).collect();
    assert!(names.contains(&"serve") && names.len() > 8, "{names:?}");
    for name in names.into_iter().filter(|name| *name != "help") {
        let page = folder.path().join(format!("bitnetd-{name}.1"));
        assert!(fs::read_to_string(&page).unwrap().contains(".SH NAME"), "{}", page.display());
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = Command::new(bitnetd).args(["completions", shell]).output().unwrap();
        assert!(script.status.success() && script.stdout.len() > 1000, "{shell}");
    }
}
