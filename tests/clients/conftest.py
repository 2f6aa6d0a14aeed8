"""The service with its smallest model, started as a user would, and what the clients need of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

MODEL = "smollm2-135m"


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where it is, without a path."""
    log = tmp_path_factory.mktemp("service") / "log"
    command = [sys.executable, "-m", "dspark_stream", "serve", MODEL, "--port", "0"]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            found = re.search(r"http://[\w.:]+", line)
            if found:
                yield found[0]
                break
        else:
            pytest.fail(f"the service did not start:\n{log.read_text()[-2000:]}")
    finally:
        process.terminate()
        process.wait(60)
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model's tokenizer, as benchmarks want one to count with: no hub is asked."""
    from transformers import PreTrainedTokenizerFast

    from dspark_stream.config import Config
    from dspark_stream.console import Progress
    from dspark_stream.models.fetch import model_path
    from dspark_stream.models.gguf import GgufFile
    from dspark_stream.models.tokenizer import codec_from_gguf

    path = Path(model_path(MODEL, Config().cache_dir, Progress(enabled=False)))
    codec = codec_from_gguf(GgufFile(path).fields)
    folder = tmp_path_factory.mktemp("tokenizer")
    special = {name: text for name, text in codec.special.items() if text}
    PreTrainedTokenizerFast(tokenizer_object=codec.raw, **special).save_pretrained(folder)
    return folder
