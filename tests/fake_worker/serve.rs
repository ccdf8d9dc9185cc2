//! A supervisor in a process of its own, so that a test can kill it: `serve SOCKET SLOTS SCRIPT…`.

use std::path::Path;

use bitnetd_config::{Config, ListenConfig};
use bitnetd_placement::{Plan, WorkerPlacement};
use bitnetd_supervisor::{Listener, ModelSource, Service, ServiceSpec};

pub(crate) fn run(args: &[String]) {
    let [socket, slots, script @ ..] = args else { panic!("serve SOCKET SLOTS SCRIPT…") };
    let n_slots: usize = slots.parse().unwrap();
    let spec = ServiceSpec {
        config: Config::default(),
        plan: Plan { workers: vec![WorkerPlacement::default(); n_slots], ..Plan::default() },
        model: ModelSource::BuiltIn(b"fake image"),
        image_cache: None,
        worker_program: std::env::current_exe().unwrap(),
        worker_args: script.iter().map(Into::into).collect(),
        memory_bytes: None,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = Listener::bind(Path::new(socket), &ListenConfig::default()).unwrap();
        let service = Service::start(spec).await.unwrap();
        listener.serve(service).await;
    });
}
