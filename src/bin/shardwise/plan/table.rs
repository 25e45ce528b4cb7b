//! The table of the best plans.

use super::{
    Report,
    units::{percent, short},
};
use shardwise::plan::{
    Memory, Plan, RankUse, Verdict,
    text::{Unit, time},
};

/// The largest width of a line, in columns.
const WIDTH: usize = 140;

/// The names of the parts of a rank's memory.
pub(super) const PARTS: [&str; 6] =
    ["weights", "gradients", "optimizer", "activations", "transients", "cache"];

/// Columns of the table under a common heading, which may be empty.
pub(super) struct Columns {
    pub(super) heading: String,
    pub(super) columns: Vec<Column>,
}

/// A column of the table: its heading, and a cell of each plan.
pub(super) struct Column {
    pub(super) heading: String,
    pub(super) cells: Vec<String>,
}

/// Returns the parts of a rank's memory in the order of [`PARTS`].
pub(super) fn parts(memory: &Memory) -> [u64; 6] {
    [memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.transients, memory.cache]
}

/// Returns the rank that holds the most.
fn fullest(plan: &Plan) -> Option<&RankUse> {
    plan.ranks.iter().max_by_key(|rank| rank.memory.total())
}

fn sent(plan: &Plan) -> u64 {
    plan.ranks.iter().map(|rank| rank.sent).max().unwrap_or_default()
}

pub(super) fn verdict(plan: &Plan) -> &'static str {
    match plan.verdict {
        Verdict::Fits => "fits",
        Verdict::Tight => "tight",
        _ => "too big",
    }
}

/// Returns the columns of the table. Parts of the memory that no plan has are left out.
pub(super) fn table(plans: &[Plan]) -> Vec<Columns> {
    let number = |value: usize| value.to_string();
    let column = |heading: &str, cell: &dyn Fn(&Plan) -> String| Column {
        heading: heading.into(),
        cells: plans.iter().map(cell).collect(),
    };
    let mut strategy = vec![
        column("dp", &|plan| number(plan.strategy.data)),
        column("tp", &|plan| number(plan.strategy.tensor)),
        column("pp", &|plan| number(plan.strategy.pipeline)),
        column("v", &|plan| number(plan.strategy.chunks)),
        column("mb", &|plan| format!("{}x{}", plan.strategy.sequences, plan.strategy.microbatches)),
        column("sp", &|plan| if plan.strategy.sequence_parallel { "on" } else { "-" }.into()),
        column("rc", &|plan| match plan.strategy.recomputed {
            0 => "-".into(),
            blocks => number(blocks),
        }),
    ];
    if plans.iter().any(|plan| plan.threads > 1) {
        strategy.push(column("th", &|plan| number(plan.threads)));
    }
    let peak = |plan: &Plan| fullest(plan).map(|rank| rank.memory).unwrap_or_default();
    let unit = Unit::of(plans.iter().map(|plan| peak(plan).total()).max().unwrap_or_default());
    let wire = Unit::of(plans.iter().map(sent).max().unwrap_or_default());
    let mut memory = vec![column("total", &|plan| unit.count(peak(plan).total()))];
    for (at, part) in PARTS.into_iter().enumerate() {
        if plans.iter().any(|plan| parts(&peak(plan))[at] > 0) {
            memory.push(column(short_part(part), &|plan| unit.count(parts(&peak(plan))[at])));
        }
    }
    let mut speed = vec![
        column("step", &|plan| time(plan.seconds)),
        column("±", &|plan| format!("{:.0}%", 100.0 * plan.error)),
        column("tok/s", &|plan| short(plan.tokens_per_second)),
    ];
    if plans.iter().any(|plan| plan.prefill.is_some()) {
        speed.push(column("prefill", &|plan| plan.prefill.map_or("-".into(), time)));
    }
    let share = |plan: &Plan, seconds: f64| match plan.seconds > 0.0 {
        true => percent(seconds / plan.seconds),
        false => percent(0.0),
    };
    let waiting = vec![
        column("bubble", &|plan| percent(plan.bubble)),
        column("tp", &|plan| share(plan, plan.exposed.tensor)),
        column("dp", &|plan| share(plan, plan.exposed.data)),
        column("pp", &|plan| share(plan, plan.exposed.pipeline)),
    ];
    let numbers = Column { heading: "#".into(), cells: (1..=plans.len()).map(number).collect() };
    let groups = [
        ("", vec![numbers]),
        ("strategy", strategy),
        (&*format!("{}/rank", unit.name), memory),
        ("", vec![column("verdict", &|plan| verdict(plan).into())]),
        ("", speed),
        ("waiting", waiting),
        ("sent", vec![column(wire.name, &|plan| wire.count(sent(plan)))]),
    ];
    groups.into_iter().map(|(heading, columns)| Columns { heading: heading.into(), columns }).collect()
}

/// The heading of a part's column.
fn short_part(part: &str) -> &'static str {
    match part {
        "weights" => "w",
        "gradients" => "g",
        "optimizer" => "o",
        "activations" => "a",
        "transients" => "x",
        _ => "kv",
    }
}

/// What the headings mean.
pub(super) const LEGEND: &str = "dp, tp, pp: data-, tensor-parallel and pipeline ranks. v: stages of a pipeline rank. mb: sequences \
     of a microbatch x microbatches. sp: sequence parallel. rc: blocks that recompute their forward. th: threads of a rank's \
     matrix products. Memory of the fullest rank: w weights, \
     g gradients, o optimizer, a activations, x transients, kv cache. waiting: shares of a step in which the busiest rank \
     waits for other pipeline ranks (bubble), and for communication by axis. sent: bytes of a rank in a step.";

/// Writes the report as text of at most [`WIDTH`] columns.
pub(super) fn text(report: &Report) -> String {
    let mut lines = wrapped(&report.title());
    lines.push(String::new());
    if !report.best.is_empty() {
        lines.extend(rows(&table(&report.best)));
        lines.push(String::new());
        lines.extend(wrapped(LEGEND));
        lines.push(String::new());
    }
    for note in report.notes() {
        lines.extend(wrapped(&note));
    }
    if let Some(why) = report.why() {
        lines.extend(wrapped(&format!("Why 1 over 2: {why}")));
    }
    let refused = if report.refused.is_empty() { "" } else { " Refused:" };
    lines.push(format!("{} strategies were considered.{refused}", report.considered));
    for refusal in &report.refused {
        lines.extend(wrapped(&format!("{:>6} {}", refusal.count, refusal.reason)));
    }
    lines.join("\n") + "\n"
}

fn rows(table: &[Columns]) -> Vec<String> {
    let length = |text: &str| text.chars().count();
    let plans = table.iter().flat_map(|group| &group.columns).map(|column| column.cells.len()).max();
    let mut rows = vec![String::new(); 2 + plans.unwrap_or_default()];
    for group in table {
        let mut lines = vec![String::new(); rows.len()];
        for column in &group.columns {
            let cells = || [&column.heading].into_iter().chain(&column.cells);
            let width = cells().map(|cell| length(cell)).max().unwrap_or_default();
            for (line, cell) in lines[1..].iter_mut().zip(cells()) {
                let gap = if line.is_empty() { "" } else { " " };
                *line += &format!("{gap}{cell:>width$}");
            }
        }
        lines[0].clone_from(&group.heading);
        let width = lines.iter().map(|line| length(line)).max().unwrap_or_default();
        for (at, (row, line)) in rows.iter_mut().zip(&lines).enumerate() {
            let gap = if row.is_empty() && width > 0 { "" } else { "  " };
            // A common heading begins where its columns begin.
            *row += &if at == 0 { format!("{gap}{line:<width$}") } else { format!("{gap}{line:>width$}") };
        }
    }
    rows.iter().map(|row| row.trim_end().to_string()).collect()
}

/// Breaks a text into lines. Control characters, which a terminal would execute, become spaces.
fn wrapped(text: &str) -> Vec<String> {
    let clean: String = text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
    let indent = clean.len() - clean.trim_start().len();
    let mut lines = vec![" ".repeat(indent)];
    let mut words: Vec<&str> = clean.split_whitespace().collect();
    words.reverse();
    while let Some(word) = words.pop() {
        let line = lines.last_mut().expect("there is always a line");
        let used = line.chars().count();
        let gap = usize::from(!line.trim_start().is_empty());
        if used + gap + word.chars().count() <= WIDTH {
            line.push_str(&" ".repeat(gap));
            line.push_str(word);
        } else if gap == 1 {
            lines.push(" ".repeat(indent + 2));
            words.push(word);
        } else {
            // A word that is longer than a line.
            let (end, _) = word.char_indices().nth(WIDTH - used).expect("the word is longer than the line");
            line.push_str(&word[..end]);
            words.push(&word[end..]);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::{super::tests::report, *};

    #[test]
    fn every_plan_has_a_row_of_its_numbers() {
        let text = text(&report("model"));
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert!(text.starts_with(
            "32 ranks · model, 6.74B parameters, bf16 · training, 8 x 4096 tokens a step · four ranks for tests\n"
        ));
        assert_eq!(rows[2].join(" "), "strategy GiB/rank waiting sent");
        let headings = "# dp tp pp v mb sp rc total w g o a x verdict step ± tok/s bubble tp dp pp GiB";
        assert_eq!(rows[3].join(" "), headings);
        assert_eq!(
            rows[4].join(" "),
            "1 2 4 2 2 1x4 on - 53.5 6.0 12.0 24.0 10.5 1.0 fits 2.00s 12% 16.4k 10% 5.0% 2.5% 0.5% 9.0"
        );
        assert_eq!(
            rows[5].join(" "),
            "2 4 4 1 1 1x8 - 2 70.8 12.0 24.0 24.0 9.2 1.5 tight 2.50s 12% 13.1k 0.0% 12% 8.0% 0.0% 19.0"
        );
        assert!(text.contains("Why 1 over 2: It takes 2.00s for a step instead of 2.50s."));
        assert!(
            text.contains("40 strategies were considered. Refused:\n    30 <memory> & more\n     8 none\n")
        );
    }

    #[test]
    fn threads_have_a_column_if_a_plan_has_several() {
        let mut report = report("model");
        assert!(!text(&report).contains(" rc th "));
        report.best[1].threads = 4;
        let text = text(&report);
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        let column = rows[3].iter().position(|heading| *heading == "th").unwrap();
        assert_eq!((rows[4][column], rows[5][column]), ("1", "4"));
    }

    #[test]
    fn lines_are_at_most_140_columns_wide() {
        let mut report = report(&"name ".repeat(60));
        for plan in &mut report.best {
            let strategy = &mut plan.strategy;
            (strategy.data, strategy.pipeline, strategy.tensor, strategy.chunks) = (1024, 128, 128, 16);
            (strategy.sequences, strategy.microbatches, strategy.recomputed) = (128, 4096, 128);
            (plan.seconds, plan.tokens_per_second, plan.bubble) = (0.99999, 123_456_789.0, 1.0);
            plan.threads = 64;
            (plan.verdict, plan.error) = (Verdict::OutOfMemory, 1.0);
            (plan.exposed.tensor, plan.exposed.data, plan.exposed.pipeline) = (1.0, 1.0, 1.0);
            plan.ranks[0].memory.cache = 100 << 30;
            plan.ranks[0].memory.optimizer = 500 << 30;
            plan.ranks[0].sent = 999 << 30;
        }
        report.refused[0].reason = format!("{}{}", "x".repeat(500), " words".repeat(50));
        let text = text(&report);
        let widest = text.lines().map(|line| line.chars().count()).max();
        assert!(widest.is_some_and(|widest| widest > 130 && widest <= WIDTH), "{widest:?}\n{text}");
        let kept: String = text.split_whitespace().collect();
        assert!(kept.contains(&"x".repeat(500)) && kept.contains(&"words".repeat(50)));
    }

    #[test]
    fn terminals_get_no_control_characters() {
        let text = text(&report("a\u{1b}[31m\u{7}\nmodel"));
        assert!(text.contains("a [31m model"), "{text}");
        assert!(text.chars().all(|letter| letter == '\n' || !letter.is_control()));
    }

    #[test]
    fn nothing_that_fits_has_no_rows() {
        let mut report = report("model");
        report.best.clear();
        let text = text(&report);
        assert!(text.contains("No plan fits") && !text.contains("tok/s") && text.contains("40 strategies"));
    }
}
