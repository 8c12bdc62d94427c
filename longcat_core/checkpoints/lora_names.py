"""The names in LoRA files: prefixes of trainers, parts of a layer, and kinds that are not a plain LoRA."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

from ..errors import CheckpointError, listed, printable
from .formats import targets

PREFIX = "lora___lorahyphen___"
SEPARATOR = "___lorahyphen___"
# What trainers put before a module's name, possibly several, with dots or with "_" instead.
PREFIXES = (
    "base_model.model.", "model.", "diffusion_model.", "transformer.", "unet.", "dit.", "pipe.", "module.",
    "net.", "pipeline.", "denoiser.", "generator.", "student.", "model_ema.", "ema.",
    "lora_unet_", "lora_transformer_", "lora_dit_", "lora_", "lycoris_", "_",
)  # fmt: skip
_DOTTED = tuple(prefix for prefix in PREFIXES if prefix.endswith("."))
_FLAT = tuple(prefix.replace(".", "_") for prefix in PREFIXES)
# What PyTorch's wrappers put before, or inside, a module's name.
_WRAPPERS = re.compile(r"(?:^|[._])_(?:orig_mod|(?:fsdp|checkpoint)_wrapped_module)(?=[._]|$)|\.module(?=\.|$)")
# More parts of a name than any network has.
_DEEPEST = 8

# The suffix after a module's name. PEFT may put an adapter's name before `.weight`, which may have dots.
_ADAPTER = r"(?:\.(?!blocks\.)[^.]+(?:\.[^.]+){0,4})?"
_PART = re.compile(
    r"\.(?:lora_up\.blocks\.(?P<slice>[0-9]{1,3})\.weight"
    rf"|(?P<down>lora_(?:down|[Aa]){_ADAPTER}\.weight|lora(?:_linear_layer)?\.(?:down|[Aa])\.weight|lora_(?:down|[Aa]))"
    rf"|(?P<up>lora_(?:up|[Bb]){_ADAPTER}\.weight|lora(?:_linear_layer)?\.(?:up|[Bb])\.weight|lora_(?:up|[Bb]))"
    r"|(?P<scale>alpha_scale)|(?P<alpha>(?:lora_|network_)?alpha))$"
)
# Kinds that change a weight by something else than a product of two matrices, by how their tensors' names end.
_OTHER_KINDS = tuple(
    (name, re.compile(rf"[._](?:{pattern})$"))
    for name, pattern in (
        ("DoRA", r"dora_scale(?:\.\w+)?|lora_magnitude_vector.*|magnitude(?:\.weight)?"),
        ("LoHa", r"hada_\w+(?:\.\w+)?"),
        ("LoKr", r"lokr_\w+(?:\.\w+)?"),
        ("OFT", r"b?oft_\w+(?:\.\w+)?"),
        ("GLoRA", r"[ab][12]\.weight"),
        ("(IA)^3", r"ia3_\w+(?:\.\w+)?|on_input"),
        ("VeRA", r"vera_lambda_\w+"),
        ("a LoRA with a Tucker core", r"lora_mid(?:\.\w+)?"),
        ("a LoRA with biases", rf"lora_(?:[AaBb]|down|up){_ADAPTER}\.bias"),
        ("a LoRA of embeddings", r"lora_embedding_[AB].*"),
        ("differences of whole weights", r"diff|diff_[bm]|set_weight|reshape_weight|[wb]_norm"),
        ("a quantized LoRA", r"scale_weight|weight_scale|scaled_fp8|comfy_quant|absmax|quant_state\W.*"),
    )
)
# Characters of a name that a sentence shows.
_SHOWN_CHARACTERS = 100


def short(name: object) -> str:
    """A name from a file, for a sentence."""
    return printable(str(name), _SHOWN_CHARACTERS)


def first_names(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return listed(names, characters=_SHOWN_CHARACTERS)


def plain(key: str) -> str:
    """A key of an official file with dots for its separators; any other key as it is."""
    return key.removeprefix(PREFIX).replace(SEPARATOR, ".") if key.startswith(PREFIX) else key


def other_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """(kind, key) of the first key that belongs to another kind of adapter than a plain LoRA."""
    return next(((kind, key) for key in keys for kind, ending in _OTHER_KINDS if ending.search(key)), None)


def other_kind_modules(keys: Iterable[str]) -> set[str]:
    """`flat` names of the modules that another kind of adapter changes."""
    found = set()
    for key in keys:
        match = next((match for _, ending in _OTHER_KINDS if (match := ending.search(key))), None)
        if match is not None:
            found.add(flat(plain(key)[: match.start() - len(key)]))
    return found


def check_kind(keys: Iterable[str], source: object) -> None:
    """Raise CheckpointError, naming the kind, unless `keys` are those of plain LoRAs."""
    if found := other_kind(keys):
        raise CheckpointError(
            f"{source} holds {short(found[1])}: a kind of LoRA that cannot be merged here ({found[0]}); "
            "give a plain LoRA"
        )


def split_key(key: str) -> tuple[str, str] | None:
    """(module without prefixes, official name of the part) of a key of a LoRA; None for a key of anything else."""
    name = plain(key)
    match = _PART.search(name)
    if match is None:
        return None
    kind = match.lastgroup or ""
    part = {"down": "lora_down.weight", "up": "lora_up.weight", "scale": "alpha_scale"}.get(kind, kind)
    if kind == "slice":
        part = f"lora_up.blocks.{int(match['slice'])}.weight"
    return bare(name[: match.start()]), part


def bare(module: str) -> str:
    """A module's name without wrappers, and without the prefixes that end in a dot."""
    return _without(_WRAPPERS.sub("", module).lstrip("."), _DOTTED)


def flat(module: str) -> str:
    """A module's name without any prefix, with "_" for every dot: what all spellings of it have in common."""
    return _without(_WRAPPERS.sub("", module).replace(".", "_"), _FLAT).removesuffix(
        "_0" if module.endswith("to_out.0") else ""
    )


def _without(name: str, prefixes: tuple[str, ...]) -> str:
    while prefix := next((prefix for prefix in prefixes if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def prefix_of(modules: Iterable[str], known: Container[str], source: object) -> str:
    """The prefix in dots under which `modules` have `flat` names that are known; "" for none.

    Raises CheckpointError for several, because any of these may be meant.
    """
    found: dict[str, None] = {}
    for module in modules:
        pieces = module.rsplit(".", _DEEPEST)
        for i in range(1, len(pieces)):
            if flat(".".join(pieces[i:])) in known:
                found[".".join(pieces[:i]) + "."] = None
                break
    if len(found) > 1:
        raise CheckpointError(f"{source} holds LoRAs under {first_names(list(found))}; give a file with one LoRA")
    return next(iter(found), "")


def targets_by_flat_name(depth: int) -> dict[str, tuple[str, int, int]]:
    """`formats.targets` by the `flat` names of modules."""
    return {flat(name): target for name, target in targets(depth).items()}
