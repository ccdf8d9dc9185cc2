//! Copies of the model, one for a memory node: memory that the first worker of the node fills and seals, and that all
//! workers of the node map.
//!
//! The supervisor only makes the descriptors. Where the pages lie follows from who fills them: a worker whose own memory
//! is bound to the node (`bitnetd_placement` gives a copy to no other).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use bitnetd_placement::Plan;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::image::ImageError;

/// The copies of one model, by their nodes.
pub(crate) type NodeCopies = BTreeMap<u32, Arc<NodeCopy>>;

/// Memory for what the workers of one node map.
#[derive(Debug)]
pub(crate) struct NodeCopy {
    model: OwnedFd,
    image: OwnedFd,
}

impl NodeCopy {
    /// Empty memory, for workers to fill.
    fn new() -> io::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        Ok(Self {
            model: memfd_create(c"bitnetd-copy", flags)?,
            image: memfd_create(c"bitnetd-head", flags)?,
        })
    }

    /// For the model's bytes.
    pub(crate) fn model(&self) -> BorrowedFd<'_> {
        self.model.as_fd()
    }

    /// For the fast image.
    pub(crate) fn image(&self) -> BorrowedFd<'_> {
        self.image.as_fd()
    }

    /// Takes a copy that was filled and sealed in an earlier life of the service.
    pub(crate) fn set_model(&mut self, memory: OwnedFd) {
        self.model = memory;
    }

    /// The same of the fast image.
    pub(crate) fn set_image(&mut self, memory: OwnedFd) {
        self.image = memory;
    }
}

/// The copies that a plan needs: those of the same model that are there, and new ones.
pub(crate) fn for_plan(plan: &Plan, present: &NodeCopies) -> Result<NodeCopies, ImageError> {
    let copy_on = |node| match present.get(&node) {
        Some(copy) => Ok((node, copy.clone())),
        None => Ok((node, Arc::new(NodeCopy::new().map_err(ImageError::Memory)?))),
    };
    plan.copy_nodes().into_iter().map(copy_on).collect()
}

#[cfg(test)]
mod tests {
    use bitnetd_placement::WorkerPlacement;

    use super::*;

    fn plan(nodes: &[Option<u32>]) -> Plan {
        let worker =
            |copy_node: &Option<u32>| WorkerPlacement { copy_node: *copy_node, ..Default::default() };
        Plan { workers: nodes.iter().map(worker).collect(), ..Plan::default() }
    }

    #[test]
    fn a_copy_that_is_there_is_not_made_again() {
        let first = for_plan(&plan(&[Some(1), None, Some(1), Some(3)]), &NodeCopies::new()).unwrap();
        assert_eq!(first.keys().collect::<Vec<_>>(), [&1, &3]);
        let next = for_plan(&plan(&[Some(3), Some(0)]), &first).unwrap();
        assert_eq!(next.keys().collect::<Vec<_>>(), [&0, &3]);
        assert!(Arc::ptr_eq(&next[&3], &first[&3]));
        assert!(for_plan(&plan(&[None]), &next).unwrap().is_empty());
    }
}
