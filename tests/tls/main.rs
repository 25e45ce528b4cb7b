//! Tests connections between processes over TLS 1.3. Feature `tls`.

/// An environment with other values of some fields.
macro_rules! with {
    ($env:expr $(, $field:ident = $value:expr)* $(,)?) => {{
        let mut env = $env;
        $(env.$field = $value;)*
        env
    }};
}

mod audit;
mod certificates;
mod data;
mod job;
mod refusals;
#[path = "../suite/relay.rs"]
mod relay;
mod roles;
