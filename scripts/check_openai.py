#!/usr/bin/env python3
"""The official OpenAI client against a running `ferrotune serve`: scripts/check_openai starts one and calls this.

    python check_openai.py http://127.0.0.1:8000/v1

Needs the package openai. Prints what was checked; the first difference ends it with an error.
"""
import json
import sys

import openai
from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="check-key", max_retries=0)
QUESTION = [{"role": "user", "content": "What is the opposite of hot?"}]
ANSWER = "The opposite of hot is cold."


def raises(error, call):
    try:
        call()
    except error as found:
        return found
    raise AssertionError(f"expected {error.__name__}")


def models():
    listed = client.models.list().data
    assert [model.id for model in listed] == ["tiny"], listed
    assert client.models.retrieve("tiny") == listed[0]
    return listed[0].id


model = models()


def chat():
    reply = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    choice = reply.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (ANSWER, "assistant", "stop"), reply
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.completion_tokens > 3 and reply.model == model and reply.object == "chat.completion"


def chat_stream():
    chunks = list(client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ANSWER, text
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    # The client's own helper, which checks the order of events.
    with client.chat.completions.stream(model=model, messages=QUESTION, temperature=0) as stream:
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def sampling():
    talk = [{"role": "user", "content": "Tell me a story."}]
    ask = dict(model=model, messages=talk, temperature=2, n=3, max_completion_tokens=24)
    texts = lambda seed: [choice.message.content for choice in client.chat.completions.create(seed=seed, **ask).choices]
    first = texts(5)
    assert first == texts(5) and len(set(first)) > 1 and len(first) == 3, first
    reply = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, stop=[" is"], presence_penalty=0.1, frequency_penalty=0.1, top_p=0.9)
    assert reply.choices[0].message.content == "The opposite of hot" and reply.choices[0].finish_reason == "stop"
    reply = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=3)
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 3


def logprobs():
    reply = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=2, max_tokens=5)
    content = reply.choices[0].logprobs.content
    assert len(content) == 5
    for token in content:
        assert token.logprob <= 0 and token.top_logprobs[0].logprob == token.logprob
        assert token.top_logprobs[0].token == token.token and bytes(token.bytes).decode() == token.token
    reply = client.completions.create(model=model, prompt="The sky", temperature=0, logprobs=2, max_tokens=4)
    found = reply.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 4


def completions():
    one = client.completions.create(model=model, prompt="The sky", temperature=0, max_tokens=8)
    assert one.object == "text_completion" and one.usage.completion_tokens <= 8
    several = client.completions.create(model=model, prompt=["The sky", "The sky"], temperature=0, max_tokens=8, n=2)
    assert [choice.text for choice in several.choices] == [one.choices[0].text] * 4
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    chunks = list(client.completions.create(model=model, prompt="The sky", temperature=0, max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == one.choices[0].text


def structured():
    schema = {"type": "object", "additionalProperties": False, "required": ["colour", "count"], "properties": {
        "colour": {"type": "string", "enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}}}
    response_format = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    for seed in range(3):
        reply = client.chat.completions.create(
            model=model, messages=QUESTION, temperature=1, seed=seed, response_format=response_format)
        found = json.loads(reply.choices[0].message.content)
        assert found["colour"] in ("red", "blue") and 0 <= found["count"] <= 99, found


def tools():
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    # The model knows no tools: it answers, and a conversation with calls in it is read.
    reply = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, tools=[tool])
    assert reply.choices[0].message.content == ANSWER and not reply.choices[0].message.tool_calls
    called = QUESTION + [
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{\"place\": \"here\"}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "hot"}]
    assert client.chat.completions.create(model=model, messages=called, max_tokens=4).choices


def errors():
    chat = client.chat.completions.create
    assert raises(openai.NotFoundError, lambda: chat(model="other", messages=QUESTION)).code == "model_not_found"
    long = [{"role": "user", "content": "word " * 2000}]
    assert raises(openai.BadRequestError, lambda: chat(model=model, messages=long)).code == "context_length_exceeded"
    bad = raises(openai.BadRequestError, lambda: chat(model=model, messages=QUESTION, temperature=-1))
    assert bad.type == "invalid_request_error"
    stranger = OpenAI(base_url=sys.argv[1], api_key="wrong", max_retries=0)
    raises(openai.AuthenticationError, stranger.models.list)


for check in (chat, chat_stream, sampling, logprobs, completions, structured, tools, errors):
    check()
    print(f"openai {openai.__version__}: {check.__name__} ok")
