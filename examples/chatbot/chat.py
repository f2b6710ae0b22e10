"""A conversation with a GGUF file in llama-cpp-python: chat.py FILE [QUESTION ...]. Every turn sees the ones before it."""
import sys

import llama_cpp

QUESTIONS = ["Hello! Who are you?", "What is a young dog called?", "What is 3 + 4?"]
llama = llama_cpp.Llama(sys.argv[1], n_ctx=512, seed=0, verbose=False)
messages = []
for question in sys.argv[2:] or QUESTIONS:
    messages.append({"role": "user", "content": question})
    # The chat template and the end-of-turn token are those in the file.
    answer = llama.create_chat_completion(messages, temperature=0, max_tokens=100)["choices"][0]
    if answer["finish_reason"] != "stop":
        sys.exit(f"no end of turn within 100 tokens: {answer}")
    messages.append(answer["message"])
    print(f"user       {question}\nassistant  {answer['message']['content']}", flush=True)
