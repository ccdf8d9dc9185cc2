//! The machine and the plan as an SVG picture: nodes hold L3s, L3s hold cores, cores hold CPUs in their worker's colour.

use std::collections::BTreeMap;

use bitnetd_config::cpu_list;
use bitnetd_placement::{Cpu, Machine, Plan};

use super::drawing::{memory_words, size};
use super::owner;

/// Width of the picture.
const WIDTH: usize = 1000;
/// Side of a CPU.
const CELL: usize = 26;
/// Space around things.
const GAP: usize = 8;
/// Height of a line of text.
const LINE: usize = 18;
/// Cores in one row of an L3.
const CORES_PER_ROW: usize = 16;

/// A picture that grows downwards.
#[derive(Debug, Default)]
struct Canvas {
    body: String,
}

impl Canvas {
    fn rect(&mut self, at: (usize, usize), extent: (usize, usize), fill: &str, stroke: &str) {
        let ((x, y), (width, height)) = (at, extent);
        self.body.push_str(&format!(
            "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" rx=\"3\" fill=\"{fill}\" stroke=\"{stroke}\"/>\n"
        ));
    }

    fn text(&mut self, at: (usize, usize), class: &str, text: &str) {
        let (x, y) = at;
        let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        self.body.push_str(&format!("<text x=\"{x}\" y=\"{y}\" class=\"{class}\">{escaped}</text>\n"));
    }
}

/// The CPUs of one L3, laid out.
struct L3Box<'a> {
    title: String,
    cores: Vec<Vec<&'a Cpu>>,
}

impl L3Box<'_> {
    fn n_siblings(&self) -> usize {
        self.cores.iter().map(Vec::len).max().unwrap_or(1)
    }

    fn extent(&self) -> (usize, usize) {
        let columns = self.cores.len().clamp(1, CORES_PER_ROW);
        let rows = self.cores.len().div_ceil(CORES_PER_ROW);
        let width = (columns * (CELL + 4) + GAP * 2).max(self.title.chars().count() * 7 + GAP * 2);
        (width, rows * (self.n_siblings() * CELL + GAP) + LINE + GAP)
    }
}

/// The whole picture.
pub(super) fn draw(machine: &Machine, usable: &[u32], plan: Option<&Plan>) -> String {
    let mut canvas = Canvas::default();
    let mut y = GAP + LINE;
    canvas.text((GAP * 2, y), "head", machine.model_name.as_deref().unwrap_or("unknown processor"));
    y += GAP;
    let mut nodes: BTreeMap<Option<u32>, Vec<&Cpu>> = BTreeMap::new();
    for cpu in &machine.cpus {
        nodes.entry(cpu.node).or_default().push(cpu);
    }
    for (node, cpus) in &nodes {
        y = draw_node(&mut canvas, machine, *node, cpus, y, &|cpu| {
            if !cpu.online {
                ("#ffffff".into(), "#dddddd")
            } else if let Some(worker) = owner(plan, cpu.id) {
                (colour(worker), "#333333")
            } else if usable.binary_search(&cpu.id).is_ok() {
                ("#f2f2f2".into(), "#888888")
            } else {
                ("#cccccc".into(), "#888888")
            }
        });
    }
    y = draw_legend(&mut canvas, plan, y + LINE);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y}\" viewBox=\"0 0 {WIDTH} {y}\">\n\
         <style>text{{font-family:sans-serif;font-size:12px;fill:#222222}}.head{{font-size:15px;font-weight:bold}}\
         .cpu{{font-size:10px;text-anchor:middle}}</style>\n\
         <rect width=\"{WIDTH}\" height=\"{y}\" fill=\"#ffffff\"/>\n{}</svg>\n",
        canvas.body
    )
}

/// Draws one node below `y`; returns where the next thing may begin.
fn draw_node(
    canvas: &mut Canvas,
    machine: &Machine,
    node: Option<u32>,
    cpus: &[&Cpu],
    y: usize,
    look: &dyn Fn(&Cpu) -> (String, &'static str),
) -> usize {
    let mut groups: BTreeMap<_, BTreeMap<u32, Vec<&Cpu>>> = BTreeMap::new();
    for cpu in cpus {
        let key = (!cpu.online, cpu.package, cpu.die, cpu.l3.unwrap_or(u32::MAX), cpu.kind);
        groups.entry(key).or_default().entry(cpu.core).or_default().push(cpu);
    }
    let boxes = groups.into_iter().map(|((is_offline, .., kind), cores)| {
        let first = cores.values().flatten().next();
        let l3 = match first.and_then(|cpu| cpu.l3.and(cpu.l3_bytes)) {
            Some(bytes) => format!("L3 {}", size(bytes)),
            None => "no L3".into(),
        };
        let kind = if machine.is_hybrid() { format!(" {}", kind.label()) } else { String::new() };
        let title = if is_offline { "offline".into() } else { format!("{l3}{kind}") };
        L3Box { title, cores: cores.into_values().collect() }
    });
    let (mut x, mut top, mut bottom) = (GAP * 3, y + LINE + GAP, y + LINE + GAP);
    let mut placed = Vec::new();
    for group in boxes {
        let (width, height) = group.extent();
        if x + width > WIDTH - GAP * 3 && x > GAP * 3 {
            (x, top) = (GAP * 3, bottom + GAP);
        }
        bottom = bottom.max(top + height);
        placed.push(((x, top), group));
        x += width + GAP;
    }
    let memory = node.and_then(|id| machine.nodes.iter().find(|node| node.id == id)?.memory_bytes);
    let memory = memory.map_or_else(String::new, |bytes| format!(", {}", memory_words(bytes)));
    canvas.rect((GAP, y), (WIDTH - 2 * GAP, bottom + GAP - y), "#fafafa", "#999999");
    let title = node.map_or_else(|| "no memory node".to_owned(), |id| format!("node {id}{memory}"));
    canvas.text((GAP * 2, y + LINE - 2), "node", &title);
    for (at, group) in placed {
        draw_l3(canvas, at, &group, look);
    }
    bottom + 2 * GAP
}

fn draw_l3(
    canvas: &mut Canvas,
    at: (usize, usize),
    group: &L3Box<'_>,
    look: &dyn Fn(&Cpu) -> (String, &'static str),
) {
    let (x, y) = at;
    canvas.rect(at, group.extent(), "#ffffff", "#bbbbbb");
    canvas.text((x + GAP, y + 14), "l3", &group.title);
    let row_height = group.n_siblings() * CELL + GAP;
    for (idx, core) in group.cores.iter().enumerate() {
        let (column, row) = (idx % CORES_PER_ROW, idx / CORES_PER_ROW);
        let (core_x, core_y) = (x + GAP + column * (CELL + 4), y + LINE + 2 + row * row_height);
        for (sibling, cpu) in core.iter().enumerate() {
            let (fill, stroke) = look(cpu);
            let top = core_y + sibling * CELL;
            canvas.rect((core_x, top), (CELL, CELL), &fill, stroke);
            canvas.text((core_x + CELL / 2, top + CELL / 2 + 4), "cpu", &cpu.id.to_string());
        }
    }
}

/// Workers with their colours, two in a row, then what there is to warn of.
fn draw_legend(canvas: &mut Canvas, plan: Option<&Plan>, y: usize) -> usize {
    let Some(plan) = plan else { return y };
    let column_width = WIDTH / 2 - 2 * GAP;
    for (idx, worker) in plan.workers.iter().enumerate() {
        let (x, y) = (GAP * 2 + idx % 2 * column_width, y + idx / 2 * (LINE + 4));
        canvas.rect((x, y - 13), (16, 16), &colour(idx), "#333333");
        let memory = worker.memory_words();
        let list = cpu_list::format(&worker.cpus);
        let text = format!("worker {idx}: {} threads, CPUs {list}{memory}", worker.cpus.len());
        let cut: String =
            if text.chars().count() > 72 { text.chars().take(71).chain(['…']).collect() } else { text };
        canvas.text((x + 24, y), "worker", &cut);
    }
    let mut y = y + plan.workers.len().div_ceil(2) * (LINE + 4) + GAP;
    for warning in &plan.warnings {
        canvas.text((GAP * 2, y), "warning", &format!("! {warning}"));
        y += LINE;
    }
    y
}

/// A light colour for each worker; neighbours differ by the golden angle, so that they differ well.
fn colour(worker: usize) -> String {
    let hue = (worker * 137 + 205) % 360;
    let lightness = if (worker / 8).is_multiple_of(2) { 186 } else { 160 };
    // From hue to red, green and blue: each channel is a trapezoid around its own third of the circle.
    let channel = |offset: usize| {
        let position = (hue + offset) % 360;
        let level = match position {
            0..60 | 300..360 => 60,
            60..120 => 120 - position,
            240..300 => position - 240,
            _ => 0,
        };
        (lightness - 70 + level * 135 / 60).min(255)
    };
    format!("#{:02x}{:02x}{:02x}", channel(0), channel(240), channel(120))
}

#[cfg(test)]
mod tests {
    use bitnetd_config::{AffinityConfig, Profile, SplitConfig};

    use super::*;

    #[test]
    fn every_cpu_and_worker_is_in_the_picture_and_text_is_escaped() {
        let mut machine = super::super::drawing::tests::machine();
        machine.model_name = Some("A <B> & C".into());
        let affinity = AffinityConfig::default();
        let plan =
            bitnetd_placement::plan(&machine, &SplitConfig::Profile(Profile::Balanced), &affinity).unwrap();
        let picture = draw(&machine, &machine.usable(&[]), Some(&plan));
        assert!(picture.contains("A &lt;B&gt; &amp; C"));
        assert!((0..16).all(|cpu| picture.contains(&format!("class=\"cpu\">{cpu}</text>"))));
        assert!((0..plan.workers.len()).all(|worker| picture.contains(&format!("worker {worker}:"))));
        assert_eq!(picture.matches('<').count(), picture.matches('>').count());
    }

    #[test]
    fn workers_have_different_colours() {
        let colours: std::collections::BTreeSet<String> = (0..24).map(colour).collect();
        assert_eq!(colours.len(), 24);
        assert!(colours.iter().all(|colour| colour.len() == 7), "{colours:?}");
    }
}
