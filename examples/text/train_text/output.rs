//! Writes the loss curves of the training runs, as a table and as a plot.

use super::Trained;
use plotters::{
    prelude::*,
    style::{FontStyle, register_font},
};
use std::{error::Error, fmt::Write, path::Path};

/// Writes the losses as CSV, with one line for each mesh, kind of loss and step.
pub(crate) fn table(path: &Path, runs: &[(String, Trained)]) -> Result<(), Box<dyn Error>> {
    let mut text = String::from("mesh,kind,step,loss\n");
    for (name, run) in runs {
        for (kind, losses) in [("train", &run.curve), ("validation", &run.validation)] {
            for (step, loss) in losses {
                writeln!(text, "\"{name}\",{kind},{step},{loss}")?;
            }
        }
    }
    Ok(std::fs::write(path, text)?)
}

/// Plots the loss curves of all runs.
pub(crate) fn plot(path: &Path, runs: &[(String, Trained)]) -> Result<(), Box<dyn Error>> {
    register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)
        .map_err(|_| "the font cannot be read")?;
    let losses = || runs.iter().flat_map(|(_, run)| run.curve.iter().chain(&run.validation));
    let steps = losses().map(|(step, _)| *step).max().unwrap_or(1);
    let largest = losses().map(|(_, loss)| *loss).fold(0.0, f64::max);
    let canvas = BitMapBackend::new(path, (900, 540)).into_drawing_area();
    canvas.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&canvas)
        .margin(16)
        .caption("loss, nats per character", ("sans-serif", 22))
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(0..steps, 0.0..largest * 1.05)?;
    chart.configure_mesh().x_desc("step").draw()?;
    for (number, (name, run)) in runs.iter().enumerate() {
        let color = Palette99::pick(number);
        // Training curves are thin and pale, validation curves thick. The legend names both.
        for (kind, losses, style) in [
            ("training", &run.curve, color.mix(0.5).stroke_width(1)),
            ("validation", &run.validation, color.stroke_width(3)),
        ] {
            chart
                .draw_series(LineSeries::new(losses.iter().copied(), style))?
                .label(format!("{kind}, {name}"))
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], style));
        }
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    canvas.present()?;
    Ok(())
}
