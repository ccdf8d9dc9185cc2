//! What the workers of each slot are started with: one edition for each configuration that still has slots.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bitnetd_placement::WorkerPlacement;
use bitnetd_proto::error::WireError;
use bitnetd_proto::worker_link::WorkerSetup;

use crate::image::{ModelImage, ModelSource};
use crate::kept_image;
use crate::node_copy::{self, NodeCopies};
use crate::report;
use crate::service::ServiceSpec;
use crate::state::{Edition, ModelId, NewConfig, Policy, SlotId, State, slot_edition, slot_number};

/// One configuration and its model.
#[derive(Clone, Debug)]
pub(crate) struct Prepared {
    pub(crate) spec: ServiceSpec,
    pub(crate) image: Arc<ModelImage>,
    /// Copies of it that nodes of their own have.
    pub(crate) copies: NodeCopies,
    /// The edition that brought the model.
    model: ModelId,
}

/// The present configuration, former ones that still have workers, and one that is on trial.
#[derive(Debug)]
pub(crate) struct Editions {
    present: Edition,
    all: BTreeMap<Edition, Prepared>,
}

impl Editions {
    pub(crate) fn new(spec: ServiceSpec, image: ModelImage, copies: NodeCopies) -> Self {
        let first = Prepared { spec, image: Arc::new(image), copies, model: 0 };
        Self { present: 0, all: BTreeMap::from([(0, first)]) }
    }

    /// The present configuration.
    ///
    /// # Panics
    /// Never: the present edition is only replaced by one that is there, and never forgotten.
    pub(crate) fn present(&self) -> &Prepared {
        &self.all[&self.present]
    }

    /// What the processes of a slot are started with.
    pub(crate) fn of_slot(&self, slot: SlotId) -> Option<(&Prepared, &WorkerPlacement)> {
        let prepared = self.all.get(&slot_edition(slot))?;
        let place = prepared.spec.plan.workers.get(usize::try_from(slot_number(slot)).ok()?)?;
        Some((prepared, place))
    }

    /// Opens the model of a new configuration, and finds what of the present one goes on as it is.
    pub(crate) fn prepare(&mut self, spec: ServiceSpec, state: &State) -> Result<NewConfig, WireError> {
        let present = self.present();
        let mut opened = ModelImage::open(&spec.model).map_err(|error| error.to_wire())?;
        opened.set_kept(kept_image::find(spec.image_cache.as_deref(), &spec.config, &opened));
        let is_same_file = match (&spec.model, &present.spec.model) {
            (ModelSource::BuiltIn(new), ModelSource::BuiltIn(old)) => new == old,
            _ => opened.is_same_file(&present.image),
        };
        // The same weights, read in the same way: the answers are the same, so that jobs may move.
        let engine = |spec: &ServiceSpec| (spec.config.engine.ctx, spec.config.engine.kv_type.clone());
        let is_same_model = is_same_file
            && spec.config.model.head == present.spec.config.model.head
            && engine(&spec) == engine(&present.spec);
        let edition = self.unused();
        let model = if is_same_model { present.model } else { edition };
        let image = if is_same_model { present.image.clone() } else { Arc::new(opened) };
        let there = if is_same_model { present.copies.clone() } else { NodeCopies::new() };
        let copies = node_copy::for_plan(&spec.plan, &there).map_err(|error| error.to_wire())?;
        // How many others there are, and what all may take together, matters only when a worker starts.
        let settings = |number, spec: &ServiceSpec, place: &WorkerPlacement| WorkerSetup {
            n_workers: 0,
            n_threads: 0,
            n_copies: 0,
            memory_bytes: 0,
            ..report::worker_setup(number, spec, place)
        };
        let seats = (0..).zip(&spec.plan.workers).map(|(number, place)| {
            let slot = state.slot_with_number(number)?;
            let (old, old_place) = self.of_slot(slot)?;
            let is_same = is_same_model
                && place == old_place
                && spec.worker_program == old.spec.worker_program
                && spec.config.affinity.numa == old.spec.config.affinity.numa
                && settings(number, &spec, place) == settings(number, &old.spec, old_place);
            is_same.then_some(slot)
        });
        let config = NewConfig { edition, policy: Policy::new(&spec.config), model, seats: seats.collect() };
        self.all.insert(edition, Prepared { spec, image, copies, model });
        Ok(config)
    }

    /// The edition holds from now on.
    pub(crate) fn take_over(&mut self, edition: Edition) {
        let Some(args) = self.all.get(&edition).map(|prepared| prepared.spec.worker_args.clone()) else {
            return;
        };
        self.present = edition;
        // Slots that go on: their next processes log as everything else does now.
        for prepared in self.all.values_mut() {
            prepared.spec.worker_args.clone_from(&args);
        }
    }

    /// Forgets the editions that have no slot any more, and with them their models; and copies for nodes without one.
    pub(crate) fn forget_unused(&mut self, state: &State) {
        let (present, change) = (self.present, state.edition_on_trial());
        self.all.retain(|&edition, _| {
            let is_used = state.slots().iter().any(|slot| slot_edition(slot.id) == edition);
            is_used || edition == present || Some(edition) == change
        });
        for (&edition, prepared) in &mut self.all {
            if edition == present || Some(edition) == change || prepared.copies.is_empty() {
                continue;
            }
            let slots = state.slots().iter().filter(|slot| slot_edition(slot.id) == edition);
            let places = slots.filter_map(|slot| {
                prepared.spec.plan.workers.get(usize::try_from(slot_number(slot.id)).ok()?)
            });
            let nodes: BTreeSet<u32> = places.filter_map(|place| place.copy_node).collect();
            prepared.copies.retain(|node, _| nodes.contains(node));
        }
    }

    fn unused(&self) -> Edition {
        let mut edition = self.present.wrapping_add(1);
        while self.all.contains_key(&edition) {
            edition = edition.wrapping_add(1);
        }
        edition
    }
}
