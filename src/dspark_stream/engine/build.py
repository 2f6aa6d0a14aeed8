"""From settings to a running engine's parts: target, drafter, caches, capacity curve."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from dspark_kernels.cpu import Context, Kind, NoCompilerError, best_isa, supported_isas
from dspark_kernels.cpu.build import compiler, library_path
from dspark_kernels.linear import can_pack
from dspark_stream.config import Config
from dspark_stream.console import Progress
from dspark_stream.decoding.calibration import Calibration, load_calibration
from dspark_stream.decoding.schedule import parse_schedule
from dspark_stream.decoding.survival import AcceptanceHistory
from dspark_stream.drafters import shipped_drafter
from dspark_stream.engine.eager import EagerRounds
from dspark_stream.engine.memory import check_kv_memory, foretold, memory_bytes, refused_by_the_system
from dspark_stream.engine.profile import curve_key, load_or_measure
from dspark_stream.engine.rounds import Models, Rounds
from dspark_stream.engine.worker import EngineThread
from dspark_stream.errors import ConfigError, InvalidRequestError, ModelLoadError
from dspark_stream.load.controller import Controller
from dspark_stream.models.cache import GRAIN, ExtentAllocator, slots_for_budget
from dspark_stream.models.checkpoint import load_drafter
from dspark_stream.models.fetch import model_path
from dspark_stream.models.geometry import UnsupportedError
from dspark_stream.models.loading import LoadedTarget, load_target
from dspark_stream.models.names import MODELS
from dspark_stream.models.native.target import NativeTarget
from dspark_stream.models.protocols import Drafter, Store
from dspark_stream.models.recommended import recommended_sampling
from dspark_stream.models.tokenizer import TextCodec
from dspark_stream.models.torch.drafter import Drafter as TorchDrafter
from dspark_stream.models.torch.quant import WEIGHT_ONLY_BITS, quantise_linears
from dspark_stream.models.torch.target import Target as TorchTarget
from dspark_stream.types import ModelInfo

log = logging.getLogger(__name__)

CPU_THREADS = torch.get_num_threads()
"""What torch takes for this machine, asked before anybody sets it."""
PAYING_ROWS = 64
"""Of a round that verifies only what pays, or two a stream if those are more. Two cores took 57 at most."""
BESIDES = 32 << 20
"""Bytes that work takes besides logits and KV: taps, Python's own. 29 MiB were found."""
KERNEL_KINDS: dict[str, Kind] = {"w8a8": Kind.EIGHT, "w4a8": Kind.FOUR_M}
"""How the CPU's kernels keep weights that come as floats, by the setting's name."""


def build_engine(
    config: Config, progress: Progress, *, measure_again: bool = False
) -> tuple[EngineThread, TextCodec | None]:
    """Load everything that ``config`` names; the engine still has to be started.

    ``measure_again``: measure the capacity curve whether or not it is known.

    Returns the engine and the tokenizer, None for a model folder without one.

    Raises:
        ModelLoadError: target or drafter cannot be used (`DownloadError`: a named model cannot be had).
        ConfigError: limits that do not fit together.
    """
    if config.device == "cpu" or not torch.cuda.is_available():
        check_kv_memory(config.kv_memory, memory_bytes())  # before anything is fetched
    path = model_path(config.model, config.cache_dir, progress)
    with progress.stage(f"loading {config.model}"):
        kernels = open_kernels(config, progress)
        kind = KERNEL_KINDS.get(config.target_quant)
        loaded = load_target(path, dtype=config.dtype, device=config.device, kernels=kernels, kind=kind)
    target = loaded.target
    if loaded.codec is not None:
        _try_template(loaded.codec, progress)
    name = config.model if config.model in MODELS else loaded.name
    drafter, calibration, drafter_folder = _load_drafter(config, loaded, progress)
    if drafter is None and config.drafter != "none":
        progress.say(f"no drafter is shipped for {name}: decoding is plain; --drafter names one")
    # on the kernels little is left to torch, and two pools on the same cores would wait for each other
    torch.set_num_threads(1 if isinstance(target, NativeTarget) else config.threads or CPU_THREADS)
    if isinstance(target, TorchTarget):
        assert drafter is None or isinstance(drafter, TorchDrafter)
        _prepare_on_torch(target, drafter, config)

    gamma = drafter.gamma if drafter else 0
    ring = drafter.ring if drafter else 0
    drafter_bytes = sum(s.nbytes(target.kv_dtype) for s in drafter.kv_shapes) if drafter else 0
    per_token = sum(s.nbytes(target.kv_dtype) for s in target.kv_shapes) + (0 if ring else drafter_bytes)
    rings = ring * config.max_num_seqs
    for_slots = config.kv_memory - rings * drafter_bytes
    affordable = max(GRAIN, for_slots // per_token - gamma - 2 * GRAIN)
    max_model_len = _longest(config, target.max_positions, affordable, progress)
    slots = slots_for_budget(config.kv_memory, per_token, max_model_len + gamma + 1, rings * drafter_bytes)
    allocator = ExtentAllocator(slots, ring, config.max_num_seqs if ring else 0)
    if target.device.type == "cuda":
        check_kv_memory(config.kv_memory, torch.cuda.get_device_properties(target.device).total_memory, "the GPU")

    def stores() -> tuple[Store, Store | None]:
        with refused_by_the_system(config.kv_memory):
            return target.make_store(slots), drafter.make_store(rings or slots) if drafter else None

    target_kv, drafter_kv = stores()
    folder = "" if drafter_folder is None else _weights_stamp(drafter_folder)
    curve = load_or_measure(
        target,
        target_kv,
        drafter,
        drafter_kv,
        allocator,
        max_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        key=curve_key(target, [loaded.fingerprint, folder], [config.target_quant, config.draft_quant]),
        folder=config.cache_dir / "capacity",
        progress=progress,
        again=measure_again,
    )
    if target.device.type == "cpu":  # new ones, whose pages are nobody's yet: measuring has touched some of these
        del target_kv, drafter_kv
        target_kv, drafter_kv = stores()
    models = Models(
        target=target,
        target_kv=target_kv,
        drafter=drafter,
        drafter_kv=drafter_kv,
        calibration=calibration,
        history=AcceptanceHistory(gamma),
        capacity=curve,
        controller=Controller(gamma, curve),
    )
    rounds = _rounds(models, config, max_model_len + gamma + 1, progress)
    codec = _set_up(loaded.codec, config)
    info = ModelInfo(
        model=name,
        drafter=drafter_folder.name if drafter_folder else None,
        gamma=gamma,
        vocab_size=target.vocab_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_token_bytes=codec.max_token_bytes if codec else 1,
        dtype=kernels.isa if kernels and target.runner else str(target.dtype).removeprefix("torch."),
        device=str(target.device),
        target_quant=config.target_quant,
        draft_quant=config.draft_quant,
        schedule=config.schedule,
        sampling=recommended_sampling(config.model),
    )
    _give_back_memory()
    fixed, streams = rounds.schedule.slots(gamma), config.max_num_seqs
    rows = max(PAYING_ROWS, 2 * streams) if fixed is None else streams * (1 + fixed)
    if target.device.type == "cpu" and (told := foretold(config.kv_memory, BESIDES + 4 * target.vocab_size * rows)):
        progress.say(told)
    text = codec.token_bytes if codec else None
    engine = EngineThread(
        rounds,
        info,
        allocator,
        text,
        prefill_budget_ms=config.prefill_budget_ms,
        max_chunk_gap_ms=config.max_chunk_gap_ms,
    )
    return engine, codec


def _longest(config: Config, most: int, affordable: int, progress: Progress) -> int:
    """Tokens of prompt and answer together: as many as were asked for, or as the model and the memory allow.

    Raises:
        ConfigError: more than the model has positions.
    """
    if config.max_model_len > most:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is more than the model's {most}", param="max_model_len"
        )
    if config.max_model_len or affordable >= most:
        return config.max_model_len or most
    progress.say(
        f"max_model_len is {affordable} of the model's {most}: kv_memory of {config.kv_memory >> 20} MiB holds no "
        "longer stream"
    )
    return affordable


def _try_template(codec: TextCodec, progress: Progress) -> None:
    """A damaged template parses as a rule; nobody should find out by every request that is refused."""
    try:
        codec.encode_chat([("user", "Hello")])
    except InvalidRequestError as error:
        progress.say(f"the model's chat template refuses a plain question, so most requests will be: {error}")


def _set_up(codec: TextCodec | None, config: Config) -> TextCodec | None:
    if codec is not None:
        codec.allow_control_tokens = config.allow_control_tokens
    return codec


def _give_back_memory() -> None:
    """What loading took and let go of, to the system: some 50 MB, which the C library would keep (glibc's
    malloc_trim)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _rounds(models: Models, config: Config, longest: int, progress: Progress) -> Rounds:
    """On a GPU every size of a round, captured and timed."""
    schedule = parse_schedule(config.schedule)
    if models.target.device.type != "cuda" or config.cuda_graphs != "auto":
        return EagerRounds(models, schedule, looks_up=config.lookup)
    from dspark_stream.engine.captured.runner import CapturedRounds

    rounds = CapturedRounds(models, schedule, seats=config.max_num_seqs, longest=longest)
    with progress.bar("capturing rounds", total=len(rounds.ladder.sizes())) as bar:
        rounds.ladder.warm(bar.advance)
    return rounds


def _prepare_on_torch(target: TorchTarget, drafter: TorchDrafter | None, config: Config) -> None:
    """Quantised as asked for, and laid out for the device."""
    quantise_linears(target.decoder, config.target_quant)
    if drafter is not None:
        quantise_linears(drafter, config.draft_quant)
    if target.device.type == "cuda":
        _prepare_for_gpu(target, drafter, config)
    if can_pack(target.device, target.dtype):
        target.pack()
        if drafter is not None:
            drafter.pack()


def _prepare_for_gpu(target: TorchTarget, drafter: TorchDrafter | None, config: Config) -> None:
    """Fewer launches a layer, and a head of its own for a drafter whose weights are our kernel's."""
    from dspark_stream.models.torch.fusing import fuse_layers

    fused = fuse_layers(target.decoder)
    if drafter is not None:
        fused += fuse_layers(drafter)
        if config.draft_quant in WEIGHT_ONLY_BITS:
            drafter.quantise_head()
    log.info("%d parts of the library's layers run on kernels of ours", fused)


def open_kernels(config: Config, progress: Progress) -> Context | None:
    """The CPU's integer kernels, unless they are not wanted or the models' precision is chosen otherwise."""
    if (
        config.cpu_kernels == "off"
        or config.device == "cuda"
        or (config.device == "auto" and torch.cuda.is_available())
        or {config.target_quant, config.draft_quant} - {"none", *KERNEL_KINDS}  # bitsandbytes' are torch's
    ):
        return None
    isa = best_isa() if config.cpu_kernels == "auto" else config.cpu_kernels
    if isa not in supported_isas():
        raise ConfigError(f"this CPU cannot run {isa} kernels: {', '.join(supported_isas())}", param="cpu_kernels")
    first = compiler() is not None and not library_path(isa).exists()
    told = progress.stage(f"compiling the {isa} kernels, once for this machine")
    try:
        with told if first else contextlib.nullcontext():
            return Context(config.threads or CPU_THREADS, isa)
    except NoCompilerError as error:
        if config.cpu_kernels != "auto":
            raise ConfigError(str(error), param="cpu_kernels") from error
        progress.say(f"models run on torch, several times slower than on our CPU kernels: {error}")
        return None


def _load_drafter(
    config: Config, loaded: LoadedTarget, progress: Progress
) -> tuple[Drafter | None, Calibration, Path | None]:
    folder = drafter_folder(config)
    if folder is None:
        return None, Calibration(), None
    with _refused_by_kernels():
        drafter = load_drafter(folder, loaded.target, KERNEL_KINDS.get(config.draft_quant))
    if config.calibration == "none":
        return drafter, Calibration(), folder
    calibration = load_calibration(folder)
    if calibration is None and drafter.has_confidence:
        progress.say(f"{folder.name} is not calibrated: confidences count as they come; dspark-stream calibrate helps")
    return drafter, calibration or Calibration(), folder


@contextlib.contextmanager
def _refused_by_kernels() -> Iterator[None]:
    """What the CPU's kernels say of a drafter, as an error that says what helps."""
    try:
        yield
    except UnsupportedError as error:
        raise ModelLoadError(
            f"the CPU kernels cannot run this drafter ({error}): --cpu-kernels off runs both models on torch",
            param="drafter",
        ) from error


def drafter_folder(config: Config) -> Path | None:
    """The drafter's folder: the one named, the one shipped for the model, or none. A hub name is fetched.

    Raises:
        ModelLoadError: a name that is neither a folder nor reachable.
    """
    if config.drafter == "none":
        return None
    if config.drafter == "auto":
        return shipped_drafter(config.model)
    name = config.drafter
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise ModelLoadError(
            f"{name} is no drafter folder and no reachable hub name: {error}", param="drafter"
        ) from error


def _weights_stamp(folder: Path) -> str:
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    return repr([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files])
