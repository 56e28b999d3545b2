"""Which implementation decodes, encodes or rotates: each says what it can run, the first that can
is taken.

`TPA_CONVERT_BACKEND` names one to force it: `reference` or `triton`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

VARIABLE = "TPA_CONVERT_BACKEND"
TYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("rotated", "contextual", "latent", "components", "pairs")
MAX_WIDTH = 8192
MAX_SPAN = 128  # rotary pairs whose keys fit the registers
TRITON_MISSING = importlib.util.find_spec("triton") is None


class BackendError(RuntimeError):
    """The backend asked for cannot run; the message is one line."""


class Case(NamedTuple):
    """What is to be decoded, encoded or rotated.

    Attributes:
        layout: of the cache: `rotated` (numbers), `contextual` (numbers with head factors) or
            `latent` (rows of bytes, of which keys are rebuilt); `components` are to be encoded, and
            `pairs` to be rotated.
        width_k, width_v: components of keys and of values; of what is not cached the first alone.
        dtype, device: of the queries, components or pairs.
        cached: types of keys and values that are numbers.
        ranks: of contextual keys and values, 0 without head factors.
        paged: whether the cache is a pool of pages.
        span: of latent keys, pairs that one program rebuilds side by side, and programs that would
            have to know each other's norm.
    """

    layout: str
    width_k: int
    width_v: int
    dtype: torch.dtype
    device: torch.device
    cached: tuple[torch.dtype, ...] = ()
    ranks: tuple[int, ...] = ()
    paged: bool = False
    span: tuple[int, int] = (0, 1)


class Backend(NamedTuple):
    """A name, and the reason why it cannot run a case, or None; the second argument says whether
    Triton's interpreter, which is slow, may take it."""

    name: str
    can_use: Callable[[Case, bool], str | None]


def _reference(case: Case, interpreted: bool = False) -> str | None:
    return None if case.layout in LAYOUTS else f"no layout {case.layout}"


def forced_backend() -> str:
    """The name that the environment asks for, or `auto`."""
    return os.environ.get(VARIABLE, "auto")


def _triton(case: Case, interpreted: bool = False) -> str | None:
    if case.layout not in LAYOUTS:
        return f"no kernel for the layout {case.layout}"
    if TRITON_MISSING:
        return "triton is not installed"
    if case.device.type != "cuda" and not interpreted:
        return f"its kernels need a CUDA device, not {case.device.type}"
    if not interpreted and torch.cuda.get_device_capability(case.device) < (8, 0):
        return "its kernels need compute capability 8.0"
    if case.dtype not in TYPES:
        return f"no kernel for numbers in {str(case.dtype).removeprefix('torch.')}"
    if max(case.width_k, case.width_v) > MAX_WIDTH:
        return f"widths above {MAX_WIDTH}"
    if case.layout in ("components", "pairs"):
        return None
    if case.layout == "latent":
        return _latent(case, interpreted)
    if case.width_k % 8 or case.width_v % 8:
        return f"widths {case.width_k} and {case.width_v} are not multiples of 8"
    if (case.width_k + case.width_v) * case.dtype.itemsize > 2048:
        return "keys and values of more than 2048 bytes a slot"
    if any(cached != case.dtype for cached in case.cached):
        return "queries, keys and values have several types"
    if case.layout == "contextual":
        rank_k, rank_v = case.ranks
        # Of a single rank all features have the same factor, however many they are.
        pairs = case.width_k // (2 * rank_k) if rank_k > 1 else 16
        features = case.width_v // rank_v if rank_v > 1 else 16
        if pairs & (pairs - 1) or features & (features - 1) or pairs < 16 or features < 16:
            return f"{pairs} pairs and {features} features a rank are not powers of two from 16 on"
    return None


def _latent(case: Case, interpreted: bool) -> str | None:
    pairs, together = case.span
    if case.dtype == torch.float32 and not interpreted:
        return "no kernel for latent keys in float32"
    if pairs > MAX_SPAN:
        return f"more than {MAX_SPAN} rotary pairs of a head in one block"
    if together > 1:
        return "a norm over more heads than one program rebuilds"
    return None


BACKENDS = (Backend("triton", _triton), Backend("reference", _reference))


def wanted(device: torch.device) -> bool:
    """Whether anything but the reference is to be chosen for tensors on `device`."""
    forced = forced_backend()
    return device.type == "cuda" if forced == "auto" else forced != "reference"


def choose_backend(case: Case) -> str:
    """Name of the backend that runs `case`.

    Raises:
        BackendError: the one that the environment names is unknown or cannot run it.
    """
    # A cache that `torch.compile` would warn of spares the host what every layer asks again.
    choose = _choose if torch.compiler.is_compiling() else _choose_once
    forced = forced_backend()
    interpreted = forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return choose(case, forced, interpreted)


def _choose(case: Case, forced: str, interpreted: bool) -> str:
    names = [backend.name for backend in BACKENDS]
    if forced != "auto" and forced not in names:
        raise BackendError(f"{VARIABLE}={forced}: choose auto, {' or '.join(names)}")
    reasons = []
    for backend in BACKENDS:
        if forced in ("auto", backend.name):
            reason = backend.can_use(case, interpreted)
            if reason is None:
                return backend.name
            reasons.append(f"{backend.name}: {reason}")
    raise BackendError(f"{VARIABLE}={forced} cannot run here ({'; '.join(reasons)})")


_choose_once = functools.lru_cache(maxsize=256)(_choose)
