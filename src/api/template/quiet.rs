use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook},
    sync::Once,
};

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`, and returns what it says if it panics. What clients can cause at will must not fill the log: nothing is
/// printed, where the panic hook would print a message each time. The caller sees to it that nothing half-done is left.
pub(super) fn catch_panic<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = take_hook();
        set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                loud(panic);
            }
        }));
    });
    QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    QUIET.set(false);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().copied();
        text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("?").to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_caught_with_its_text_and_only_then_is_the_thread_quiet() {
        assert_eq!(catch_panic(|| QUIET.get()), Ok(true));
        assert!(!QUIET.get());
        assert_eq!(catch_panic(|| -> () { panic!("a {}", 1) }), Err("a 1".into()));
        assert_eq!(catch_panic(|| -> () { panic!("text") }), Err("text".into()));
        assert!(!QUIET.get());
    }
}
