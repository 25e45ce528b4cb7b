//! What private training writes to the audit logs.

use crate::models::*;
use serde_json::Value;
use shardwise::{launch::Threads, prelude::*, privacy::*};
use std::fs;

#[test]
fn the_logs_have_the_mechanism_and_each_disclosure_and_no_value() -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder");
    let norms = Threads::new(2).audit(folder.path()).run(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(1, 1, 2)?)?;
        let tensor = mesh.group(Axis::Tensor);
        let model = classifier::<f64>(tensor)?;
        let mechanism = DpSgd::new(3, 1.0, 1.25, 0.75);
        let mut private =
            Private::new(&mesh, [model.params()], mechanism, RunKey::agree(&world)?, ledger()?)?;
        let mut step = private.begin()?;
        backward(&model, tensor, &[0, 1, 2], 0)?;
        let norms = step.clip(3)?.disclose("the samples are made up")?;
        let refused = step.release(None)?.disclose(" ").unwrap_err().to_string();
        assert!(refused.contains("reason is empty"), "{refused}");
        Ok(norms)
    })?;
    let mut logs = 0;
    for file in fs::read_dir(folder.path()).expect("the folder") {
        let text = fs::read_to_string(file.expect("a file").path()).expect("a log");
        let lines: Vec<Value> =
            text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
        let of = |event: &str| -> Vec<&Value> {
            lines.iter().filter(|line| line["event"] == event).map(|line| &line["fields"]).collect()
        };
        let [start] = of("private_training")[..] else { panic!("{text}") };
        assert_eq!(start["samples"], 3);
        assert_eq!([&start["rate"], &start["clip"], &start["noise"]], ["1", "1.25", "0.75"]);
        assert_eq!((&start["secret_key"], &start["parts"]), (&Value::from("yes"), &Value::from(1)));
        let [disclosed] = of("disclose")[..] else { panic!("{text}") };
        assert_eq!(disclosed["reason"], "the samples are made up");
        for norm in &norms[0] {
            let digits = &norm.to_string()[..8];
            assert!(!text.contains(digits), "{digits} in {text}");
        }
        logs += 1;
    }
    assert_eq!((logs, norms[0].len()), (2, 3));
    Ok(())
}
