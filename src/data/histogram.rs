//! How often each length occurs.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// Counts of whole numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram(BTreeMap<usize, u64>);

/// A stretch of lengths: from, up to and without, how many.
pub type Bin = (usize, usize, u64);

impl Histogram {
    /// Counts `length`.
    pub fn add(&mut self, length: usize) {
        *self.0.entry(length).or_default() += 1;
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.0.values().sum()
    }

    /// The sum of all lengths.
    pub fn total(&self) -> u64 {
        self.0.iter().map(|(length, count)| *length as u64 * count).sum()
    }

    /// The mean length; 0 of nothing.
    pub fn mean(&self) -> f64 {
        self.total() as f64 / self.count().max(1) as f64
    }

    /// The smallest length that a share of at least `share` does not exceed; 0 of nothing.
    pub fn quantile(&self, share: f64) -> usize {
        let wanted = (share * self.count() as f64).ceil() as u64;
        let mut so_far = 0;
        let reached = self.0.iter().find(|(_, count)| {
            so_far += **count;
            so_far >= wanted
        });
        reached.map_or(0, |(length, _)| *length)
    }

    /// The longest.
    pub fn max(&self) -> usize {
        self.0.last_key_value().map_or(0, |(length, _)| *length)
    }

    /// At most `most` bins of one width up to the 99th percentile; the last one holds all that is longer.
    pub fn bins(&self, most: usize) -> Vec<Bin> {
        let width = nice(self.quantile(0.99) / most.max(1) + 1);
        let count = (self.quantile(0.99) / width + 1).min(most.max(1));
        let mut bins: Vec<Bin> = (0..count).map(|at| (at * width, (at + 1) * width, 0)).collect();
        for (length, number) in &self.0 {
            bins[(length / width).min(count - 1)].2 += number;
        }
        if let Some(last) = bins.last_mut() {
            last.1 = last.1.max(self.max() + 1);
        }
        bins
    }

    /// The bins as an SVG picture, with a line at `limit`.
    pub fn picture(&self, title: &str, limit: usize) -> Result<String> {
        let mut picture = String::new();
        self.draw(&mut picture, title, limit).map_err(|error| anyhow!("drawing the histogram: {error}"))?;
        Ok(picture)
    }

    fn draw(
        &self,
        picture: &mut String,
        title: &str,
        limit: usize,
    ) -> std::result::Result<(), Box<dyn std::error::Error>> {
        let bins = self.bins(48);
        let width = bins.first().map_or(1, |bin| bin.1 - bin.0);
        let end = bins.len() * width;
        let highest = bins.iter().map(|bin| bin.2).max().unwrap_or(0).max(1);
        let area = SVGBackend::with_string(picture, (960, 540)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 20))
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(0..end, 0..highest + highest / 20 + 1)?;
        chart.configure_mesh().x_desc("tokens").y_desc("rows").disable_x_mesh().draw()?;
        let blue = RGBColor(31, 119, 180);
        chart.draw_series(
            bins.iter()
                .enumerate()
                .map(|(at, bin)| Rectangle::new([(at * width, 0), ((at + 1) * width, bin.2)], blue.filled())),
        )?;
        if limit < end {
            let line = [(limit, 0), (limit, highest)];
            chart.draw_series([PathElement::new(line, RGBColor(214, 96, 14).stroke_width(2))])?;
        }
        area.present()?;
        drop(chart);
        Ok(())
    }
}

/// The next of 1, 2, 5, 10, 20, ..
fn nice(width: usize) -> usize {
    let power = 10usize.pow(width.max(1).ilog10());
    [1, 2, 5, 10].into_iter().map(|step| step * power).find(|step| *step >= width).unwrap_or(width)
}
