//! The suite (`kernels/suite`), for every backend there is without a device; `engine doctor --gpu` runs it on one.

use engine_kernel_suite::{Check, OnDevice, of_every_backend, of_every_device};

fn demand(checks: Vec<Check>, topic: &str, name: &str) {
    let check = checks.iter().find(|check| (check.topic, check.name) == (topic, name));
    check.expect("the macro lists what the function returns").demand();
}

macro_rules! tests {
    ({ $checks:ident, $of:ty } $($topic:ident: $($name:ident),+;)+) => {
        $(mod $topic {
            $(#[test]
            fn $name() {
                super::super::demand(engine_kernel_suite::$checks::<$of>(), stringify!($topic), stringify!($name));
            })+
        })+
    };
}

mod reference {
    super::of_every_backend!(tests! { { backend_checks, engine_kernels::reference::ReferenceBackend } });
}

mod cpu {
    super::of_every_backend!(tests! { { backend_checks, engine_kernels::cpu::CpuBackend } });
}

mod cuda_emulated {
    super::of_every_backend!(tests! { { backend_checks, super::super::OnEmulated } });
    super::of_every_device!(tests! { { device_checks, engine_cuda_emulated::Emulated } });
}

mod cuda_emulated_hopper {
    super::of_every_device!(tests! { { device_checks, engine_cuda_emulated::EmulatedHopper } });

    /// Of what every backend passes, a device of compute capability 9.0 computes products in another way, and what
    /// takes them in,
    #[test]
    fn products_pass_the_suite() {
        assert!(demanded(|topic, _| ["linear", "residual"].contains(&topic)) > 10);
    }

    /// and the attention of prompts.
    #[test]
    fn attention_of_prompts_passes_the_suite() {
        let decodes = |name: &str| name.starts_with("decoding_with_every") || name.starts_with("large_groups");
        assert!(demanded(|topic, name| topic == "attention" && !decodes(name)) > 8);
    }

    fn demanded(wanted: impl Fn(&str, &str) -> bool) -> usize {
        let checks = engine_kernel_suite::backend_checks::<super::OnHopper>();
        let others = checks.iter().filter(|check| wanted(check.topic, check.name));
        others.inspect(|check| check.demand()).count()
    }
}

type OnEmulated = OnDevice<engine_cuda_emulated::Emulated>;
type OnHopper = OnDevice<engine_cuda_emulated::EmulatedHopper>;
