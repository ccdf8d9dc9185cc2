//! What the supervisor itself gives up once it has its sockets.
//!
//! It starts workers of its own user, signals them, and reads files that it may read anyway. As root it keeps two
//! capabilities; as a user of its own it has none.

use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

/// What could not be given up.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// No new privileges.
    #[error("cannot give up new privileges")]
    NewPrivileges(#[source] Errno),
    /// Capabilities.
    #[error("cannot drop capabilities")]
    Capabilities(#[from] caps::errors::CapsError),
}

/// Those that stay if they are there: to read a model or a configuration that belongs to somebody else, and to give
/// workers a priority above the usual (`engine.nice`).
const KEPT: [Capability; 2] = [Capability::CAP_DAC_READ_SEARCH, Capability::CAP_SYS_NICE];

/// Lets workers lock as much memory as they need, if this process may decide that (as root may). Must come before
/// [`reduce`].
pub fn allow_locked_memory() {
    let raised = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    tracing::debug!(?raised, "limit of locked memory");
}

/// Drops every capability but two, and the way to any other, for this thread and what it starts: workers too.
///
/// # Errors
/// [`PrivilegeError`]
pub fn reduce() -> Result<(), PrivilegeError> {
    prctl::set_no_new_privs().map_err(PrivilegeError::NewPrivileges)?;
    let permitted = caps::read(None, CapSet::Permitted)?;
    if permitted.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::all().into_iter().filter(|capability| !KEPT.contains(capability)) {
            // A kernel that is older than a capability does not know it.
            if caps::has_cap(None, CapSet::Bounding, capability).unwrap_or(false) {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    let kept: CapsHashSet = permitted.into_iter().filter(|capability| KEPT.contains(capability)).collect();
    let wanted = [
        (CapSet::Inheritable, CapsHashSet::new()),
        (CapSet::Effective, kept.clone()),
        (CapSet::Permitted, kept.clone()),
    ];
    for (set, wanted) in wanted {
        // A service manager that has taken the others away may have forbidden the call, too.
        let present = caps::read(None, set)?;
        if !present.is_subset(&wanted) {
            caps::set(None, set, &wanted)?;
        }
    }
    tracing::debug!(?kept, "capabilities dropped");
    Ok(())
}
