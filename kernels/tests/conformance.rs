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

type OnEmulated = OnDevice<engine_cuda_emulated::Emulated>;
