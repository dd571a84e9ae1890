"""Tiny text encoders and tokenizers with random weights, in the layouts of pipelines: T5 alone, or two CLIPs and T5."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)  # fmt: skip

from zoo.pipelines import Family, flux, pixart_sigma, randomized, sana, sd3, wan

WORDS = ("a", "an", "bold", "thin", "red", "blue", "green", "on", "over", "letter", "A", "B", "C", "of")
PROMPTS = ("a bold red A on blue", "a thin green B over red", "letter C")


def tokenizer(length: int, begins: bool) -> PreTrainedTokenizerFast:
    """Words and single characters; a text ends with </s>, and begins with <s> as CLIP's does."""
    marks = ["<pad>", "</s>", "<unk>", "<s>"]
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*marks, *WORDS, *characters]))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    template = "<s> $A </s>" if begins else "$A </s>"
    made.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 3), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def t5(width: int, seed: int = 0) -> T5EncoderModel:
    config = T5Config(
        vocab_size=128, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )  # fmt: skip
    return randomized(T5EncoderModel(config), seed)


def clip(width: int, projected: int, seed: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=128, hidden_size=width, intermediate_size=32, projection_dim=projected, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=12, eos_token_id=1, bos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return randomized(CLIPTextModelWithProjection(config), seed)


def without_embeddings(arguments: dict[str, Any]) -> dict[str, Any]:
    """What remains of a call if prompts come as text."""
    return {name: value for name, value in arguments.items() if "prompt" not in name}


def pixart_with_t5() -> Family:
    pipeline, arguments = pixart_sigma()
    pipeline.register_modules(tokenizer=tokenizer(64, begins=False), text_encoder=t5(24))
    return pipeline, {**without_embeddings(arguments), "max_sequence_length": 10, "negative_prompt": ""}


def sd3_with_clip() -> Family:
    """CLIP's states are filled up with zeros to T5's width, and stand before T5's."""
    pipeline, arguments = sd3()
    pipeline.register_modules(
        tokenizer=tokenizer(12, begins=True), tokenizer_2=tokenizer(12, begins=True), tokenizer_3=tokenizer(64, False),
        text_encoder=clip(12, 12, seed=1), text_encoder_2=clip(16, 12, seed=2), text_encoder_3=t5(32, seed=3),
    )  # fmt: skip
    pipeline.tokenizer_max_length = 12
    return pipeline, {**without_embeddings(arguments), "max_sequence_length": 9}


def flux_with_clip() -> Family:
    """CLIP's pooled state alone, and T5's states."""
    pipeline, arguments = flux()
    config = CLIPTextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, eos_token_id=1, bos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    pipeline.register_modules(
        tokenizer=tokenizer(12, begins=True), tokenizer_2=tokenizer(64, begins=False),
        text_encoder=randomized(CLIPTextModel(config)), text_encoder_2=t5(32),
    )  # fmt: skip
    pipeline.tokenizer_max_length = 12
    return pipeline, {**without_embeddings(arguments), "max_sequence_length": 9}


def sana_with_gemma() -> Family:
    """An instruction stands before each prompt; of its tokens the states of the first one remain."""
    pipeline, arguments = sana()
    config = Gemma2Config(
        vocab_size=128, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    pipeline.register_modules(tokenizer=tokenizer(64, begins=True), text_encoder=randomized(Gemma2Model(config)))
    instruction = ["Given a letter", "on blue: "]
    return pipeline, {
        **without_embeddings(arguments), "max_sequence_length": 9, "complex_human_instruction": instruction
    }  # fmt: skip


def wan_with_umt5() -> Family:
    """States of padding are replaced by zeros."""
    pipeline, arguments = wan()
    config = UMT5Config(vocab_size=128, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    pipeline.register_modules(tokenizer=tokenizer(64, begins=False), text_encoder=randomized(UMT5EncoderModel(config)))
    return pipeline, {**without_embeddings(arguments), "max_sequence_length": 9}


OTHERS = {"flux": flux_with_clip, "sana": sana_with_gemma, "wan": wan_with_umt5}  # their encoders are tested alone
TEXTS = {"pixart-sigma": pixart_with_t5, "sd3": sd3_with_clip}
