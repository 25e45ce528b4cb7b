//! A page about the best plans, in one file without scripts.

use super::{
    Report, chart,
    table::{Column, LEGEND, PARTS, parts, table, verdict},
    units::{percent, short},
};
use shardwise::plan::{
    Plan,
    text::{bytes, time},
};
use std::fmt::Write;

/// The colors are those of Okabe and Ito (2008), which people with any color vision can separate.
const STYLE: &str = "
:root { color-scheme: light dark; --back: #fff; --text: #1b1b1b; --soft: #5a5a5a; --line: #c8c8c8; --hatch: #a8a8a8 }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181b; --text: #ececec; --soft: #a9adb3; --line: #44484e; --hatch: #62676e }
}
body { margin: 2rem auto; max-width: 76rem; padding: 0 1.5rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, 'DejaVu Sans', sans-serif }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem }
p { margin: .4rem 0; max-width: 60rem } .soft { color: var(--soft) }
dl { display: flex; flex-wrap: wrap; gap: .8rem 2.2rem; margin: 1.2rem 0 }
dt { color: var(--soft); font-size: .85rem } dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums }
svg { width: 100%; height: auto; display: block } svg text { font-size: 12px; fill: var(--text) }
svg rect { stroke: var(--back); stroke-width: .5 }
svg text.on { text-anchor: middle; font-size: 11px; pointer-events: none; fill: #000 } svg text.on.forward { fill: #fff }
.weights, .forward { fill: #0072b2; background: #0072b2 } .gradients { fill: #56b4e9; background: #56b4e9 }
.optimizer, .exchange { fill: #009e73; background: #009e73 } .activations, .backward { fill: #e69f00; background: #e69f00 }
.transients { fill: #d55e00; background: #d55e00 } .cache { fill: #cc79a7; background: #cc79a7 }
rect.idle { fill: url(#idle); stroke: var(--line) } .hatch { stroke: var(--hatch); stroke-width: 2; fill: none }
i.idle { background: repeating-linear-gradient(135deg, var(--hatch) 0 1px, transparent 1px 4px) }
.limit { stroke: var(--text); stroke-width: 1.5; fill: none } .limit.fits { stroke-dasharray: 6 4 }
.limit.tight { stroke-dasharray: 2 3 }
ul.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; font-size: .9rem }
ul.legend i { display: inline-block; width: .9rem; height: .9rem; margin-right: .4rem; vertical-align: -.1rem;
  border: 1px solid var(--line) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th[colspan] { text-align: left } td.words { text-align: left; white-space: normal } tbody tr:first-child { font-weight: 600 } table.refused tr { font-weight: 400 }
";

/// Writes the page.
pub(super) fn page(report: &Report) -> String {
    let title = escaped(&format!("Plan of {}", report.model.name));
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    );
    paragraph(&mut page, "soft", &report.title());
    if let Some(best) = report.best.first() {
        page.push_str(&figures(best));
    }
    for note in report.notes() {
        paragraph(&mut page, "", &note);
    }
    if let Some(why) = report.why() {
        paragraph(&mut page, "", &format!("Why 1 over 2: {why}"));
    }
    if let Some(best) = report.best.first() {
        page.push_str(&memory(report, best));
        page.push_str(&timeline(report, best));
        page.push_str(&plans(report));
    }
    page.push_str(&refusals(report));
    page + "</body>\n</html>\n"
}

/// Replaces the characters that HTML interprets.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            _ => escaped.push(letter),
        }
    }
    escaped
}

fn paragraph(page: &mut String, class: &str, text: &str) {
    let _ = writeln!(page, "<p class=\"{class}\">{}</p>", escaped(text));
}

/// The main numbers of the best plan.
fn figures(plan: &Plan) -> String {
    let strategy = &plan.strategy;
    let mesh = format!("dp {} · tp {} · pp {}", strategy.data, strategy.tensor, strategy.pipeline);
    let peak = plan.ranks.iter().map(|rank| rank.memory.total()).max().unwrap_or_default();
    let mut figures = vec![
        ("mesh", mesh),
        ("step", format!("{} ± {:.0}%", time(plan.seconds), 100.0 * plan.error)),
        ("tokens a second", short(plan.tokens_per_second)),
        ("memory of the fullest rank", format!("{}, {}", bytes(peak), verdict(plan))),
        ("bubble", percent(plan.bubble)),
    ];
    figures.extend(plan.prefill.map(|prefill| ("first token", time(prefill))));
    let mut list = String::from("<dl>\n");
    for (name, value) in figures {
        let _ = writeln!(list, "<div><dt>{name}</dt><dd>{}</dd></div>", escaped(&value));
    }
    list + "</dl>\n"
}

fn memory(report: &Report, plan: &Plan) -> String {
    let mut section = String::from("<h2>Memory of the best plan</h2>\n");
    let used = PARTS.into_iter().enumerate();
    let used = used.filter(|(at, _)| plan.ranks.iter().any(|rank| parts(&rank.memory)[*at] > 0));
    section.push_str(&legend(used.map(|(_, part)| part)));
    section.push_str(&chart::memory(report, plan));
    paragraph(
        &mut section,
        "soft",
        "Each bar is the fullest tensor-parallel rank of a pipeline rank, at the moment at which it holds the most.",
    );
    section
}

fn timeline(report: &Report, plan: &Plan) -> String {
    let mut section = String::from("<h2>Timeline of the best plan</h2>\n");
    match chart::timeline(plan) {
        Ok((svg, note)) => {
            let all = ["forward", "backward", "exchange", "idle"];
            section.push_str(&legend(
                all.into_iter().filter(|work| report.is_training() || *work != "backward"),
            ));
            section.push_str(&svg);
            paragraph(&mut section, "soft", &note);
        }
        Err(error) => paragraph(&mut section, "", &format!("The timeline cannot be drawn: {error}")),
    }
    section
}

fn legend<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut list = String::from("<ul class=\"legend\">\n");
    for name in names {
        let _ = writeln!(list, "<li><i class=\"{name}\"></i>{name}</li>");
    }
    list + "</ul>\n"
}

fn plans(report: &Report) -> String {
    let table = table(&report.best);
    let groups: String = table
        .iter()
        .map(|group| format!("<th colspan=\"{}\">{}</th>", group.columns.len(), escaped(&group.heading)))
        .collect();
    let columns = || table.iter().flat_map(|group| &group.columns);
    let cells = |tag: &str, cell: &dyn Fn(&Column) -> &str| -> String {
        columns().map(|column| format!("<{tag}>{}</{tag}>", escaped(cell(column)))).collect()
    };
    let heads = cells("th", &|column| &column.heading);
    let mut section = format!(
        "<h2>Best plans</h2>\n<div class=\"wide\"><table>\n<thead><tr>{groups}</tr>\n<tr>{heads}</tr></thead>\n<tbody>\n"
    );
    for at in 0..report.best.len() {
        let _ = writeln!(section, "<tr>{}</tr>", cells("td", &|column| &column.cells[at]));
    }
    section.push_str("</tbody>\n</table></div>\n");
    paragraph(&mut section, "soft", LEGEND);
    section
}

fn refusals(report: &Report) -> String {
    let considered = format!("{} strategies were considered.", report.considered);
    let mut section = String::from("<h2>Refused</h2>\n");
    paragraph(&mut section, "soft", &considered);
    section.push_str("<table class=\"refused\">\n<tbody>\n");
    for refusal in &report.refused {
        let _ = writeln!(
            section,
            "<tr><td>{}</td><td class=\"words\">{}</td></tr>",
            refusal.count,
            escaped(&refusal.reason)
        );
    }
    section + "</tbody>\n</table>\n"
}

#[cfg(test)]
mod tests {
    use super::{super::tests::report, *};

    #[test]
    fn text_is_escaped() {
        let page = page(&report("<&\">'"));
        assert!(page.contains("<title>Plan of &lt;&amp;&quot;&gt;&#39;</title>"));
        assert!(
            page.contains("&lt;memory&gt; &amp; more") && !page.contains("<&") && !page.contains("<memory")
        );
    }

    #[test]
    fn the_page_needs_no_other_file() {
        let page = page(&report("model"));
        for outside in ["src=", "href=", "<script", "http", "@import", "url(http"] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert_eq!(page.matches("<svg").count(), 2);
        assert_eq!(page.matches("</svg>").count(), 2);
    }

    #[test]
    fn the_page_has_every_plan_and_refusal() {
        let report = report("model");
        let page = page(&report);
        // Two rows of headings, the plans, and the refusals.
        assert_eq!(page.matches("<tr>").count(), 2 + report.best.len() + report.refused.len());
        for words in ["2.00s ± 12%", "53.5 GiB, fits", "Why 1 over 2", "one node, 16 of 32 ranks", "16.4k"] {
            assert!(page.contains(words), "{words}");
        }
    }

    #[test]
    fn a_page_without_plans_has_the_refusals() {
        let mut report = report("model");
        report.best.clear();
        let page = page(&report);
        assert!(page.contains("No plan fits") && page.contains("&amp; more") && !page.contains("<svg"));
    }
}
