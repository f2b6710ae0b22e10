use ferrotune::data::{ChatTemplate, RenderOptions};
use serde_json::Value;
#[test]
fn all_templates() {
    let all: Value = serde_json::from_str(&std::fs::read_to_string("/tmp/dg/all.json").unwrap()).unwrap();
    let mut wrong = 0;
    for case in all["cases"].as_array().unwrap() {
        let name = format!("{} {} tools={} gen={}", case["name"].as_str().unwrap(), case["conversation"].as_str().unwrap(), case["tools"], case["gen"]);
        let mut t = match ChatTemplate::new(case["template"].as_str().unwrap(), "t") { Ok(t) => t, Err(e) => { println!("COMPILE {name}: {e:#}"); wrong += 1; continue } };
        t.set_variable("bos_token", "<s>".into());
        t.set_variable("eos_token", "</s>".into());
        t.set_now("2025-01-01T00:00:00".parse().unwrap());
        let o = RenderOptions { tools: (case["tools"] == true).then_some(&all["tools"]), add_generation_prompt: case["gen"] == true, ..Default::default() };
        let r = t.render_spans(all["conversations"][case["conversation"].as_str().unwrap()].as_array().unwrap(), &o);
        match (r, case["text"].as_str()) {
            (Ok(r), Some(text)) => {
                if r.text != text {
                    wrong += 1;
                    let at = r.text.chars().zip(text.chars()).take_while(|(a, b)| a == b).count();
                    let cut = |s: &str| s.chars().skip(at.saturating_sub(30)).take(110).collect::<String>();
                    println!("DIFF {name}\n  exp {:?}\n  got {:?}", cut(text), cut(&r.text));
                    continue;
                }
                let spans: Vec<(usize, usize)> = r.generation.iter().map(|s| (text[..s.start].chars().count(), text[..s.end].chars().count())).collect();
                let exp: Vec<(usize, usize)> = case["spans"].as_array().unwrap().iter().map(|s| (s[0].as_u64().unwrap() as usize, s[1].as_u64().unwrap() as usize)).collect();
                let mut merged: Vec<(usize, usize)> = Vec::new();
                for e in exp { if e.0 == e.1 { continue } match merged.last_mut() { Some(l) if l.1 == e.0 => l.1 = e.1, _ => merged.push(e) } }
                let exp = merged;
                if spans != exp { wrong += 1; println!("SPANS {name}\n exp {exp:?}\n got {spans:?}"); }
            }
            (Err(e), None) => {
                if let Some(m) = case["error"].as_str().unwrap().strip_prefix("TemplateError: ") { if !e.to_string().ends_with(m) { wrong += 1; println!("ERR {name}: {m} / {e:#}"); } }
            }
            (Ok(r), None) => { wrong += 1; println!("NOERR {name}: {} got {:?}", case["error"], r.text.chars().take(200).collect::<String>()); }
            (Err(e), Some(_)) => { wrong += 1; println!("FAILED {name}: {e:#}"); }
        }
    }
    println!("{wrong} wrong of {}", all["cases"].as_array().unwrap().len());
}
