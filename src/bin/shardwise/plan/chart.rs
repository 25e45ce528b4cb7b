//! Charts of a plan as SVG: the memory of its ranks, and the timeline of its pipeline.

use super::{
    Report,
    table::{PARTS, parts},
};
use shardwise::{
    Result,
    plan::{
        Plan, Span, SpanWork, Timeline,
        text::{bytes, time},
    },
    train::Pass,
};
use std::fmt::Write;

/// The widths of a chart, of the labels on its left, and of the bars or lanes.
const CHART: f64 = 1000.0;
const LEFT: f64 = 64.0;
const AREA: f64 = 800.0;

/// The height of a bar or lane, and the distance to the next one.
const LANE: f64 = 20.0;
const STEP: f64 = 26.0;

/// The largest number of spans of a lane in each half of a shortened timeline.
const SPANS: usize = 80;

/// The width of the gap between the halves of a shortened timeline.
const GAP: f64 = 40.0;

/// Draws the memory of each pipeline rank as a bar of its parts, with the limits of the machine.
pub(super) fn memory(report: &Report, plan: &Plan) -> String {
    let capacity = report.machine.rank_memory(plan.strategy.ranks()) as f64;
    let totals = plan.ranks.iter().map(|rank| rank.memory.total() as f64);
    let scale = AREA / totals.fold(capacity, f64::max);
    let top = 40.0;
    let bottom = top + STEP * plan.ranks.len() as f64;
    let mut svg = begin("memory of each pipeline rank", bottom + 4.0);
    for (at, rank) in plan.ranks.iter().enumerate() {
        let (y, mut x) = (top + STEP * at as f64, LEFT);
        label(&mut svg, at, y);
        svg.push_str("<g class=\"bar\">");
        for (part, size) in PARTS.into_iter().zip(parts(&rank.memory)) {
            let width = size as f64 * scale;
            if size > 0 {
                let words = format!("rank {at}: {part} {}", bytes(size));
                rect(&mut svg, part, (x, y, width), &words);
            }
            x += width;
        }
        let total = bytes(rank.memory.total());
        let y = y + 14.0;
        let _ = write!(svg, "</g><text x=\"{CHART}\" y=\"{y:.1}\" text-anchor=\"end\">{total}</text>");
    }
    for (name, share, row, anchor) in [
        ("fits", report.machine.fits, 28.0, "end"),
        ("tight", report.machine.tight, 12.0, "end"),
        ("memory", 1.0, 12.0, "start"),
    ] {
        let x = LEFT + share * capacity * scale;
        let words = format!("{name}: {}", bytes((share * capacity) as u64));
        let _ = write!(
            svg,
            "<path class=\"limit {name}\" d=\"M{x:.1} {:.1}V{bottom:.1}\"/>\
             <text x=\"{x:.1}\" y=\"{row:.1}\" text-anchor=\"{anchor}\">{words}</text>",
            row + 4.0
        );
    }
    svg + "</svg>"
}

/// A range of time that is drawn, and where.
struct Window {
    from: f64,
    to: f64,
    x: f64,
    width: f64,
}

/// Draws what each rank of the pipeline does in a step. Of a long step, draws the first and the
/// last part. Returns the drawing and a note about it.
pub(super) fn timeline(plan: &Plan) -> Result<(String, String)> {
    let timeline = plan.timeline()?;
    let windows = windows(&timeline);
    let bottom = STEP * timeline.ranks.len() as f64;
    let mut svg = begin("timeline of the pipeline", bottom + 22.0);
    svg.push_str(
        "<defs><pattern id=\"idle\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\" \
         patternTransform=\"rotate(45)\"><path class=\"hatch\" d=\"M0 0V6\"/></pattern></defs>",
    );
    for (at, spans) in timeline.ranks.iter().enumerate() {
        let y = STEP * at as f64;
        label(&mut svg, at, y);
        svg.push_str("<g class=\"lane\">");
        for window in &windows {
            rect(&mut svg, "idle", (window.x, y, window.width), &format!("rank {at}: idle"));
            for span in spans {
                draw(&mut svg, window, span, at, y);
            }
        }
        svg.push_str("</g>");
    }
    for window in &windows {
        let (left, right) = (window.x, window.x + window.width);
        for (x, at, anchor) in [(left, window.from, "start"), (right, window.to, "end")] {
            let y = bottom + 12.0;
            let _ =
                write!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", time(at));
        }
    }
    let (passes, step) = (time(timeline.seconds), time(plan.seconds));
    let mut note = format!("Passes and exchanges take {passes} of a step of {step}.");
    if let [first, _] = &windows[..] {
        let _ = write!(note, " Only their first and last {} are drawn.", time(first.to));
    }
    Ok((svg + "</svg>", note))
}

/// Returns the drawn ranges of time: all of a short timeline, or two ranges of equal length, in
/// which no lane has more than about [`SPANS`] spans.
fn windows(timeline: &Timeline) -> Vec<Window> {
    let end = timeline.seconds;
    let all = vec![Window { from: 0.0, to: end, x: LEFT, width: AREA }];
    let long = timeline.ranks.iter().filter(|spans| spans.len() > 2 * SPANS);
    let lengths = long.map(|spans| spans[SPANS].start.min(end - spans[spans.len() - SPANS].start));
    let Some(length) = lengths.reduce(f64::min).filter(|length| 2.0 * length < end) else { return all };
    let width = (AREA - GAP) / 2.0;
    vec![
        Window { from: 0.0, to: length, x: LEFT, width },
        Window { from: end - length, to: end, x: LEFT + width + GAP, width },
    ]
}

/// Draws the part of a span that is in the window.
fn draw(svg: &mut String, window: &Window, span: &Span, rank: usize, y: f64) {
    let (start, end) = (span.start.max(window.from), span.end.min(window.to));
    if end <= start {
        return;
    }
    let scale = window.width / (window.to - window.from);
    let (x, width) = (window.x + (start - window.from) * scale, (end - start) * scale);
    let when = format!("{} to {}", time(span.start), time(span.end));
    match span.work {
        SpanWork::Compute { pass, chunk, microbatch } => {
            let class = match pass {
                Pass::Forward => "forward",
                Pass::Backward => "backward",
            };
            let words = format!("rank {rank}: {class} of microbatch {microbatch}, chunk {chunk}, {when}");
            rect(svg, class, (x, y, width), &words);
            let number = microbatch.to_string();
            if width >= 7.0 * number.len() as f64 + 3.0 {
                let (x, y) = (x + width / 2.0, y + 14.0);
                let _ = write!(svg, "<text class=\"on {class}\" x=\"{x:.1}\" y=\"{y:.1}\">{number}</text>");
            }
        }
        SpanWork::Exchange => rect(svg, "exchange", (x, y, width), &format!("rank {rank}: exchange, {when}")),
        _ => {}
    }
}

fn begin(what: &str, height: f64) -> String {
    format!("<svg role=\"img\" aria-label=\"{what}\" viewBox=\"0 0 {CHART} {height:.0}\">")
}

fn label(svg: &mut String, rank: usize, y: f64) {
    let _ = write!(svg, "<text x=\"0\" y=\"{:.1}\">rank {rank}</text>", y + 14.0);
}

fn rect(svg: &mut String, class: &str, (x, y, width): (f64, f64, f64), words: &str) {
    let _ = write!(
        svg,
        "<rect class=\"{class}\" x=\"{x:.2}\" y=\"{y:.1}\" width=\"{width:.2}\" height=\"{LANE}\">\
         <title>{words}</title></rect>"
    );
}

#[cfg(test)]
mod tests {
    use super::{super::tests::report, *};

    /// Returns the widths of the rectangles in each group of a class.
    fn widths(svg: &str, class: &str) -> Vec<Vec<f64>> {
        let begin = format!("<g class=\"{class}\">");
        let groups = svg.split(&begin).skip(1);
        let of = |group: &str| {
            let group = &group[..group.find("</g>").unwrap()];
            let widths = group.split(" width=\"").skip(1);
            widths.map(|text| text[..text.find('"').unwrap()].parse().unwrap()).collect()
        };
        groups.map(of).collect()
    }

    #[test]
    fn every_rank_has_a_bar_as_long_as_its_memory() {
        let report = report("model");
        for plan in &report.best {
            let bars = widths(&memory(&report, plan), "bar");
            assert_eq!(bars.len(), plan.ranks.len());
            for (bar, rank) in bars.iter().zip(&plan.ranks) {
                let want = AREA * rank.memory.total() as f64 / report.machine.memory as f64;
                let length: f64 = bar.iter().sum();
                assert!((length - want).abs() < 0.05, "{length} {want}");
                let weights = AREA * rank.memory.weights as f64 / report.machine.memory as f64;
                assert!(bar.len() == 5 && (bar[0] - weights).abs() < 0.01, "{bar:?}");
            }
        }
    }

    #[test]
    fn bars_of_too_much_memory_stay_in_the_chart() {
        let mut report = report("model");
        report.machine.memory = 1 << 30;
        let bars = widths(&memory(&report, &report.best[0]), "bar");
        assert!((bars[0].iter().sum::<f64>() - AREA).abs() < 0.05, "{bars:?}");
    }

    #[test]
    fn every_rank_has_a_lane_with_its_passes() {
        let plan = &report("model").best[0];
        let (svg, note) = timeline(plan).unwrap();
        assert!(note.ends_with(" of a step of 2.00s."), "{note}");
        assert_eq!(widths(&svg, "lane").len(), 2);
        for class in ["forward", "backward"] {
            // Two ranks with two chunks each, and four microbatches.
            assert_eq!(svg.matches(&format!("<rect class=\"{class}\"")).count(), 16, "{svg}");
        }
        for number in 0..4 {
            assert!(svg.contains(&format!(">{number}</text>")));
        }
        let computing = |class: &str| -> f64 {
            let begin = format!("<rect class=\"{class}\"");
            let rects = svg.split(&begin).skip(1);
            let widths = rects.map(|text| &text[text.find("width=\"").unwrap() + 7..]);
            widths.map(|text| text[..text.find('"').unwrap()].parse::<f64>().unwrap()).sum()
        };
        assert!((computing("backward") / computing("forward") - 2.0).abs() < 0.01);
    }

    #[test]
    fn a_long_timeline_is_shortened() {
        let mut plan = report("model").best.remove(0);
        plan.strategy.microbatches = 4000;
        let (svg, note) = timeline(&plan).unwrap();
        assert!(note.contains("Only their first and last "), "{note}");
        for (microbatch, is_drawn) in [(0, true), (2000, false), (3999, true)] {
            assert_eq!(svg.contains(&format!("of microbatch {microbatch},")), is_drawn, "{microbatch}");
        }
        assert!(svg.matches("<rect").count() <= 2 * 2 * (SPANS + 4), "{}", svg.matches("<rect").count());
    }
}
