"""How to denoise: the sampler's settings, from generation_config.json or a .gguf's diffusion.* keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import read_json
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.fields import Fields

GENERATION_CONFIG = "generation_config.json"
# A bare .gguf names one end-of-sequence token; these end a turn and hand over to a tool, and end an answer too.
GGUF_END_TOKENS = ("<turn|>", "<|tool_response>")


@dataclass(frozen=True)
class SamplerConfig:
    """Entropy-bound denoising of one canvas. The defaults are the released checkpoint's (and transformers').

    With n steps left of `steps`, logits are divided by t_min + (t_max - t_min) * n / steps. entropy_bound and
    confidence are in nats; stability counts steps (0 = don't ask for stability). confidence 0: no early stop, every
    canvas takes all steps.
    """

    steps: int = 48
    t_min: float = 0.4
    t_max: float = 0.8
    entropy_bound: float = 0.1
    stability: int = 1
    confidence: float = 0.005


@dataclass(frozen=True)
class GenerationConfig:
    """The sampler, and what surrounds it: which ids end an answer, which fills a finished row."""

    sampler: SamplerConfig
    eos_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int = 256

    @classmethod
    def from_file(cls, path: Path, config: ModelConfig) -> GenerationConfig:
        """Read generation_config.json; every absent key, and an absent file, takes its default.

        EOS and pad fall back to config.json's (note: the released config.json knows 2 of the 3 EOS ids).
        """
        there = path.exists() or path.is_symlink()  # a link that leads nowhere is a broken download, not an absent file
        return cls.from_json(read_json(path) if there else {}, config, str(path))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], config: ModelConfig, source: str) -> GenerationConfig:
        fields, default = Fields(raw, source), SamplerConfig()
        bound = fields.section("sampler_config", {"entropy_bound": default.entropy_bound})
        bound.expect("_cls_name", "EntropyBoundSamplerConfig")
        sampler = SamplerConfig(
            steps=fields.count("max_denoising_steps", default.steps),
            t_min=fields.not_negative("t_min", default.t_min),
            t_max=fields.positive("t_max", default.t_max),
            entropy_bound=bound.positive("entropy_bound"),
            stability=fields.get("stability_threshold", int, default.stability),
            confidence=fields.not_negative("confidence_threshold", default.confidence),
        )
        eos = fields.ids("eos_token_id") or config.eos_ids
        pad = fields.get("pad_token_id", int, config.pad_id)
        return _checked(cls(sampler, eos, pad, fields.count("max_new_tokens", 256)), config, source)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], config: ModelConfig, source: str) -> GenerationConfig:
        """The diffusion.eb_* keys, each of which may be absent. Values are float32 there: 0.4 reads 0.4000000059604645.

        EOS is the metadata's one id and GGUF_END_TOKENS, as far as the vocabulary has them.
        """
        fields, default = Fields(metadata, source, prefix="diffusion."), SamplerConfig()
        sampler = SamplerConfig(
            steps=fields.count("eb_max_steps", default.steps),
            t_min=fields.not_negative("eb_t_min", default.t_min),
            t_max=fields.positive("eb_t_max", default.t_max),
            entropy_bound=fields.positive("eb_entropy_bound", default.entropy_bound),
            stability=fields.get("eb_stability_threshold", int, default.stability),
            confidence=fields.not_negative("eb_confidence_threshold", default.confidence),
        )
        tokens = metadata["tokenizer.ggml.tokens"]
        more = [tokens.index(token) for token in GGUF_END_TOKENS if token in tokens]
        eos = tuple(dict.fromkeys((*config.eos_ids, *more)))
        return _checked(cls(sampler, eos, config.pad_id, config.canvas), config, source)


def sampler_notices(path: Path, generation: GenerationConfig) -> tuple[str, ...]:
    """A line for each unusual thing about how the model at `path`, a directory or a .gguf, is sampled."""
    steps, lines = generation.sampler.steps, []
    if path.is_dir() and not (path / GENERATION_CONFIG).is_file():
        lines.append(f"no {GENERATION_CONFIG}: the released model's sampler is used, {steps} steps at most")
    if generation.sampler.confidence == 0:
        early = f"no early stop, every canvas takes all {steps} steps"
        lines.append(f"confidence_threshold is 0: {early} (transformers refuses such a {GENERATION_CONFIG})")
    return tuple(lines)


def _checked(generation: GenerationConfig, config: ModelConfig, source: str) -> GenerationConfig:
    sampler = generation.sampler
    if sampler.t_max <= sampler.t_min:
        raise InputError(f"{source}: t_max {sampler.t_max} is not above t_min {sampler.t_min}")
    if not 0 <= sampler.stability <= 10_000:
        raise InputError(f"{source}: stability_threshold is {sampler.stability}, expected 0 to 10,000")
    for key, ids in (("eos_token_id", generation.eos_ids), ("pad_token_id", (generation.pad_id,))):
        for token in ids:
            if not 0 <= token < config.vocab:
                raise InputError(f"{source}: {key} {token} is outside the vocabulary of {config.vocab}")
    return generation
