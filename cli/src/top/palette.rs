//! Colours: one for each worker, or none at all (`NO_COLOR`).

use ratatui::style::{Color, Modifier, Style};

/// Colours of workers, in turn. None of them is that of a warning.
const WORKERS: [Color; 8] = [
    Color::Green,
    Color::Cyan,
    Color::Yellow,
    Color::Magenta,
    Color::Blue,
    Color::LightGreen,
    Color::LightCyan,
    Color::LightMagenta,
];

/// Which colours to use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Palette {
    has_colour: bool,
}

impl Palette {
    pub(super) fn new(has_colour: bool) -> Self {
        Self { has_colour }
    }

    fn colour(self, colour: Color) -> Style {
        if self.has_colour { Style::new().fg(colour) } else { Style::new() }
    }

    /// What belongs to a worker.
    pub(super) fn worker(self, slot: u32) -> Style {
        self.colour(WORKERS[slot as usize % WORKERS.len()])
    }

    /// What matters less.
    pub(super) fn dim(self) -> Style {
        self.colour(Color::DarkGray)
    }

    /// What needs somebody.
    pub(super) fn bad(self) -> Style {
        self.colour(Color::Red)
    }

    /// What will pass.
    pub(super) fn passing(self) -> Style {
        self.colour(Color::Yellow)
    }

    /// What is as it should be.
    pub(super) fn good(self) -> Style {
        self.colour(Color::Green)
    }

    /// Titles; bold without colours, too.
    pub(super) fn title(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    /// The table that keys move.
    pub(super) fn focused(self) -> Style {
        self.title().add_modifier(Modifier::REVERSED)
    }
}
