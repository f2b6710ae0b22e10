//! Tools from the request to the call and from its result to the answer, with a model that has learnt one conversation.

use std::fs;
use std::path::Path;
use std::process::Command;

use ferrotune::generate::KvBudget;
use ferrotune::models::FastLanguageModel;
use ferrotune::serve::ServeOptions;
use serde_json::{Value, json};
use tch::{Device, Kind};

use crate::server::{CHAT, Running, dir, limits};

/// The example model's template, with tools as Hermes and Qwen write them.
const TEMPLATE: &str = r#"{%- if tools %}<|im_start|>system
<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools><|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"#;

/// A copy of the example model that has learnt `row` by heart.
fn taught(folder: &Path, row: &Value) -> FastLanguageModel {
    let (model, output) = (folder.join("model"), folder.join("taught"));
    fs::create_dir(&model).unwrap();
    for file in fs::read_dir(dir()).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), model.join(file.file_name())).unwrap();
    }
    fs::write(model.join("chat_template.jinja"), TEMPLATE).unwrap();
    let data = folder.join("data.jsonl");
    fs::write(&data, format!("{row}\n")).unwrap();
    let output = output.to_str().unwrap();
    let trained = Command::new(env!("CARGO_BIN_EXE_ferrotune"))
        .args(["train", "--device", "cpu", "--threads", "1", "--full-finetuning", "--max-seq-length", "512"])
        .args(["--max-steps", "60", "--learning-rate", "1e-3", "--per-device-train-batch-size", "1"])
        .args(["--output-dir", output, "--model", model.to_str().unwrap()])
        .args(["--dataset", data.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(trained.status.success(), "{}", String::from_utf8_lossy(&trained.stderr));
    FastLanguageModel::from_pretrained(Path::new(output), Kind::Float, Device::Cpu).unwrap()
}

#[test]
fn a_tool_is_called_and_its_result_answered() {
    let tools = json!([{"type": "function", "function": {
        "name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}
    }}]);
    let asked = json!({"role": "user", "content": "Is it cold in Oslo?"});
    let called = |arguments: Value| {
        json!({"role": "assistant", "content": "Let me see.", "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        ]})
    };
    let result = json!({"role": "tool", "tool_call_id": "call_1", "content": "4 degrees"});
    let answer = "Yes, it is cold there.";
    let row = json!({"tools": tools, "messages": [
        asked, called(json!({"city": "Oslo"})), result, {"role": "assistant", "content": answer}
    ]});
    let folder = tempfile::tempdir().unwrap();
    let options = ServeOptions { limits: limits(), api_key: None, runtime_lora: false };
    let server = Running::on(taught(folder.path(), &row), KvBudget::Tokens(4096), options);

    let request = json!({"messages": [asked], "tools": tools, "temperature": 0});
    let (status, reply) = server.post(CHAT, &request);
    assert_eq!(status, 200, "{reply}");
    let choice = &reply["choices"][0];
    assert_eq!(choice["finish_reason"], json!("tool_calls"), "{reply}");
    assert_eq!(choice["message"]["content"], json!("Let me see."));
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("get_weather")));
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert_eq!(arguments, json!({"city": "Oslo"}));
    assert!(call["id"].as_str().unwrap().starts_with("call_") && call.get("index").is_none(), "{call}");

    // The same as it comes: what is no call is shown before, and nothing of the call is shown as text.
    let mut streamed = request.clone();
    streamed["stream"] = json!(true);
    let chunks = server.stream(CHAT, &streamed);
    let deltas: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]).collect();
    let text: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
    assert_eq!(text.trim(), "Let me see.");
    assert!(deltas.iter().filter(|delta| delta["content"].is_string()).count() > 3, "{deltas:?}");
    let calls: Vec<&Value> =
        deltas.iter().filter_map(|delta| delta["tool_calls"].as_array()).flatten().collect();
    assert_eq!(calls.len(), 1, "{deltas:?}");
    assert_eq!((&calls[0]["index"], &calls[0]["function"]), (&json!(0), &call["function"]));
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], json!("tool_calls"));

    // The call goes back as the client got it, its arguments a text, with what the tool said.
    let turn = json!([asked, called(json!("{\"city\": \"Oslo\"}")), result]);
    let (status, reply) = server.post(CHAT, &json!({"messages": turn, "tools": tools, "temperature": 0}));
    assert_eq!(status, 200, "{reply}");
    let choice = &reply["choices"][0];
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!(answer), &json!("stop")));

    // Who wants no calls sees text.
    let mut none = request;
    none["tool_choice"] = json!("none");
    let (_, reply) = server.post(CHAT, &none);
    assert!(reply["choices"][0]["message"].get("tool_calls").is_none(), "{reply}");
    server.settle();
    server.stop();
}
