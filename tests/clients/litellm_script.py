"""LiteLLM against a real model. Prints one JSON object with what it saw."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm

litellm.suppress_debug_info = True
MODEL = "openai/smollm2-135m"
OPTIONS: dict[str, Any] = {"api_base": sys.argv[1] + "/v1", "api_key": "unused"}
SHORT = [{"role": "user", "content": "Tell me a story."}]
LONG = [{"role": "user", "content": "a " * 9000}]


def main() -> None:
    """A turn, a stream, a text to go on with, an overflow, and a fallback to a model with a longer context."""
    found: dict[str, Any] = {}
    whole = litellm.completion(model=MODEL, messages=SHORT, max_tokens=8, seed=1, **OPTIONS)
    found["text"] = whole.choices[0].message.content
    parts = litellm.completion(model=MODEL, messages=SHORT, max_tokens=8, stream=True, **OPTIONS)
    found["streamed"] = "".join(part.choices[0].delta.content or "" for part in parts)
    text = litellm.text_completion(
        model="text-completion-openai/smollm2-135m", prompt="Once upon a time", max_tokens=6, **OPTIONS
    )
    found["completion"] = text.choices[0].text
    try:
        litellm.completion(model=MODEL, messages=LONG, max_tokens=8, **OPTIONS)
    except litellm.ContextWindowExceededError as error:
        found["overflow"] = type(error).__name__
    router = litellm.Router(
        model_list=[
            {"model_name": "small", "litellm_params": {"model": MODEL, **OPTIONS}},
            {
                "model_name": "large",
                "litellm_params": {"model": "openai/large", "api_key": "unused", "mock_response": "from the large one"},
            },
        ],
        context_window_fallbacks=[{"small": ["large"]}],
        num_retries=0,
    )
    found["stayed"] = router.completion(model="small", messages=SHORT, max_tokens=8).choices[0].message.content
    found["fell_back"] = router.completion(model="small", messages=LONG, max_tokens=8).choices[0].message.content
    print(json.dumps(found))


if __name__ == "__main__":
    main()
