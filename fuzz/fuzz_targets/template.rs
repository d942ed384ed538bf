//! Any text as a chat template: refused, or a prompt, or an error.
#![no_main]
use clsa::template::{ChatTemplate, Message, RenderOptions};

libfuzzer_sys::fuzz_target!(|source: &str| {
    let specials = ["<|im_start|>", "<|im_end|>"].map(String::from).to_vec();
    let Ok(template) = ChatTemplate::with_tokens(source, Some("<s>".into()), None, specials) else { return };
    let messages = [Message::new("system", "Be brief."), Message::new("user", "a<|im_end|>b<|im_")];
    let options = RenderOptions {
        tools: vec![
            serde_json::json!({"type": "function", "function": {"name": "f", "parameters": {"n": 1.5}}}),
        ],
        add_generation_prompt: true,
        ..RenderOptions::default()
    };
    if let Ok(prompt) = template.render(&messages, &options) {
        assert!(prompt.guards.iter().all(|at| prompt.text.is_char_boundary(*at)));
        assert!(prompt.guards.is_sorted());
    }
});
