"""What a LoRA's header, or PEFT's config beside it, states about its alpha and rank.

Trainers have no common key, so that any value counts that is clear: JSON with PEFT's fields, with an alpha and a rank,
or with alphas of modules; and plain numbers under a key that ends in `alpha`. What looks like an alpha and cannot be
read is noted by its key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.records import parse_record
from .lora_names import flat, short

REMEDY = "get the LoRA again, or give a file without it"
# Keys of a header that hold a PEFT config as JSON and nothing else; under any other key it is recognized by its fields.
_CONFIGS = ("lora_adapter_metadata", "lora_config", "peft_config", "adapter_config", "adapter_config.json")
# Names of alpha and rank in lower case without "_", after any part that ends in a dot. The first one counts.
_ALPHAS = ("loraalpha", "networkalpha", "alpha", "ssnetworkalpha")
_RANKS = ("r", "rank", "lorarank", "loradim", "networkrank", "networkdim", "ssnetworkdim")
_FIELDS = ("r", "lora_alpha", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern")
# kohya writes these for LoRAs whose layers differ.
_NOTHING = ("", "none", "null", "dynamic")
_MENTION = re.compile(r"(?:\b|_)(?:lora|network)_?alphas?(?![a-z])", re.I)
_OF_MODULES = ("alphas", "loraalphas", "networkalphas")
_NUMBER = re.compile(r"[+-]?(?:\d{1,40}\.?\d{0,40}|\.\d{1,40})(?:e[+-]?\d{1,3})?|[+-]?inf(?:inity)?|nan", re.I | re.A)
_ALONE = re.compile(r'\s*(\[\s*)?"?([^\s"\[\]]{1,100})"?(?(1)\s*\])\s*')
# A module of a block with its alpha.
_MODULE = re.compile(r".*[._]\d+[._].+\.(?:lora_|network_)?alpha")
_ENDING = re.compile(r"\.(?:lora_|network_)?alpha$")
# Parts of a pipeline that are not the network.
_OTHER_PARTS = ("text_encoder", "vae", "tokenizer")
# A pattern is a regular expression of the file's writer. Bounded, because some take exponential time.
_MAX_PATTERNS, _MAX_PATTERN, _MAX_REPEATS = 10_000, 200, 2
_LITERAL = re.compile(r"[\w.]+")
_NESTED = re.compile(r"\)[*+?{]|\(\?|\\[1-9]")


@dataclass(frozen=True)
class PeftConfig:
    """What decides the scale in a PEFT config; every field may be missing or null."""

    r: int | None = None
    lora_alpha: float | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    alpha_pattern: dict[str, float] | None = None
    rank_pattern: dict[str, int] | None = None


@dataclass(frozen=True)
class Stated:
    """What one place outside the tensors says about alpha and rank. place: for sentences. modules: `flat` name of a
    module -> its alpha."""

    place: str
    config: PeftConfig
    modules: dict[str, float] = field(default_factory=dict)

    def alpha(self, module: str) -> float | None:
        """The alpha of a module; None if the place says nothing about it."""
        found = self.modules.get(flat(module)) if self.modules else None
        found = _of_pattern(self.config.alpha_pattern, module, self.place) if found is None else found
        return self.config.lora_alpha if found is None else found

    @property
    def speaks(self) -> bool:
        """Whether it says anything about an alpha."""
        return self.config.lora_alpha is not None or bool(self.config.alpha_pattern or self.modules)

    def scale(self, alpha: float, rank: int) -> float:
        """The scale of a module of this rank."""
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank) if rank else 0.0

    def rank(self, module: str) -> int | None:
        """The rank of a module; None if the place says nothing about it."""
        found: int | None = _of_pattern(self.config.rank_pattern, module, self.place)
        return self.config.r if found is None else found


def config_of(content: Mapping[str, Any], place: str) -> PeftConfig:
    """The PEFT config of the network in a JSON object. Raises CheckpointError for a field of another type."""

    def wrong(name: str, value: object, want: str) -> CheckpointError:
        return CheckpointError(f"{place} is not a PEFT config ({name}: {short(repr(value))} is not {want}); {REMEDY}")

    def number(name: str, value: object) -> float | None:
        found = value if value is None else _number(value)
        if found is None and value is not None and not _says_nothing(value):
            raise wrong(name, value, "a finite number")
        return found

    def whole(name: str, value: object) -> int | None:
        found = number(name, value)
        if found is not None and (not found.is_integer() or found < 0):
            raise wrong(name, value, "a whole number")
        return None if found is None else int(found)

    def truth(name: str) -> bool | None:
        value = fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise wrong(name, value, "a valid boolean, true or false")
        return value

    def items(name: str) -> Mapping[str, object]:
        value = fields.get(name)
        if value is not None and not isinstance(value, dict):
            raise wrong(name, value, "an object")
        return value or {}

    fields = _of_network(content)
    alphas = {key: number(f"alpha_pattern.{key}", value) for key, value in items("alpha_pattern").items()}
    ranks = {key: whole(f"rank_pattern.{key}", value) for key, value in items("rank_pattern").items()}
    return PeftConfig(
        whole("r", fields.get("r")),
        number("lora_alpha", fields.get("lora_alpha")),
        truth("use_rslora"),
        truth("use_dora"),
        {key: value for key, value in alphas.items() if value is not None},
        {key: value for key, value in ranks.items() if value is not None},
    )


def in_header(
    path: str | Path, metadata: Mapping[str, str], kohya_names: bool, notes: list[str], unread: list[str]
) -> list[Stated]:
    """What the header of the file at `path` states, the place that counts first; adds to `notes` and `unread`.

    kohya_names: whether parts are called lora_down and lora_up. unread: sentences about what seems to be an alpha.
    Raises CheckpointError for a place that cannot be read.
    """
    # kohya's programs hash what they write and keep an alpha for each layer. Converters to PEFT's names drop these
    # alphas, after they multiplied the matrices by them.
    converted = "sshs_model_hash" in metadata and not kohya_names
    found: list[Stated] = []
    dropped = False
    for key in sorted(metadata, key=_order):
        place, text = f"{short(key)} in the header of {path}", metadata[key]
        if key in ("use_rslora", "alpha_pattern") and text.strip().lower() not in ("false", "{}", *_NOTHING):
            notes.append(f"{place} changes the scale and is read in a PEFT config only; give another strength")
        stated = _stated(key, text, place)
        if stated is None:
            named = _name(key) in (*_ALPHAS, *_OF_MODULES) or _MENTION.search(key) or _MENTION.search(text)
            if named and not key.startswith(_OTHER_PARTS) and not _says_nothing(text):
                unread.append(f"{place} seems to hold an alpha and cannot be read; the LoRA counts without it")
        elif key.startswith("ss_") and converted:
            dropped |= stated.speaks
        elif _MODULE.fullmatch(key) and found and found[-1].modules:
            # Keys of modules are one place.
            found[-1].modules.update(stated.modules)
        else:
            found.append(stated)
    if dropped:
        notes.append(
            f"{path} was converted from kohya's names; it counts at scale 1, because converters put alpha into the "
            "matrices; give another strength if this one did not"
        )
    return found


def _order(key: str) -> tuple[int, str]:
    """PEFT configs come before alphas, and kohya's values last."""
    alpha = _ALPHAS.index(_name(key)) if _name(key) in _ALPHAS else len(_ALPHAS)
    return (-1 if key in _CONFIGS else alpha + key.startswith("ss_")), key


def _name(key: str) -> str:
    return re.split(r"[.:/]", key)[-1].replace("_", "").lower()


def _stated(key: str, text: str, place: str) -> Stated | None:
    """What one value of a header states; None for a value about something else, or one that cannot be read."""
    name, object_ = _name(key), text.lstrip()[:1] == "{"
    if key.startswith(_OTHER_PARTS) or (key.startswith("ss_") and name not in (*_ALPHAS, *_RANKS, "ssnetworkargs")):
        return None
    if key in _CONFIGS or object_:
        try:
            content = parse_record(text, dict[str, Any], place, "a PEFT config", REMEDY, CheckpointError)
        except CheckpointError:
            if key in _CONFIGS:
                raise
            return None
        modules: dict[str, Any] = {}
        if name in _OF_MODULES or any(map(_MODULE.fullmatch, content)):
            modules = {item: value for item, value in content.items() if name in _OF_MODULES or _ENDING.search(item)}
        alphas: dict[str, float] = {}
        for item, value in modules.items():
            if (alpha := _number(value)) is None:
                raise CheckpointError(f"{place} has a broken alpha for {short(item)}, not a finite number; {REMEDY}")
            alphas[flat(_ENDING.sub("", item))] = alpha
        content = {item: value for item, value in content.items() if item not in modules}
        known = key in _CONFIGS or name == "ssnetworkargs" or _is_config(content)
        config = config_of(content, place) if known else PeftConfig()
        return Stated(place, config, alphas) if known or alphas else None
    if name in _ALPHAS:
        if (value := _number(text)) is None:
            if _NUMBER.fullmatch(text.strip()):
                raise CheckpointError(f"{place} is {short(text)}, not a number to scale by; {REMEDY}")
            return None
        if _MODULE.fullmatch(key):
            return Stated(place, PeftConfig(), {flat(_ENDING.sub("", key)): value})
        return Stated(place, PeftConfig(lora_alpha=value))
    if name in _RANKS and (value := _number(text)) is not None and value.is_integer() and value > 0:
        return Stated(place, PeftConfig(r=int(value)))
    return None


def _is_config(content: Mapping[str, Any]) -> bool:
    """Whether a JSON object is about a LoRA: PEFT's own words, or an alpha beside a rank."""
    named = {key.rpartition(".")[2] for key in content}.union(*(v for v in content.values() if isinstance(v, dict)))
    return bool(named & {"lora_alpha", "network_alpha", "alpha_pattern"}) or {"lora_alpha", "r"} <= set(
        _of_network(content)
    )


def _number(value: object) -> float | None:
    """A finite number, as such, as text, or alone in a list; None for anything else."""
    if isinstance(value, str):
        match = _ALONE.fullmatch(value)
        value = float(match[2]) if match and _NUMBER.fullmatch(match[2]) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _says_nothing(value: object) -> bool:
    return isinstance(value, str) and value.strip().lower() in _NOTHING


def _of_network(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a PEFT config that belong to the network, of names such as `transformer.lora_alpha`."""
    raw: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        part, _, name = key.rpartition(".")
        if isinstance(value, dict) and name not in _FIELDS:
            raw.setdefault(key, {}).update(value)
        else:
            raw.setdefault(part, {})[name] = value
    parts = {part: _named(fields) for part, fields in raw.items()}
    networks = [part for part, fields in parts.items() if fields and not part.startswith(_OTHER_PARTS)]
    chosen = next((part for part in ("transformer", "") if part in networks), networks[0] if networks else None)
    return parts[chosen] if chosen is not None else {}


def _named(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a PEFT config under PEFT's names, and else under those that other trainers have for them."""
    found = {name: content[name] for name in _FIELDS if name in content}
    for field_name, others in (("lora_alpha", _ALPHAS), ("r", _RANKS)):
        for name, value in content.items():
            if _name(name) in others:
                found.setdefault(field_name, value)
    return found


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, place: str) -> Any:
    """The value of the first pattern that matches a module: PEFT's rule, the module's name or the end of it."""
    if not pattern:
        return None
    if len(pattern) > _MAX_PATTERNS:
        raise CheckpointError(f"{place} has more than {_MAX_PATTERNS:,} patterns; {REMEDY}")
    name = flat(module)
    for key, value in pattern.items():
        if _LITERAL.fullmatch(key):
            if f"_{name}".endswith(f"_{flat(key)}"):
                return value
            continue
        repeats = sum(key.count(sign) for sign in "*+?{")
        if len(key) > _MAX_PATTERN or repeats > _MAX_REPEATS or _NESTED.search(key):
            raise CheckpointError(f"{place} has a pattern that is too complex ({short(key)}); {REMEDY}")
        try:
            if re.match(rf"(?:.*\.)?(?:{key})$", module):
                return value
        except re.error as error:
            raise CheckpointError(f"{place} has a broken pattern ({short(key)}: {error}); {REMEDY}") from error
    return None
