"""A policy for tests of GRPO: a random 2-layer Llama over 28 one-letter words, its tokenizer, its LoRA. No files."""

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS = 0, 1
WORDS = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"]  # token 2 is "a", 3 is "b" …


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of 28 one-letter words, without a file."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def tiny_model() -> LlamaForCausalLM:
    """Build a random Llama of 2 layers and 32 channels, the same at every call."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # ten times Llama's: log-probabilities that differ from token to token
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def tiny_lora() -> LoraConfig:
    """LoRA on all linear layers, the head left out, as TRL demands."""
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def word_ids(text: str) -> list[int]:
    """Translate words to token ids."""
    return [WORDS.index(word) for word in text.split()]
