"""What is recommended for sampling: by name, by file, and by a folder's generation_config.json."""

import json

import pytest
from huggingface_hub import constants

from dspark_stream.models.names import MODELS
from dspark_stream.models.recommended import recommended_sampling
from dspark_stream.types import RecommendedSampling

NOTHING = RecommendedSampling()


def write(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_it_goes_with_the_name_and_with_files_called_so(model):
    assert recommended_sampling(model.name) == model.sampling != NOTHING
    assert recommended_sampling(f"/somewhere/{model.file_name}") == model.sampling


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True, "eos_token_id": 2}, (0.6, 0.95, 20)),
        ({"temperature": 0.6, "top_p": 0.95, "do_sample": False}, (0.0, None, None)),
        ({"do_sample": True}, (None, None, None)),
        ({"temperature": 1, "top_k": None}, (1, None, None)),
        ({"temperature": 0.0}, (0.0, None, None)),
        ({"temperature": -1, "top_p": 0.9}, (None, 0.9, None)),
        ({"temperature": "hot", "top_p": 0, "top_k": 3.5}, (None, None, None)),
        ({"temperature": True, "top_p": 2, "top_k": -1}, (None, None, None)),
        ({"temperature": 5}, (None, None, None)),
        ("{", (None, None, None)),
        ("[1]", (None, None, None)),
        ("", (None, None, None)),
    ],
)
def test_a_folder_says_what_its_makers_recommend(tmp_path, content, expected):
    found = recommended_sampling(write(tmp_path / "mine", content))
    assert (found.temperature, found.top_p, found.top_k) == expected


def test_a_folder_without_the_file_is_known_by_its_name_if_at_all(tmp_path, monkeypatch):
    for name in ("mine", "SmolLM2-135M-Instruct"):
        (tmp_path / name).mkdir()
    assert recommended_sampling(str(tmp_path / "mine")) == NOTHING
    assert recommended_sampling(str(tmp_path / "SmolLM2-135M-Instruct")) == MODELS["smollm2-135m"].sampling
    # A name is a name, whatever lies in the folder that one happens to be in.
    write(tmp_path / "smollm2-135m", {"temperature": 1.5})
    monkeypatch.chdir(tmp_path)
    assert recommended_sampling("smollm2-135m") == MODELS["smollm2-135m"].sampling


def test_a_hub_name_recommends_what_was_fetched_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert recommended_sampling("org/name") == NOTHING
    write(tmp_path / "models--org--name/snapshots/abc", {"temperature": 0.3})
    (tmp_path / "models--org--name/refs").mkdir()
    (tmp_path / "models--org--name/refs/main").write_text("abc")
    assert recommended_sampling("org/name") == RecommendedSampling(temperature=0.3)
