//! Conversations to token ids, with the assistant's turns marked.
//!
//! What the assistant says at message i is what the template adds between
//!
//! ```text
//! before = render(messages[..i], add_generation_prompt = true)      where the model begins to answer
//! after  = render(messages[..=i], add_generation_prompt = false)    where its answer, end token included, is over
//! ```
//!
//! provided `before` is a prefix of `after` and `after` of the whole conversation; a template for which they are not
//! (one that cuts old turns, or writes into an answer what it does not put into the prompt) is refused. The ids are
//! those of the whole text, as Hugging Face encodes it. The answer's first token is where these ids and those of
//! `before` part, so that what is trained is what generation continues; a token that straddles the boundary counts
//! as the assistant's. What follows the last answer is left out, for nothing in it is trained.

use crate::data::template::ChatTemplate;
use crate::data::tokenizer::Tokenizer;
use crate::{Error, Result};
use serde_json::Value;
use std::ops::Range;

/// A conversation up to its last answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// The tokens.
    pub ids: Vec<u32>,
    /// The assistant's among them, in order, disjoint; the last ends where the tokens end.
    pub answers: Vec<Range<usize>>,
    /// Characters of the answers.
    pub characters: usize,
}

/// Encode `messages` (objects with a `role` and whatever else the template reads).
///
/// Errors: no message of the assistant; a template that fails, or whose answers cannot be told from its prompts.
pub fn encode(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Value],
    tools: &Value,
) -> Result<Conversation> {
    let spoken = |m: &Value| m["role"] == "assistant";
    let Some(last) = messages.iter().rposition(spoken) else {
        return Err(Error::ChatTemplate { why: "no message has the role \"assistant\": nothing to train on".into() });
    };
    let messages = &messages[..=last];
    let whole = template.render(messages, tools, false)?;
    let ids = tokenizer.encode(&whole, false)?;
    let mut answers: Vec<Range<usize>> = Vec::new();
    let mut characters = 0;
    for i in (0..messages.len()).filter(|&i| spoken(&messages[i])) {
        let unstable = |what: &str| {
            let why = format!("messages[{i}]: {what}: the assistant's text cannot be told from the template's");
            Error::ChatTemplate { why }
        };
        let before = template.render(&messages[..i], tools, true)?;
        let after = template.render(&messages[..=i], tools, false)?;
        if !whole.starts_with(&after) {
            return Err(unstable("the text so far changes with the messages that follow"));
        }
        let Some(answer) = after.strip_prefix(&before) else {
            return Err(unstable("the generation prompt is not how the answer begins"));
        };
        let start = common_prefix(&ids, &tokenizer.encode(&before, false)?);
        let end = if i == last { ids.len() } else { common_prefix(&ids, &tokenizer.encode(&after, false)?) };
        // Consecutive answers may share a straddling token: it is trained once.
        let start = start.max(answers.last().map_or(0, |a| a.end));
        answers.push(start..end.max(start));
        characters += answer.chars().count();
    }
    Ok(Conversation { ids, answers, characters })
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    const LLAMA_3: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";

    const MISTRAL: &str = "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}";

    /// Bytes and a few merges, with the special tokens of the three templates.
    fn tokenizer(template: &str) -> Tokenizer {
        let trained = Tokenizer::train_bpe("assistant user system assistant answer answer", 280).unwrap();
        let [(_, json), _] = trained.files().unwrap();
        let mut json: Value = serde_json::from_str(&json).unwrap();
        let names =
            ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>"];
        let added = json["added_tokens"].as_array_mut().unwrap();
        for (i, name) in names.iter().enumerate() {
            let mut token = added[0].clone();
            token["id"] = (280 + i).into();
            token["content"] = (*name).into();
            added.push(token);
        }
        let config = json!({ "bos_token": "<s>", "eos_token": { "content": "</s>" }, "chat_template": template });
        Tokenizer::from_bytes(json.to_string().as_bytes(), config.to_string().as_bytes()).unwrap()
    }

    /// The whole text, and the assistant's parts of it.
    fn parts(template: &str, messages: &Value) -> Result<(String, Vec<String>)> {
        let tokenizer = tokenizer(template);
        let messages = messages.as_array().unwrap();
        let chat = encode(&tokenizer, &tokenizer.chat_template()?, messages, &Value::Null)?;
        let answers = chat.answers.iter().map(|a| tokenizer.decode(&chat.ids[a.clone()], true).unwrap()).collect();
        Ok((tokenizer.decode(&chat.ids, true)?, answers))
    }

    fn two_turns() -> Value {
        json!([
            { "role": "user", "content": "one?" }, { "role": "assistant", "content": "1" },
            { "role": "user", "content": "two?" }, { "role": "assistant", "content": "answer 2" },
            { "role": "user", "content": "unanswered" }
        ])
    }

    /// The whole texts are what transformers renders from the first four messages.
    #[test]
    fn chatml_masks_the_answers_alone() {
        let (text, answers) = parts(CHATML, &two_turns()).unwrap();
        let turn = |role: &str, content: &str| format!("<|im_start|>{role}\n{content}<|im_end|>\n");
        let system = turn("system", "You are a helpful AI assistant.");
        let turns = [turn("user", "one?"), turn("assistant", "1"), turn("user", "two?"), turn("assistant", "answer 2")];
        assert_eq!(text, system + &turns.concat());
        assert_eq!(answers, ["1<|im_end|>\n", "answer 2<|im_end|>\n"]);
    }

    #[test]
    fn llama_3_masks_the_answers_alone() {
        let (text, answers) = parts(LLAMA_3, &two_turns()).unwrap();
        let turn =
            |role: &str, content: &str| format!("<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>");
        let turns = [turn("user", "one?"), turn("assistant", "1"), turn("user", "two?"), turn("assistant", "answer 2")];
        assert_eq!(text, "<s>".to_owned() + &turns.concat());
        assert_eq!(answers, ["1<|eot_id|>", "answer 2<|eot_id|>"]);
    }

    #[test]
    fn mistral_masks_the_answers_alone() {
        let (text, answers) = parts(MISTRAL, &two_turns()).unwrap();
        assert_eq!(text, "<s>[INST] one? [/INST]1</s>[INST] two? [/INST]answer 2</s>");
        assert_eq!(answers, ["1</s>", "answer 2</s>"]);
    }

    #[test]
    fn roles_that_the_template_refuses_are_its_error() {
        let error = parts(MISTRAL, &json!([{ "role": "assistant", "content": "1" }])).unwrap_err().to_string();
        assert!(error.contains("roles must alternate"), "{error}");
    }

    #[test]
    fn a_conversation_without_an_answer_is_an_error() {
        let error = parts(CHATML, &json!([{ "role": "user", "content": "?" }])).unwrap_err().to_string();
        assert_eq!(error, "chat template: no message has the role \"assistant\": nothing to train on");
    }

    #[test]
    fn a_template_that_rewrites_the_past_is_refused() {
        // It shows only the last message, as templates that cut old reasoning do.
        let last = "{{ messages[-1].content }}{% if add_generation_prompt %}:{% endif %}";
        let error = parts(last, &two_turns()).unwrap_err().to_string();
        assert!(error.contains("messages[1]: the text so far changes with the messages that follow"), "{error}");
        let prompt = "{% for m in messages %}{{ m.content }};{% endfor %}{% if add_generation_prompt %}<s>{% endif %}";
        let error = parts(prompt, &two_turns()).unwrap_err().to_string();
        assert!(error.contains("messages[1]: the generation prompt is not how the answer begins"), "{error}");
    }

    #[test]
    fn a_token_across_the_boundary_is_the_assistants() {
        // " an" + "swer" is one word and one token; the answer begins inside it.
        let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
        let chat = json!([{ "role": "user", "content": " an" }, { "role": "assistant", "content": "swer" }]);
        assert_eq!(parts(template, &chat).unwrap().1, [" answer"]);
    }
}
