"""LangChain against a real model. Prints one JSON object with what it saw."""

from __future__ import annotations

import json
import sys
from typing import Any

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

OPTIONS: dict[str, Any] = {
    "base_url": sys.argv[1] + "/v1",
    "api_key": "unused",
    "model": "smollm2-135m",
    "max_retries": 0,
    "timeout": 120,
}


def talk(model: ChatOpenAI) -> Any:
    """A turn, a stream, a history, and an overflow."""
    history = [
        SystemMessage("Be brief."),
        HumanMessage("hi", id="1"),
        AIMessage("hello", additional_kwargs={"reasoning_content": "a greeting"}, id="2"),
        HumanMessage([{"type": "text", "text": "say"}, {"type": "text", "text": "something"}]),
    ]
    answer = model.invoke(history)
    found = {"text": answer.text, "usage": answer.usage_metadata and answer.usage_metadata["output_tokens"]}
    found["streamed"] = "".join(chunk.text for chunk in model.stream("Tell me a story."))
    try:
        model.invoke("a " * 9000)
    except ContextOverflowError as error:
        found["overflow"] = type(error).__name__
    return found


def main() -> None:
    """All of it."""
    found = {
        "chat": talk(ChatOpenAI(**OPTIONS, max_completion_tokens=10, seed=3)),
        "responses": talk(ChatOpenAI(**OPTIONS, max_completion_tokens=10, use_responses_api=True)),
        "completions": OpenAI(**OPTIONS, max_tokens=6).invoke("Once upon a time"),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
