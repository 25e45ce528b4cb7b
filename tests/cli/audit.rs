//! Tests `shardwise audit verify` on the logs of ranks with keys.

use crate::{
    launch::text,
    security::{Folder, fails, shardwise, works},
};
use serde_json::json;
use shardwise::{Result, launch::Env, security::audit};
use std::{fs, net::TcpListener, path::PathBuf, thread, time::Duration};

const RANKS: usize = 2;

/// A folder with keys, a signed list of them, and the logs of one start of a job.
fn audited() -> Folder {
    let folder = Folder::new();
    folder.key("owner");
    let member =
        |rank: usize| json!({ "rank": rank, "role": "trainer", "key": folder.key(&format!("rank{rank}")) });
    let members: Vec<_> = (0..RANKS).map(member).collect();
    let list = json!({ "version": 1, "job": "train-7", "epochs": [0, 9], "members": members });
    fs::write(folder.path("list.json"), list.to_string()).unwrap();
    works(&["membership", "sign", &folder.path("list.json"), "--key", &folder.path("owner.pem")]);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let rank = |rank: usize| -> Result<()> {
        let env = Env::of(|name| match name {
            "RANK" | "LOCAL_RANK" => Some(rank.to_string()),
            "WORLD_SIZE" | "LOCAL_WORLD_SIZE" => Some(RANKS.to_string()),
            "SHARDWISE_JOB" | "TORCHELASTIC_RUN_ID" => Some("train-7".into()),
            "SHARDWISE_PORT" => Some(port.to_string()),
            "SHARDWISE_KEY" => Some(folder.path(&format!("rank{rank}.pem"))),
            "SHARDWISE_MEMBERSHIP" => Some(folder.path("list.json")),
            "SHARDWISE_OWNER" => Some(folder.path("owner.pub")),
            "SHARDWISE_AUDIT_DIR" => Some(folder.path("audit")),
            _ => None,
        })?;
        env.run(Duration::from_secs(60), |_| audit::record(&audit::Event::new("data_set").number("rows", 7)))
    };
    thread::scope(|scope| {
        let rank = &rank;
        let ranks: Vec<_> = (0..RANKS).map(|number| scope.spawn(move || rank(number))).collect();
        ranks.into_iter().for_each(|rank| rank.join().unwrap().unwrap());
    });
    folder
}

fn log(folder: &Folder, rank: usize) -> PathBuf {
    folder.path(&format!("audit/train-7-rank{rank}.audit.jsonl")).into()
}

/// Verifies the folder with these further arguments. Returns the exit code and what is printed.
fn verify(folder: &Folder, arguments: &[&str]) -> (Option<i32>, String) {
    let output = shardwise(&[&["audit", "verify", &folder.path("audit")], arguments].concat());
    (output.status.code(), text(&output.stdout))
}

#[test]
fn the_exit_code_says_whether_logs_are_intact() {
    let folder = audited();
    let [list, owner] = ["list.json", "owner.pub"].map(|name| folder.path(name));
    let keys = ["--membership", &*list, "--owner", &*owner];
    let (code, report) = verify(&folder, &keys);
    assert_eq!(code, Some(0), "{report}");
    let lines: Vec<_> = report.lines().collect();
    assert_eq!(lines.len(), 3, "{report}");
    for (rank, line) in lines[..2].iter().enumerate() {
        let counts = "starts 1, lines 6, witnessed by other ranks 5, signatures verified 3, ";
        assert!(line.starts_with(&format!("job train-7, rank {rank}: {counts}")), "{report}");
    }
    assert_eq!(lines[2], "intact");
    // Without the list signatures are not verified, and the report says so.
    let (code, report) = verify(&folder, &[]);
    assert!(code == Some(0) && report.contains("3 signatures were not verified"), "{report}");

    let whole = fs::read_to_string(log(&folder, 1)).unwrap();
    let place = |line: usize| format!("{}:{line}: ", log(&folder, 1).display());
    fs::write(log(&folder, 1), whole.replace("\"rows\":7", "\"rows\":8")).unwrap();
    let (code, report) = verify(&folder, &keys);
    let changed = place(4) + "changed: the line was changed";
    assert!(code == Some(1) && report.contains(&changed) && report.ends_with("\nchanged\n"), "{report}");
    let cut = whole[..whole.len() - 1].rfind('\n').unwrap() + 1;
    fs::write(log(&folder, 1), &whole[..cut]).unwrap();
    let (code, report) = verify(&folder, &keys);
    let missing = place(1) + "incomplete: no `witness` follows the `end` of this start";
    assert!(code == Some(3) && report.contains(&missing) && report.ends_with("\nincomplete\n"), "{report}");
    fs::remove_file(log(&folder, 1)).unwrap();
    let (code, report) = verify(&folder, &keys);
    let missing = format!("{}: changed: the file of rank 1 of 2 is missing", log(&folder, 1).display());
    assert!(code == Some(1) && report.contains(&missing), "{report}");
}

#[test]
fn what_cannot_be_verified_is_an_error() {
    let (folder, other) = (audited(), Folder::new());
    other.key("owner");
    let [logs, list, owner] = ["audit", "list.json", "owner.pub"].map(|name| folder.path(name));
    fails(&["audit", "verify", &folder.path("none")], "none: No such file");
    fs::create_dir(folder.path("empty")).unwrap();
    fails(&["audit", "verify", &folder.path("empty")], "there are no audit logs");
    let unsigned = ["audit", "verify", &*logs, "--membership", &*list, "--owner", &*other.path("owner.pub")];
    fails(&unsigned, "the owner has not signed this file");
    // Usage.
    for arguments in [
        &["audit", "verify"][..],
        &["audit", "verify", &logs, "--membership", &list],
        &["audit", "verify", &logs, "--owner", &owner],
    ] {
        assert_eq!(shardwise(arguments).status.code(), Some(2), "{arguments:?}");
    }
}
