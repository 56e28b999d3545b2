"""What kernels of attention take: those of tpa-convert, for models that find the package installed
(others do without), and PyTorch's."""

from collections.abc import Callable, Sequence
from importlib import import_module
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import nn

from .tpa_codes import round_up

INTERFACE = 3  # of the kernels: those of another package may take and give other things
WIDEST_FLASH = 256  # head dim of PyTorch's flash attention
address_of = torch.Tensor.data_ptr
changes_of = attrgetter("_version")  # how often a tensor has been changed in place


def of_one_width(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values with zeros behind them, as wide as the widest: flash attention takes
    a single width, and where it does not run, shared heads are attended to in plain products."""
    widths = key.shape[-1], value.shape[-1]
    if not query.is_cuda or widths[0] == widths[1] or max(widths) > WIDEST_FLASH:
        return query, key, value
    width = round_up(max(widths), 8)
    query, key, value = (
        nn.functional.pad(x, (0, width - x.shape[-1])) for x in (query, key, value)
    )
    return query, key, value


def find_kernel() -> Callable[..., torch.Tensor | None] | None:
    """`tpa_convert.kernels.decode_on_kernel`, None where no package has it.

    To be called when a model is made: `torch.compile` does not follow an import.
    """
    found = _of_kernels("decode_on_kernel")
    return None if found is None else found[0]


def _of_kernels(*names: str) -> list[Any] | None:
    """What `tpa_convert.kernels` has by these names, None where no package has all of them as this
    file knows them."""
    try:
        kernels = import_module("tpa_convert.kernels")
        if kernels.INTERFACE != INTERFACE:
            return None
        return [getattr(kernels, name) for name in names]
    except (ImportError, AttributeError):
        return None


class Coding(NamedTuple):
    """`tpa_convert.kernels`' own way from components to features, with gradients."""

    straight_through: Callable[..., Any]
    code_tables: Callable[..., Any]
    wanted: Callable[..., bool]


def find_coding() -> Coding | None:
    """What codes components on a GPU, None where no package has it; see `find_kernel`."""
    found = _of_kernels("straight_through", "CodeTables", "wanted")
    return None if found is None else Coding(*found)


class CodedKernels(NamedTuple):
    """`tpa_convert.kernels`' own ways to code components in rows, to rotate, and to decode over
    rows."""

    wanted: Callable[..., bool]
    encodes: Callable[..., bool]
    code_prompt: Callable[..., Any]
    code_tables: Callable[..., Any]
    row_tables: Callable[..., Any]
    row_codes: Callable[..., Any]
    token_tables: Callable[..., Any]
    takes_in: Callable[..., bool]
    take_in: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    rotate: Callable[..., torch.Tensor]
    decodes: Callable[..., bool]
    decode: Callable[..., torch.Tensor]
    attend: Callable[..., torch.Tensor]
    output_map: Callable[..., Any]
    tables: Callable[..., Any]
    key_map: Callable[..., Any]
    rows: Callable[..., Any]


def find_coded() -> CodedKernels | None:
    """What codes rows and decodes over them on a GPU, None where no package has it; see
    `find_kernel`."""
    encoding = "runs_components", "code_prompt", "CodeTables", "row_tables", "row_codes"
    of_tokens = "token_tables", "takes_in", "take_in"
    decoding = "runs_latent", "latent_on_kernel", "attend_on_kernel", "OutputMap"
    tables = "latent_tables", "KeyMap", "Rows"
    found = _of_kernels("wanted", *encoding, *of_tokens, "rotate_on_kernel", *decoding, *tables)
    return None if found is None else CodedKernels(*found)


def find_rotation() -> Callable[..., torch.Tensor | None] | None:
    """What rotates pairs on a GPU, None where no package has it; see `find_kernel`."""
    found = _of_kernels("rotate")
    return None if found is None else found[0]


def part_of(module: nn.Module, name: str) -> Any:
    """A module inside of another, past the look-up of `nn.Module`, which takes the host 1 µs."""
    return module._modules[name]


def plain_inference(x: torch.Tensor) -> bool:
    """Whether nothing but numbers is asked for, in the type of a tensor: no gradients, no graph for
    a compiler, no other types by autocast."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return not torch.is_autocast_enabled(x.device.type)


HOOKS = (  # of all modules
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
)


def plain_product(
    module: nn.Module, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight and bias of a module that does nothing but multiply by the one and add the other, in
    the type and place of a tensor; None of others: those that somebody hooks into, adapts,
    quantises, parametrises or splits among devices."""
    own = module.__dict__
    if type(module) is not nn.Linear or own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return None
    weight, bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
    if type(weight) is not nn.Parameter or "forward" in own or any(HOOKS):
        return None
    if weight.dtype != like.dtype or weight.device != like.device or not weight.is_contiguous():
        return None
    if bias is not None and (type(bias) is not nn.Parameter or bias.dtype != like.dtype):
        return None
    return weight, bias


class Sources:
    """The tensors that something was made of, to see whether they are still the same.

    Fused optimizers change parameters in place and nothing counts that, so whatever may be training
    has to say `trained`.
    """

    rounds = 0  # of training, of any model

    def __init__(self, tensors: Sequence[torch.Tensor] = ()):
        # Kept, so that no other tensor can have their place in memory.
        self.seen = list(tensors)
        self.addresses = list(map(address_of, self.seen))
        self.counted = [x for x in self.seen if not x.is_inference()]  # whose changes are
        self.changes = list(map(changes_of, self.counted))
        self.round = Sources.rounds

    @classmethod
    def trained(cls) -> None:
        """Parameters may have changed: nothing made of them before is right any more."""
        cls.rounds += 1

    def are(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are they, not changed in place since."""
        same = len(self.seen) == len(tensors) and all(map(is_, self.seen, tensors))
        return same and self.unchanged()

    def unchanged(self) -> bool:
        """Whether they have not been changed in place."""
        return (  # without loops of Python: every token and layer asks
            self.round == Sources.rounds
            and list(map(address_of, self.seen)) == self.addresses
            and list(map(changes_of, self.counted)) == self.changes
        )


class Kept:
    """What follows from tensors, kept until they are others or have changed."""

    def __init__(self) -> None:
        self.made_of, self.made = Sources(), None

    def __reduce__(self) -> Any:
        """A copy makes its own."""
        return Kept, ()

    def of(self, tensors: Sequence[torch.Tensor], make: Callable[[], Any]) -> Any:
        """What `make` makes of `tensors`; always made where gradients or a compiler need to see
        how."""
        if torch.compiler.is_compiling():
            return make()
        if wants_gradients(*tensors):
            Sources.trained()
            return make()
        if not self.made_of.are(tensors):
            with torch.inference_mode(False), torch.no_grad():
                self.made = make()
            self.made_of = Sources(tensors)
        return self.made


def wants_gradients(*tensors: torch.Tensor) -> bool:
    """Whether what is made of these has to lead back to them, which kernels of decoding do not."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def mask_of_slots(
    mask: torch.Tensor | None, added: bool = False
) -> tuple[bool, torch.Tensor | None]:
    """Whether kernels take a mask of attention functions, and the mask [b or 1, t] for them: one
    position's, the same for all heads; boolean, unless they take one that is `added` too."""
    if mask is None:
        return True, None
    if mask.ndim != 4 or mask.shape[1] != 1 or not (added or mask.dtype == torch.bool):
        return False, None
    return True, mask[:, 0, -1]


def decode_components(
    kernel: Callable[..., torch.Tensor | None] | None,
    query: torch.Tensor,
    packed_key: torch.Tensor,
    packed_value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    key_factors: int,
    value_factors: int,
    **settings: Any,
) -> torch.Tensor | None:
    """Attention of component queries on a packed cache, by a kernel; None if there is none for it.

    Args:
        query: [b, h, 1, width_k].
        packed_key, packed_value: [b, 1, t, factors + width].
        attention_mask: as the attention function takes it.
        key_factors, value_factors: head factors in front of each row.
        settings: of the kernel.

    Returns: mixed components [b, h, 1, width_v].
    """
    if kernel is None or wants_gradients(query, packed_key, packed_value):
        return None
    known, mask = mask_of_slots(attention_mask)
    if not known:
        return None
    key_heads = value_heads = None
    if key_factors:
        key_heads, packed_key = packed_key[..., :key_factors], packed_key[..., key_factors:]
    if value_factors:
        value_heads, packed_value = (
            packed_value[..., :value_factors],
            packed_value[..., value_factors:],
        )
    heads = {"key_heads": key_heads, "value_heads": value_heads}
    return kernel(query, packed_key, packed_value, mask=mask, **heads, **settings)
