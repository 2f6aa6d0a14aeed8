"""Targets from a local folder, a hub name or a GGUF file; what precision they get on this machine."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dspark_kernels.cpu import Context, Kind
from dspark_stream.errors import ModelLoadError
from dspark_stream.files import read_json
from dspark_stream.models.families import Family, by_gguf, family_named, supported
from dspark_stream.models.geometry import UnsupportedError, geometry_of, geometry_of_gguf
from dspark_stream.models.gguf import GgufFile
from dspark_stream.models.native.loading import check_tensors, gguf_name, target_from_folder, target_from_gguf
from dspark_stream.models.native.target import NativeTarget
from dspark_stream.models.tokenizer import TextCodec, codec_from_gguf, codec_from_hub
from dspark_stream.models.torch.from_gguf import config_of, fill, turn_as
from dspark_stream.models.torch.target import Target
from dspark_stream.models.vocabulary import end_ids

log = logging.getLogger(__name__)

DType = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedTarget:
    """A target with what came beside it."""

    target: Target | NativeTarget
    codec: TextCodec | None
    """None for a folder without a tokenizer: token ids only."""
    name: str
    fingerprint: str
    """Changes when the weights may have changed; keys what is kept on disk for this model."""

    @property
    def on_torch(self) -> Target:
        """The target as torch has it, which training goes through layer by layer.

        Raises:
            ModelLoadError: it was loaded for the CPU's kernels.
        """
        if isinstance(self.target, NativeTarget):
            raise ModelLoadError(f"{self.name} runs on the CPU kernels; here it has to run on torch", param="model")
        return self.target


def pick_device(device: str) -> torch.device:
    """``auto``: the GPU where torch sees one, else the CPU.

    Raises:
        ModelLoadError: a GPU was asked for and torch sees none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelLoadError("device cuda: this torch sees no GPU", param="device")
    return torch.device(device)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def fast_dtype(device: torch.device) -> torch.dtype:
    """What a device multiplies fastest, of bfloat16 and float32."""
    return torch.bfloat16 if device.type == "cuda" or cpu_has_bfloat16() else torch.float32


def pick_dtype(dtype: DType, own: torch.dtype | None, device: torch.device) -> torch.dtype:
    """``auto``: a checkpoint's own precision, with bfloat16 only where the machine has it.

    ``own`` None (a quantised GGUF file) means that any precision is above the weights' own; the fastest is taken.
    """
    if dtype != "auto":
        return DTYPES[dtype]
    fast = fast_dtype(device)
    return own if own == torch.float32 else fast


def load_target(
    name: str,
    *,
    dtype: DType = "auto",
    device: str = "auto",
    kernels: Context | None = None,
    kind: Kind | None = None,
) -> LoadedTarget:
    """A target by local folder, GGUF file or hub name.

    Args:
        kernels: the CPU's integer kernels, to run a model that they can run; None for torch alone (training).
        kind: of weights, to have a checkpoint folder quantised on load for those kernels; None: torch runs it.

    Raises:
        ModelLoadError: missing, broken, or of a family that is not known.
    """
    where = pick_device(device)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        if not path.is_file():
            raise ModelLoadError(f"no GGUF file at {path}", param="model")
        if kind is not None:
            raise ModelLoadError(f"{path} is quantised already: it is run as it is", param="target_quant")
        gguf = GgufFile(path)
        architecture = gguf.fields.get("general.architecture")
        _check_family(str(path), by_gguf(architecture), architecture)
        codec = codec_from_gguf(gguf.fields)
        ends = _end_ids(gguf.name, end_ids(gguf.fields), codec)
        if kernels is not None and where.type == "cpu" and dtype == "auto":
            try:
                target: Any = target_from_gguf(gguf, kernels, ends)
                return LoadedTarget(target, codec, gguf.name, _gguf_fingerprint(gguf))
            except UnsupportedError as error:
                _check_whole(gguf, f", and the CPU kernels do not know {error}")
                log.warning("%s runs on torch, several times slower: the CPU kernels do not know %s", path.name, error)
        _check_whole(gguf)
        target = Target(_gguf_model(gguf, dtype, where, ends), eos_token_ids=ends)
        return LoadedTarget(target, codec, gguf.name, _gguf_fingerprint(gguf))
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelLoadError(f"no model folder or GGUF file at {name}", param="model")
    if kind is not None:
        return _load_quantised(path, name, kernels, kind)
    return _load_transformers(str(path) if path.is_dir() else name, dtype, where)


def _load_quantised(path: Path, name: str, kernels: Context | None, kind: Kind) -> LoadedTarget:
    """A checkpoint folder (a hub name: fetched first) on the CPU's integer kernels."""
    if kernels is None:
        raise ModelLoadError("integer weights need the CPU kernels, which are not in use here", param="target_quant")
    folder = path if path.is_dir() else _fetched(name)
    try:
        target = target_from_folder(folder, kind, kernels)
    except UnsupportedError as error:
        raise ModelLoadError(f"{name} cannot run on the CPU kernels: {error}", param="target_quant") from error
    shown = path.name if path.is_dir() else name
    codec = codec_from_hub(str(folder))
    target.eos_token_ids = _end_ids(shown, target.eos_token_ids, codec)
    return LoadedTarget(target, codec, shown, _fingerprint(folder, name))


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise ModelLoadError(f"{name} is no model folder and no reachable hub name: {error}", param="model") from error


def _load_transformers(name: str, dtype: DType, device: torch.device) -> LoadedTarget:
    from transformers import AutoConfig, AutoModelForCausalLM

    from dspark_stream.models.torch.layers import ATTENTION_NAME

    if (file := Path(name) / "config.json").is_file():
        with contextlib.suppress(ValueError, AttributeError):  # no JSON object, of which the library says so
            _check_numbers(read_json(file), str(file))
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # missing, unreachable, not JSON, or refused by the library's validation of its fields
        raise ModelLoadError(
            f"{name} is no model folder, GGUF file or reachable hub name: {error}", param="model"
        ) from error
    _check_family(name, family_named(config.model_type), config.model_type)
    if not Path(name).is_dir():
        _check_numbers(config.to_dict(), name)
    own = getattr(config.get_text_config(), "dtype", None) or torch.float32
    own = DTYPES.get(own, torch.float32) if isinstance(own, str) else own
    try:
        with quiet() if Path(name).is_dir() else contextlib.nullcontext():  # a fetch from the hub shows its bars
            model, report = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=pick_dtype(dtype, own, device),
                attn_implementation=ATTENTION_NAME,
                output_loading_info=True,
            )
    except Exception as error:  # the library raises anything for a broken file: safetensors, pickle, shape errors
        raise ModelLoadError(f"{name} does not load: {error}", param="model") from error
    _check_complete(name, report)
    path, codec = Path(name), codec_from_hub(name)
    shown = path.name if path.is_dir() else name
    target = Target(model.to(device), eos_token_ids=_end_ids(shown, _eos_ids(model), codec))
    return LoadedTarget(target, codec, shown, _fingerprint(path, name))


def _check_numbers(config: Mapping[str, Any], source: str) -> None:
    """Refuse numbers that cannot be, of which the library warns at most; what the kernels cannot do it may."""
    with contextlib.suppress(UnsupportedError):
        geometry_of(config, source)


def _check_whole(gguf: GgufFile, besides: str = "") -> None:
    if len(gguf.paths) > 1:
        raise ModelLoadError(
            f"{gguf.path} is one of {len(gguf.paths)} shards, which torch cannot load{besides}: join them "
            "(llama-gguf-split --merge)",
            param="model",
        )


def _gguf_model(gguf: GgufFile, dtype: DType, device: torch.device, ends: tuple[int, ...]) -> Any:
    path = gguf.path
    try:
        geometry = geometry_of_gguf(gguf)
    except UnsupportedError as error:  # the library's reader would not heed it
        raise ModelLoadError(f"{path}: {error} is not supported from GGUF", param="model") from error
    check_tensors(gguf, geometry)
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from dspark_stream.models.torch.layers import ATTENTION_NAME

    try:
        with quiet(), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config_of(geometry, tied="output.weight" not in gguf.tensors, ends=ends),
                dtype=pick_dtype(dtype, None, device),
                attn_implementation=ATTENTION_NAME,
            ).eval()
        model.tie_weights()
        fill(model, gguf, geometry, lambda name: gguf_name(name, geometry.family))
    except ModelLoadError:
        raise
    except Exception as error:  # as above: any error class, all meaning a file that cannot be used
        raise ModelLoadError(f"{path} does not load: {error}", param="model") from error
    turn_as(model, geometry)
    return model.to(device)


def _check_family(name: str, family: Family | None, said: object) -> None:
    if family is None:
        raise ModelLoadError(f"{name} is a {said}; supported families: {supported()}", param="model")


def _end_ids(name: str, said: tuple[int, ...], codec: TextCodec | None) -> tuple[int, ...]:
    """The tokens that end an answer: what the model says, and what its chat template closes the assistant's turns with
    (base models say the end of a document; tuned on chats, they end turns by another token)."""
    if codec is None:
        return said
    closing = codec.turn_end()
    if not said:
        closing = codec.known_end() if closing is None else closing
        ends = "nothing but max_tokens ends its answers" if closing is None else f"{codec.name_of(closing)} is taken"
        log.warning("%s names no EOS token: %s", name, ends)
    return said if closing is None else tuple(dict.fromkeys((*said, closing)))


def _check_complete(name: str, report: dict[str, Any]) -> None:
    """The library fills tensors that a file lacks with random numbers and only warns."""
    missing = sorted(report.get("missing_keys", ()))
    wrong = sorted(str(key) for key in report.get("mismatched_keys", ()))
    if missing or wrong:
        raise ModelLoadError(
            f"{name}: tensors missing: {', '.join(missing[:4]) or 'none'}; of the wrong shape: "
            f"{', '.join(wrong[:4]) or 'none'}",
            param="model",
        )


def _eos_ids(model: Any) -> tuple[int, ...]:
    eos = model.generation_config.eos_token_id if model.generation_config else None
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    return tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (int(eos),)


def _fingerprint(path: Path, name: str) -> str:
    """Name, sizes and times of the files: cheap, and new when somebody retrains in place."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    return json.dumps([name if not files else path.name, _stats(files)])


def _gguf_fingerprint(gguf: GgufFile) -> str:
    return json.dumps([gguf.path.name, _stats(gguf.paths)])


def _stats(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's own bars and notices out of ours: what matters comes as an exception."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
