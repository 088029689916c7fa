//! The OpenAI API: HTTP in, tokens out.

mod template;

pub use template::{ChatTemplate, RenderOptions, TemplateError};
