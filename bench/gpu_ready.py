"""Whether this machine can run `make gpu`: what is missing, in a line each, before minutes are spent.

python bench/gpu_ready.py [--quiet]       # exit status 1 where something that everything needs is missing
"""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib.util import find_spec

NEEDED = ("torch", "triton", "transformers", "accelerate", "msgspec", "numpy", "safetensors", "tokenizers", "tqdm")
"""Packages without which nothing runs."""
WANTED = {
    "bitsandbytes": "its int8 and nf4 drafts are not measured",
    "gguf": "transformers generate, the peer of the section smollm2, cannot read the model",
    "jinja2": "the section smollm2 cannot fill in its chat template",
    "pytest": "the tests do not run",
    "pytest_timeout": "the tests do not run",
    "pytest_asyncio": "the tests do not run",
    "hypothesis": "some tests do not run",
}
TOOLS = {"compute-sanitizer": "kernels are not run under it"}
OLDEST = (8, 0)


def missing() -> tuple[list[str], list[str]]:
    """What nothing runs without, and what some of it runs without."""
    needed = [f"the package {name} is not installed" for name in NEEDED if find_spec(name) is None]
    wanted = [f"the package {name} is not installed: {what}" for name, what in WANTED.items() if not find_spec(name)]
    wanted += [f"{name} is not in the path: {what}" for name, what in TOOLS.items() if not shutil.which(name)]
    if find_spec("torch"):
        import torch

        if not torch.cuda.is_available():
            built = torch.version.cuda or "none"
            needed.append(f"torch {torch.__version__} sees no GPU here (built for CUDA: {built})")
        elif torch.cuda.get_device_capability() < OLDEST:
            found = ".".join(map(str, torch.cuda.get_device_capability()))
            needed.append(f"{torch.cuda.get_device_name()} has compute capability {found}; kernels need 8.0")
        elif shutil.which("nvidia-smi") is None:
            wanted.append("nvidia-smi is not in the path: nobody says what else uses the GPU")
    return needed, wanted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiet", action="store_true", help="say only what nothing runs without")
    args = parser.parse_args()
    needed, wanted = missing()
    for line in [] if args.quiet else wanted:
        print(f"LEFT OUT: {line}", file=sys.stderr)
    for line in needed:
        print(f"CANNOT RUN: {line}", file=sys.stderr)
    if any("package" in line for line in needed):
        print(
            "With a network `make gpu` installs what it needs; without one, give a Python that has it:", file=sys.stderr
        )
        print("    make gpu GPU_PY=python3", file=sys.stderr)
    return 1 if needed else 0


if __name__ == "__main__":
    raise SystemExit(main())
