//! Enums whose values have names in the configuration file.

use crate::sections::{
    Confinement, CopyPolicy, CoreChoice, HeadChoice, LogFormat, NumaPolicy, Profile, SchedulerChoice,
    SmtPolicy,
};

/// A closed set of named values.
pub trait Choice: Copy + PartialEq + 'static {
    /// Every value with its name, in the order in which they are offered.
    const CHOICES: &'static [(&'static str, Self)];

    /// The name of this value in the configuration file and on the command line.
    fn name(self) -> &'static str {
        Self::CHOICES.iter().find(|(_, value)| *value == self).map_or("", |(name, _)| name)
    }

    /// The value with this name.
    fn from_name(name: &str) -> Option<Self> {
        Self::CHOICES.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
    }
}

impl Choice for HeadChoice {
    const CHOICES: &'static [(&'static str, Self)] =
        &[("auto", Self::Auto), ("file", Self::File), ("fast", Self::Fast)];
}

impl Choice for Profile {
    const CHOICES: &'static [(&'static str, Self)] = &[
        ("auto", Self::Auto),
        ("max-throughput", Self::MaxThroughput),
        ("balanced", Self::Balanced),
        ("high-concurrency", Self::HighConcurrency),
        ("low-latency", Self::LowLatency),
    ];
}

impl Choice for SmtPolicy {
    const CHOICES: &'static [(&'static str, Self)] =
        &[("spread", Self::Spread), ("pack", Self::Pack), ("off", Self::Off)];
}

impl Choice for SchedulerChoice {
    const CHOICES: &'static [(&'static str, Self)] = &[("normal", Self::Normal), ("batch", Self::Batch)];
}

impl Choice for CoreChoice {
    const CHOICES: &'static [(&'static str, Self)] =
        &[("all", Self::All), ("performance", Self::Performance), ("efficiency", Self::Efficiency)];
}

impl Choice for NumaPolicy {
    const CHOICES: &'static [(&'static str, Self)] = &[
        ("auto", Self::Auto),
        ("bind", Self::Bind),
        ("preferred", Self::Preferred),
        ("interleave", Self::Interleave),
        ("off", Self::Off),
    ];
}

impl Choice for CopyPolicy {
    const CHOICES: &'static [(&'static str, Self)] = &[("none", Self::None), ("node", Self::Node)];
}

impl Choice for Confinement {
    const CHOICES: &'static [(&'static str, Self)] =
        &[("auto", Self::Auto), ("require", Self::Require), ("off", Self::Off)];
}

impl Choice for LogFormat {
    const CHOICES: &'static [(&'static str, Self)] =
        &[("auto", Self::Auto), ("text", Self::Text), ("json", Self::Json), ("journald", Self::Journald)];
}
