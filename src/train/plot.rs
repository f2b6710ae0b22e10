//! Curves as SVG pictures: the loss or another metric of every step, its smoothed course, the evaluations.

use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::train::metrics::LossHistory;

const SIZE: (u32, u32) = (960, 540);
const TRAIN: RGBColor = RGBColor(31, 119, 180);
const EVAL: RGBColor = RGBColor(214, 96, 14);
const GRID: RGBColor = RGBColor(228, 228, 228);
const TEXT: RGBColor = RGBColor(60, 60, 60);

/// More points than this cannot be told apart in the picture and make it megabytes large.
const MOST_POINTS: usize = 1000;

/// The SVG text of the losses over the steps.
pub fn loss_curve(title: &str, history: &LossHistory) -> Result<String> {
    curve(title, "loss", history)
}

/// The SVG text of another metric over the steps; `what` it is stands at the axis.
pub fn curve(title: &str, what: &str, history: &LossHistory) -> Result<String> {
    let mut picture = String::new();
    draw(&mut picture, title, what, history).map_err(|error| anyhow!("drawing the {what} curve: {error}"))?;
    Ok(picture)
}

fn draw(
    picture: &mut String,
    title: &str,
    what: &str,
    history: &LossHistory,
) -> Result<(), Box<dyn std::error::Error>> {
    let train = thinned(&history.train);
    let smooth = smoothed(&train);
    let eval: Vec<(f64, f64)> = finite(&history.eval).collect();
    let (steps, losses) = (step_range(&train, &eval), loss_range(&train, &smooth, &eval));
    let clipped = |&(step, loss): &(f64, f64)| (step, loss.clamp(losses.start, losses.end));

    let area = SVGBackend::with_string(picture, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let font = |size: u32| ("sans-serif", size).into_font().color(&TEXT);
    let mut chart = ChartBuilder::on(&area)
        .caption(title, font(20))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(steps, losses.clone())?;
    let decimals = if losses.end - losses.start < 0.2 { 3 } else { 2 };
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc(what)
        .axis_desc_style(font(15))
        .label_style(font(13))
        .axis_style(TEXT)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .x_labels(10)
        .y_labels(8)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|loss| format!("{loss:.decimals$}"))
        .draw()?;

    let faint = TRAIN.mix(0.3).stroke_width(1);
    let line = TRAIN.stroke_width(2);
    let dots = EVAL.stroke_width(2);
    let key = |style: ShapeStyle| move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style);
    chart.draw_series(LineSeries::new(train.iter().map(clipped), faint))?.label("train").legend(key(faint));
    chart
        .draw_series(LineSeries::new(smooth.iter().map(clipped), line))?
        .label("train, smoothed")
        .legend(key(line));
    if !eval.is_empty() {
        chart
            .draw_series(LineSeries::new(eval.iter().map(clipped), dots))?
            .label("evaluation")
            .legend(key(dots));
        chart.draw_series(eval.iter().map(|point| Circle::new(clipped(point), 4, EVAL.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(12)
        .legend_area_size(32)
        .label_font(font(14))
        .background_style(WHITE.mix(0.85))
        .border_style(GRID)
        .draw()?;
    area.present()?;
    drop(chart);
    Ok(())
}

fn finite(points: &[(u64, f64)]) -> impl Iterator<Item = (f64, f64)> {
    points.iter().filter(|(_, loss)| loss.is_finite()).map(|(step, loss)| (*step as f64, *loss))
}

/// At most [`MOST_POINTS`] points, each the mean of as many neighbours.
fn thinned(points: &[(u64, f64)]) -> Vec<(f64, f64)> {
    let points: Vec<(f64, f64)> = finite(points).collect();
    let group = points.len().div_ceil(MOST_POINTS).max(1);
    let mean = |group: &[(f64, f64)]| {
        let (steps, losses) = group.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (steps / group.len() as f64, losses / group.len() as f64)
    };
    points.chunks(group).map(mean).collect()
}

/// Mean over a window around each point of about a twentieth of the curve, smaller towards the ends. An exponential
/// mean would trail behind a falling loss.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let half = (points.len() / 40).max(1);
    let mean = |(i, point): (usize, &(f64, f64))| {
        let half = half.min(i).min(points.len() - 1 - i);
        let window = &points[i - half..=i + half];
        (point.0, window.iter().map(|point| point.1).sum::<f64>() / window.len() as f64)
    };
    points.iter().enumerate().map(mean).collect()
}

fn step_range(train: &[(f64, f64)], eval: &[(f64, f64)]) -> Range<f64> {
    let steps = || train.iter().chain(eval).map(|point| point.0);
    let first = steps().fold(f64::INFINITY, f64::min);
    let last = steps().fold(f64::NEG_INFINITY, f64::max);
    match first.is_finite() {
        true => first..last.max(first + 1.0),
        false => 0.0..1.0,
    }
}

/// Holds the smoothed curve, the evaluations and all but the wildest 1 % of the steps: one spike must not flatten
/// the rest of the curve.
fn loss_range(train: &[(f64, f64)], smooth: &[(f64, f64)], eval: &[(f64, f64)]) -> Range<f64> {
    let mut losses: Vec<f64> = train.iter().map(|point| point.1).collect();
    losses.sort_by(f64::total_cmp);
    let spared = losses.len() / 200;
    let shown = losses[spared..losses.len() - spared].iter().copied();
    let shown = || shown.clone().chain(smooth.iter().chain(eval).map(|point| point.1));
    let (low, high) = (shown().fold(f64::INFINITY, f64::min), shown().fold(f64::NEG_INFINITY, f64::max));
    if !low.is_finite() {
        return 0.0..1.0;
    }
    let margin = ((high - low) * 0.05).max(1e-3);
    (if low >= 0.0 { (low - margin).max(0.0) } else { low - margin })..high + margin
}
